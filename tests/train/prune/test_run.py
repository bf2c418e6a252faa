"""`python -m train.prune` from end to end: schedules, scores, structures, delivered files, resuming, refusals."""

import json
import signal
import time
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from resnet_jax.layers import CifarStem
from resnet_jax.masks import apply_masks, full_masks
from resnet_jax.parallel import make_mesh
from resnet_jax.resnet import MODELS, BasicBlock, ResNet
from resnet_jax.tree import count, is_kernel, leaves
from tests.train.test_run import Interrupted
from train import session as session_module
from train.__main__ import main as train_main
from train.checkpoint import Checkpoints
from train.config import TrainConfig
from train.from_config import load_data
from train.predict import load as load_predict
from train.prune.__main__ import main
from train.prune.sparse_file import load_sparse, save_sparse
from train.report import main as report_main
from train.run_folder import load_state, read_config
from train.state import init_variables
from train.weights import load_masks

# Two stages of one block for 8x8 digits.
TWO_BLOCKS = partial(ResNet, (1, 1), BasicBlock, stem=CifarStem)
NETWORK = ["--model", "two_blocks", "--width", "16"]
ALIKE = ["--batch", "64", "--eval-every", "100", "--log-every", "1"]
LAYERS = [
    "stage1_block1/conv1/kernel",
    "stage1_block1/conv2/kernel",
    "stage2_block1/conv1/kernel",
    "stage2_block1/conv2/kernel",
    "stage2_block1/shortcut/conv/kernel",
]

# 8 steps, by the recipe of the training after pruning or by that of the dense run.
EIGHT, SCRATCH = ("--prune.epochs", "0.4"), ("--steps", "8")
TO_80 = ("--prune.sparsity", "0.8")
DATES = ("--prune.every", "2", "--prune.end", "0.9")
ONE_SHOT = ("--prune.schedule", "one_shot")
AT_ONCE = (*ONE_SHOT, *EIGHT)
GRADUAL = ("--prune.schedule", "gradual", *DATES, *EIGHT, *TO_80)
ITERATIVE = ("--prune.schedule", "iterative", "--prune.levels", "2", "--prune.restart")
CHANNELS = (
    *AT_ONCE, "--prune.structure", "channels", "--prune.score", "norm_scale", "--prune.scope", "uniform",
    "--prune.sparsity", "0.5", "--prune.recalibrate"
)  # fmt: skip


class Start(NamedTuple):
    """What a training started from: the step, arrays by path, the place in the data."""

    step: int
    params: dict[str, np.ndarray]
    masks: dict[str, np.ndarray]
    position: Any


class Pruned(NamedTuple):
    """A run of pruning, and where each training in it started."""

    out: Path
    result: dict[str, Any]
    starts: list[Start]


def flat(tree):
    return {path: np.array(leaf) for path, leaf in leaves(tree).items()}


@pytest.fixture(scope="module", autouse=True)
def small(tfds_dir):
    """Runs of this process are on one of its devices, and may be of the smaller network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "two_blocks", TWO_BLOCKS)
        patch.setattr(session_module, "make_mesh", lambda: make_mesh(jax.devices()[:1]))
        # All of them read the same images, once.
        read = session_module.read_data
        images = {}

        def read_once(config, dataset):
            if not images:
                images["digits"] = read(config, dataset)
            return images["digits"]

        patch.setattr(session_module, "read_data", read_once)
        yield


@pytest.fixture(scope="module")
def dense(small, tmp_path_factory):
    """The folder of the dense run that all others prune: two epochs."""
    out = tmp_path_factory.mktemp("dense") / "run"
    train_main(["digits", *NETWORK, "--steps", "40", "--optim.warmup-epochs", "0.5", *ALIKE, "--out", str(out)])
    return out


def prune(*arguments):
    """Run it in this process; `--out` comes last."""
    starts = []

    def noting(step, state, data, **options):
        starts.append(Start(int(state.step), flat(state.params), flat(state.masks), data.state()))
        return fit(step, state, data, **options)

    fit = session_module.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session_module, "fit", noting)
        main([str(a) for a in arguments])
    out = Path(arguments[-1])
    return Pruned(out, json.loads((out / "result.json").read_text()), starts)


@pytest.fixture(scope="module")
def pruned(dense, tmp_path_factory) -> Callable[..., Pruned]:
    """`pruned(*GRADUAL)` prunes the dense run like this, once."""
    made: dict[tuple[str, ...], Pruned] = {}

    def prune_dense(*more):
        if more not in made:
            made[more] = prune(dense, *more, "--out", tmp_path_factory.mktemp("pruned") / "run")
        return made[more]

    return prune_dense


@cache
def state_of(run):
    """The final state of a run, read once; runs that are asked for are finished."""
    return load_state(run)


def masks_of(run):
    """The masks of what can be pruned, by path."""
    return {path: mask for path, mask in flat(state_of(Path(run)).masks).items() if mask.ndim}


def kept_in(masks):
    return sum(int(mask.sum()) for mask in masks.values())


def rows_of(out, name):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [round(row[name], 6) for row in rows if name in row]


def assert_same(a, b):
    assert list(a) == list(b)
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def assert_pruned(out, result, share, *, slack=0):
    """This share is pruned, to the weight; what is pruned is zero; the sparse file has the same weights and masks."""
    state, masks = state_of(out), masks_of(out)
    assert sorted(masks) == LAYERS
    size = sum(mask.size for mask in masks.values())
    assert abs(kept_in(masks) - (size - round(share * size))) <= slack
    assert result["sparsity"] == pytest.approx(1 - kept_in(masks) / size, abs=1e-6)
    assert_same(flat(state.params), flat(apply_masks(state.params, state.masks)))
    variables, saved, about = load_sparse(Path(result["pruned_file"]))
    assert_same(flat(saved), flat(state.masks))
    config, _ = read_config(out, TrainConfig)
    classes = json.dumps([str(digit) for digit in range(10)])
    assert about == {"model": "two_blocks", "widths": json.dumps(config.widths), "classes": classes}
    if "file_accuracy" not in result:  # not int8
        assert_same(flat(variables), flat(state.variables))
    return masks


# ---- the command line ------------------------------------------------------------------------------------------------


def by_command(out, *more):
    small = ["--model", "resnet8", "--width", "8", "--batch", "64", "--steps", "40", "--eval-every", "1"]
    return ["digits_prune", *small, "--prune.epochs", "1", "--prune.every", "4", *more, "--out", str(out)]


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """(completed process, folder) of the default preset, scaled down, through the real command line."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return command("train.prune", *by_command(out)), out


