"""Files of weights as people have them: taken, with what is left out said, or refused in one line."""

import re
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from resnet_jax.torch_weights import canonical, from_torch, to_torch
from resnet_jax.tree import leaves
from tests.resnet_jax.test_torch_parity import filled, template
from train.errors import UsageError
from train.weights import load_weights, read_state_dict

SMALL = np.zeros(3, np.float32)


@pytest.fixture(scope="module")
def state():
    return to_torch(filled("resnet18"))


def prefixed(prefix, tensors):
    return {prefix + name: x for name, x in tensors.items()}


def without_head(tensors):
    return {name: x for name, x in tensors.items() if not name.startswith("fc.")}


def in_sequence(tensors):
    """Named as in `torch.nn.Sequential(*network.children())`."""
    places = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7, "fc": 9}
    split = {name: name.partition(".") for name in tensors}
    return {f"{places[split[name][0]]}.{split[name][2]}": x for name, x in tensors.items()}


def of_transformers(tensors):
    """Named as in the ResNets of transformers."""
    rules = [
        (r"^conv1\.", "resnet.embedder.embedder.convolution."),
        (r"^bn1\.", "resnet.embedder.embedder.normalization."),
        (r"^layer(\d)\.(\d)\.", lambda m: f"resnet.encoder.stages.{int(m[1]) - 1}.layers.{m[2]}."),
        (r"\.downsample\.0\.", ".shortcut.convolution."),
        (r"\.downsample\.1\.", ".shortcut.normalization."),
        (r"\.conv(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.convolution."),
        (r"\.bn(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.normalization."),
        (r"^fc\.", "classifier.1."),
    ]
    names = {}
    for name in tensors:
        names[name] = name
        for pattern, replacement in rules:
            names[name] = re.sub(pattern, replacement, names[name])
    return {names[name]: x for name, x in tensors.items()}


# name -> (state dict from that of a ResNet, whether its head is taken, what is left out)
FILES = {
    "torch.compile": (lambda s: prefixed("_orig_mod.", s), True, []),
    "torch.compile of DataParallel": (lambda s: prefixed("_orig_mod.module.", s), True, []),
    "DataParallel of torch.compile": (lambda s: prefixed("module._orig_mod.", s), True, []),
    "Lightning": (lambda s: prefixed("net.", s), True, []),
    "own wrapper": (lambda s: prefixed("resnet.", s), True, []),
    "only the average": (
        lambda s: prefixed("model_ema.module.", s) | {"model_ema.n_averaged": SMALL},
        True,
        ["n_averaged"],
    ),
    "model and average": (
        lambda s: prefixed("model_ema.", {k: x + 1 for k, x in s.items()}) | prefixed("model.", s),
        True,
        ["model_ema (72 tensors)"],
    ),
    "solo-learn": (
        lambda s: (
            prefixed("momentum_backbone.", without_head(s))
            | prefixed("backbone.", without_head(s))
            | {"projector.0.weight": SMALL, "classifier.weight": SMALL}
        ),
        False,
        ["momentum_backbone (70 tensors)", "projector (1 tensor)", "classifier (1 tensor)"],
    ),
    "MoCo": (
        lambda s: (
            prefixed("module.encoder_k.", without_head(s))
            | prefixed("module.encoder_q.", without_head(s))
            | {"module.queue": SMALL, "module.encoder_q.fc.0.weight": SMALL, "module.encoder_q.fc.2.weight": SMALL}
        ),
        False,
        ["module.encoder_k (70 tensors)", "module.queue (1 tensor)", "module.encoder_q.fc (2 tensors)"],
    ),
    "SimSiam": (
        lambda s: prefixed("module.encoder.", without_head(s)) | {"module.predictor.0.weight": SMALL},
        False,
        ["module.predictor (1 tensor)"],
    ),
    "DINO": (
        lambda s: prefixed("teacher.backbone.", without_head(s)) | prefixed("student.backbone.", without_head(s)),
        False,
        ["teacher (70 tensors)"],
    ),
    "detector": (
        lambda s: prefixed("backbone.body.", without_head(s)) | {"backbone.fpn.a.weight": SMALL, "rpn.b": SMALL},
        False,
        ["backbone.fpn (1 tensor)", "rpn (1 tensor)"],
    ),
    "SwAV": (lambda s: without_head(s) | {"prototypes.weight": SMALL}, False, ["prototypes (1 tensor)"]),
    "counters": (lambda s: s | {"bn1.num_batches_tracked": np.array(7)}, True, []),
    "without a head": (without_head, False, []),
    "dropout before the head": (lambda s: {k.replace("fc.", "fc.1."): x for k, x in s.items()}, True, []),
    "pretrainedmodels": (lambda s: {k.replace("fc.", "last_linear."): x for k, x in s.items()}, True, []),
    "a sequence": (lambda s: prefixed("backbone.", in_sequence(without_head(s))), False, []),
    "transformers": (of_transformers, True, []),
}


