"""Models by name, from a folder laid out like the hub's cache; without a network."""

import json
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from resnet_jax.resnet import MODELS
from resnet_jax.torch_weights import from_torch, to_torch
from tests.reference.make_golden import weights
from train import hub
from train.config import DataConfig, TrainConfig
from train.errors import UsageError
from train.explain.__main__ import main as explain_main
from train.hub import Card, download, is_hub_name, read_card
from train.presets import PRESETS
from train.pretrained import from_pretrained
from train.prune.config import PruneConfig
from train.prune.report import report_main
from train.prune.run import run as prune_run
from train.run import with_card
from train.weights import find_weights

TIMM = {
    "architecture": "tiny",
    "num_classes": 3,
    "pretrained_cfg": {"input_size": [3, 32, 32], "crop_pct": 0.9, "mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.1]},
}
CARD = Card(model="tiny", classes=3, resize=35, size=32, mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.1))


@pytest.fixture
def tiny(monkeypatch):
    """The model `tiny` in the table, and its state dict."""

    def make(**fields):
        return MODELS["resnet18"](**{"width": 8, **fields}).clone(stage_sizes=(1,))

    monkeypatch.setitem(MODELS, "tiny", make)
    like = jax.eval_shape(make(num_classes=3).init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), dict(like))
    state = weights("tiny", {name: x.shape for name, x in to_torch(zeros).items()})
    return state, from_torch(state, zeros)


@pytest.fixture
def cache(tiny, tmp_path, monkeypatch):
    """A cache with `hf:someone/tiny`; the hub is offline."""
    pytest.importorskip("huggingface_hub", reason="needs the extra hub")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model, commit = tmp_path / "models--someone--tiny", "0" * 40
    files = model / "snapshots" / commit
    files.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    save_file(tiny[0], files / "model.safetensors")
    (files / "config.json").write_text(json.dumps(TIMM))
    return files


def check(source, tiny):
    model, variables, preprocess = from_pretrained(source)
    jax.tree.map(np.testing.assert_array_equal, variables, tiny[1])
    photo = np.full((70, 90, 3), 255, np.uint8)
    x = preprocess([photo, Image.fromarray(photo)])
    assert x.shape == (2, 32, 32, 3)
    np.testing.assert_allclose(x[0, 0, 0], [2, 3, 7], rtol=1e-6)
    assert jax.eval_shape(model.apply, variables, preprocess(photo)).shape == (1, 3)


def test_two_lines_by_name(cache, tiny):
    for name in ("hf:someone/tiny", "hf://someone/tiny"):
        check(name, tiny)
    assert find_weights(cache) == cache / "model.safetensors"
    assert download("hf:someone/tiny@" + "0" * 40, "config.json") == cache / "config.json"


def test_pruning_by_name(cache, tmp_path, monkeypatch):
    """From a name, and reported against one."""

    def named(*arguments, **options):
        source = options.get("before") or arguments[1]
        assert find_weights(source) == cache / "model.safetensors"
        raise InterruptedError

    monkeypatch.setattr("train.prune.run.train_levels", named)
    monkeypatch.setattr("train.prune.report.measure", named)
    with pytest.raises(InterruptedError):
        prune_run(PruneConfig(init="hf://someone/tiny", out=str(tmp_path / "run")))
    with pytest.raises(InterruptedError):
        report_main([str(tmp_path), "--before", "hf://someone/tiny"])


@pytest.mark.slow
def test_explanation_by_name(cache, tmp_path, capsys):
    """`hf:` and the folder that it stands for are explained alike."""
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(tmp_path / "image.png")
    for out, source in (("a", "hf:someone/tiny"), ("b", str(cache))):
        flags = ["--out", str(tmp_path / out), "--methods", "grad_cam", "--target", "2"]
        explain_main([source, str(tmp_path / "image.png"), *flags])
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["methods"] == second["methods"] and first["images"] == second["images"]
    assert first["images"][0]["explained"] == "2" and first["layer"] == "stage1_block1"


