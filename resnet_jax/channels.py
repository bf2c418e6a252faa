"""Structured pruning of a `ResNet`: which channels go together, masks over whole channels, and the smaller network.

A channel is carried by many leaves: a convolution puts it out, a norm scales and shifts it, others take it in; the
channels of a residual stream are tied over all blocks that add to it (https://arxiv.org/abs/2301.12900). A mask that
is False wherever a channel is carried, norms' biases included, leaves that channel at exactly 0 behind the norm, so
`compact` cuts it out without changing the network's output. Grouped convolutions' channels are not pruned, nor are
streams whose width something else depends on: squeeze-excite's, and a `DeepStem`'s.
"""

import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from math import gcd
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.masks import apply_masks, check_masks, largest, sortable
from resnet_jax.resnet import PreActBlock, ResNet
from resnet_jax.tree import PyTree, leaves, map_with_path

Scope = Literal["uniform", "global"]


@dataclass(frozen=True)
class Member:
    """A range of a leaf that carries a group's channels: `[offset, offset + size)` along `axis` of the leaf at `path`.

    `scored` leaves count in a channel's score: kernels that put it out, and scales of its norms.
    """

    path: str
    axis: int
    offset: int
    scored: bool


@dataclass(frozen=True)
class ChannelGroup:
    """Channels [size] that are kept or removed, each together with all leaves that carry it.

    `copies` is 2 where channel i stands for a pair of them, else 1.
    """

    name: str
    size: int
    copies: int
    members: tuple[Member, ...]


def widths_of(model: ResNet, params: PyTree) -> tuple[int, ...]:
    """Output channels of each convolution of these parameters: what `ResNet.widths` is for them.

    Raises:
      ValueError: the parameters have no such stem or block.
    """
    flat = leaves(params)
    widths = [flat[_kernels(flat, "stem")[-1]].shape[-1]]
    for _, block in _blocks(model):
        widths += [flat[path].shape[-1] for path in _kernels(flat, block)]
    return tuple(widths)


def channel_groups(model: ResNet, params: PyTree) -> tuple[ChannelGroup, ...]:
    """The groups of channels that can be pruned.

    Inside of a block they are named after the convolution that puts them out: `stage1_block1/conv1`. `stream2` is the
    residual stream of the second stage, `stem` the stem's output where stage 1 does not start with an identity.

    With the shortcut `ZeroPad` a stage's channels go on through all later ones, and `stream2` are those that the second
    stage adds: equally many below and above the earlier ones. They are pruned as pairs, the i-th below with the i-th
    above, so that equally many are left and the shortcut's padding stays right.

    Args:
      model: a `ResNet` of the blocks in `resnet_jax.resnet`, pruned before or not.
      params: its parameters, or their shapes.

    Raises:
      ValueError: the parameters have no such stem or block.
    """
    # Groups are collected by name while the network is walked from its input to its output: `stream` names the groups
    # that make up the residual stream at this point, from its first channel to its last; `fixed` may not be pruned.
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

    # The stem puts out the first stream. Stage 1 shares it where its first block keeps it as it is.
    stem = _kernels(flat, "stem")[-1]
    channels = flat[stem].shape[-1]
    first = _kernels(flat, "stage1_block1")[-1]
    tied = "stage1_block1/shortcut/conv/kernel" not in flat and flat[first].shape[-1] == channels
    stream = ["stream1" if tied else "stem"]
    sizes[stream[0]] = channels
    if stem != "stem/conv/kernel":
        fixed |= {*stream}  # the inner width of a `DeepStem` is half of its output's
    add(stream, stem, 3, scored=True)
    add_norm(stream, "stem/norm")

    for stage, block in _blocks(model):
        # The stream goes into the first convolution and into the shortcut's.
        kernels = _kernels(flat, block)
        # Norms belong to a convolution's input in pre-activation blocks, to its output in the others.
        norms = [f"{block}/norm{i}" for i in range(1, len(kernels) + 1)]
        if preact:
            add_norm(stream, norms[0])
        add(stream, kernels[0], 2)
        add(stream, f"{block}/shortcut/conv/kernel", 2)

        # A group of a grouped convolution sees its own inputs alone: removing channels would change who sees what.
        pairs = list(pairwise(kernels))
        grouped = any(flat[kernel].shape[3] != flat[consumer].shape[2] for kernel, consumer in pairs)
        for i, (kernel, consumer) in enumerate(() if grouped else pairs):
            name = kernel.removesuffix("/kernel")
            sizes[name] = flat[kernel].shape[3]
            add([name], kernel, 3, scored=True)
            add_norm([name], norms[i + 1] if preact else norms[i])
            add([name], consumer, 2)

        # What the block adds to: a projection starts a new stream, a zero-padded shortcut widens the present one.
        missing = flat[kernels[-1]].shape[3] - sum(sizes[name] for name in stream)
        name = f"stream{stage}"
        if f"{block}/shortcut/conv/kernel" in flat:
            stream = [name]
            sizes[name] = flat[kernels[-1]].shape[3]
        elif missing:
            # The odd channel, if any, is the highest, which the padding would still be right about.
            odd = f"{name}_odd"
            sizes[name], sizes[odd] = missing // 2, missing % 2
            fixed.add(odd)
            stream = [name, *stream, name, odd]
        # Both summands put out the stream: the last convolution and the shortcut's, with their norms.
        add(stream, kernels[-1], 3, scored=True)
        add(stream, f"{block}/shortcut/conv/kernel", 3, scored=True)
        add_norm(stream, f"{block}/shortcut/norm")
        if not preact:
            add_norm(stream, norms[-1])
        if any(path.startswith(f"{block}/attention/") for path in flat):
            fixed |= {*stream}  # the inner width of squeeze-excite is a fraction of the stream's

    # The final norm and the head take in the last stream.
    add_norm(stream, "final/norm")
    add(stream, "head/kernel", 0)
    if model.num_classes is None:
        fixed |= {*stream}  # these features are the output
    return tuple(
        ChannelGroup(name, sizes[name], 2 if stream.count(name) == 2 else 1, tuple(group_members))
        for name, group_members in members.items()
        if name not in fixed
    )


