"""Channel pruning of a `ResNet`: groups of coupled channels, masks over whole channels, and the smaller network.

Many leaves carry a channel: one convolution produces it, a norm scales and shifts it, and others consume it. The
channels of a residual stream are shared by all blocks that add to it (https://arxiv.org/abs/2301.12900). When a mask is
False wherever a channel is carried, including the norms' biases, that channel is exactly 0 after the norm, so `compact`
can remove it without changing the output. Channels of grouped convolutions are not pruned, nor are streams that
determine the width of another layer (squeeze-excite, `DeepStem`).
"""

import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from math import gcd
from types import ModuleType
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.layers import GroupNorm, StandardizedConv
from resnet_jax.masks import check_masks, largest, sortable
from resnet_jax.resnet import PreActBlock, ResNet
from resnet_jax.tree import PyTree, leaves, map_with_path

Scope = Literal["uniform", "global"]


@dataclass(frozen=True)
class Member:
    """Slice of a leaf that carries a group's channels: `[offset, offset + size)` along `axis` of the leaf at `path`.

    `scored` members count in a channel's score: the kernels that produce it and the scales of its norms.
    """

    path: str
    axis: int
    offset: int
    scored: bool


@dataclass(frozen=True)
class ChannelGroup:
    """Channels [size] that can be kept or removed one by one, and all leaves that carry them.

    `copies` is 2 if channel i stands for a pair of channels, else 1.
    """

    name: str
    size: int
    copies: int
    members: tuple[Member, ...]


def widths_of(model: ResNet, params: PyTree) -> tuple[int, ...]:
    """Return the output channels of each convolution, the `ResNet.widths` of these parameters.

    Raises:
      ValueError: the parameters lack the stem or a block of the model.
    """
    flat = leaves(params)
    kernels = [_kernels(flat, "stem")[-1], *(path for _, block in _blocks(model) for path in _kernels(flat, block))]
    return tuple(flat[path].shape[-1] for path in kernels)


