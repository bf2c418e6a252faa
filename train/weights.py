"""Weights to start from: a run of this project, or a PyTorch state dict in a file or on the Hugging Face hub."""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save

from resnet_jax.torch_weights import canonical, from_torch, same_shape, to_array, to_torch
from resnet_jax.tree import PyTree, abbreviate, leaves, map_with_path
from train.config import TrainConfig
from train.errors import UsageError
from train.hub import WEIGHTS, download, is_hub_name, read_card, source_path
from train.paths import local_path, replace_file
from train.run_folder import load_state, pipeline_of, read_config
from train.runtime import say
from train.sparse_file import is_sparse_file, load_sparse

ENCODER = "encoder.safetensors"  # in the folder of a pretraining run
PICKLE = "pytorch_model.bin"  # in older folders from the hub
FOREIGN = {
    **dict.fromkeys((".h5", ".hdf5", ".keras"), "Keras weights"),
    ".msgpack": "weights in Flax's format",
    **dict.fromkeys((".npy", ".npz"), "NumPy arrays"),
    ".onnx": "an ONNX model",
    **dict.fromkeys((".pb", ".tflite"), "a TensorFlow model"),
    ".gguf": "a GGUF file",
    **dict.fromkeys((".zip", ".gz", ".tgz"), "an archive: unpack it first"),
}
TORCH = b"PK\x03\x04", b"\x80"  # how PyTorch's files begin: a zip archive, or in old ones a pickle
POINTER = b"version https://git-lfs"


def find_weights(source: str | Path) -> Path:
    """Find the run folder or the weights file that `source` stands for; downloads a name on the hub.

    A folder of pretraining stands for its encoder, and a folder from the hub for its weights.

    Raises:
      UsageError: nothing is there, or a folder without weights.
    """
    if is_hub_name(source):
        return download(str(source), WEIGHTS)
    on_hub = re.fullmatch(r"(?:https?:/+)?huggingface\.co/([\w-]+/[\w.-]+)/?|([\w-]+/[\w.-]+)", str(source))
    if on_hub and (on_hub[1] or not source_path(source).exists()):
        raise UsageError(f"no weights at {source}; a model on the hub is called hf:{on_hub[1] or on_hub[2]}")
    source = source_path(source)
    if not source.exists():
        raise UsageError(f"no weights at {source}")
    if not source.is_dir():
        return source
    if (source / ENCODER).is_file():
        return source / ENCODER
    if pipeline_of(source) == "pretrain":
        raise UsageError(f"{source} is a run of pretraining that is not finished: it has no {ENCODER}")
    if not is_run(source):
        found = [*source.glob("*.safetensors")]
        for file in (source / WEIGHTS, *(found if len(found) == 1 else ()), source / PICKLE):
            if file.is_file():
                return file
        hint = f": name one of {abbreviate([file.name for file in found])}" if found else ""
        if run := next((folder for folder in source.resolve().parents if is_run(folder)), None):
            hint = f": name the run folder, {run}"
        raise UsageError(f"{source} is not a run folder, and has no {WEIGHTS}{hint}")
    return source


def is_run(folder: Path) -> bool:
    """Whether a folder's config.json is a run's; folders from the hub have one too."""
    try:
        return "config" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return (folder / "checkpoints").is_dir()


