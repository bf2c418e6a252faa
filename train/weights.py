"""Weights to start from: a run of this project, or a PyTorch state dict."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from resnet_jax.torch_weights import canonical, from_torch, to_torch
from resnet_jax.tree import PyTree, is_head, leaves, map_with_path
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
        return _same_shapes(load_state(source).variables, variables, source)
    if not source.is_file():
        raise UsageError(f"no weights at {source}")
    if is_sparse_file(source):
        return _same_shapes(load_sparse(source)[0], variables, source)
    state_dict = read_state_dict(source)
    if any(name.startswith("params/") for name in state_dict):  # written by `save_encoder` with Flax's names
        return _same_shapes(state_dict, variables, source)
    theirs, ours = canonical(state_dict).get("fc.weight"), variables["params"].get("head")
    fits = theirs is not None and ours is not None and theirs.shape == ours["kernel"].shape[::-1]
    try:
        return from_torch(state_dict, variables, new_head=not fits)
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
    found = leaves(masks)
    if not any(m.ndim for m in found.values()):
        return None
    for path in sorted(found.keys() ^ leaves(params).keys()):
        if not path.startswith("head/"):
            raise UsageError(f"{source} has masks of a different model: {path} is only in one of the two")

    def fitting(path: str, x: Any) -> Any:
        mask = found.get(path)
        if is_head(path, x) and (mask is None or mask.shape != x.shape):
            return np.ones((), bool)
        if mask is None or mask.shape not in ((), x.shape):
            raise UsageError(f"{source} has masks of a different model: {path} has a different shape there")
        return mask

    return map_with_path(fitting, params)


def dense_variables(source: Path, like: dict[str, PyTree]) -> dict[str, PyTree]:
    """Load all weights of `source`, head included, in place of `like`.

    Raises:
      UsageError: as `load_weights`, or a head for different classes.
    """
    unknown = map_with_path(lambda path, x: np.full(x.shape, np.nan, np.float32), like)
    found = load_weights(source, unknown)
    if any(np.isnan(np.asarray(x)).any() for x in jax.tree.leaves(found["params"].get("head", {}))):
        raise UsageError(
            f"{source} has a head for different classes, or none: fine-tune first with python -m train --init"
        )
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
        raise UsageError(
            f'reading {path} needs PyTorch: pip install -e ".[parity]", or convert it to .safetensors'
        ) from None
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
    have, want = leaves(given), leaves(wanted)

    def of_head(path: str) -> bool:
        return path.startswith("params/head/")

    odd = sorted(p for p in have.keys() ^ want.keys() if not of_head(p))
    odd += [p for p in want if p in have and have[p].shape != want[p].shape and not of_head(p)]
    if odd:
        raise UsageError(f"{source} comes from a different model: {odd[0]} and {len(odd) - 1} more differ")
    heads = [p for p in want if of_head(p)]
    fits = all(p in have and have[p].shape == want[p].shape for p in heads)
    return map_with_path(lambda path, leaf: leaf if of_head(path) and not fits else have[path], wanted)