def channel_groups(model: ResNet, params: PyTree) -> tuple[ChannelGroup, ...]:
    """Return the groups of channels that can be pruned.

    Groups inside a block are named after the convolution that produces them, such as `stage1_block1/conv1`. `stream2`
    is the residual stream of the second stage; `stem` is the output of the stem unless stage 1 begins with an identity.

    With the `ZeroPad` shortcut, the channels of a stage continue through all later stages, and `stream2` are the
    channels added by the second stage, half below and half above the previous ones. They are pruned as pairs, the i-th
    below with the i-th above, so that both halves stay equal and the shortcut's padding stays valid.

    The model has blocks from `resnet_jax.resnet` and may be compacted already; `params` may be shapes.

    Raises:
      ValueError: the parameters lack the stem or a block of the model, or the model has group norms or standardised
        convolutions, whose statistics depend on other channels.
    """
    for layer, name in ((model.norm, "group norm"), (model.conv, "standardised convolutions")):
        if getattr(layer, "func", layer) in (GroupNorm, StandardizedConv):
            raise ValueError(f"channels of networks with {name} cannot be removed: prune single weights")
    # Walk the network from input to output and collect the members of each group by name. `stream` names the groups
    # that make up the current residual stream, from first channel to last; groups in `fixed` cannot be pruned.
    flat = leaves(params)
    block_class: Any = getattr(model.block, "func", model.block)
    preact = issubclass(block_class, PreActBlock)
    members: dict[str, list[Member]] = defaultdict(list)
    sizes: dict[str, int] = {}
    fixed: set[str] = set()

    def add(groups: Sequence[str], path: str, axis: int, *, scored: bool = False) -> None:
        offset = 0
        for name in groups if path in flat else ():
            members[name].append(Member(path, axis, offset, scored))
            offset += sizes[name]

    def add_norm(groups: Sequence[str], module: str) -> None:
        add(groups, f"{module}/scale", 0, scored=True)
        add(groups, f"{module}/bias", 0)

    # The stem produces the first stream, which stage 1 shares if its first block has an identity shortcut.
    stem = _kernels(flat, "stem")[-1]
    channels = flat[stem].shape[-1]
    first = _kernels(flat, "stage1_block1")[-1]
    tied = "stage1_block1/shortcut/conv/kernel" not in flat and flat[first].shape[-1] == channels
    stream = ["stream1" if tied else "stem"]
    sizes[stream[0]] = channels
    if stem != "stem/conv/kernel":
        fixed |= {*stream}  # the inner width of a `DeepStem` is half its output width
    add(stream, stem, 3, scored=True)
    add_norm(stream, "stem/norm")

    for stage, block in _blocks(model):
        # The first convolution and the shortcut consume the stream.
        kernels = _kernels(flat, block)
        # A norm belongs to the input of a convolution in pre-activation blocks, and to its output in others.
        norms = [f"{block}/norm{i}" for i in range(1, len(kernels) + 1)]
        if preact:
            add_norm(stream, norms[0])
        add(stream, kernels[0], 2)
        add(stream, f"{block}/shortcut/conv/kernel", 2)

        # Each output of a grouped convolution sees only its own group of inputs; removing channels would regroup them.
        pairs = list(pairwise(kernels))
        grouped = any(flat[kernel].shape[3] != flat[consumer].shape[2] for kernel, consumer in pairs)
        for i, (kernel, consumer) in enumerate(() if grouped else pairs):
            name = kernel.removesuffix("/kernel")
            sizes[name] = flat[kernel].shape[3]
            add([name], kernel, 3, scored=True)
            add_norm([name], norms[i + 1] if preact else norms[i])
            add([name], consumer, 2)

        # The shortcut determines the block's output stream: a projection starts a new one, zero-padding widens it.
        missing = flat[kernels[-1]].shape[3] - sum(sizes[name] for name in stream)
        name = f"stream{stage}"
        if f"{block}/shortcut/conv/kernel" in flat:
            stream = [name]
            sizes[name] = flat[kernels[-1]].shape[3]
        elif missing:
            # The odd channel, if any, is the last one, where the shortcut pads one channel more.
            odd = f"{name}_odd"
            sizes[name], sizes[odd] = missing // 2, missing % 2
            fixed.add(odd)
            stream = [name, *stream, name, odd]
        # The last convolution and the shortcut both produce the output stream.
        add(stream, kernels[-1], 3, scored=True)
        add(stream, f"{block}/shortcut/conv/kernel", 3, scored=True)
        add_norm(stream, f"{block}/shortcut/norm")
        if not preact:
            add_norm(stream, norms[-1])
        if any(path.startswith(f"{block}/attention/") for path in flat):
            fixed |= {*stream}  # the inner width of squeeze-excite is a fraction of the stream's width

    # The final norm and the head consume the last stream.
    add_norm(stream, "final/norm")
    add(stream, "head/kernel", 0)
    if model.num_classes is None:
        fixed |= {*stream}  # the features are the output
    return tuple(
        ChannelGroup(name, sizes[name], 2 if stream.count(name) == 2 else 1, tuple(group_members))
        for name, group_members in members.items()
        if name not in fixed
    )


def channel_scores(scores: PyTree, groups: Sequence[ChannelGroup]) -> dict[str, jax.Array]:
    """Sum the scores of each channel over the `scored` members of its group; float32 [size] by group name.

    `scores` is a non-negative tree with the structure of the parameters, as from `resnet_jax.scores`.
    """
    flat = leaves(scores)
    return {
        group.name: sum(
            (_along(flat[m.path].astype(jnp.float32), m, group.size, "sum") for m in group.members if m.scored),
            start=jnp.zeros(group.size),
        )
        for group in groups
    }


