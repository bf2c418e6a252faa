"""`python -m pretrain` from end to end: its folder, resuming, evaluation, fine-tuning, every error."""

import contextlib
import io
import json
import shutil
from dataclasses import replace

import flax.linen as nn
import jax
import numpy as np
import pytest

from pretrain import evaluate as evaluate_module
from pretrain.__main__ import main
from pretrain.config import ObjectiveConfig, PretrainConfig, ViewConfig, make_objective
from pretrain.evaluate import evaluate
from pretrain.evaluate import main as evaluate_main
from pretrain.from_config import init_network, make_network
from pretrain.objectives import OBJECTIVES
from pretrain.presets import PRESETS
from pretrain.report import main as report_main
from pretrain.run import pools_first, run
from resnet_jax.parallel import make_mesh
from resnet_jax.resnet import MODELS
from resnet_jax.tree import leaves
from tests.pretrain.test_steps import Encoder
from train import session as session_module
from train.__main__ import main as train_main
from train.config import AugmentConfig, DataConfig, OptimConfig, TrainConfig
from train.data import from_arrays
from train.data.sets import load
from train.errors import UsageError
from train.predict import main as predict_main
from train.report.__main__ import main as train_report
from train.run import run as train_run
from train.weights import load_weights, read_state_dict, save_encoder

pytestmark = pytest.mark.usefixtures("one_device")

# This takes seconds without colour operations, which compile longest.
QUICK = ["--width", "8", "--steps", "60", "--batch", "64", "--eval-every", "2", "--log-every", "10"]
QUICK += ["--augment.jitter", "0", "0", "0", "0"]
PLAIN = ViewConfig(min_scale=0.4, flip=False, jitter=(0, 0, 0, 0), grayscale=0)


def quick(preset, out, *more):
    return [preset, *QUICK, "--out", str(out), *more]