@pytest.mark.slow
def test_run_leaves_what_it_promises(finished):
    done, out = finished
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((out / "result.json").read_text())
    assert (result["preset"], result["steps"], result["epochs"]) == ("digits_prune", 20, 0.99)
    masks = masks_of(out)
    size = sum(mask.size for mask in masks.values())
    assert kept_in(masks) == size - round(0.9 * size)
    assert result["sparsity"] == pytest.approx(1 - kept_in(masks) / size, abs=1e-6)
    assert result["pruned_bytes"] == Path(result["pruned_file"]).stat().st_size < result["dense_gzip_bytes"]
    assert result["dense_bytes"] > 4 * result["parameters"] > 5 * result["pruned_bytes"]
    assert result["pruned_file"] == str(out / "sparse.safetensors")
    assert result["pruned_accuracy"] == result["test_accuracy"] > 0.1

    dense = json.loads((out / "dense" / "result.json").read_text())
    assert (dense["steps"], dense["epochs"], dense["test_accuracy"]) == (40, 1.98, result["dense_accuracy"])
    assert not any(mask.ndim for mask in flat(state_of(out / "dense").masks).values())
    for said in ("training the dense network in", "pruning to 90.0% (gradual)", "accuracy on test: dense "):
        assert said in done.stderr
    start = json.loads((out / "start.json").read_text())
    assert start["sparsity"] == 0
    assert start["validation_accuracy_before_pruning"] == start["validation_accuracy_before_training"]


@pytest.mark.slow
def test_finished_run_only_says_its_result(finished, fails, capsys):
    done, out = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    main(by_command(out))
    assert capsys.readouterr().out == done.stdout.splitlines()[-1] + "\n"
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    line = fails(2, main, by_command(out, "--prune.sparsity", "0.8", "--prune.score", "random"))
    assert "different settings (prune.sparsity 0.9 -> 0.8, prune.score magnitude -> random); choose a different" in line


