"""`python -m train.detect` from end to end: the run folder, resuming, learning, every error."""

import json
import signal
from dataclasses import replace

import numpy as np
import pytest

from resnet_jax.tree import leaves
from tests.train.detect.quick_run import CONFIG, quick
from train.config import TrainConfig
from train.data import from_arrays
from train.detect.__main__ import main
from train.detect.config import DetectConfig, ObjectDataConfig
from train.detect.run import run
from train.detect.steps import detection
from train.loop import read_rows
from train.run import run as train_run
from train.run_folder import read_config

pytestmark = pytest.mark.usefixtures("one_device_for_all")


def test_run_leaves_what_it_promises(finished):
    stdout, stderr, out = finished
    result = json.loads(stdout)
    assert result == json.loads((out / "result.json").read_text())
    assert (result["preset"], result["detector"], result["dataset"]) == ("shapes_fasterrcnn", "faster_rcnn", "shapes")
    assert result["steps"] == result["selected_step"] == 6 and result["test_images"] == 120
    figures = {"test_ap", "test_ap50", "test_ap75", "test_ap_small", "test_ar_100", "test_voc_ap", "test_voc07_ap"}
    for name in figures | {"validation_ap", "validation_ap50"}:
        assert 0 <= result[name] <= 1
    assert {*result["test_per_class"]} == {"disc", "square", "triangle", "star"}
    assert len(result["params_digest"]) == 64 and result["parameters"] > 50_000

    rows = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6]
    losses = {"objectness_loss", "proposal_loss", "class_loss", "box_loss"}
    assert losses | {"loss", "grad_norm", "learning_rate"} <= {*rows[0]}
    assert rows[0]["loss"] == pytest.approx(sum(rows[0][name] for name in losses), rel=1e-5)
    assert [row["step"] for row in rows if "validation_ap" in row] == [6]
    assert "shapes: 480 train, 120 validation, 120 test images, 4 classes" in stderr
    assert "validation AP" in stderr and "faster_rcnn on resnet18: " in stderr
    saved = json.loads((out / "config.json").read_text())
    assert saved["pipeline"] == "train.detect" or saved["pipeline"] == "detect"
    assert saved["classes"] == ["disc", "square", "triangle", "star"]


def test_finished_run_only_says_its_result(finished, capsys):
    stdout, _, out = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    main(quick(out))
    assert capsys.readouterr().out == stdout
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}


def test_different_settings_in_the_same_folder(finished, fails):
    *_, out = finished
    line = fails(2, main, quick(out, "--features", "32"))
    assert "different settings (features 16 -> 32); choose a different --out" in line
    config, _ = read_config(out, DetectConfig)
    assert config.data.buckets == ("64x64",) and config.metric == "validation_ap"


@pytest.mark.slow
def test_stopped_it_ends_bit_equal(tmp_path):
    """Between two checkpoints; with the buckets that are chosen, a moving average, and each bucket traced once."""
    traces = []
    objective = detection()

    def counted(variables, batch, **options):
        traces.append(batch["image"].shape[1:3])
        return objective(variables, batch, **options)

    def stop(state):
        raise KeyboardInterrupt

    config = replace(CONFIG, data=ObjectDataConfig(), ema=0.9, save_steps=2, out=str(tmp_path / "stopped"))
    with pytest.raises(KeyboardInterrupt):
        run(config, hooks=[(5, stop)])
    resumed = run(config)
    assert resumed["params_digest"] == run(replace(config, out=str(tmp_path / "whole")))["params_digest"]
    assert read_config(tmp_path / "stopped", DetectConfig)[0].data.buckets == ("96x128", "128x96")

    run(replace(config, out=str(tmp_path / "counted")), objective=counted, test=False)
    assert sorted(traces) == [(96, 128), (128, 96)]


@pytest.mark.slow
def test_killed_it_ends_bit_equal(command, killed, tmp_path):
    """SIGKILL after a checkpoint: the second start ends where a whole run does, in processes of their own."""

    def arguments(out):
        return ["train.detect", *quick(tmp_path / out, "--save-steps", "1", "--steps", "12")]

    def saved():
        return any(p.name.isdigit() for p in (tmp_path / "killed" / "checkpoints").glob("[0-9]*"))

    assert killed(*arguments("killed"), when=saved) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "result.json").exists()

    again, whole = command(*arguments("killed")), command(*arguments("whole"))
    assert again.returncode == whole.returncode == 0, again.stderr + whole.stderr
    assert "resuming from step" in again.stderr
    results = [json.loads(done.stdout.splitlines()[-1]) for done in (again, whole)]
    for name in ("params_digest", "test_ap", "validation_ap"):
        assert results[0][name] == results[1][name]