@pytest.fixture(scope="module")
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        for module in (session_module, evaluate_module):
            patch.setattr(module, "make_mesh", lambda: make_mesh(jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def finished(one_device, tfds_dir, tmp_path_factory):
    """(stdout, stderr, run folder) of one quick run."""
    out = tmp_path_factory.mktemp("pretrained") / "quick"
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()) as told:
        main(quick("digits_simclr", out))
    return said.getvalue(), told.getvalue(), out


def test_run_leaves_what_it_promises(finished):
    stdout, stderr, out = finished
    result = json.loads(stdout)
    assert result == json.loads((out / "result.json").read_text())
    assert (result["preset"], result["objective"], result["steps"]) == ("digits_simclr", "simclr", 60)
    # The images are told apart by random weights already, and better by trained ones.
    assert 0.3 < result["random_knn_accuracy"] < result["knn_accuracy"] <= 1
    assert 0.5 < result["random_linear_accuracy"] < result["linear_accuracy"] + 0.02
    assert 0.2 < result["online_linear_accuracy"] <= 1 and result["test_images"] == 360
    assert result["collapsed_at"] is None and result["verdict"] in stderr
    assert result["verdict"].startswith("representations are healthy: effective rank")
    assert f"kNN {result['knn_accuracy']:.2%} (random weights {result['random_knn_accuracy']:.2%})" in stderr
    assert len(result["params_digest"]) == 64 and result["devices"] == "8 x cpu"

    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == list(range(10, 61, 10))
    looks = [r for r in rows if "validation_knn_accuracy" in r]
    assert [r["step"] for r in looks] == [0, 40, 60]
    health = {"alignment", "uniformity", "feature_std", "rank_me", "effective_rank", "dead_fraction"}
    assert health | {"positive_similarity", "negative_similarity", "validation_online_linear_accuracy"} <= set(looks[0])
    spread = {"projection_std", "projection_similarity", "projection_negative_similarity", "grad_norm"}
    assert spread | {"probe_accuracy", "learning_rate"} <= set(rows[1])
    assert json.loads((out / "config.json").read_text())["pipeline"] == "pretrain"


def test_finished_run_only_says_its_result(finished, capsys):
    stdout, _, out = finished
    main(quick("digits_simclr", out))
    assert capsys.readouterr().out == stdout


def test_another_objective_in_the_same_folder(finished, fails, monkeypatch):
    *_, out = finished
    line = fails(2, main, quick("digits_simclr", out, "--objective.name", "supcon"))
    assert "different settings (objective.name simclr -> supcon); choose a different --out" in line
    monkeypatch.setattr("sys.argv", ["predict", str(out), "image.png"])
    assert "is a run of pretrain, not of train" in fails(2, predict_main)


# ---- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mocov2", "dino"])
def test_resumed_it_ends_bit_equal(method, tmp_path, tfds_dir):
    """Queue, target network, center and probe are part of a checkpoint: an interruption changes no bit."""
    config = PRESETS[f"digits_{method}"]()
    if method == "mocov2":
        config = replace(config, objective=replace(config.objective, queue=192))
    config = replace(config, augment=PLAIN, width=8, steps=10, batch=64, save_steps=4, eval_every=100, log_every=1)

    def stop(state):
        raise KeyboardInterrupt

    interrupted = replace(config, out=str(tmp_path / "interrupted"))
    with pytest.raises(KeyboardInterrupt):
        run(interrupted, hooks=[(7, stop)])
    resumed, whole = run(interrupted), run(replace(config, out=str(tmp_path / "whole")))
    for name in ("params_digest", "knn_accuracy", "linear_accuracy", "online_linear_accuracy", "health"):
        assert resumed[name] == whole[name]


@pytest.mark.slow
def test_eight_devices_end_as_one(tmp_path, tfds_dir, monkeypatch):
    """The whole pipeline on 8 devices, in the mode that needs most care, against one device under jit."""
    objective = ObjectiveConfig(name="mocov2", projector=(16, 16), queue=128, target_momentum=0.9)
    config = PretrainConfig(
        width=8, steps=8, batch=64, eval_every=100, augment=PLAIN, objective=objective, optim=OptimConfig(lr=0.05)
    )
    one = run(replace(config, out=str(tmp_path / "one")))
    monkeypatch.setattr(session_module, "make_mesh", make_mesh)
    eight = run(replace(config, out=str(tmp_path / "eight"), mode="shard_map"))
    assert eight["health"] == pytest.approx(one["health"], rel=1e-2, abs=1e-3)
    assert eight["linear_accuracy"] == pytest.approx(one["linear_accuracy"], abs=0.02)


# ---- after pretraining ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_encoder_goes_into_supervised_training(finished, tmp_path, tfds_dir):
    """`--init RUN` starts from the pretrained encoder, bit by bit; frozen, its features alone classify."""
    *_, out = finished
    tensors = read_state_dict(out / "encoder.safetensors")
    assert tensors["conv1.weight"].shape == (8, 1, 3, 3) and not any(name.startswith("fc.") for name in tensors)
    config = TrainConfig(width=8, steps=60, batch=64, optim=OptimConfig(lr=0.5), freeze=True, eval_every=100)
    mean, std = (json.loads((out / "config.json").read_text())["config"]["augment"][n] for n in ("mean", "std"))
    config = replace(config, augment=AugmentConfig(mean=tuple(mean), std=tuple(std)))
    warm = train_run(replace(config, init=str(out), out=str(tmp_path / "warm")))
    assert warm["test_accuracy"] > 0.6


@pytest.mark.slow
def test_evaluation_names_its_protocols(finished, tfds_dir, capsys, monkeypatch):
    stdout, _, out = finished
    evaluate_main([str(out), "--protocol", "knn", "linear"])
    said = capsys.readouterr()
    found, result = json.loads(said.out.splitlines()[-1]), json.loads(stdout)
    assert found["knn_accuracy"] == pytest.approx(result["knn_accuracy"], abs=0.006)
    assert found["linear_accuracy"] == pytest.approx(result["linear_accuracy"], abs=0.012)
    assert "knn: " in said.err and "linear: " in said.err and "pretrained on" not in said.err

    monkeypatch.setattr("pretrain.evaluate.UPDATES", 60)
    tuned = evaluate(out, ["finetune_10", "scratch_10"], epochs=1)
    assert 0.3 < tuned["scratch_10_accuracy"] <= 1 and 0.3 < tuned["finetune_10_accuracy"] <= 1
    figures = json.loads((out / "evaluation-digits.json").read_text())["figures"]
    assert set(figures) == {"knn", "linear", "finetune_10", "scratch_10"}
    assert figures["finetune_10"]["labelled"] == 129 and figures["finetune_10"]["lr"] == 0.05
    (folder,) = out.glob("finetune_10-digits-*")
    config = json.loads((folder / "config.json").read_text())["config"]
    assert config["data"]["fraction"] == 0.1 and config["init"].endswith("encoder.safetensors")
    assert folder.name.endswith(f"-pretrained_steps{result['steps']}")


def test_transfer_says_so(finished, tfds_dir, capsys):
    """The same digits under another name stand for another set."""
    stdout, _, out = finished
    evaluate_main([str(out), "--protocol", "linear", "--data", "digits/1.0.0"])
    said = capsys.readouterr()
    assert "test, digits/1.0.0, pretrained on digits" in said.err
    found, result = json.loads(said.out.splitlines()[-1]), json.loads(stdout)
    assert found["linear_accuracy"] == pytest.approx(result["linear_accuracy"], abs=0.012)
    assert (out / "evaluation-digits_1.0.0.json").is_file()


@pytest.mark.slow
def test_evaluation_of_a_run_that_only_may_be_read(finished, tfds_dir, capsys, monkeypatch, fails):
    *_, out = finished
    kept = out / "evaluation-digits.json"
    before = kept.read_bytes() if kept.exists() else None
    monkeypatch.setattr("pretrain.evaluate.os.access", lambda path, mode: False)
    assert evaluate(out, ["knn"])["knn_accuracy"] > 0.5
    assert "cannot be written to, so evaluation-digits.json is not written" in capsys.readouterr().err
    assert (kept.read_bytes() if kept.exists() else None) == before
    line = fails(2, evaluate_main, [str(out), "--protocol", "knn", "finetune_1"])
    assert "fine-tuning keeps its runs there: copy it first" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocol", "kmeans"], "unknown protocol 'kmeans'"),
        (["--dir", "somewhere"], "--dir and --image-size apply only to a different set: name it with --data"),
        (["--image-size", "0"], "--dir and --image-size apply only to a different set: name it with --data"),
        (
            ["--lr", "0.1"],
            "--lr only applies to protocols that train: finetune_1, finetune_10, finetune_100,",
        ),
        (["--data", "synthetic"], "synthetic has 3 channels, but"),
    ],
)
def test_evaluation_refuses(finished, fails, arguments, message):
    assert message in fails(2, evaluate_main, [str(finished[-1]), *arguments])