@pytest.mark.parametrize("name", FILES)
def test_the_network_is_found_and_the_rest_is_said(name, state, tmp_path, capsys):
    change, head, left_out = FILES[name]
    save_file({k: np.ascontiguousarray(x) for k, x in change(state).items()}, tmp_path / "w.safetensors")
    got, want = leaves(load_weights(tmp_path / "w.safetensors", template("resnet18"))), leaves(filled("resnet18"))
    for path, leaf in got.items():
        expected = 0 if "/head/" in path and not head else want[path]
        np.testing.assert_array_equal(leaf, expected, err_msg=path)
    said = capsys.readouterr().err
    assert all(part in said for part in left_out) and ("left out" in said) == bool(left_out), said


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_any_precision(dtype, state, tmp_path):
    save_file({k: x.astype(dtype) for k, x in state.items()}, tmp_path / "w.safetensors")
    got = leaves(load_weights(tmp_path / "w.safetensors", template("resnet18")))
    for path, leaf in leaves(filled("resnet18")).items():
        assert got[path].dtype == np.float32
        np.testing.assert_array_equal(got[path], np.asarray(leaf).astype(dtype).astype(np.float32), err_msg=path)


def test_a_head_for_other_classes_is_new_and_that_is_said(state, tmp_path, capsys):
    save_file(state | {"fc.weight": np.ones((9, 64), np.float32), "fc.bias": SMALL}, tmp_path / "w.safetensors")
    got = load_weights(tmp_path / "w.safetensors", template("resnet18"))
    assert (np.asarray(got["params"]["head"]["kernel"]) == 0).all()
    assert "the head starts from random weights, as the one of" in capsys.readouterr().err
    save_file({name: x for name, x in state.items() if name != "fc.bias"}, tmp_path / "w.safetensors")
    load_weights(tmp_path / "w.safetensors", template("resnet18"))
    assert capsys.readouterr().err.endswith("w.safetensors has no bias\n")


