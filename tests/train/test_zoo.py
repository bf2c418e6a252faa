"""The models that come with this project: complete, in the wheel, and loaded by name by every program."""

import json
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from PIL import Image

from resnet_jax.resnet import MODELS
from resnet_jax.tree import leaves
from train.config import AugmentConfig, OptimConfig, TrainConfig
from train.data.sets import from_arrays
from train.errors import UsageError
from train.from_config import make_state
from train.hub import WEIGHTS, ZOO, read_card
from train.predict import load, main
from train.presets import PRESETS
from train.pretrained import from_pretrained
from train.prune.config import PruneConfig, PruningConfig
from train.prune.run import run as prune
from train.run import run, with_card
from train.run_folder import load_state
from train.weights import classes_of, dense_variables, find_weights, load_masks

pytestmark = pytest.mark.usefixtures("one_device_for_all")

NAME = "cifar10_resnet20"
ROOT = Path(__file__).parent.parent.parent
CARD = read_card(NAME)
# Logits of the picture, computed in float32 with plain XLA.
LOGITS = [3.845017, -4.034259, -0.441614, 3.328946, -1.62102, -0.24439, 3.578589, 0.808458, 0.156097, -5.409411]


@pytest.fixture(scope="module")
def picture():
    """uint8 [32, 32, 3]: colours that change from edge to edge."""
    y, x = np.mgrid[:32, :32]
    return np.stack([8 * y, 8 * x, 4 * (y + x)], -1).astype(np.uint8)


@pytest.fixture(scope="module")
def images():
    """A few images with the classes of CIFAR-10."""
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8), np.arange(60) % 10
    return from_arrays(pixels, labels, classes=CARD.labels)


@pytest.mark.parametrize("name", [folder.name for folder in ZOO.iterdir()])
def test_models_are_complete_and_in_the_wheel(name):
    card, about = read_card(name), json.loads((ZOO / name / "config.json").read_text())
    assert card.model in MODELS and len(card.labels) == card.classes and card.size and card.mean and card.std
    assert about["pretrained_cfg"]["license"]
    assert (ROOT / re.search(r"results/\S+\.json", about["description"])[0]).is_file()
    files = [ZOO / name / "config.json", find_weights(name)]
    assert ZOO.is_relative_to(ROOT / "train") and files[1] == ZOO / name / WEIGHTS
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert "train" in wheel["packages"] and not {"exclude", "only-include"} & {*wheel}
    ignored = (ROOT / ".gitignore").read_text().split()  # by git, and by the wheel
    parts = {part for file in files for part in file.relative_to(ROOT).parts}
    assert not any(fnmatch(part, pattern.rstrip("/")) for part in parts for pattern in ignored)


def test_logits_are_those_stored(picture):
    model, variables, preprocess = from_pretrained(NAME)
    found = np.asarray(model.apply(variables, preprocess(picture)))[0]
    np.testing.assert_allclose(found, LOGITS, atol=1e-5 * np.ptp(LOGITS))


def test_predicts_classes_by_name(picture, tmp_path, capsys):
    want = np.exp(LOGITS) / np.exp(LOGITS).sum()
    found = dict(load(NAME, top=10)(picture))
    np.testing.assert_allclose([found[label] for label in CARD.labels], want, atol=1e-4)
    path = tmp_path / "photo.png"
    Image.fromarray(picture).resize((500, 400)).save(path)
    main([NAME, str(path), "--top", "1"])
    (result,) = json.loads(capsys.readouterr().out)
    assert result["top"][0][0] in CARD.labels