def channel_scores(scores: PyTree, groups: Sequence[ChannelGroup]) -> dict[str, jax.Array]:
    """A score for each channel, float32 [size] by the group's name: the sum over what is `scored` of it.

    `scores` is a tree like the parameters', non-negative, as of `resnet_jax.scores`.
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
    """Masks that keep the channels of the highest scores, of equal ones the earlier.

    A group is left with a multiple of `round_to` channels, at least one: the nearest, of two the larger, or with all of
    them where that is nearer still.

    Args:
      scores: of `channel_scores`, non-negative [size] for each group.
      sparsity: the share of channels to remove, in [0, 1); may be traced.
      groups: of `channel_groups`, or some of them: the rest is kept.
      params: the parameters, or their shapes.
      scope: `uniform`, the same share of each group; `global`, one ranking of all groups' scores, each group's divided
        by their mean, in which a pair counts as one.
      round_to: at least 1.
      masks: earlier masks, whose removed channels stay removed and count as removed.

    Returns:
      A tree like `params`: bool in the shape of each leaf that carries one of the groups, 0-d True elsewhere.

    Raises:
      ValueError: no groups, an unknown scope, a sparsity or a multiple out of range.
    """
    if not groups:
        raise ValueError("no channels to prune: the model has no such groups")
    if scope not in get_args(Scope):
        raise ValueError(f"unknown scope {scope!r}; choose one of {', '.join(get_args(Scope))}")
    if not isinstance(sparsity, jax.core.Tracer) and not 0 <= float(sparsity) < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    if round_to < 1:
        raise ValueError(f"round_to must be at least 1, got {round_to}")

    # Channels that are removed already rank below all others, whatever their scores.
    alive = {group.name: True for group in groups} if masks is None else kept_channels(masks, groups)
    keys = []
    for group in groups:
        x = jnp.where(alive[group.name], scores[group.name].astype(jnp.float32), 0)
        # Removed channels count in the mean, as 0, so that pruning in steps ends about where pruning at once does.
        mean = x.mean() if scope == "global" else 1.0
        keys.append(sortable(x / jnp.maximum(mean, jnp.finfo(jnp.float32).tiny), alive[group.name]))

    # How many channels each group would keep before rounding: a share of its own, or its part of the overall best.
    sizes = np.array([group.size for group in groups], np.float32)
    share = 1 - jnp.asarray(sparsity, jnp.float32)
    targets = share * sizes
    if scope == "global":
        best = largest(keys, jnp.round(share * sizes.sum())[None].astype(jnp.int32), [0] * len(groups))
        targets = jnp.stack([x.sum() for x in best]).astype(jnp.float32)
    # Round to multiples, which for pairs of channels are half as large, or keep all where that is nearer.
    steps = np.array([round_to // gcd(round_to, group.copies) for group in groups], np.float32)
    # 1 - sparsity is not exact in float32: what is a half but for that counts as one.
    multiples = jnp.maximum(jnp.floor(targets / steps + 0.5001), 1) * steps
    counts = jnp.where(sizes - targets < jnp.abs(multiples - targets), sizes, multiples).astype(jnp.int32)
    kept = largest(keys, counts, list(range(len(groups))))
    return _masks_of({group.name: k & alive[group.name] for group, k in zip(groups, kept, strict=True)}, groups, params)


def kept_channels(masks: PyTree, groups: Sequence[ChannelGroup]) -> dict[str, Any]:
    """Which channels are kept, bool [size] by the group's name: those that a mask leaves a single weight of."""
    flat = leaves(masks)
    kept: dict[str, Any] = {}
    for group in groups:
        # A 0-d True, of a head that was made anew for one, says nothing: what is pruned before it reaches it as 0.
        partial_masks = [_along(flat[m.path], m, group.size, "any") for m in group.members if flat[m.path].ndim]
        kept[group.name] = reduce(operator.or_, partial_masks) if partial_masks else np.ones(group.size, bool)
    return kept


