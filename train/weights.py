"""Weights to start from: a run of this project, or a PyTorch state dict."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from resnet_jax.torch_weights import canonical, from_torch, to_torch
from resnet_jax.tree import PyTree, abbreviate, leaves, map_with_path
from train.config import TrainConfig
from train.errors import UsageError
from train.prune.sparse_file import is_sparse_file, load_sparse
from train.run_folder import load_state, pipeline_of, read_config

ENCODER = "encoder.safetensors"  # in the folder of a pretraining run


def load_weights(source: Path, variables: dict[str, PyTree]) -> dict[str, PyTree]:
    """Load the weights of `source` into `variables`; a head that is missing or of a different size stays as it was.

    Args:
      source: a run folder (of training, or of pretraining for its encoder), a .safetensors file, or a .pth / .pt /
        .bin file (read with `weights_only=True`) with torchvision's or timm's names.

    Raises:
      UsageError: no such file, one that cannot be read, or weights of a different model; no tensor is ignored.
    """
    source = source.expanduser()
    if (source / ENCODER).is_file():
        source = source / ENCODER
    if source.is_dir() and pipeline_of(source) == "pretrain":
        raise UsageError(f"{source} is a run of pretraining that is not finished: it has no {ENCODER}")
    if source.is_dir():
        loaded = load_state(source).variables
    elif not source.is_file():
        raise UsageError(f"no weights at {source}")
    else:
        loaded = load_sparse(source)[0] if is_sparse_file(source) else read_state_dict(source)
    # PyTorch's names have no slash; `save_encoder` may have written Flax's.
    if any(path.startswith("params/") for path in leaves(loaded)):
        return _same_shapes(loaded, variables, source)
    theirs, ours = canonical(loaded).get("fc.weight"), variables["params"].get("head")
    fits = theirs is not None and ours is not None and theirs.shape == ours["kernel"].shape[::-1]
    try:
        return from_torch(loaded, variables, new_head=not fits)
    except ValueError as error:
        raise UsageError(f"{source}: {error}") from None


def save_encoder(path: Path, variables: dict[str, PyTree], *, flax_names: bool = False) -> None:
    """Write an encoder's variables as safetensors, by torchvision's names, or by their paths with `flax_names`."""
    named = leaves(variables) if flax_names else to_torch(variables)
    save_file({name: np.asarray(x) for name, x in named.items()}, path)


def load_masks(source: Path, params: PyTree) -> PyTree | None:
    """Load the masks of a sparse run or a sparse file for these parameters; None if `source` has nothing pruned.

    A head of a different size is not pruned.

    Raises:
      UsageError: as `load_weights`, or masks of a different model.
    """
    source = source.expanduser()
    if source.is_dir() and not (source / ENCODER).is_file():
        masks = load_state(source).masks
    elif source.is_file() and is_sparse_file(source):
        masks = load_sparse(source)[1]
    else:
        return None
    have, want = leaves(masks), leaves(params)
    if not any(m.ndim for m in have.values()):
        return None
    fits = {p: p in have and p in want and have[p].shape in ((), want[p].shape) for p in {**have, **want}}
    if odd := [p for p, fitting in fits.items() if not fitting and not p.startswith("head/")]:
        raise UsageError(f"{source} has masks of a different model: {abbreviate(odd)} differ")
    return map_with_path(lambda path, x: have[path] if fits[path] else np.ones((), bool), params)


def dense_variables(source: Path, like: dict[str, PyTree]) -> dict[str, PyTree]:
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
    source = source.expanduser()
    if source.is_file() and is_sparse_file(source):
        about = load_sparse(source)[2]
        return about.get("model", ""), tuple(json.loads(about.get("widths", "[]")))
    if not (source / "config.json").is_file() or pipeline_of(source) != "train":
        return "", ()
    config, _ = read_config(source, TrainConfig)
    return config.model, config.widths


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """Read a PyTorch weights file as {name: array}; wrappers such as {"state_dict": ...} are unwrapped.

    Raises:
      UsageError: the file is damaged, or it needs PyTorch, which is not installed.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UsageError(f"{path} is not a readable safetensors file: {error}") from None
    try:
        import torch
    except ImportError:
        message = f'reading {path} needs PyTorch: pip install -e ".[parity]", or convert it to .safetensors'
        raise UsageError(message) from None
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling a damaged file can raise anything
        raise UsageError(f"{path} is not a readable PyTorch weights file: {error}") from None
    for wrapper in ("state_dict", "model", "net"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise UsageError(f"{path} holds no state dict (names and tensors)")
    return {name: tensor.numpy() for name, tensor in content.items()}


def _same_shapes(given: PyTree, wanted: PyTree, source: Path) -> PyTree:
    """The leaves of `given` in the structure of `wanted`, which keeps its head if that of `given` does not fit."""
    have, want = leaves(given), leaves(wanted)
    odd = [p for p in {**want, **have} if p not in have or p not in want or have[p].shape != want[p].shape]
    heads = [p for p in want if p.startswith("params/head/")]
    if body := [p for p in odd if not p.startswith("params/head/")]:
        raise UsageError(f"{source} comes from a different model: {abbreviate(body)} differ")
    kept = heads if {*heads} & {*odd} else []
    return map_with_path(lambda path, leaf: leaf if path in kept else have[path], wanted)
