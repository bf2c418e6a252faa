"""`python -m train.prune` from end to end: schedules, scores, structures, resuming, refusals."""

import json
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from resnet_jax.parallel import make_mesh
from resnet_jax.tree import is_kernel, leaves
from tests.reference.compare import assert_equal
from tests.reference.nets import Mlp
from tests.train.prune.runs import (
    ALIKE,
    AT_ONCE,
    DATES,
    EIGHT,
    GRADUAL,
    ITERATIVE,
    LAYERS,
    NETWORK,
    ONE_SHOT,
    SCRATCH,
    TO_80,
    TWO_BLOCKS,
    assert_pruned,
    flat,
    kept_in,
    masks_of,
    prune,
    rows_of,
    state_of,
)
from tests.train.test_run import Interrupted
from train import session as session_module
from train.checkpoint import Checkpoints
from train.errors import UsageError
from train.prune.__main__ import main
from train.prune.config import PruningConfig
from train.prune.start import make_target, start_masks
from train.sparse_file import load_sparse
from train.state import init_variables

pytestmark = pytest.mark.usefixtures("small")

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
def test_killed_it_ends_bit_equal(finished, command, killed, tmp_path):
    """SIGKILL in the pruning: the second start ends where the uninterrupted run did."""
    out = tmp_path / "killed"
    arguments = ["train.prune", *by_command(out, "--save-steps", 2)]

    def saved():
        return any(p.name.isdigit() for p in (out / "checkpoints").glob("*"))

    assert killed(*arguments, when=saved) == -signal.SIGKILL
    second = command(*arguments)
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
    assert_equal({path: start.masks[path] for path in masks}, masks)
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


@pytest.mark.slow
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
        assert_equal(start.params, {path: w * start.masks[path] for path, w in flat(saved["params"]).items()})
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
    assert_equal(second.params, {path: w * second.masks[path] for path, w in first.params.items()})
    initial = dense_at_the_start()
    assert all(not np.array_equal(w, initial[path] * first.masks[path]) for path, w in first.params.items() if w.any()
               and is_kernel(path, w))  # fmt: skip


@pytest.mark.slow
def test_levels_that_go_on(pruned, dense):
    run = pruned(*ITERATIVE, "finetune", *EIGHT, *TO_80)
    first, _ = levels_of(run)
    for start, before in zip(run.starts, (state_of(dense), first), strict=True):
        assert start.step == 0
        assert_equal(start.params, {path: w * start.masks[path] for path, w in flat(before.params).items()})


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
    assert_equal(start.params, {path: w * start.masks[path] for path, w in dense_at_the_start().items()})


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


BEFORE_THE_DENSE_RUN = {
    "--prune.schedule iterative --prune.rewind-epochs 9": "--prune.rewind-epochs 9 is not before the end of the dense",
    "--prune.schedule one_shot --prune.exclude stage7": "--prune.exclude stage7 matches none of the names ",
    "--prune.schedule one_shot --prune.layers stage7=0.5": "--prune.layers stage7 matches no prunable kernel: ",
    "--prune.schedule one_shot --prune.structure 5x1": "5x1 does not divide ",
    "--prune.schedule one_shot --prune.masks nowhere": "--prune.masks nowhere: no such run or file",
}


@pytest.mark.parametrize("arguments", BEFORE_THE_DENSE_RUN)
def test_what_is_refused_before_the_dense_run(arguments, fails, tmp_path):
    line = fails(2, main, [*NETWORK, *ALIKE, *SCRATCH, *arguments.split(), "--out", str(tmp_path / "run")])
    assert BEFORE_THE_DENSE_RUN[arguments] in line
    assert not any(path.is_file() for path in (tmp_path / "run").rglob("*"))


STAGE7 = "--prune.exclude stage7 matches none of the names "
BAD_FOR_THE_NETWORK = {
    "everything excluded": ({"exclude": (".",)}, "nothing to prune: no leaf is prunable"),
    "all groups excluded": ({"structure": "channels", "exclude": (".",)}, "no channels to prune"),
    "unmatched exclusion": ({"exclude": ("stage7",)}, STAGE7 + "head/kernel"),
    "unmatched group": ({"structure": "channels", "exclude": ("stage7",)}, STAGE7 + "stream"),
    "undivided": ({"structure": "2:4", "exclude": ("head",)}, "2:4 does not divide stem/conv/kernel of shape 3x3x1x16"),
}
OF_TRAINING = " has no effect on this pruning: the training after pruning is set by --prune.epochs"
REFUSED = {
    "undivided": (["--prune.structure", "2:4", "--prune.exclude", "head"], BAD_FOR_THE_NETWORK["undivided"][1]),
    "no channels left": (
        [*ITERATIVE, "finetune", "--prune.structure", "channels", "--prune.scope", "uniform", "--prune.exclude", "."],
        "no channels to prune: none can be removed, or --prune.exclude matches all of them",
    ),
    "rewinding": (
        ["--prune.schedule", "iterative"],
        "rewinding needs the early weights of a run that it trains itself: leave the run out",
    ),
    "epochs": (["--epochs", "3"], "--epochs" + OF_TRAINING),
    "rate": (["--optim.lr", "0.3"], "--optim.lr" + OF_TRAINING),
}


@pytest.mark.parametrize("case", BAD_FOR_THE_NETWORK)
def test_what_does_not_fit_the_network(case):
    fields, message = BAD_FOR_THE_NETWORK[case]
    model, p = TWO_BLOCKS(num_classes=10, width=16), PruningConfig(**fields)
    shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), (8, 8, 1)))["params"]
    with pytest.raises(UsageError, match=message):
        start_masks(p, make_target(p, model, shapes), shapes, None)


def test_channels_of_a_model_that_is_not_a_resnet():
    with pytest.raises(UsageError, match="channels needs a ResNet, not Mlp: prune single weights"):
        make_target(PruningConfig(structure="channels"), Mlp(), {})


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_the_run_is_refused_in_one_line(case, dense, fails, tmp_path):
    arguments, message = REFUSED[case]
    assert message in fails(2, main, [str(dense), *arguments, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", [AT_ONCE, pytest.param(GRADUAL, marks=pytest.mark.slow)], ids=["one_shot", "gradual"])
def test_pruning_a_layer_to_nothing(dense, fails, tmp_path, how):
    line = fails(2, main, [str(dense), *how, "--prune.sparsity", "0.9999", "--out", str(tmp_path / "run")])
    assert "nothing would be left of stage" in line and "lower the sparsity, or exclude it" in line