REFUSED = {
    "two networks": (lambda s: prefixed("left.", s) | prefixed("right.", s), r"there are 2 networks \(left, right\)"),
    "integers": (lambda s: s | {"bn1.weight": np.ones(8, np.int8)}, "not floating-point 1: bn1.weight"),
    "not finite": (lambda s: s | {"bn1.bias": np.full(8, np.nan, np.float32)}, "not finite: 1: bn1.bias"),
    "twice": (
        lambda s: prefixed("", s) | {"layer0.conv1.weight": s["conv1.weight"]},
        "are the same tensor",
    ),
    "another model": (lambda s: s | {"layer1.0.se.fc1.weight": SMALL}, "unexpected 1: layer1.0.se.fc1.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name, state, tmp_path):
    change, message = REFUSED[name]
    save_file({k: np.ascontiguousarray(x) for k, x in change(state).items()}, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=message) as error:
        load_weights(tmp_path / "w.safetensors", template("resnet18"))
    assert "\n" not in str(error.value)


def test_from_torch_takes_a_network_alone(state):
    many = prefixed("encoder.", state) | {"projector.weight": SMALL}
    with pytest.raises(ValueError, match="unexpected 1: projector"):
        from_torch(many, template("resnet18"))
    tensors, left_out = canonical(many)
    assert left_out == {"projector": 1} and canonical(tensors) == (tensors, {})
    jax.tree.map(np.testing.assert_array_equal, from_torch(tensors, template("resnet18")), filled("resnet18"))


def test_a_folder_from_the_hub(state, tmp_path):
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    got = load_weights(tmp_path, template("resnet18"))
    jax.tree.map(np.testing.assert_array_equal, got, filled("resnet18"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w.h5", r"cannot be read \(Keras weights\): weights come from \.safetensors"),
        ("w.msgpack", "weights in Flax's format"),
        ("w.npz", "NumPy arrays"),
        ("w.onnx", "an ONNX model"),
        ("w.npy", "NumPy arrays"),
        ("cat.png", "is not a readable PyTorch weights file: damaged, or not of PyTorch"),
        ("w.pth", "is not a readable PyTorch weights file: damaged, or not of PyTorch"),
    ],
)
def test_weights_of_other_frameworks(name, message, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UsageError, match=message):
        load_weights(tmp_path / name, {})


def test_names_that_are_nowhere():
    with pytest.raises(UsageError, match=r"no weights at IMAGENET1K_V1$"):
        load_weights(Path("IMAGENET1K_V1"), {})
    for name in (
        "timm/resnet50.a1_in1k",
        "https://huggingface.co/timm/resnet50.a1_in1k",
        "huggingface.co/timm/resnet50.a1_in1k",
    ):
        with pytest.raises(UsageError, match=r"is called hf:timm/resnet50\.a1_in1k$"):
            load_weights(Path(name), {})


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_files_that_are_empty_or_stand_for_others(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(UsageError, match=f"{name} is an empty file"):
        read_state_dict(tmp_path / name)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:7")
    with pytest.raises(UsageError, match=f"{name} is a pointer of Git LFS, not the weights: .*git lfs pull"):
        read_state_dict(tmp_path / name)


def test_folders_without_the_weights_of_a_model(state, tmp_path):
    for part in ("a", "b"):
        save_file(state, tmp_path / f"{part}.safetensors")
    with pytest.raises(UsageError, match=r"has no model\.safetensors: name one of .*[ab]\.safetensors"):
        load_weights(tmp_path, template("resnet18"))
    (tmp_path / "run" / "checkpoints" / "4").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text('{"config": {}}')
    with pytest.raises(UsageError, match=f"name the run folder, {tmp_path}/run$"):
        load_weights(tmp_path / "run" / "checkpoints" / "4", template("resnet18"))


# ---- PyTorch's own files ---------------------------------------------------------------------------------------------


def tensors_of(state):
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    return {name: torch.from_numpy(np.array(x)) for name, x in state.items()}


@pytest.mark.parametrize(
    "key", ["state_dict", "model_state_dict", "model", "params", "model_ema", "state_dict_ema", "x"]
)
def test_containers(key, state, tmp_path):
    tensors = tensors_of(state)
    torch = pytest.importorskip("torch")
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    content = {"epoch": 3, "optimizer": optimizer, "best": torch.tensor(0.5), key: prefixed("module.", tensors)}
    torch.save(content, tmp_path / "w.pth.tar")
    got = load_weights(tmp_path / "w.pth.tar", template("resnet18"))
    jax.tree.map(np.testing.assert_array_equal, got, filled("resnet18"))


def test_bfloat16_and_parameters(state, tmp_path):
    tensors = tensors_of(state)
    torch = pytest.importorskip("torch")
    given = {name: torch.nn.Parameter(x.bfloat16()) for name, x in tensors.items()}
    torch.save(given, tmp_path / "w.pth")
    for got in (load_weights(tmp_path / "w.pth", template("resnet18")), from_torch(given, template("resnet18"))):
        kernel = got["params"]["stem"]["conv"]["kernel"]
        assert kernel.dtype == np.float32
        np.testing.assert_allclose(kernel, filled("resnet18")["params"]["stem"]["conv"]["kernel"], rtol=1e-2)


def test_tensors_of_other_layouts(state, tmp_path):
    tensors = tensors_of(state)
    torch = pytest.importorskip("torch")
    torch.save(tensors | {"fc.weight": tensors["fc.weight"].to_sparse()}, tmp_path / "w.pth")
    got = load_weights(tmp_path / "w.pth", template("resnet18"))
    jax.tree.map(np.testing.assert_array_equal, got, filled("resnet18"))
    torch.save(tensors | {"fc.weight": tensors["fc.weight"].to("meta")}, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"tensors without values \(of the device meta\): 1: fc.weight"):
        load_weights(tmp_path / "w.pth", template("resnet18"))


def test_objects_next_to_the_weights(tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    torch.save({"model": {"conv1.weight": torch.ones(3)}, "where": Path("x")}, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"Python objects .*Path\).*x = torch.load\('.*torch.save\(x\[") as error:
        read_state_dict(tmp_path / "w.pth")
    assert "\n" not in str(error.value)
