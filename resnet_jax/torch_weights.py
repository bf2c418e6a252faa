"""Conversion between PyTorch state dicts and the variables of a `ResNet`, without PyTorch.

Both directions use one table of torchvision's names, which timm shares; `canonical` translates the names of other code
to them. A state dict is any mapping from names to arrays or tensors, such as `safetensors.numpy.load_file(path)` or a
PyTorch module's `state_dict()`.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.tree import PyTree, abbreviate, is_head, leaves, map_with_path

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

Rename = tuple[str, str | Callable[[re.Match[str]], str]]


def _stage(match: re.Match[str]) -> str:
    """Number the stages from 1, as torchvision does."""
    return f"layer{int(match[1]) + 1}.{match[2]}."


# Ways to name the tensors of a ResNet: a pattern of the first block's, and what turns the names into torchvision's.
NAMINGS: tuple[tuple[str, tuple[Rename, ...]], ...] = (
    # torchvision and timm; `shortcut` in CIFAR repositories, `layer0` and `se_module` in timm's legacy networks
    (
        r"layer1\.0\.(?:conv|bn|downsample|shortcut|se)",
        ((r"^(layer\d+\.\d+)\.shortcut\.", r"\1.downsample."), (r"^layer0\.", ""), (r"\.se_module\.", ".se.")),
    ),
    # timm's pre-activation networks (V2)
    (
        r"stages\.0\.blocks\.0\.",
        (
            (r"^stages\.(\d+)\.blocks\.(\d+)\.", _stage),
            (r"\.norm(\d)\.", r".bn\1."),
            (r"\.downsample\.conv\.", ".downsample.0."),
            (r"^stem\.conv\.", "conv1."),
            (r"^norm\.", "bn."),
        ),
    ),
    # torch.nn.Sequential of torchvision's modules
    (
        r"4\.0\.(?:conv|bn)",
        (
            (r"^0\.", "conv1."),
            (r"^1\.", "bn1."),
            (r"^([4-7])\.(\d+)\.", lambda m: f"layer{int(m[1]) - 3}.{m[2]}."),
            (r"^9\.", "fc."),
        ),
    ),
    # transformers
    (
        r"(?:resnet\.)?encoder\.stages\.0\.layers\.0\.",
        (
            (r"^resnet\.", ""),
            (r"^embedder\.embedder\.convolution\.", "conv1."),
            (r"^embedder\.embedder\.normalization\.", "bn1."),
            (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.", _stage),
            (r"\.shortcut\.convolution\.", ".downsample.0."),
            (r"\.shortcut\.normalization\.", ".downsample.1."),
            (r"\.layer\.(\d)\.convolution\.", lambda m: f".conv{int(m[1]) + 1}."),
            (r"\.layer\.(\d)\.normalization\.", lambda m: f".bn{int(m[1]) + 1}."),
        ),
    ),
)
BODY = r"(?:conv1|bn1|bn|layer\d+\.\d+)\."
HEAD = r"(?:fc|linear|last_linear|classifier|head|head\.fc)(?:\.\d+)?\.(weight|bias)"
# Networks that follow another one, which is the one to take.
FOLLOWER = r"(?:^|[._])(?:momentum|target|teacher|ema|averaged|swa|key|k|m)(?:[._]|$)"


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


def to_array(x: Any) -> np.ndarray:
    """Convert an array or a PyTorch tensor of any floating-point dtype, device and layout, with a gradient or not."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = x.dequantize() if x.is_quantized else x
        x = x.to_dense() if x.is_sparse or x.is_sparse_csr else x
        x = x.float() if x.is_floating_point() else x  # NumPy has no bfloat16
    return np.asarray(x)


def to_layout(path: str, x: Any) -> np.ndarray:
    """Convert a kernel from PyTorch: [O, I, H, W] to [H, W, I, O]; [O, I], or 1x1 in a linear layer, to [I, O]."""
    x = to_array(x)
    if not path.endswith("/kernel"):
        return x
    if ("/attention/" in path or path == "head/kernel") and x.shape[2:] == (1, 1):
        x = x[:, :, 0, 0]
    return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T


def from_layout(path: str, x: Any) -> np.ndarray:
    """Invert `to_layout`."""
    x = np.asarray(x)
    if not path.endswith("/kernel"):
        return x
    x = x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T
    return np.ascontiguousarray(x[:, :, None, None] if "/attention/" in path else x)