@pytest.mark.parametrize(("name", "convolution"), [("resnet50c", 0), ("resnet50d", 1)])
def test_encoder_has_the_names_of_its_family(name, convolution, tmp_path):
    """ResNet-C and ResNet-D have the same parameters, but only in the latter a pool comes before the convolution."""
    encoder = MODELS[name](num_classes=None, width=8).clone(stage_sizes=(1,))
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), dict(shapes))
    save_encoder(tmp_path / "encoder.safetensors", zeros, pooled=pools_first(encoder))
    tensors = read_state_dict(tmp_path / "encoder.safetensors")
    assert tensors[f"layer1.0.downsample.{convolution}.weight"].ndim == 4


@pytest.fixture
def edited(finished, tmp_path):
    """`edited(width=4)` copies the finished run, with these fields in its config and without its evaluations."""

    def copy(replaced=(), **fields):
        for name in ("encoder.safetensors", "result.json"):
            shutil.copy(finished[-1] / name, tmp_path)
        saved = json.loads((finished[-1] / "config.json").read_text())
        saved["config"] |= fields
        (tmp_path / "config.json").write_text(json.dumps(saved | {"replaced": replaced}))
        return tmp_path

    return copy


@pytest.fixture
def trainings(monkeypatch):
    """The configs that evaluation trains, in order; nothing is trained."""
    configs, result = [], {"test_accuracy": 0.5}
    monkeypatch.setattr(evaluate_module, "train_run", lambda config, preset: configs.append(config) or result)
    return configs


def test_evaluation_trains_the_network_that_was_pretrained(edited, trainings):
    widths = (8, 8, 8, 16, 16, 32, 32)
    evaluate(edited(width=None, widths=widths), ["finetune_10", "scratch_10"])
    assert [config.widths for config in trainings] == [widths, widths]


def test_evaluation_trains_again_on_images_of_a_different_size(edited, trainings):
    for side in (None, 8, 9):
        evaluate(edited(), ["scratch_10"], data=DataConfig(name="digits", image_size=side))
    assert len({config.out for config in trainings}) == 3


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"figures": 1}'])
def test_evaluation_refuses_a_damaged_file(edited, trainings, fails, content):
    run = edited()
    (run / "evaluation-digits.json").write_text(content)
    line = fails(2, evaluate_main, [str(run), "--protocol", "scratch_10"])
    assert "evaluation-digits.json cannot be read" in line and "delete it, and evaluate again" in line
    assert not trainings