def compact(model: ResNet, variables: PyTree, masks: PyTree) -> tuple[ResNet, PyTree]:
    """The network without the channels that the masks remove: a model with its `widths`, and its variables.

    Its outputs are those of the masked network. Channels that are masked in part stay, masked. On the host.

    Args:
      model: a `ResNet`, pruned before or not.
      variables: its parameters, and whatever else there is, such as `batch_stats`.
      masks: a tree like the parameters', of `channel_masks` or others.

    Raises:
      ValueError: masks of another model, or ones that keep no channel of a group.
    """
    params = variables["params"]
    check_masks(masks, params)
    groups = channel_groups(model, params)
    masks = jax.tree.map(np.asarray, masks)
    kept = kept_channels(masks, groups)
    for name, channels in kept.items():
        if not channels.any():
            raise ValueError(f"no channel would be left of {name}: lower the sparsity, or exclude it")
    whole_channels = jax.jit(lambda kept: _masks_of(kept, groups, params))(kept)
    masked = jax.jit(apply_masks)(params, masks)
    masks_by_path = {path: np.asarray(mask) for path, mask in leaves(whole_channels).items()}

    def cut(path: str, x: Any) -> jax.Array:
        x, mask = np.asarray(x), masks_by_path.get(path, np.ones((), bool))
        for axis in range(mask.ndim):
            x = np.compress(mask.any(_other_axes(mask.ndim, axis)), x, axis)
        return jnp.asarray(x)

    small = {
        # Statistics are of the same channels as the scale beside them.
        name: map_with_path(lambda path, x: cut(f"{path.rpartition('/')[0]}/scale", x), tree)
        for name, tree in variables.items()
    } | {"params": map_with_path(cut, masked)}
    return model.clone(widths=widths_of(model, small["params"])), small


def _blocks(model: ResNet) -> list[tuple[int, str]]:
    """(stage, name) of each block, in order."""
    return [
        (stage, f"stage{stage}_block{block}")
        for stage, size in enumerate(model.stage_sizes, start=1)
        for block in range(1, size + 1)
    ]


def _kernels(flat: dict[str, Any], module: str) -> list[str]:
    """Paths of a stem's or a block's own convolutions, in order."""
    names = [f"{module}/conv/kernel", *(f"{module}/conv{i}/kernel" for i in range(1, 10))]
    paths = [name for name in names if name in flat]
    if not paths:
        raise ValueError(f"the parameters have no convolution in {module}: are they another model's?")
    return paths


def _other_axes(ndim: int, axis: int) -> tuple[int, ...]:
    return tuple(other for other in range(ndim) if other != axis)


def _along(x: Any, member: Member, size: int, reduce: Literal["sum", "any"]) -> Any:
    """A leaf, NumPy's or JAX's, reduced over all but the channels of a member: [size]."""
    reduced = getattr(x, reduce)(_other_axes(x.ndim, member.axis))
    return reduced[member.offset : member.offset + size]


def _masks_of(kept: dict[str, jax.Array], groups: Sequence[ChannelGroup], params: PyTree) -> PyTree:
    """Masks that are False wherever a channel that is not `kept` is carried."""
    shapes = {path: leaf.shape for path, leaf in leaves(params).items()}
    axes: dict[tuple[str, int], jax.Array] = {}
    for group in groups:
        for m in group.members:
            before = axes.get((m.path, m.axis), jnp.ones(shapes[m.path][m.axis], bool))
            axes[m.path, m.axis] = before.at[m.offset : m.offset + group.size].set(kept[group.name])
    masks: dict[str, jax.Array] = {}
    for (path, axis), keep in axes.items():
        shape = [-1 if i == axis else 1 for i in range(len(shapes[path]))]
        masks[path] = masks.get(path, jnp.ones(shapes[path], bool)) & keep.reshape(shape)
    return map_with_path(lambda path, _: masks.get(path, jnp.ones((), bool)), params)