def channel_masks(
    scores: dict[str, jax.Array],
    sparsity: float | jax.Array,
    *,
    groups: Sequence[ChannelGroup],
    params: PyTree,
    scope: Scope = "uniform",
    round_to: int = 8,
    masks: PyTree | None = None,
) -> PyTree:
    """Return masks that keep the channels with the highest scores; ties keep the lower index.

    They are bool in the shape of each leaf that carries a group, and a 0-d True for every other leaf.

    The number of channels left in a group is rounded to the nearest multiple of `round_to` (ties round up), at least
    one multiple, or to all channels if that is nearer.

    Args:
      scores: non-negative [size] for each group, from `channel_scores`.
      sparsity: the fraction of channels to remove, in [0, 1); may be traced.
      groups: all or some groups from `channel_groups`; channels of others are kept.
      params: the parameters, or their shapes.
      scope: `uniform` removes the same fraction of each group; `global` ranks all groups together, after dividing the
        scores of a group by their mean, and counts a pair as one channel.
      round_to: at least 1.
      masks: previous masks; the channels they remove stay removed and count as removed.

    Raises:
      ValueError: there are no groups, the scope is unknown, or `sparsity` or `round_to` is out of range.
    """
    if not groups:
        raise ValueError("no channels to prune: the model has no such groups")
    if scope not in get_args(Scope):
        raise ValueError(f"unknown scope {scope!r}; choose one of {', '.join(get_args(Scope))}")
    if not isinstance(sparsity, jax.core.Tracer) and not 0 <= float(sparsity) < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    if round_to < 1:
        raise ValueError(f"round_to must be at least 1, got {round_to}")

    # Channels that are already removed rank below all others, whatever their scores.
    alive = {group.name: True for group in groups} if masks is None else kept_channels(masks, groups)
    keys = []
    for group in groups:
        x = jnp.where(alive[group.name], scores[group.name].astype(jnp.float32), 0)
        # Removed channels count in the mean as 0, so that gradual and one-shot pruning give about the same result.
        mean = x.mean() if scope == "global" else 1.0
        keys.append(sortable(x / jnp.maximum(mean, jnp.finfo(jnp.float32).tiny), alive[group.name]))

    # Target number of channels per group: a fixed fraction, or the channels it has among the best overall.
    sizes = np.array([group.size for group in groups], np.float32)
    share = 1 - jnp.asarray(sparsity, jnp.float32)
    targets = share * sizes
    if scope == "global":
        best = largest(keys, jnp.round(share * sizes.sum())[None].astype(jnp.int32), [0] * len(groups))
        targets = jnp.stack([x.sum() for x in best]).astype(jnp.float32)
    # Round to multiples, or to all channels if that is nearer; a pair counts as two channels.
    steps = np.array([round_to // gcd(round_to, group.copies) for group in groups], np.float32)
    # 1 - sparsity is inexact in float32, so allow for a small error where a half rounds up.
    multiples = jnp.maximum(jnp.floor(targets / steps + 0.5001), 1) * steps
    counts = jnp.where(sizes - targets < jnp.abs(multiples - targets), sizes, multiples).astype(jnp.int32)
    kept = largest(keys, counts, list(range(len(groups))))
    return _masks_of({group.name: k & alive[group.name] for group, k in zip(groups, kept, strict=True)}, groups, params)


def kept_channels(masks: PyTree, groups: Sequence[ChannelGroup]) -> dict[str, Any]:
    """Return which channels are kept, bool [size] by group name: those with at least one weight left."""
    flat = leaves(masks)
    kept: dict[str, Any] = {}
    for group in groups:
        # Ignore 0-d masks, as of a new head: a removed channel reaches that leaf as 0 in any case.
        partial_masks = [_along(flat[m.path], m, group.size, "any") for m in group.members if flat[m.path].ndim]
        kept[group.name] = reduce(operator.or_, partial_masks) if partial_masks else np.ones(group.size, bool)
    return kept


def compact(model: ResNet, variables: PyTree, masks: PyTree) -> tuple[ResNet, PyTree]:
    """Remove the channels that the masks remove: return a model with smaller `widths`, and its variables.

    The outputs equal those of the masked network. Partially masked channels stay, with their masks applied. `variables`
    has `params` and any other collections, such as `batch_stats`; `masks` may come from `channel_masks` or elsewhere.
    Runs on the host.

    Raises:
      ValueError: the masks come from a different model, or keep no channel of a group.
    """
    params = variables["params"]
    check_masks(masks, params)
    groups = channel_groups(model, params)
    masks = jax.tree.map(np.asarray, masks)
    kept = kept_channels(masks, groups)
    for name, channels in kept.items():
        if not channels.any():
            raise ValueError(f"no channel would be left of {name}: lower the sparsity, or exclude it")
    axes = _kept_axes(kept, groups, params, np)

    def cut(path: str, x: Any) -> jax.Array:
        x = np.asarray(x)
        for axis in range(x.ndim):
            x = np.compress(axes.get((path, axis), np.ones(x.shape[axis], bool)), x, axis)
        return jnp.asarray(x)

    masked = jax.tree.map(lambda x, mask: np.where(mask, x, np.zeros((), x.dtype)), params, masks)
    small = {
        # Statistics have the same channels as the scale of the same norm.
        name: map_with_path(lambda path, x: cut(f"{path.rpartition('/')[0]}/scale", x), tree)
        for name, tree in variables.items()
    } | {"params": map_with_path(cut, masked)}
    return model.clone(widths=widths_of(model, small["params"])), small


def _blocks(model: ResNet) -> list[tuple[int, str]]:
    """Return (stage, name) of each block, in order."""
    return [
        (stage, f"stage{stage}_block{block}")
        for stage, size in enumerate(model.stage_sizes, start=1)
        for block in range(1, size + 1)
    ]


def _kernels(flat: dict[str, Any], module: str) -> list[str]:
    """Return the paths of the kernels in a stem or block, without the shortcut, in order."""
    names = [f"{module}/conv/kernel", *(f"{module}/conv{i}/kernel" for i in range(1, 10))]
    paths = [name for name in names if name in flat]
    if not paths:
        raise ValueError(f"the parameters have no convolution in {module}: they come from a different model")
    return paths


def _along(x: Any, member: Member, size: int, reduce: Literal["sum", "any"]) -> Any:
    """Reduce a NumPy or JAX leaf over everything except the channels of a member: [size]."""
    reduced = getattr(x, reduce)(tuple(axis for axis in range(x.ndim) if axis != member.axis))
    return reduced[member.offset : member.offset + size]


def _kept_axes(
    kept: dict[str, Any], groups: Sequence[ChannelGroup], params: PyTree, xp: ModuleType
) -> dict[tuple[str, int], Any]:
    """Return which channels are kept along each axis that carries a group, by path and axis; `xp` is NumPy or JAX."""
    shapes = {path: leaf.shape for path, leaf in leaves(params).items()}
    axes: dict[tuple[str, int], Any] = {}
    for group in groups:
        for m in group.members:
            before = axes.get((m.path, m.axis), np.ones(shapes[m.path][m.axis], bool))
            parts = before[: m.offset], kept[group.name], before[m.offset + group.size :]
            axes[m.path, m.axis] = xp.concatenate(parts)
    return axes


def _masks_of(kept: dict[str, jax.Array], groups: Sequence[ChannelGroup], params: PyTree) -> PyTree:
    """Return masks that are False wherever a leaf carries a channel that is not `kept`."""
    shapes = {path: leaf.shape for path, leaf in leaves(params).items()}
    masks: dict[str, jax.Array] = {}
    for (path, axis), keep in _kept_axes(kept, groups, params, jnp).items():
        shape = [-1 if i == axis else 1 for i in range(len(shapes[path]))]
        masks[path] = masks.get(path, jnp.ones(shapes[path], bool)) & keep.reshape(shape)
    return map_with_path(lambda path, _: masks.get(path, jnp.ones((), bool)), params)