def test_evaluation_refuses_an_encoder_that_was_passed_to_run(edited, fails):
    line = fails(2, evaluate_main, [str(edited(replaced=["model"])), "--protocol", "scratch_10"])
    assert "trained a model that was passed to run()" in line


def test_evaluation_needs_a_finished_run(tmp_path, finished, fails):
    (tmp_path / "config.json").write_text((finished[-1] / "config.json").read_text())
    assert "is not finished: it has no result.json" in fails(2, evaluate_main, [str(tmp_path)])
    with pytest.raises(UsageError, match="is a run of pretraining that is not finished"):
        load_weights(tmp_path, {})
    shutil.copy(finished[-1] / "encoder.safetensors", tmp_path)  # as while a finished run is continued for longer
    assert "is not finished: it has no result.json" in fails(2, evaluate_main, [str(tmp_path)])


def test_report(finished, tmp_path, capsys, fails):
    *_, out = finished
    train_report([str(out), "--json", str(tmp_path / "kept.json")])
    report_main([str(tmp_path / "kept.json"), str(out), "--table"])
    random, row = capsys.readouterr().out.splitlines()[2:]
    result = json.loads((out / "result.json").read_text())
    assert random.startswith(f"| random weights | {100 * result['random_knn_accuracy']:.1f} |")
    assert row.startswith(f"| simclr | {100 * result['knn_accuracy']:.1f} (0.0) |") and row.endswith("| 2 |")
    kept = json.loads((tmp_path / "kept.json").read_text())
    (tmp_path / "wider.json").write_text(json.dumps(kept | {"config": kept["config"] | {"widths": [16] * 7}}))
    line = fails(2, report_main, [str(out), str(tmp_path / "wider.json"), "--table"])
    assert "a table needs runs of the same network on the same set" in line
    (tmp_path / "other.json").write_text('{"history": []}')
    assert "is not a run of pretraining" in fails(2, report_main, [str(tmp_path / "other.json"), "--table"])
    assert "nothing to do" in fails(2, report_main, [str(out)])


