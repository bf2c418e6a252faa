"""Conversion between PyTorch state dicts and the variables of a `ResNet`, without PyTorch.

Both directions use one table of torchvision's names, which timm shares. A state dict is any mapping from names to
values that `numpy.asarray` takes, such as `safetensors.numpy.load_file(path)` or a PyTorch module's `state_dict()`.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.tree import PyTree, abbreviate, is_head, leaves, map_with_path

WRAPPERS = ("module.", "model.", "backbone.")

# Module paths here, without `stage{i}_block{j}/`, and their PyTorch names.
MODULES = {
    "stem/conv": "conv1",
    "stem/norm": "bn1",
    "stem/conv1": "conv1.0",
    "stem/norm1": "conv1.1",
    "stem/conv2": "conv1.3",
    "stem/norm2": "conv1.4",
    "stem/conv3": "conv1.6",
    "stem/norm3": "bn1",
    **{f"conv{i}": f"conv{i}" for i in (1, 2, 3)},
    **{f"norm{i}": f"bn{i}" for i in (1, 2, 3)},
    "attention/fc1": "se.fc1",
    "attention/fc2": "se.fc2",
    "shortcut/conv": "downsample.0",
    "shortcut/norm": "downsample.1",
    "final/norm": "bn",
    "head": "fc",
}
# In the shortcuts of timm's ResNet-D an average-pool comes first, which shifts the index of the convolution by one.
POOLED = {"shortcut/conv": "downsample.1", "shortcut/norm": "downsample.2"}
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def torch_name(path: str, *, pooled: bool) -> str:
    """Return the PyTorch name of a path below `params` or `batch_stats`.

    For example `layer1.0.conv1.weight` for `stage1_block1/conv1/kernel`.

    Raises:
      ValueError: no `ResNet` has a variable at this path.
    """
    block = re.match(r"stage(\d+)_block(\d+)/", path)
    prefix = f"layer{block[1]}.{int(block[2]) - 1}." if block else ""
    module, _, leaf = path[block.end() if block else 0 :].rpartition("/")
    names = MODULES | POOLED if pooled else MODULES
    if module not in names or leaf not in LEAVES:
        raise ValueError(f"{path} has no PyTorch name: only the variables of a ResNet have one")
    return f"{prefix}{names[module]}.{LEAVES[leaf]}"


def to_layout(path: str, x: Any) -> np.ndarray:
    """Convert a kernel from PyTorch: [O, I, H, W] to [H, W, I, O]; [O, I], or 1x1 in squeeze-excite, to [I, O]."""
    x = np.asarray(x)
    if not path.endswith("/kernel"):
        return x
    if "/attention/" in path and x.shape[2:] == (1, 1):
        x = x[:, :, 0, 0]
    return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T


def from_layout(path: str, x: Any) -> np.ndarray:
    """Invert `to_layout`."""
    x = np.asarray(x)
    if not path.endswith("/kernel"):
        return x
    x = x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T
    return np.ascontiguousarray(x[:, :, None, None] if "/attention/" in path else x)


def canonical(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Rename tensors to torchvision's names: drop wrappers and counters, map `linear` and `shortcut` of CIFAR code."""
    names = {name: x for name, x in state_dict.items() if not name.endswith("num_batches_tracked")}
    while wrapper := next((w for w in WRAPPERS if names and all(name.startswith(w) for name in names)), None):
        names = {name.removeprefix(wrapper): x for name, x in names.items()}
    names = {re.sub(r"^linear\.", "fc.", name): x for name, x in names.items()}
    return {re.sub(r"^(layer\d+\.\d+)\.shortcut\.", r"\1.downsample.", name): x for name, x in names.items()}


def from_torch(state_dict: Mapping[str, Any], variables: PyTree, *, new_head: bool = False) -> PyTree:
    """Return `variables` with all values replaced from a PyTorch `state_dict`, in the layout and dtype of `variables`.

    Names are those of torchvision and timm, or of CIFAR repositories that use `linear` for `fc` and `shortcut` for
    `downsample` (https://github.com/kuangliu/pytorch-cifar, https://github.com/akamaster/pytorch_resnet_cifar10), with
    or without the prefix of a wrapper: `module.`, `model.` or `backbone.`. The last norm of pre-activation networks is
    `bn`.

    Args:
      state_dict: arrays by name; convolutions [O, I / groups, H, W], linear layers [O, I].
      variables: `{"params": ..., "batch_stats": ...}` from `model.init`, or their shapes from `jax.eval_shape` of it.
      new_head: keep the head of `variables`, for a different set of classes, and ignore the head of the source.

    Raises:
      ValueError: tensors are missing, unexpected or have a different shape; one line names the first of each kind.
    """
    source = canonical(state_dict)
    pooled = any(re.fullmatch(r"layer\d+\.\d+\.downsample\.2\..+", name) for name in source)
    if new_head:
        source = {name: x for name, x in source.items() if not name.startswith("fc.")}
    missing, shapes, used = [], [], set()

    def load_leaf(path: str, leaf: Any) -> Any:
        _, _, path = path.partition("/")  # the collection
        if new_head and is_head(path, leaf):
            return leaf
        name = torch_name(path, pooled=pooled)
        if name not in source:
            missing.append(name)
            return leaf
        used.add(name)
        x = to_layout(path, source[name])
        if x.shape != leaf.shape:
            shapes.append(f"{name} {list(np.shape(source[name]))} (here {list(x.shape)}, not {list(leaf.shape)})")
            return leaf
        return jnp.array(x, leaf.dtype)  # a copy: PyTorch may modify its tensor in place

    loaded = map_with_path(load_leaf, variables)
    unexpected = [name for name in source if name not in used]
    problems = {"missing": missing, "unexpected": unexpected, "of a different shape": shapes}
    if any(problems.values()):
        listed = "; ".join(f"{kind} {abbreviate(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"the state dict does not fit the model: {listed}")
    return loaded


def to_torch(variables: PyTree) -> dict[str, np.ndarray]:
    """Return the state dict, arrays by torchvision's and timm's names, of a `ResNet`'s variables.

    Takes any tree with their structure, such as gradients in `{"params": gradients}`. PyTorch's `load_state_dict`
    accepts the result in strict mode, although `num_batches_tracked` is absent. `from_torch` restores the same bits.

    Raises:
      ValueError: these are not the variables of a `ResNet`.
    """
    flat = {path.partition("/")[2]: leaf for path, leaf in leaves(jax.device_get(variables)).items()}
    # A deep stem implies ResNet-D.
    pooled = any(path.startswith("stem/conv1/") for path in flat)
    return {torch_name(path, pooled=pooled): from_layout(path, leaf) for path, leaf in flat.items()}
