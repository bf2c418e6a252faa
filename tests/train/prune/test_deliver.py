"""What a run of pruning delivers, in use: predictions, fine-tuning, further pruning, reports; damaged files."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest

from resnet_jax.masks import apply_masks, full_masks
from resnet_jax.tree import count
from tests.reference.compare import assert_equal
from tests.train.prune.runs import (
    ALIKE,
    AT_ONCE,
    CHANNELS,
    DATES,
    EIGHT,
    GRADUAL,
    ITERATIVE,
    LAYERS,
    NETWORK,
    SCRATCH,
    TO_80,
    TWO_BLOCKS,
    assert_pruned,
    flat,
    masks_of,
    prune,
    rows_of,
    state_of,
)
from train.__main__ import main as train_main
from train.config import TrainConfig
from train.errors import UsageError
from train.from_config import load_data
from train.predict import load as load_predict
from train.prune.__main__ import main
from train.prune.start import named_masks
from train.report import collect
from train.report.__main__ import main as report_main
from train.run_folder import read_config
from train.sparse_file import load_sparse, save_sparse
from train.state import init_variables
from train.weights import load_masks, load_weights

pytestmark = pytest.mark.usefixtures("small")

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
    assert_equal(flat(after.masks), flat(before.masks))
    assert_equal(flat(after.params), flat(apply_masks(after.params, before.masks)))
    for path, w in flat(after.params).items():
        assert not np.array_equal(w, flat(before.params)[path])


@pytest.mark.slow
def test_fine_tuning_of_a_dense_network(pruned, tmp_path, fails):
    """`--dense` lets pruned weights grow back; it only applies to fine-tuning."""
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


def of_gradual(pruned):
    """A run of pruning with the masks of the gradual one, from its file."""
    return pruned(*AT_ONCE, "--prune.masks", pruned(*GRADUAL).result["pruned_file"])


def test_masks_of_another_run(pruned):
    given, run = pruned(*GRADUAL), of_gradual(pruned)
    assert_equal(flat(load_masks(given.out, state_of(run.out).params)), flat(state_of(run.out).masks))
    assert_equal(assert_pruned(run.out, run.result, 0.8), masks_of(given.out))


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
    assert_equal(flat(variables), flat(state.variables))


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


# ---- masks and weights that cannot be taken ------------------------------------------------------------------------


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
        tmp_path / "nowhere": f"--prune.masks {tmp_path}/nowhere: no such run or file",
    }
    for source, message in refused.items():
        with pytest.raises(UsageError, match=re.escape(message)):
            named_masks(str(source), state_of(dense).params)
    arguments = [str(dense), *AT_ONCE, "--prune.masks", str(wider), "--out", str(tmp_path / "run")]
    assert refused[wider] in fails(2, main, arguments)
    assert not (tmp_path / "run" / "config.json").exists()


def test_weights_that_cannot_be_taken(dense, pruned, wider, fails, tmp_path):
    """Refused as `--init` of training and of pruning alike."""
    tampered, truncated = damaged(pruned(*GRADUAL).result["pruned_file"], tmp_path)
    refused = {
        wider: f"{wider} comes from a different model: ",
        tampered: "its checksum differs; export or copy it again",
        truncated: "truncated.safetensors is not a readable safetensors file",
        tmp_path / "nowhere": "no weights at",
    }
    for source, message in refused.items():
        with pytest.raises(UsageError, match=re.escape(message)):
            load_weights(source, state_of(dense).variables)
    for run, preset, source in ((main, [], tampered), (train_main, ["digits"], wider)):
        given = [*preset, *NETWORK, *ALIKE, "--init", str(source), "--out", str(tmp_path / "run")]
        assert refused[source] in fails(2, run, given)
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
    at_once, gradual = of_gradual(pruned), pruned(*GRADUAL)
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
    gradual, wider = pruned(*GRADUAL).out, tmp_path / "wider.json"
    compact = pruned(*CHANNELS).out / "compact"
    wider.write_text(json.dumps((record := collect(gradual)) | {"config": record["config"] | {"widths": [32] * 5}}))
    for message, *arguments in (
        (of_training, "report", dense),
        (of_training, "report", compact),
        ("it has no config.json", "report", tmp_path),
        ("--sensitivity must be at least 0 and below 1, got 1.5", "report", dense, "--sensitivity", 1.5),
        (f"{dense} is not a run of pruning", "curve", dense),
        ("holds no finished run", "curve", tmp_path),
        ("a table needs runs of the same network on the same set, got", "curve", gradual, wider),
    ):
        assert message in fails(2, main, [str(a) for a in arguments])
    # Training further in its folder would leave another network there than the file next to it.
    line = fails(2, train_main, ["--config", str(compact)])
    assert f"{compact} is a network that train.prune delivered: train it with --init" in line


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