def test_report_draws(finished, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    from PIL import Image

    report_main([str(finished[-1]), "--picture", str(tmp_path / "curve.png")])
    with Image.open(tmp_path / "curve.png") as image:
        assert (31, 119, 180) in {tuple(p[:3]) for _, p in image.convert("RGB").getcolors(1 << 20)}


@pytest.mark.slow
def test_images_without_labels(tmp_path, tfds_dir, fails, capsys):
    """A flat folder can be pretrained on: health is all that is said, and training refuses it."""
    from PIL import Image

    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    data = ["--data.name", f"folder:{tmp_path / 'photos'}", "--data.image-size", "8"]
    small = ["--width", "8", "--batch", "16", "--steps", "3", "--augment.jitter", "0", "0", "0", "0"]
    main(["digits_simclr", *data, *small, "--out", str(tmp_path / "run")])
    result, said = json.loads((tmp_path / "run" / "result.json").read_text()), capsys.readouterr().err
    assert "knn_accuracy" not in result and result["health"]["images"] == 4
    assert "no labels, so only the encoder's health is reported" in said and result["verdict"] in said
    assert (tmp_path / "run" / "encoder.safetensors").is_file()
    assert "has no labels to evaluate with: name a labelled set" in fails(2, evaluate_main, [str(tmp_path / "run")])
    assert "was pretrained without labels" in fails(2, report_main, [str(tmp_path / "run"), "--table"])
    line = fails(2, train_main, [*data, "--batch", "16", "--out", str(tmp_path / "supervised")])
    assert "has only one class: training needs two or more" in line


# ---- health ---------------------------------------------------------------------------------------------------------


def test_collapse_is_found_and_dated(tmp_path):
    """Under a loss that pulls every image to one point."""

    def collapsing(views, *, axis_name=None):
        return ((views.online["projection"] - 1) ** 2).mean()

    objective = replace(OBJECTIVES["simclr"], loss=collapsing, projector=(16, 16), last_norm=None, norm=False)
    config = PretrainConfig(
        out=str(tmp_path), steps=60, batch=64, log_every=2, eval_every=100, augment=PLAIN, optim=OptimConfig(lr=0.5)
    )
    images = np.random.default_rng(0).integers(0, 256, (640, 8, 8, 1), dtype=np.uint8)
    unlabelled = from_arrays(images, np.zeros(640, int))
    result = run(config, objective=objective, model=Encoder(), dataset=unlabelled)
    assert result["verdict"].startswith("representations have collapsed: since step ")
    assert 2 <= result["collapsed_at"] <= 60 and f"since step {result['collapsed_at']} " in result["verdict"]


# ---- refusals --------------------------------------------------------------------------------------------


BAD_INPUT = {
    "digits_simclear": "unknown preset 'digits_simclear': did you mean digits_simclr",
    "--objective.temprature 1": "unknown field '--objective.temprature': did you mean --objective.temp",
    "--objective.name moco": "unknown objective 'moco': did you mean mocov",
    "--batch 1": "a batch of one has no other image to compare with",
    "--objective.temperature 0": "--objective.temperature must be above 0, got 0.0",
    "digits_byol --objective.target-momentum 1.5": "--objective.target-momentum must be at least 0 and at most 1, got",
    "digits_byol --augment.views 3": "byol takes two views, not 3",
    "--augment.views 1": "simclr takes two or more views, not 1",
    "--augment.small-views 4": "simclr does not take small views",
    "digits_mocov2 --objective.queue 1000": "--objective.queue 1000 is not a multiple of --batch 128",
    "--objective.queue 128": "simclr does not take --objective.queue; it takes projector, temperature",
    "--objective.frozen-prototypes 1": "--objective.frozen-prototypes: simclr has no prototypes",
    "digits_byol --objective.predictor 64 32": "--objective.predictor ends in 32 but the projector in 64: the last",
    "--augment.resized-crop 16": "--augment.resized-crop 16 is larger than the images, 8x8",
    "--data.random-crop": "--data.random-crop cuts one box for all views of an image",
    "digits_swav --augment.small-views 2 --augment.small-crop 8": "small-crop 8 is not smaller than the large views, 8",
    "digits_swav --augment.small-views 2": "--augment.small-crop 96 is larger than the images, 8x8",
    "--augment.blur 0.5 2": "--augment.blur must be at least 0 and at most 1, got 2.0",
    "--neighbours 0": "--neighbours must be at least 1, got 0",
}


@pytest.mark.parametrize("arguments", BAD_INPUT)
def test_bad_input_is_refused_in_one_line(arguments, fails, tmp_path, tfds_dir):
    assert BAD_INPUT[arguments] in fails(2, main, [*arguments.split(), "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_backbone_without_pooled_features():
    config = PretrainConfig(objective=ObjectiveConfig(projector=(8, 8)))

    class Maps(nn.Module):
        def __call__(self, images):
            return images

    network = make_network(config, make_objective(config.objective), encoder=Maps())
    with pytest.raises(UsageError, match=r"resnet8 cannot be pretrained: .* not pooled features \[B, F\]"):
        init_network(config, network, (8, 8, 1))


def test_objective_options_reach_its_functions():
    bound = make_objective(ObjectiveConfig(name="dino", temperature=0.3, center_momentum=0.5, prototypes=7))
    assert bound.options == {"temperature": 0.3, "teacher_temperature": 0.04, "center_momentum": 0.5}
    assert bound.init_memory(jax.random.key(0))["center"].shape == (7,)
    assert set(leaves(bound.init_memory(jax.random.key(0)))) == {"center"}


def test_data_fraction_is_drawn_evenly_and_nested(tfds_dir):
    few, more = (load("digits", fraction=f).train for f in (0.1, 0.3))
    counts = np.bincount(few.labels, minlength=10)
    assert counts.sum() == pytest.approx(129, abs=5) and counts.min() >= 12 and counts.max() <= 14
    held = {image.tobytes() for image in more.images}
    assert all(image.tobytes() in held for image in few.images)
    encoded = load("digits", fraction=0.1, memory_limit=0).train
    np.testing.assert_array_equal([encoded[i]["label"] for i in range(len(encoded))], few.labels)
    with pytest.raises(UsageError, match=r"fraction of the training split must lie above 0"):
        load("digits", fraction=1.5)
    assert DataConfig().fraction == 1