def load_weights(source: str | Path, variables: dict[str, PyTree]) -> dict[str, PyTree]:
    """Load the weights of `source` into `variables`; a head that is missing or of a different size stays as it was.

    Prints what is left out of a file that holds more than a ResNet.

    Args:
      source: a run folder (of training, or of pretraining for its encoder); a .safetensors file, or a .pth / .pt /
        .bin / .ckpt file (read with `weights_only=True`), with the names of torchvision, timm or transformers (see
        `resnet_jax.torch_weights.canonical`), or a folder with one; the name of a model in `train.hub.ZOO`; or a name
        on the hub, `hf:OWNER/NAME[@REVISION]`.

    Raises:
      UsageError: no such file, one that cannot be read, or weights of a different model; no tensor of it is ignored.
    """
    file = find_weights(source)
    if file.is_dir():
        loaded = load_state(file).variables
    else:
        loaded = load_sparse(file)[0] if is_sparse_file(file) else read_state_dict(file)
    # PyTorch's names have no slash; `save_encoder` may have written Flax's.
    if any(path.startswith("params/") for path in leaves(loaded)):
        return _same_shapes(loaded, variables, source)
    try:
        tensors, left_out = canonical(loaded)
        if bad := [name for name, x in tensors.items() if not np.isfinite(to_array(x)).all()]:
            raise ValueError(f"tensors that are not finite: {abbreviate(bad)}")
        theirs, ours = tensors.get("fc.weight"), variables["params"].get("head")
        classes = None if theirs is None else len(theirs)
        fits = ours is not None and theirs is not None and theirs.shape[:2] == ours["kernel"].shape[::-1]
        fits = fits and "fc.bias" in tensors
        found = from_torch(tensors, variables, new_head=not fits)
    except ValueError as error:
        raise UsageError(f"{source}: {error}") from None
    if left_out:
        listed = ", ".join(f"{module} ({count} tensor{'s' * (count > 1)})" for module, count in left_out.items())
        say(f"note: only the ResNet of {source} is taken; left out: {listed}")
    if not fits and ours is not None and classes is not None:
        theirs_is = f"has {classes} outputs" if "fc.bias" in tensors else "has no bias"
        say(f"note: the head starts from random weights, as the one of {source} {theirs_is}")
    return found


def save_encoder(
    path: Path, variables: dict[str, PyTree], *, flax_names: bool = False, pooled: bool | None = None
) -> None:
    """Write an encoder's variables as safetensors, by torchvision's names, or by their paths with `flax_names`.

    For `pooled` see `resnet_jax.torch_weights.to_torch`.

    Raises:
      RunError: the file cannot be written.
    """
    named = leaves(variables) if flax_names else to_torch(variables, pooled=pooled)
    replace_file(path, save({name: np.asarray(x) for name, x in named.items()}))


def load_masks(source: str | Path, params: PyTree) -> PyTree | None:
    """Load the masks of a sparse run or a sparse file for these parameters; None if `source` has nothing pruned.

    A head of a different size is not pruned.

    Raises:
      UsageError: as `load_weights`, or masks of a different model.
    """
    file = find_weights(source)
    if file.is_dir():
        masks = load_state(file).masks
    elif is_sparse_file(file):
        masks = load_sparse(file)[1]
    else:
        return None
    have, want = leaves(masks), leaves(params)
    if not any(m.ndim for m in have.values()):
        return None
    fits = {p: p in have and p in want and have[p].shape in ((), want[p].shape) for p in {**have, **want}}
    if odd := [p for p, fitting in fits.items() if not fitting and not p.startswith("head/")]:
        raise UsageError(f"{source} has masks of a different model: {abbreviate(odd)} differ")
    return map_with_path(lambda path, x: have[path] if fits[path] else np.ones((), bool), params)


def dense_variables(source: str | Path, like: dict[str, PyTree]) -> dict[str, PyTree]:
    """Load all weights of `source`, head included, in place of `like`.

    Raises:
      UsageError: as `load_weights`, or a head for different classes.
    """
    unknown = map_with_path(lambda path, x: np.full(x.shape, np.nan, np.float32), like)
    found = load_weights(source, unknown)
    if any(np.isnan(x).any() for x in jax.tree.leaves(found["params"].get("head", {}))):
        message = f"{source} has a head for different classes, or none: fine-tune first with python -m train --init"
        raise UsageError(message)
    return found


def widths_of(source: Path) -> tuple[str, tuple[int, ...]]:
    """Read (model, `widths`) of a run folder or a sparse file; no widths if they are the model's defaults."""
    if is_hub_name(source):
        return "", ()
    source = local_path(source)
    if source.is_file() and is_sparse_file(source):
        about = load_sparse(source)[2]
        return about.get("model", ""), tuple(json.loads(about.get("widths", "[]")))
    if not is_run(source) or pipeline_of(source) != "train":
        return "", ()
    config, _ = read_config(source, TrainConfig)
    return config.model, config.widths


