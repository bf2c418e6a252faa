"""Models other than ResNets, and other pieces of your own, in every pipeline."""

import dataclasses
import json
import time

import flax.linen as nn
import jax
import numpy as np
import pytest

from pretrain.config import ObjectiveConfig, PretrainConfig, ViewConfig
from pretrain.run import run as pretrain_run
from resnet_jax.augment import normalize
from resnet_jax.masks import apply_masks
from tests.reference.nets import CLASSES, Mlp, VisionTransformer
from train.checkpoint import Checkpoints
from train.config import AugmentConfig, OptimConfig, TrainConfig
from train.data import from_arrays
from train.errors import UsageError
from train.loop import read_rows
from train.optim import make_optimizer
from train.predict import load
from train.prune.config import PruneConfig, PruningConfig
from train.prune.measure import measure
from train.prune.run import run as prune_run
from train.run import run
from train.run_folder import load_state
from train.steps import classify
from train.weights import load_weights

pytestmark = pytest.mark.usefixtures("one_device_for_all")

MODELS = {"mlp": Mlp(), "vit": VisionTransformer()}
IN_TURN = ["mlp", pytest.param("vit", marks=pytest.mark.slow)]
PIXELS = AugmentConfig(mean=(0.3, 0.3, 0.3), std=(0.2, 0.2, 0.2))


@pytest.fixture(scope="module")
def dataset():
    """Four classes that a mean tells apart."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, 240)
    images = rng.integers(0, 32, (240, 8, 8, 3)) + 64 * labels[:, None, None, None]
    return from_arrays(images.astype(np.uint8), labels, classes=["a", "b", "c", "d"])


def config(out, **options):
    optim = OptimConfig(name="adamw", lr=1e-2)
    fields = {"batch": 24, "epochs": 10, "eval_every": 5, "log_every": 4, "eval_batch": 24}
    return TrainConfig(out=str(out), augment=PIXELS, optim=optim, **(fields | options))


@pytest.fixture(scope="module", params=IN_TURN)
def trained(request, dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "run"
    return MODELS[request.param], out, run(config(out), model=MODELS[request.param], dataset=dataset)


def test_run_of_any_module(trained, dataset):
    model, out, result = trained
    assert result["test_accuracy"] > 0.6  # chance is 0.25
    assert result["model"] == type(model).__name__
    assert json.loads((out / "config.json").read_text())["replaced"] == ["model", "dataset"]
    label, probability = load(out, model=model)(dataset.test.images[0])[0]
    assert label == dataset.classes[dataset.test.labels[0]] and probability > 1 / CLASSES


def test_run_again_needs_the_same_pieces(trained, dataset):
    model, out, result = trained
    assert run(config(out), model=model, dataset=dataset) == result
    with pytest.raises(UsageError, match=r"different pieces passed to run\(\) \(model, dataset -> dataset\)"):
        run(config(out), dataset=dataset)
    with pytest.raises(UsageError, match=r"pass it here too, load\(run, model=\.\.\.\)"):
        load(out)


def test_resumed_it_ends_bit_equal(trained, dataset, tmp_path, monkeypatch):
    """In the same process, although a slow disk had not finished the last checkpoint when the run was interrupted."""
    model, _, whole = trained
    write = Checkpoints._write

    def slow_write(checkpoints, *args):
        time.sleep(0.3)
        return write(checkpoints, *args)

    def stop(state):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "_write", slow_write)
        run(config(tmp_path, save_steps=7), model=model, dataset=dataset, hooks=[(20, stop)])
    assert Checkpoints(tmp_path / "checkpoints", writes=False).steps == [7, 14]
    resumed = run(config(tmp_path, save_steps=7), model=model, dataset=dataset)
    assert resumed["params_digest"] == whole["params_digest"]


def test_pruned(trained, dataset, tmp_path):
    model, dense, _ = trained
    pruning = PruningConfig(sparsity=0.5, epochs=2, every=4)
    fields = dataclasses.asdict(config(tmp_path, init=str(dense)))
    fields |= {name: getattr(config(tmp_path), name) for name in ("data", "augment", "optim")}
    result = prune_run(PruneConfig(**fields, prune=pruning), model=model, dataset=dataset)
    assert result["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert result["pruned_accuracy"] > 0.5
    state = load_state(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, apply_masks(state.params, state.masks), state.params)
    with pytest.raises(UsageError, match=r"trained a model that was passed to run\(\)"):
        measure(tmp_path)


class Encoder(nn.Module):
    """A LayerNorm MLP that ends at features: no batch statistics, no `train`."""

    @nn.compact
    def __call__(self, images):
        return nn.LayerNorm()(nn.gelu(nn.Dense(16)(images.reshape(len(images), -1))))


class Classifier(nn.Module):
    """The encoder's layers under the same names, with a head."""

    @nn.compact
    def __call__(self, images):
        hidden = nn.gelu(nn.Dense(16, name="Dense_0")(images.reshape(len(images), -1)))
        return nn.Dense(CLASSES, name="head")(nn.LayerNorm(name="LayerNorm_0")(hidden))