def test_a_folder_needs_no_huggingface_hub(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    save_file(tiny[0], tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(TIMM))
    check(tmp_path, tiny)
    with pytest.raises(UsageError, match=r'hf:a/b needs huggingface_hub: pip install -e "\.\[hub\]"'):
        download("hf:a/b", "config.json")


def test_features_and_a_missing_head(tiny, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TIMM))
    save_file({k: x for k, x in tiny[0].items() if not k.startswith("fc.")}, tmp_path / "model.safetensors")
    model, variables, preprocess = from_pretrained(tmp_path, num_classes=None)
    assert jax.eval_shape(model.apply, variables, preprocess(np.zeros((9, 9, 3), np.uint8))).shape == (1, 8)
    with pytest.raises(UsageError, match="has no head for 3 classes: pass num_classes=None"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:someone/else", "cannot be reached .* and config.json is not in the local cache"),
        ("hf:resnet50", "is not of the form hf:OWNER/NAME"),
        ("hf:a/b/c", "is not of the form"),
    ],
)
def test_refused(name, message, cache):
    with pytest.raises(UsageError, match=message):
        read_card(name)


def test_no_network_is_noticed(cache, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "getproxies", dict)
    assert read_card("hf:someone/tiny") == CARD  # from the cache
    with pytest.raises(UsageError, match="cannot be reached"):
        download("hf:someone/tiny", "pytorch_model.bin")


def test_cards(tmp_path):
    assert read_card(tmp_path) is None and read_card(tmp_path / "w.pth") is None
    (tmp_path / "config.json").write_text(json.dumps(TIMM))
    assert read_card(tmp_path) == CARD == read_card(tmp_path / "model.safetensors")
    assert str(CARD) == "tiny, 32 pixels cropped from 35, mean 0.5 0.4 0.3, std 0.25 0.2 0.1"
    resnet = {"model_type": "resnet", "depths": [3, 4, 6, 3], "layer_type": "bottleneck", "id2label": {"0": "a"}}
    (tmp_path / "config.json").write_text(json.dumps(resnet))
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 224}, "crop_pct": 0.875}')
    card = read_card(tmp_path)
    assert card == Card(model="resnet50", classes=1, resize=256, size=224)
    (tmp_path / "config.json").write_text(json.dumps(resnet | {"downsample_in_bottleneck": True}))
    assert read_card(tmp_path).model not in MODELS
    (tmp_path / "config.json").write_text('{"pretrained_cfg": {}}')
    with pytest.raises(UsageError, match="is not understood: KeyError"):
        read_card(tmp_path)
    assert is_hub_name("hf-hub:timm/x") and is_hub_name("HF:timm/x") and not is_hub_name("runs/x")


def test_a_run_takes_what_its_user_has_not_changed(tiny, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(TIMM))
    finetune = PRESETS["finetune"]()
    taken = with_card(replace(finetune, init=str(tmp_path)), "finetune")
    assert (taken.model, taken.data.image_size, taken.augment.resized_crop) == ("tiny", 35, 32)
    assert (taken.augment.mean, taken.augment.std) == (CARD.mean, CARD.std)
    assert "tiny, 32 pixels cropped from 35" in capsys.readouterr().err
    own = replace(finetune, init=str(tmp_path), model="resnet18", data=DataConfig(name="folder:x", image_size=64))
    kept = with_card(own, "finetune")
    assert (kept.model, kept.data.image_size, kept.augment.resized_crop) == ("resnet18", 64, 224)
    digits = with_card(TrainConfig(init=str(tmp_path), data=DataConfig(name="digits")), "custom")
    assert (digits.data.image_size, digits.augment.resized_crop, digits.augment.mean) == (None, None, CARD.mean)
    assert with_card(finetune, "finetune") is finetune
    (tmp_path / "config.json").write_text('{"architecture": "resnet50", "pretrained_cfg": {}}')
    assert with_card(replace(finetune, init=str(tmp_path)), "finetune") == replace(finetune, init=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(TIMM | {"architecture": "convnext_tiny"}))
    with pytest.raises(UsageError, match="convnext_tiny"):
        with_card(replace(finetune, init=str(tmp_path)), "finetune")