def canonical(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """Find the ResNet in a state dict: (its tensors by torchvision's names, what else there is).

    The names may have any prefix, as wrappers and larger models add. If there are several ResNets, such as an encoder
    and its moving average, the one that is trained is taken, then the largest. What is left out is given as the number
    of tensors in each module; counters of batches are not mentioned.

    Raises:
      ValueError: there are several ResNets of equal rank, or two tensors for the same place.
    """
    names = [name for name in state_dict if not name.endswith("num_batches_tracked")]
    found = {match[1]: renames for first, renames in NAMINGS for match in _matches(rf"((?:.*?\.)??){first}", names)}
    sizes = {prefix: sum(name.startswith(prefix) for name in names) for prefix in found}

    def rank(prefix: str) -> tuple[bool, int]:
        return bool(re.search(FOLLOWER, prefix)), -sizes[prefix]

    ranked = sorted(found, key=rank)
    rivals = [prefix for prefix in ranked if rank(prefix) == rank(ranked[0])]
    if len(rivals) > 1:
        listed = ", ".join(prefix.rstrip(".") or "without a prefix" for prefix in rivals)
        raise ValueError(f"there are {len(rivals)} networks ({listed}): keep the tensors of one")
    prefix, renames = (ranked[0], found[ranked[0]]) if ranked else ("", NAMINGS[0][1])

    renamed = {}
    for name in names:
        if name.startswith(prefix):
            renamed[name] = name.removeprefix(prefix)
            for pattern, replacement in renames:
                renamed[name] = re.sub(pattern, replacement, renamed[name])
    # A head is one linear layer, whatever its name; if there are several, only torchvision's name is clear.
    heads = {match.string for match in _matches(rf"{HEAD}$", renamed.values())}
    layers = {name.rpartition(".")[0] for name in heads}
    head = "fc" if "fc" in layers else next(iter(layers)) if len(layers) == 1 else None
    kept: dict[str, str] = {}
    for name, new in renamed.items():
        module, _, leaf = new.rpartition(".")
        target = f"fc.{leaf}" if module == head else new if re.match(BODY, new) else None
        if target in kept:
            raise ValueError(f"{kept[target]} and {name} are the same tensor of a ResNet")
        if target is not None:
            kept[target] = name
    used = {*kept.values()}
    left_out = Counter(_module(name, prefix) for name in names if name not in used)
    return {target: state_dict[name] for target, name in kept.items()}, dict(left_out)


def _matches(pattern: str, names: Iterable[str]) -> list[re.Match[str]]:
    return [match for name in names if (match := re.match(pattern, name))]


def _module(name: str, prefix: str) -> str:
    """The module that a tensor outside the network belongs to: its name as far as it tells it from `prefix`."""
    parts, ours = name.split("."), prefix.split(".")
    shared = next((i for i, (a, b) in enumerate(zip(parts, ours, strict=False)) if a != b), len(parts) - 1)
    return ".".join(parts[: shared + 1])


def same_shape(path: str, given: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether an array fits a leaf; squeeze-excite may have any number of hidden units."""
    if "/attention/fc1/" in path:  # [C, units] and [units]
        return given[:-1] == wanted[:-1] and len(given) == len(wanted)
    if path.endswith("/attention/fc2/kernel"):
        return given[1:] == wanted[1:] and len(given) == len(wanted)
    return given == wanted


def from_torch(state_dict: Mapping[str, Any], variables: PyTree, *, new_head: bool = False) -> PyTree:
    """Return `variables` with all values replaced from a PyTorch `state_dict`, in the layout and dtype of `variables`.

    Names are those of torchvision and timm, of transformers, or of CIFAR repositories that use `linear` for `fc` and
    `shortcut` for `downsample` (https://github.com/kuangliu/pytorch-cifar,
    https://github.com/akamaster/pytorch_resnet_cifar10), with or without the prefixes of wrappers such as `module.`.
    The last norm of pre-activation networks is `bn`. Squeeze-excite layers get the hidden units that the source has.

    Args:
      state_dict: arrays or tensors by name, floating-point; convolutions [O, I / groups, H, W], linear layers [O, I].
      variables: `{"params": ..., "batch_stats": ...}` from `model.init`, or their shapes from `jax.eval_shape` of it.
      new_head: keep the head of `variables`, for a different set of classes, and ignore the head of the source.

    Raises:
      ValueError: tensors are missing, unexpected, or have a different shape or dtype; one line names the first of each
        kind. `canonical` finds a network among other tensors.
    """
    source, left_out = canonical(state_dict)
    pooled = any(re.fullmatch(r"layer\d+\.\d+\.downsample\.2\..+", name) for name in source)
    if new_head:
        source = {name: x for name, x in source.items() if not name.startswith("fc.")}
    missing, shapes, integers, used = [], [], [], set()

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
        if not jnp.issubdtype(x.dtype, jnp.floating):
            integers.append(name)
            return leaf
        if not same_shape(path, x.shape, leaf.shape):
            shapes.append(f"{name} {list(np.shape(source[name]))} (here {list(x.shape)}, not {list(leaf.shape)})")
            return leaf
        return jnp.array(x, leaf.dtype)  # a copy: PyTorch may modify its tensor in place

    loaded = map_with_path(load_leaf, variables)
    unexpected = [*(name for name in source if name not in used), *left_out]
    kinds = "missing", "unexpected", "of a different shape", "not floating-point"
    problems = dict(zip(kinds, (missing, unexpected, shapes, integers), strict=True))
    if any(problems.values()):
        listed = "; ".join(f"{kind} {abbreviate(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"the state dict does not fit the model: {listed}")
    return loaded


def to_torch(variables: PyTree, *, pooled: bool | None = None) -> dict[str, np.ndarray]:
    """Return the state dict, arrays by torchvision's and timm's names, of a `ResNet`'s variables.

    `pooled` says whether shortcuts pool first, as in ResNet-D; None assumes it of networks with a deep stem, so pass
    False for ResNet-C. Pre-activation networks, which timm names differently, have `bn` as the last norm.

    Takes any tree with their structure, such as gradients in `{"params": gradients}`. PyTorch's `load_state_dict`
    accepts the result in strict mode, although `num_batches_tracked` is absent. `from_torch` restores the same bits.

    Raises:
      ValueError: these are not the variables of a `ResNet`.
    """
    flat = {path.partition("/")[2]: leaf for path, leaf in leaves(jax.device_get(variables)).items()}
    if pooled is None:
        pooled = any(path.startswith("stem/conv1/") for path in flat)
    return {torch_name(path, pooled=pooled): from_layout(path, leaf) for path, leaf in flat.items()}