@pytest.mark.slow
def test_pretraining_of_an_encoder_without_batch_statistics(dataset, tmp_path):
    views = ViewConfig(mean=PIXELS.mean, std=PIXELS.std, min_scale=0.5, jitter=(0.0,) * 4, grayscale=0.0)
    fields = {"batch": 24, "epochs": 3, "eval_batch": 24, "eval_every": 3, "neighbours": 5}
    objective = ObjectiveConfig(projector=(16, 8))
    settings = PretrainConfig(out=str(tmp_path / "run"), augment=views, objective=objective, **fields)
    result = pretrain_run(settings, model=Encoder(), dataset=dataset)
    assert result["model"] == "Encoder" and 0 <= result["knn_accuracy"] <= 1
    variables = {"params": Classifier().init(jax.random.key(0), np.zeros((1, 8, 8, 3)))["params"], "batch_stats": {}}
    loaded = load_weights(tmp_path / "run", variables)["params"]
    assert not np.array_equal(loaded["Dense_0"]["kernel"], variables["params"]["Dense_0"]["kernel"])
    np.testing.assert_array_equal(loaded["head"]["kernel"], variables["params"]["head"]["kernel"])


def test_optimizer_objective_augmentation_and_hooks(dataset, tmp_path):
    """Each piece is the one that trains: no learning rate, no change; the hook and the objective's metric are seen."""
    steps = []

    def counted(variables, batch, **context):
        loss, (stats, metrics) = classify()(variables, batch, **context)
        return loss, (stats, metrics | {"brightest": batch["image"].max()})

    frozen = make_optimizer("sgd", lambda step: 0.0)
    pieces = {"model": Mlp(), "tx": frozen, "objective": counted, "augment": normalize(0.0, 0.5), "dataset": dataset}
    run(config(tmp_path, steps=20), **pieces, hooks=[(10, lambda state: steps.append(int(state.step)))])
    assert steps == [10, 20]
    rows = read_rows(tmp_path / "metrics.jsonl")
    brightest = max(row["brightest"] for row in rows if "brightest" in row)
    assert brightest == pytest.approx(2 * int(dataset.train.images.max()) / 255, rel=0.1)
    assert len({row["validation_loss"] for row in rows if "validation_loss" in row}) == 1


def test_objective_without_accuracy_on_crops(dataset, tmp_path):
    """Only metrics that an objective has are printed, and weights are drawn for the images that the network gets."""

    def only_loss(variables, batch, **context):
        loss, (stats, _) = classify()(variables, batch, **context)
        return loss, (stats, {"loss": loss})

    cropped = dataclasses.replace(PIXELS, resized_crop=6)
    settings = dataclasses.replace(config(tmp_path, steps=20), augment=cropped)
    result = run(settings, model=MODELS["mlp"], objective=only_loss, dataset=dataset)
    assert result["steps"] == 20
    assert load_state(tmp_path).params["in"]["kernel"].shape[0] == 6 * 6 * 3


def test_validations_reach_the_caller_and_the_test_split_stays_unseen(dataset, tmp_path):
    """Each validation's row is passed on, what the callback raises ends the run, and resuming finishes it."""
    pieces = {"model": MODELS["mlp"], "dataset": dataset}
    short, rows = config(tmp_path / "run", epochs=2, eval_every=1), []

    def stop(row):
        rows.append(row)
        raise LookupError

    with pytest.raises(LookupError):
        run(short, **pieces, validated=stop)
    assert {"step", "epoch", "validation_accuracy", "validation_loss"} <= rows[0].keys()
    result = run(short, **pieces, validated=rows.append, test=False)
    assert [row["epoch"] for row in rows[1:]] == pytest.approx([1, 2], abs=0.1)  # it had no checkpoint yet
    assert result["validation_accuracy"] == rows[-1]["validation_accuracy"]
    assert not [name for name in result if name.startswith("test")]
    assert not (tmp_path / "run" / "confusion.json").exists()