def classes_of(source: str | Path) -> list[str]:
    """The classes of a training run, of a sparse file or on a model's card, in the head's order; empty if unknown."""
    folder = source_path(source)
    if folder.is_file() and is_sparse_file(folder):
        return list(json.loads(load_sparse(folder)[2].get("classes", "[]")))
    if not is_run(folder):
        card = read_card(source)
        return list(card.labels) if card else []
    return list(read_config(folder, TrainConfig)[1].get("classes", [])) if pipeline_of(folder) == "train" else []


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """Read a PyTorch weights file as {name: array}; tensors in nested dicts have names like `state_dict.conv1.weight`.

    Raises:
      UsageError: the file is damaged or not a file of weights, or it needs PyTorch, which is not installed.
    """
    if path.suffix.lower() in FOREIGN:
        known = ".safetensors, .pth, .pt, .bin and .ckpt files, run folders and hf:OWNER/NAME"
        raise UsageError(f"{path} cannot be read ({FOREIGN[path.suffix.lower()]}): weights come from {known}")
    start = _start(path)
    if not start:
        raise UsageError(f"{path} is an empty file")
    if start.startswith(POINTER):
        raise UsageError(f"{path} is a pointer of Git LFS, not the weights: fetch them with git lfs pull")
    if path.suffix.lower() == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is not a readable safetensors file: {error}") from None
    if not start.startswith(TORCH):
        raise UsageError(f"{path} is not a readable PyTorch weights file: damaged, or not of PyTorch")
    try:
        import torch
    except ImportError:
        message = f'reading {path} needs PyTorch: pip install -e ".[parity]", or convert it to .safetensors'
        raise UsageError(message) from None
    try:
        with warnings.catch_warnings(action="ignore"):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling a damaged file can raise anything
        raise UsageError(_reason(path, str(error))) from None
    tensors = {name: x for name, x in _flat(content).items() if isinstance(x, torch.Tensor) and x.ndim}
    if not tensors:
        raise UsageError(f"{path} holds no state dict (names and tensors)")
    if meta := [name for name, x in tensors.items() if x.is_meta]:
        raise UsageError(f"{path} holds tensors without values (of the device meta): {abbreviate(meta)}")
    return {name: to_array(x) for name, x in tensors.items()}


def _start(path: Path) -> bytes:
    """The first bytes of a file.

    Raises:
      UsageError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(len(POINTER))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts to {name: leaf}, except the state of an optimizer."""
    if not isinstance(content, Mapping):
        return {prefix.removesuffix("."): content}
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if not re.search("optim|sched|scaler", str(name)) or not isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
    return flat


def _reason(path: Path, message: str) -> str:
    """Say in one line why PyTorch does not read a file, and what to do."""
    if "TorchScript" in message:
        how = f"torch.save(torch.jit.load('{path}').state_dict(), 'weights.pth')"
        return f"{path} is a TorchScript archive: extract its weights with {how}"
    if "weights_only" in message and (kind := re.search(r"GLOBAL (\S+)|type (\S+) ", message)):
        read = f"x = torch.load('{path}', map_location='cpu', weights_only=False)"
        how = f"{read}; torch.save(x['state_dict'], 'weights.pth'), or x['model'], or x.state_dict() of a whole module"
        held = f"{path} holds Python objects next to its weights ({kind[1] or kind[2]}), and loading them can run code"
        return f"{held}; if you trust it, extract the weights: {how}"
    reason = "damaged, or not of PyTorch" if "weights_only" in message else message.partition("\n")[0]
    return f"{path} is not a readable PyTorch weights file: {reason}"


def _same_shapes(given: PyTree, wanted: PyTree, source: str | Path) -> PyTree:
    """The leaves of `given` in the structure of `wanted`, which keeps its head if that of `given` does not fit."""
    have, want = leaves(given), leaves(wanted)
    odd = [
        p for p in {**want, **have} if p not in have or p not in want or not same_shape(p, have[p].shape, want[p].shape)
    ]
    heads = [p for p in want if p.startswith("params/head/")]
    if body := [p for p in odd if not p.startswith("params/head/")]:
        there, here = ("x".join(map(str, side[body[0]].shape)) if body[0] in side else "none" for side in (have, want))
        shapes = f"the first is {there} there and {here} here"
        raise UsageError(f"{source} comes from a different model: {abbreviate(body)} differ; {shapes}")
    kept = heads if {*heads} & {*odd} else []
    return map_with_path(lambda path, leaf: leaf if path in kept else have[path], wanted)