@pytest.mark.slow
def test_a_frozen_backbone_of_a_trained_run(tmp_path):
    """`--init` takes the backbone of a run of classification; frozen parts and statistics keep its bits."""
    states = []
    classifier = TrainConfig(model="resnet8", width=8, steps=2, batch=64, kernels="plain", out=str(tmp_path / "first"))
    images = np.random.default_rng(0).integers(0, 256, (128, 16, 16, 3), dtype=np.uint8)
    labels = np.arange(128) % 4
    train_run(classifier, dataset=from_arrays(images, labels), hooks=[(2, states.append)])
    config = replace(CONFIG, model="resnet8", init=str(tmp_path / "first"), freeze=2, frozen_stats=True)
    run(replace(config, out=str(tmp_path / "second"), steps=2), hooks=[(2, states.append)], test=False)
    before, after = (leaves({"params": x.params, "batch_stats": x.batch_stats}) for x in states)
    same = {path for path, x in before.items() if np.array_equal(x, after.get(path.replace("/", "/backbone/", 1), ()))}
    frozen = {p for p in before if p.startswith(("params/stem", "params/stage1", "batch_stats")) or "/norm" in p}
    assert same == frozen


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--model resnet19", "unknown model 'resnet19'"),
        ("--detector yolo", "--detector"),
        ("--features 0", "--features"),
        ("--hidden 0", "--hidden"),
        ("--canonical-size 0", "--canonical-size"),
        ("--anchor-scale 0", "--anchor-scale"),
        ("--freeze -1", "--freeze"),
        ("--freeze 2", "--freeze 2 needs a pretrained backbone: pass --init, or --freeze 0"),
        ("--data.dir there", "--data.dir has no effect with --data.name shapes"),
        ("--data.name coco:there --data.dir there", "--data.dir has no effect with --data.name coco:there"),
        ("--batch 0", "--batch"),
        ("--accumulate 0", "--accumulate"),
        ("--ema 1", "--ema"),
        ("--proposals.before 0 10", "--proposals.before"),
        ("--proposals.nms 1.5", "--proposals.nms"),
        ("--proposals.low 0.8", "--proposals.low 0.8 is above --proposals.high 0.7"),
        ("--regions.fraction 2", "--regions.fraction"),
        ("--regions.weights 10 10 0 5", "--regions.weights"),
        ("--augment.scale 2 1", "--augment.scale needs the smaller factor first, got 2.0 1.0"),
        ("--augment.scale 0 1", "--augment.scale"),
        ("--augment.color-jitter 2", "--augment.color-jitter"),
        ("--augment.std 0 1 1", "--augment.std"),
        ("--augment.mean 0.5", "--augment.mean needs 3 values, one for each channel"),
        ("--dense", "--dense frees the pruned weights of a sparse run: pass that run with --init"),
        ("--sparsity 0.5 --select best", "--select best may choose a checkpoint from before the pruning"),
        ("--select best --keep-best 0", "--select best needs --keep-best 1 or more"),
        ("--steps-per-call 4", "--steps-per-call needs images of one size"),
        ("--data.buckets 128", "--data.buckets '128' is not of the form HEIGHTxWIDTH, such as 800x1344"),
        ("--data.buckets 100x128", "bucket 100x128: the sides of a bucket must be multiples of 32"),
        ("--data.buckets 0x128", "bucket 0x128: the sides of a bucket must be multiples of 32"),
        ("--data.buckets 32x64", "images are larger than every bucket (32x64)"),
        ("--data.min-size 0", "--data.min-size"),
        ("--data.name nothing", "nothing"),
        ("--levels stage2 stage7", "--levels stage7: resnet18 has stage1, stage2, stage3, stage4"),
        ("--levels stage3 stage2", "--levels stage3 stage2: name each once, the finest first"),
        ("--levels stage2 stage2", "--levels stage2 stage2: name each once, the finest first"),
        (
            "--levels stage1 stage3",
            "stage1 stage3: the second stage needs all levels between the first and last",
        ),
        ("--batch 8 --accumulate 3", "--accumulate 3 does not divide the 8 images per device"),
        ("--batch 500", "a batch of 500 is larger than the 480 training images"),
        ("--one-stage.nms 0.3", "one-stage.nms"),
        ("--detector retinanet", "--proposals.before has no effect with --detector retinanet"),
        ("--init nothing.pth", "nothing.pth"),
    ],
)
def test_refusals_are_one_line(arguments, line, tmp_path, fails):
    """Before anything is trained, with exit code 2; nothing is left behind."""
    out = tmp_path / "refused"
    assert line in fails(2, main, quick(out, "--steps", "1", *arguments.split()))
    assert not (out / "result.json").exists() and not (out / "checkpoints").exists()


def test_the_one_stage_has_rules_of_its_own(fails, tmp_path):
    arguments = f"--detector retinanet --one-stage.low 0.6 --steps 1 --out {tmp_path / 'refused'}".split()
    assert "--one-stage.low 0.6 is above --one-stage.high 0.5" in fails(2, main, arguments)


def test_unknown_presets_are_refused(fails):
    assert "unknown preset 'shapes_rcnn'" in fails(2, main, ["shapes_rcnn"])
