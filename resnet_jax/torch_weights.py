"""PyTorch state dicts to variables of `ResNet` and back, without PyTorch.

Both ways go through one table of names: torchvision's, which timm shares. A state dict is any mapping of names to what
`numpy.asarray` takes, for example `safetensors.numpy.load_file(path)` or a PyTorch module's own `state_dict()`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.tree import PyTree, abbreviate, is_head, leaves, map_with_path

WRAPPERS = ("module.", "model.", "backbone.")

# Module paths of ours, without `stage{i}_block{j}/`, and their PyTorch names.
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
# An average-pool comes first in the shortcuts of timm's "D" nets: their convolutions have a later place.
POOLED = {"shortcut/conv": "downsample.1", "shortcut/norm": "downsample.2"}
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def torch_name(path: str, *, pooled: bool) -> str:
    """`layer1.0.conv1.weight` for `stage1_block1/conv1/kernel`, a path below `params` or `batch_stats`.

    Raises:
      ValueError: no residual network of ours has a parameter of that name.
    """
    block = re.match(r"stage(\d+)_block(\d+)/", path)
    prefix = f"layer{block[1]}.{int(block[2]) - 1}." if block else ""
    module, _, leaf = path[block.end() if block else 0 :].rpartition("/")
    names = MODULES | POOLED if pooled else MODULES
    if module not in names or leaf not in LEAVES:
        raise ValueError(f"{path} has no PyTorch name: only the variables of a ResNet have one")
    return f"{prefix}{names[module]}.{LEAVES[leaf]}"


def to_layout(path: str, x: Any) -> np.ndarray:
    """Kernels from PyTorch's layout to ours: [O, I, H, W] to [H, W, I, O], [O, I] or (squeeze-excite) 1x1 to [I, O]."""
    x = np.asarray(x)
    if not path.endswith("/kernel"):
        return x
    if "/attention/" in path and x.shape[2:] == (1, 1):
        x = x[:, :, 0, 0]
    return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T


def from_layout(path: str, x: Any) -> np.ndarray:
    """The inverse of `to_layout`."""
    x = np.asarray(x)
    if not path.endswith("/kernel"):
        return x
    x = x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T
    return np.ascontiguousarray(x[:, :, None, None] if "/attention/" in path else x)


def canonical(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors by torchvision's names: wrappers and counters off, `linear` and `shortcut` as the CIFAR repos say."""
    names = {name: x for name, x in state_dict.items() if not name.endswith("num_batches_tracked")}
    while wrapper := next((w for w in WRAPPERS if names and all(name.startswith(w) for name in names)), None):
        names = {name.removeprefix(wrapper): x for name, x in names.items()}
    names = {re.sub(r"^linear\.", "fc.", name): x for name, x in names.items()}
    return {re.sub(r"^(layer\d+\.\d+)\.shortcut\.", r"\1.downsample.", name): x for name, x in names.items()}


def has_pooled_shortcuts(names: Iterable[str]) -> bool:
    """Whether shortcuts count an average-pool before their convolution, as timm's "D" nets do."""
    return any(re.fullmatch(r"layer\d+\.\d+\.downsample\.2\..+", name) for name in names)


def from_torch(state_dict: Mapping[str, Any], variables: PyTree, *, new_head: bool = False) -> PyTree:
    """`variables` with every value taken from a PyTorch `state_dict`, by name, in our layout and dtype.

    Names are those of torchvision and timm, or of the CIFAR repositories that say `linear` for `fc` and `shortcut` for
    `downsample` (https://github.com/kuangliu/pytorch-cifar, https://github.com/akamaster/pytorch_resnet_cifar10), all
    with or without a wrapper's `module.`, `model.` or `backbone.`. The last norm of pre-activation nets is `bn`.

    Args:
      state_dict: arrays by name; convolutions [O, I / groups, H, W], linear layers [O, I].
      variables: `{"params": ..., "batch_stats": ...}` as `model.init` or, abstractly, `jax.eval_shape` of it gives.
      new_head: keep `variables`' own head, for other classes than the source's; the source's is not looked at.

    Raises:
      ValueError: tensors are missing, left over or of another shape, in one line that names the first of each.
    """
    source = canonical(state_dict)
    pooled = has_pooled_shortcuts(source)
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
            shapes.append(f"{name} {list(np.shape(source[name]))} (as ours {list(x.shape)}, not {list(leaf.shape)})")
            return leaf
        return jnp.array(x, leaf.dtype)  # a copy: PyTorch may go on to change its own

    loaded = map_with_path(load_leaf, variables)
    unexpected = [name for name in source if name not in used]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if any(problems.values()):
        listed = "; ".join(f"{kind} {abbreviate(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"the state dict does not fit the model: {listed}")
    return loaded


def to_torch(variables: PyTree) -> dict[str, np.ndarray]:
    """The state dict, arrays by torchvision's and timm's names, of a `ResNet`'s `{"params": ..., "batch_stats": ...}`.

    Takes any tree of those names, for example gradients as `{"params": gradients}`. A deep stem is read as the sign of
    a "D" net, whose shortcuts timm names `downsample.1`, `.2`. PyTorch's `load_state_dict` takes the result without
    `num_batches_tracked`, also strictly. `from_torch` of it gives back the same bits.

    Raises:
      ValueError: not the variables of a `ResNet`.
    """
    flat = {path.partition("/")[2]: leaf for path, leaf in leaves(jax.device_get(variables)).items()}
    pooled = any(path.startswith("stem/conv1/") for path in flat)
    return {torch_name(path, pooled=pooled): from_layout(path, leaf) for path, leaf in flat.items()}