def test_what_is_there_comes_first(tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    assert find_weights(NAME).parent == ZOO / NAME
    with pytest.raises(UsageError, match=f"{NAME} is not a run folder: it has no config"):
        load(f"./{NAME}")
    Path(NAME).mkdir()
    assert f"{NAME} is not a run folder: it has no config.json" in fails(2, main, [NAME, "x.png"])
    with pytest.raises(UsageError, match=f"{NAME} is not a run folder, and has no model.safetensors"):
        from_pretrained(NAME)


def test_unknown_names(fails, tmp_path):
    hint = "error: no folder, file or model here is called cifar10-resnet2: did you mean cifar10_resnet20?"
    assert fails(2, main, ["cifar10-resnet2", "x.png"]) == hint
    with pytest.raises(UsageError, match="did you mean cifar10_resnet20"):
        run(TrainConfig(init="cifar10-resnet2", out=str(tmp_path)))
    with pytest.raises(UsageError, match=r"^no weights at alexnet$"):
        from_pretrained("alexnet")


def test_cards_without_names_of_classes(tmp_path, picture, monkeypatch):
    """Classes are numbers then; without classes there is nothing to predict."""
    about = json.loads((ZOO / NAME / "config.json").read_text())
    (tmp_path / WEIGHTS).symlink_to(ZOO / NAME / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps({**about, "label_names": None}))
    assert load(tmp_path, top=1)(picture)[0][0] == "0" and classes_of(tmp_path) == []
    (tmp_path / "config.json").write_text(json.dumps({**about, "num_classes": 0}))
    with pytest.raises(UsageError, match="has no classes to predict"):
        load(tmp_path)
    with pytest.raises(UsageError, match="is not a run folder: it has no config"):
        load(ZOO.parent / "hub.py")


def config(kind, out, **options):
    augment = AugmentConfig(mean=CARD.mean, std=CARD.std)
    optim = OptimConfig(lr=0.0, weight_decay=0.0)
    return kind(init=NAME, model="resnet20", out=str(out), augment=augment, optim=optim, batch=8, **options)


@pytest.mark.slow
def test_training_starts_from_it(images, tmp_path):
    """A rate of 0 keeps the weights."""
    run(config(TrainConfig, tmp_path, steps=1), dataset=images)
    jax.tree.map(np.testing.assert_array_equal, load_state(tmp_path).params, from_pretrained(NAME)[1]["params"])


@pytest.mark.parametrize("same", [True, False])
def test_the_head_is_kept_only_for_its_classes(same, capsys):
    model, variables, _ = from_pretrained(NAME)
    classes = CARD.labels if same else [*CARD.labels[:-1], "lorry"]
    state = make_state(config(TrainConfig, "x"), model, optax.sgd(0.1), (32, 32, 3), NAME, classes=classes)
    kept = {path: np.array_equal(x, leaves(state.params)[path]) for path, x in leaves(variables["params"]).items()}
    assert [path for path, equal in kept.items() if not equal] == ([] if same else ["head/bias", "head/kernel"])
    assert (f"{NAME} has other classes (10: airplane" in capsys.readouterr().err) is not same


def test_training_takes_model_and_size_from_its_card():
    finetune = TrainConfig(**{**vars(PRESETS["finetune"]()), "init": NAME})
    taken = with_card(finetune, "finetune")
    assert (taken.model, taken.data.image_size, taken.augment.resized_crop) == ("resnet20", 32, 32)
    assert (taken.augment.mean, taken.augment.std) == (CARD.mean, CARD.std)


def test_pruning_compares_with_it():
    variables = from_pretrained(NAME)[1]
    same = dense_variables(NAME, jax.tree.map(np.zeros_like, variables))
    jax.tree.map(np.testing.assert_array_equal, same, variables)
    assert load_masks(NAME, variables["params"]) is None


@pytest.mark.slow
def test_pruning_starts_from_it(images, tmp_path):
    pruning = PruningConfig(schedule="one_shot", sparsity=0.5, epochs=0.15, lr=0.0)
    result = prune(config(PruneConfig, tmp_path, prune=pruning), dataset=images)
    assert abs(result["sparsity"] - 0.5) < 1e-3 and result["steps"] == 1
    shipped, pruned = leaves(from_pretrained(NAME)[1]["params"]), leaves(load_state(tmp_path).params)
    assert all(np.isin(np.asarray(x), [0.0]).any() or np.array_equal(x, shipped[p]) for p, x in pruned.items())