@pytest.mark.slow
def test_killed_it_ends_bit_equal(finished, command, tmp_path):
    """SIGKILL in the pruning: the second start ends where the uninterrupted run did."""
    out = tmp_path / "killed"
    process = command("train.prune", *by_command(out, "--save-steps", 2), start=True)
    deadline = time.monotonic() + 120
    while not any(p.name.isdigit() for p in (out / "checkpoints").glob("*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    second = command("train.prune", *by_command(out, "--save-steps", 2))
    assert second.returncode == 0, second.stderr
    assert "resuming from step" in second.stderr
    result, whole = json.loads(second.stdout.splitlines()[-1]), json.loads(finished[0].stdout.splitlines()[-1])
    for name in ("params_digest", "test_loss", "sparsity", "dense_accuracy", "pruned_bytes"):
        assert result[name] == whole[name]


# ---- schedules -------------------------------------------------------------------------------------------------------


def test_pruned_at_once(pruned, dense):
    """The smallest weights of all layers go, and training starts from the others."""
    out, result, [start] = pruned(*AT_ONCE, *TO_80)
    masks, before = assert_pruned(out, result, 0.8), flat(state_of(dense).params)
    assert_same({path: start.masks[path] for path in masks}, masks)
    assert smallest_go(before, masks, {path: np.ones_like(mask) for path, mask in masks.items()})
    measured = json.loads((out / "start.json").read_text())
    assert measured["sparsity"] == pytest.approx(result["sparsity"])
    assert measured["validation_accuracy_before_pruning"] > measured["validation_accuracy_before_training"]
    assert result["dense_accuracy"] > result["pruned_accuracy"]


def test_gradually(pruned):
    out, result, [start] = pruned(*GRADUAL)
    assert_pruned(out, result, 0.8)
    assert all(mask.all() for mask in start.masks.values())
    shares = rows_of(out, "sparsity")
    assert shares == sorted(shares) and shares[0] == 0
    # Every second step, and for the last time at round(0.9 * 8).
    changes = [step for step, (a, b) in enumerate(zip([0, *shares], shares, strict=False), start=1) if a != b]
    assert changes == [2, 4, 6, 7]
    assert shares[-1] == pytest.approx(result["sparsity"], abs=1e-6)
    np.testing.assert_allclose(shares[1], 0.8 - 0.8 * (5 / 7) ** 3, atol=1e-4)


@pytest.mark.slow
def test_alternating(pruned):
    out, result, _ = pruned("--prune.schedule", "acdc", *DATES, *EIGHT, *TO_80)
    assert_pruned(out, result, 0.8)
    np.testing.assert_allclose(rows_of(out, "sparsity"), np.float32([0.8, 0.8, 0, 0, 0.8, 0.8, 0.8, 0.8]), atol=1e-4)


@pytest.mark.parametrize("schedule", ["rigl", pytest.param("set", marks=pytest.mark.slow)])
def test_weights_that_move(pruned, schedule):
    out, result, [start] = pruned("--prune.schedule", schedule, "--prune.scope", "erk", *DATES, *EIGHT, *TO_80)
    masks = assert_pruned(out, result, 0.8, slack=len(LAYERS))
    moved = {path: int((mask & ~start.masks[path]).sum()) for path, mask in masks.items()}
    assert all(mask.sum() == start.masks[path].sum() for path, mask in masks.items())
    assert all(0 < moved[path] < mask.sum() for path, mask in masks.items() if not mask.all())
    np.testing.assert_allclose(rows_of(out, "sparsity"), result["sparsity"], atol=1e-6)


def levels_of(run):
    """The states that the two levels of a run of `iterative` ended in, with its masks checked."""
    share = 1 - 0.2**0.5
    first, last = run.out / "level1", run.out
    before = assert_pruned(first, json.loads((first / "result.json").read_text()), share)
    after = assert_pruned(last, run.result, 0.8)
    assert all(not (after[path] & ~before[path]).any() for path in after)
    return state_of(first), state_of(last)


def smallest_go(weights, masks, before):
    """Whether the masks keep the largest of these weights among those of the masks before."""
    kept = [np.abs(weights[path][masks[path]]) for path in LAYERS]
    gone = [np.abs(weights[path][before[path] & ~masks[path]]) for path in LAYERS]
    return np.concatenate(gone).max() <= np.concatenate(kept).min()


def test_levels_that_rewind(small, tmp_path):
    """Each level starts from the dense run's weights of step 3, and goes on in the data from there."""
    keep = ["--save-steps", "3", "--keep-last", "9", "--prune.rewind-epochs", "0.15"]
    run = prune(*NETWORK, *ALIKE, *SCRATCH, *keep, *TO_80, *ITERATIVE, "rewind", "--out", tmp_path / "run")
    first, _ = levels_of(run)
    dense = state_of(run.out / "dense")
    saved, position = Checkpoints(run.out / "dense" / "checkpoints", writes=False).read(step=3)
    assert [start.step for start in run.starts] == [0, 3, 3]
    for start in run.starts[1:]:
        assert start.position == position != run.starts[0].position
        assert_same(start.params, {path: w * start.masks[path] for path, w in flat(saved["params"]).items()})
    everything = {path: np.ones_like(mask) for path, mask in run.starts[1].masks.items()}
    assert smallest_go(flat(dense.params), run.starts[1].masks, everything)
    assert smallest_go(flat(first.params), run.starts[2].masks, run.starts[1].masks)


@pytest.mark.slow
def test_levels_from_other_weights(dense, tmp_path):
    """Each level starts from the same fresh weights, which are not those that the dense run started from."""
    run = prune(dense, *SCRATCH, *TO_80, *ITERATIVE, "reinit", "--out", tmp_path / "run")
    levels_of(run)
    first, second = run.starts
    assert first.step == second.step == 0 and first.position == second.position
    assert_same(second.params, {path: w * second.masks[path] for path, w in first.params.items()})
    initial = dense_at_the_start()
    assert all(not np.array_equal(w, initial[path] * first.masks[path]) for path, w in first.params.items() if w.any()
               and is_kernel(path, w))  # fmt: skip


@pytest.mark.slow
def test_levels_that_go_on(pruned, dense):
    run = pruned(*ITERATIVE, "finetune", *EIGHT, *TO_80)
    first, _ = levels_of(run)
    for start, before in zip(run.starts, (state_of(dense), first), strict=True):
        assert start.step == 0
        assert_same(start.params, {path: w * start.masks[path] for path, w in flat(before.params).items()})


def dense_at_the_start():
    """The weights that a run of seed 0 starts from."""
    model, key = TWO_BLOCKS(num_classes=10, width=16), jax.random.split(jax.random.key(0))[0]
    return flat(init_variables(model, key, (8, 8, 1))["params"])


def test_pruned_before_training(dense, tmp_path):
    """SNIP at the start: random weights by the dense run's recipe, with masks from gradients."""
    more = [*ONE_SHOT, *SCRATCH, *TO_80, "--prune.start", "random", "--prune.score", "snip"]
    out, result, [start] = prune(dense, *more, "--out", tmp_path / "run")
    assert_pruned(out, result, 0.8)
    assert result["steps"] == 8
    assert_same(start.params, {path: w * start.masks[path] for path, w in dense_at_the_start().items()})


# ---- scores, scopes, structures --------------------------------------------------------------------------------------

RANKED = {
    "random, uniform": ("--prune.score", "random", "--prune.scope", "uniform"),
    "snip, erk": ("--prune.score", "snip", "--prune.scope", "erk"),
    "taylor, lamp": ("--prune.score", "taylor", "--prune.scope", "lamp"),
    "fisher": ("--prune.score", "fisher", "--prune.batches", "1"),
    "synflow in rounds": ("--prune.score", "synflow", "--prune.rounds", "3", "--prune.recalibrate"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", RANKED)
def test_scores_and_scopes(pruned, case):
    out, result, _ = pruned(*AT_ONCE, *TO_80, *RANKED[case])
    masks = assert_pruned(out, result, 0.8, slack=len(LAYERS) if "," in case else 0)
    if "uniform" in case:
        assert all(mask.sum() == mask.size - round(0.8 * mask.size) for mask in masks.values())
    others = masks_of(pruned(*AT_ONCE, *TO_80).out)
    assert any(not np.array_equal(mask, others[path]) for path, mask in masks.items())


def test_two_of_four_in_int8(pruned):
    """What the file has is 2:4 along the inputs, and off by half a step of int8 at most."""
    out, result, _ = pruned(*AT_ONCE, "--prune.structure", "2:4", "--prune.values", "int8")
    assert_pruned(out, result, 0.5)
    variables, _, _ = load_sparse(Path(result["pruned_file"]))
    found, trained = flat(variables["params"]), flat(state_of(out).params)
    for path in LAYERS:
        w = np.moveaxis(found[path], -2, -1)
        assert ((w.reshape(*w.shape[:-1], -1, 4) != 0).sum(-1) <= 2).all()
        scale = np.abs(trained[path]).max((0, 1, 2)) / 127
        assert (np.abs(found[path] - trained[path]) <= 0.501 * scale).all()
    # The file was measured too, and is not what the run ended in: nothing else says so.
    assert result["file_accuracy"] == pytest.approx(result["pruned_accuracy"], abs=0.03)
    assert result["pruned_bytes"] < result["dense_bytes"] / 4


@pytest.mark.slow
def test_blocks(pruned):
    out, result, _ = pruned(*AT_ONCE, *TO_80, "--prune.structure", "4x1")
    for mask in assert_pruned(out, result, 0.8, slack=4).values():
        blocks = np.moveaxis(mask, -2, -1).reshape(*mask.shape[:2], mask.shape[3], -1, 4)
        assert set(blocks.sum(-1).ravel()) <= {0, 4}


@pytest.mark.slow
def test_shares_of_single_layers(pruned):
    """The rest have the sparsity of all; what is excluded has no masks."""
    given = ("--prune.layers", "stage1=0.25", "shortcut=0", "--prune.exclude", "head", "block1/conv2")
    masks = masks_of(pruned(*AT_ONCE, *TO_80, *given).out)
    shares = {path: 1 - mask.mean() for path, mask in masks.items()}
    wanted = {LAYERS[0]: 0.25, LAYERS[2]: 0.8, LAYERS[4]: 0, "stem/conv/kernel": 0.8}
    assert shares == pytest.approx(wanted, abs=4e-3)


def test_masks_of_another_run(pruned):
    """A gradual run's masks on the dense weights, from its file."""
    given = pruned(*GRADUAL)
    run = pruned(*AT_ONCE, "--prune.masks", given.result["pruned_file"])
    assert_same(flat(load_masks(given.out, state_of(run.out).params)), flat(state_of(run.out).masks))
    assert_same(assert_pruned(run.out, run.result, 0.8), masks_of(given.out))


@pytest.mark.slow
def test_moving_average_and_mixup(pruned):
    """The average, which is what is used and delivered, is as sparse as the weights."""
    mixed = ("--ema", "0.9", "--augment.mixup", "0.2", "--accumulate", "2")
    out, result, _ = pruned(*GRADUAL, *mixed)
    masks, state = assert_pruned(out, result, 0.8), state_of(out)
    average = flat(state.ema["params"])
    assert all(not average[path][~mask].any() for path, mask in masks.items())
    assert not np.array_equal(average[LAYERS[0]], flat(state.params)[LAYERS[0]])
    assert result["pruned_accuracy"] > 0.1


# ---- a sparse run is a run -------------------------------------------------------------------------------------------


def digits_of(run, number=64):
    """The first validation images of a run's data, or all of them, uint8."""
    split = load_data(read_config(run, TrainConfig)[0]).validation
    return [split[i]["image"] for i in range(number or len(split))]


def test_predicts(pruned):
    run, _, _ = pruned(*GRADUAL)
    (one, *_), many = load_predict(run)(digits_of(run, 1)[0]), load_predict(run, top=1)(digits_of(run, 2))
    assert one[0] in "0123456789" and 0 < one[1] <= 1 and len(many) == 2


def fine_tune(init, out, *more):
    short = ["--steps", "6", "--optim.warmup-epochs", "0", "--optim.lr", "0.02"]
    train_main(["digits", *NETWORK, *ALIKE, *short, "--init", str(init), *more, "--out", str(out)])
    return state_of(out)


@pytest.mark.parametrize("source", ["file", pytest.param("run", marks=pytest.mark.slow)])
def test_fine_tuning_keeps_what_is_pruned(pruned, tmp_path, source):
    given = pruned(*GRADUAL)
    before = state_of(given.out)
    after = fine_tune(given.out if source == "run" else given.result["pruned_file"], tmp_path / "run")
    assert_same(flat(after.masks), flat(before.masks))
    assert_same(flat(after.params), flat(apply_masks(after.params, before.masks)))
    for path, w in flat(after.params).items():
        assert not np.array_equal(w, flat(before.params)[path])


@pytest.mark.slow
def test_fine_tuning_of_a_dense_network(pruned, tmp_path, fails):
    """`--dense` lets pruned weights grow back, and is of fine-tuning alone."""
    given, _, _ = pruned(*GRADUAL)
    after = fine_tune(given, tmp_path / "run", "--dense")
    assert not any(mask.ndim for mask in flat(after.masks).values())
    for path, mask in masks_of(given).items():
        assert (flat(after.params)[path][~mask] != 0).mean() > 0.9
    line = fails(2, train_main, ["digits", "--dense", "--out", str(tmp_path / "other")])
    assert "--dense frees the pruned weights of a sparse run: pass that run with --init" in line


@pytest.mark.slow
def test_levels_of_a_network_that_is_freed_first(pruned, tmp_path):
    """`--dense` frees what the given run had pruned, not what the first level prunes."""
    given, _, _ = pruned(*GRADUAL)
    more = [*ITERATIVE, "finetune", *EIGHT, "--dense", "--prune.sparsity", "0.75"]
    run = prune(given, *more, "--out", tmp_path / "run")
    first, before = masks_of(run.out / "level1"), masks_of(given)
    assert_pruned(run.out / "level1", json.loads((run.out / "level1" / "result.json").read_text()), 0.5)
    assert any((first[path] & ~before[path]).any() for path in before)
    last = assert_pruned(run.out, run.result, 0.75)
    assert all(not (last[path] & ~first[path]).any() for path in last)


def test_pruned_further(pruned, tmp_path):
    """More is pruned, and nothing returns."""
    given, _, _ = pruned(*GRADUAL)
    before = masks_of(given)
    further = prune(given, *AT_ONCE, "--prune.sparsity", "0.9", "--out", tmp_path / "run")
    more = assert_pruned(further.out, further.result, 0.9)
    assert all(not (more[path] & ~before[path]).any() for path in before)


@pytest.mark.slow
def test_pruned_less(pruned, tmp_path, fails):
    """Only with --dense, and in the same folder: what is refused leaves it free for the mended command."""
    given, _, _ = pruned(*GRADUAL)
    arguments = [given, *AT_ONCE, "--prune.sparsity", "0.5"]
    line = fails(2, main, [*map(str, arguments), "--out", str(tmp_path / "run")])
    assert "--prune.sparsity 0.5 is less than the 0.8 already pruned" in line and "--dense" in line
    alternating = [str(given), "--prune.schedule", "acdc", *DATES, *EIGHT, *TO_80, "--out", str(tmp_path / "run")]
    assert "acdc frees weights that are already pruned: confirm with --dense" in fails(2, main, alternating)
    less = prune(*arguments, "--dense", "--out", tmp_path / "run")
    assert_pruned(less.out, less.result, 0.5)


# ---- channels --------------------------------------------------------------------------------------------------------


def test_compact_network_is_the_masked_one(pruned):
    out, result, _ = pruned(*CHANNELS)
    compact, images = out / "compact", digits_of(out)
    assert result["compact"] == str(compact) and result["pruned_file"] == str(compact / "sparse.safetensors")
    assert result["compact_error"] <= 1e-5
    for a, b in zip(load_predict(out)(images), load_predict(compact)(images), strict=True):
        assert [name for name, _ in a] == [name for name, _ in b]
        np.testing.assert_allclose([p for _, p in a], [p for _, p in b], atol=1e-5)

    state = state_of(compact)
    assert result["compact_parameters"] == count(state.params) < 0.3 * result["parameters"]
    assert result["pruned_bytes"] < 0.5 * result["dense_bytes"]
    config, saved = read_config(compact, TrainConfig)
    # Inner widths and both streams, of which the first is the stem's too: half of each.
    assert config.widths == (8, 8, 8, 16, 16)
    assert result["channels_pruned"] == 0.5 < result["sparsity"]
    assert saved["config"]["augment"]["mean"] is not None
    variables, _, _ = load_sparse(compact / "sparse.safetensors")
    assert_same(flat(variables), flat(state.variables))


@pytest.mark.slow
@pytest.mark.parametrize("source", ["compact", "pruned_file"])
def test_compact_network_goes_on(pruned, tmp_path, source):
    """It is fine-tuned with its widths, from its folder or its file, and its weights pruned."""
    result = pruned(*CHANNELS).result
    compact = Path(result["compact"])
    tuned = fine_tune(result[source], tmp_path / "fine")
    assert read_config(tmp_path / "fine", TrainConfig)[0].widths == (8, 8, 8, 16, 16)
    assert {p: w.shape for p, w in flat(tuned.params).items()} == {
        p: w.shape for p, w in flat(state_of(compact).params).items()
    }
    if source == "compact":
        further = prune(compact, *AT_ONCE, *TO_80, "--out", tmp_path / "further")
        assert_pruned(further.out, further.result, 0.8)
        assert read_config(further.out, TrainConfig)[0].widths == (8, 8, 8, 16, 16)
        assert further.result["dense_accuracy"] == pytest.approx(result["pruned_accuracy"])


@pytest.mark.slow
def test_channels_go_while_training(small, tmp_path):
    """Gradually, of a network that is trained first: the folder of the smaller one can be used as it is."""
    how = ["--prune.structure", "channels", "--prune.sparsity", "0.5", "--prune.every", "2"]
    out, result, _ = prune(*NETWORK, *ALIKE, *SCRATCH, *EIGHT, *how, "--out", tmp_path / "run")
    shares = rows_of(out, "sparsity")
    assert shares == sorted(shares) and 0 < shares[-1] == pytest.approx(result["sparsity"], abs=1e-6)
    assert result["compact_error"] <= 1e-5 and result["compact_parameters"] < result["parameters"]
    assert len(load_predict(out / "compact")(digits_of(out, 2))) == 2


@pytest.mark.slow
def test_one_command_trains_and_prunes_at_once(small, tmp_path):
    """Without a run to start from, statistics of the images are measured before scores look at data."""
    how = [*AT_ONCE, *TO_80, "--prune.score", "snip", "--prune.recalibrate", "--ema", "0.9"]
    out, result, _ = prune(*NETWORK, *ALIKE, *SCRATCH, *how, "--out", tmp_path / "run")
    assert_pruned(out, result, 0.8)


# ---- resuming --------------------------------------------------------------------------------------------------------


def interrupted(monkeypatch, *arguments):
    def log(self, step, metrics):
        if step == 5:
            raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(session_module.Progress, "log", log)
        prune(*arguments)


def test_resumed_in_the_middle_it_ends_bit_equal(pruned, dense, tmp_path, monkeypatch):
    arguments = [dense, *GRADUAL, "--save-steps", "3", "--out", tmp_path / "run"]
    interrupted(monkeypatch, *arguments)
    _, resumed, [start] = prune(*arguments)
    assert start.step == 3 and 0 < 1 - np.mean(start.masks[LAYERS[0]]) < 0.8
    whole = pruned(*GRADUAL).result
    for name in ("params_digest", "test_loss", "pruned_bytes", "dense_accuracy"):
        assert resumed[name] == whole[name]


@pytest.mark.slow
def test_eight_devices_then_one(pruned, dense, tmp_path, monkeypatch):
    """A pruning that stops on 8 devices goes on, on one, to the result of one."""
    arguments = [dense, *GRADUAL, "--save-steps", "3", "--out", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr(session_module, "make_mesh", make_mesh)
        interrupted(monkeypatch, *arguments)
    out, resumed, [start] = prune(*arguments)
    assert start.step == 3
    assert_pruned(out, resumed, 0.8)
    assert resumed["test_loss"] == pytest.approx(pruned(*GRADUAL).result["test_loss"], rel=2e-3)


def test_masks_are_bits_on_disk(pruned):
    out, _, _ = pruned(*GRADUAL)
    checkpoints = Checkpoints(out / "checkpoints", writes=False)
    saved = leaves(checkpoints._orbax.metadata(8).metadata)
    for path, mask in masks_of(out).items():
        on_disk = saved[f"masks/{path}"]
        assert (tuple(on_disk.shape), on_disk.dtype) == ((-(-mask.size // 8),), np.uint8)
    assert saved["masks/head/kernel"].shape == ()
    checkpoints.close()


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_early_weights_that_come_too_late(fails, tmp_path):
    late = [*NETWORK, *ALIKE, *SCRATCH, "--prune.schedule", "iterative", "--prune.rewind-epochs", "9"]
    line = fails(2, main, [*late, "--out", str(tmp_path / "run")])
    assert line == "error: --prune.rewind-epochs 9 is not before the end of the dense run"
    assert not any(path.is_file() for path in (tmp_path / "run").rglob("*"))


BAD_FOR_THE_RUN = {
    "everything excluded": (["--prune.exclude", "."], "nothing to prune: no leaf is prunable"),
    "all groups excluded": (["--prune.structure", "channels", "--prune.exclude", "."], "no channels to prune"),
    "unmatched exclusion": (
        ["--prune.exclude", "stage7"],
        "--prune.exclude stage7 matches none of the names head/kernel",
    ),
    "unmatched group": (
        ["--prune.structure", "channels", "--prune.exclude", "stage7"],
        "--prune.exclude stage7 matches none of the names stream",
    ),
    "undivided": (
        ["--prune.structure", "2:4", "--prune.exclude", "head"],
        "2:4 does not divide stem/conv/kernel of shape 3x3x1x16",
    ),
    "rewinding": (
        ["--prune.schedule", "iterative"],
        "rewinding needs the early weights of a run that it trains itself: leave the run out",
    ),
    "epochs": (
        ["--epochs", "3"],
        "--epochs has no effect on this pruning: the training after pruning is set by --prune.epochs",
    ),
    "rate": (
        ["--optim.lr", "0.3"],
        "--optim.lr has no effect on this pruning: the training after pruning is set by --prune.epochs",
    ),
}


@pytest.mark.parametrize("case", BAD_FOR_THE_RUN)
def test_what_does_not_fit_the_run_is_refused_in_one_line(case, dense, fails, tmp_path):
    arguments, message = BAD_FOR_THE_RUN[case]
    assert message in fails(2, main, [str(dense), *arguments, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", [AT_ONCE, pytest.param(GRADUAL, marks=pytest.mark.slow)], ids=["one_shot", "gradual"])
def test_pruning_a_layer_to_nothing(dense, fails, tmp_path, how):
    line = fails(2, main, [str(dense), *how, "--prune.sparsity", "0.9999", "--out", str(tmp_path / "run")])
    assert "nothing would be left of stage" in line and "lower the sparsity, or exclude it" in line


@pytest.fixture(scope="module")
def wider(small, tmp_path_factory):
    """A sparse file of the same network, twice as wide."""
    variables = jax.device_get(init_variables(TWO_BLOCKS(num_classes=10, width=32), jax.random.key(1), (8, 8, 1)))
    path = tmp_path_factory.mktemp("wider") / "sparse.safetensors"
    save_sparse(path, variables, jax.device_get(full_masks(variables["params"])))
    return path


@pytest.mark.slow
def test_network_of_other_classes(small, fails, tmp_path):
    """There is nothing to compare the pruned one with."""
    variables = jax.device_get(init_variables(TWO_BLOCKS(num_classes=5, width=16), jax.random.key(1), (8, 8, 1)))
    path = tmp_path / "five.safetensors"
    save_sparse(path, variables, jax.device_get(full_masks(variables["params"])))
    given = [*NETWORK, *ALIKE, "--init", str(path), "--out", str(tmp_path / "run")]
    assert f"{path} has a head for different classes, or none: fine-tune first" in fails(2, main, given)
    assert not any(p.is_file() for p in (tmp_path / "run").rglob("*"))


def damaged(file, folder):
    """Copies of a file: with a flipped bit, and without its end."""
    good = Path(file).read_bytes()
    tampered, truncated = folder / "tampered.safetensors", folder / "truncated.safetensors"
    flipped = bytearray(good)
    flipped[-100] ^= 1
    tampered.write_bytes(flipped)
    truncated.write_bytes(good[:-100])
    return tampered, truncated


def test_masks_that_cannot_be_taken(dense, pruned, wider, fails, tmp_path):
    tampered, truncated = damaged(pruned(*GRADUAL).result["pruned_file"], tmp_path)
    refused = {
        wider: f"{wider} has masks of a different model: ",
        dense: f"--prune.masks {dense} prunes nothing",
        tampered: "its checksum differs; export or copy it again",
        truncated: "truncated.safetensors",
        Path("runs/nowhere"): "runs/nowhere",
    }
    for source, message in refused.items():
        how = [*AT_ONCE, "--prune.masks", str(source)]
        line = fails(2, main, [str(dense), *how, "--out", str(tmp_path / "run")])
        assert message in line
        assert source == dense or "prunes nothing" not in line
    assert not (tmp_path / "run" / "config.json").exists()


def test_weights_that_cannot_be_taken(pruned, wider, fails, tmp_path):
    """Refused as `--init` of training and of pruning alike."""
    tampered, truncated = damaged(pruned(*GRADUAL).result["pruned_file"], tmp_path)
    refused = {
        wider: f"{wider} comes from a different model: ",
        tampered: "its checksum differs; export or copy it again",
        truncated: "truncated.safetensors is not a readable safetensors file",
        tmp_path / "nowhere": "no weights at",
    }
    for source, message in refused.items():
        given = [*NETWORK, *ALIKE, "--init", str(source), "--out", str(tmp_path / "run")]
        assert message in fails(2, main, given)
    assert message in fails(2, train_main, ["digits", *given])
    assert not (tmp_path / "run").exists()


def test_folders_that_hold_no_run(fails, tmp_path):
    assert "is neither a preset (" in fails(2, main, [str(tmp_path), "--out", str(tmp_path / "run")])
    (tmp_path / "config.json").write_text("{")
    assert "config.json cannot be read" in fails(2, main, [str(tmp_path), "--out", str(tmp_path / "run")])
    (tmp_path / "config.json").write_text('{"pipeline": "pretrain", "config": {}}')
    assert "is a run of pretrain, not of train" in fails(2, main, [str(tmp_path), "--out", str(tmp_path / "run")])


# ---- the report ------------------------------------------------------------------------------------------------------


def test_report(pruned, tmp_path, capsys):
    out, result, _ = pruned(*GRADUAL)
    capsys.readouterr()
    more = ["--json", str(tmp_path / "report.json"), "--sensitivity", "0.5", "0.9", "--steps", "0"]
    picture = tmp_path / "report.png" if find_spec("matplotlib") else None  # of the extra plot
    main(["report", str(out), *more, *(["--picture", str(picture)] if picture else [])])
    assert picture is None or picture.stat().st_size > 10_000
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert [line.split()[:1] for line in said.splitlines()[:2]] == [["before"], ["accuracy"]]
    assert f"{result['dense_accuracy']:.2%}" in said and f"{result['pruned_accuracy']:.2%}" in said
    assert f"{result['dense_bytes']:,}" in said and f"{result['pruned_bytes']:,}" in said
    assert all(path.removesuffix("/kernel") in said for path in LAYERS)
    assert (report["before"]["sparsity"], report["run"]["out"]) == (0, str(out))
    assert report["after"]["sparsity"] == pytest.approx(result["sparsity"], abs=1e-6)
    kept = {row["path"]: row["kept"] for row in report["layers"] if row["prunable"]}
    assert kept == {path: mask.sum() for path, mask in masks_of(out).items()}
    found = report["sensitivity"]
    assert found["sparsities"] == [0.5, 0.9] and set(LAYERS) < set(found["accuracy"])
    assert 0.2 < found["baseline"] <= 1 and found["images"] == len(digits_of(out, None))


def test_report_of_a_smaller_network(pruned, tmp_path):
    out, result, _ = pruned(*CHANNELS)
    main(["report", str(out), "--steps", "0", "--json", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["after"]["parameters"] == result["compact_parameters"]
    assert report["after"]["macs"] == report["after"]["nonzero_macs"] < 0.5 * report["before"]["macs"]


def test_curve(pruned, capsys, tmp_path):
    """Runs side by side, from folders and from JSON files."""
    at_once, gradual = pruned(*AT_ONCE, *TO_80), pruned(*GRADUAL)
    report_main([str(gradual.out), "--json", str(tmp_path / "kept.json")])
    capsys.readouterr()
    main(["curve", str(at_once.out), str(tmp_path / "kept.json")])
    assert capsys.readouterr().out.splitlines() == [
        "| pruned | 80 % |",
        "| --- | --- |",
        f"| not at all | {100 * gradual.result['dense_accuracy']:.1f} |",
        f"| one-shot magnitude | {100 * at_once.result['pruned_accuracy']:.1f} |",
        f"| gradual magnitude | {100 * gradual.result['pruned_accuracy']:.1f} |",
    ]


def test_report_and_curve_refuse(pruned, dense, fails, tmp_path):
    of_training = "is a run of training, not of pruning"
    for message, *arguments in (
        (of_training, "report", dense),
        (of_training, "report", pruned(*CHANNELS).out / "compact"),
        ("it has no config.json", "report", tmp_path),
        ("--sensitivity must be at least 0 and below 1, got 1.5", "report", dense, "--sensitivity", 1.5),
        (f"{dense} is not a run of pruning", "curve", dense),
        ("holds no finished run", "curve", tmp_path),
    ):
        assert message in fails(2, main, [str(a) for a in arguments])


@pytest.mark.skipif(not find_spec("matplotlib"), reason="needs the extra plot")
def test_pictures_are_refused_before_anything_is_measured(pruned, dense, fails, tmp_path):
    """Nothing is printed; and a picture that exists outlives the refusal of a report."""
    for picture in (tmp_path / "report.bmpp", tmp_path / "nowhere" / "report.png"):
        line = fails(2, main, ["report", str(pruned(*GRADUAL).out), "--picture", str(picture)])
        assert f"cannot draw {picture}" in line
    picture = tmp_path / "report.png"
    picture.write_bytes(b"an older one")
    fails(2, main, ["report", str(dense), "--picture", str(picture)])
    assert picture.read_bytes() == b"an older one"
