"""Masks over parameters: boolean trees shaped like them, with a 0-d True where a leaf is never pruned.

Scores in (`resnet_jax.scores`), masks out: `make_masks` works on any tree of parameters, keeps exact numbers (of equal
scores the earlier), and takes a traced sparsity, so that a schedule (`resnet_jax.mask_schedules`) compiles once.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.tree import Predicate, PyTree, abbreviate, is_kernel, leaves, map_with_path

Scope = Literal["global", "uniform", "erk", "lamp"]
Share = float | jax.Array


def no_masks(params: PyTree) -> PyTree:
    """Masks that keep everything: 0-d True for every leaf, which costs nothing to hold or to apply."""
    return jax.tree.map(lambda _: jnp.ones((), bool), params)


def full_masks(params: PyTree, prunable: Predicate = is_kernel) -> PyTree:
    """Masks that keep everything and can prune what is `prunable`: True in its shape, 0-d True elsewhere."""
    return map_with_path(lambda path, x: jnp.ones(x.shape if prunable(path, x) else (), bool), params)


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    """Zero where a mask is False; shapes and dtypes stay."""
    return jax.tree.map(lambda p, m: jnp.where(m, p, jnp.zeros((), p.dtype)), params, masks)


def kernels_except(patterns: Sequence[str]) -> Predicate:
    """A predicate: kernels (`is_kernel`) whose path matches none of these regular expressions (`re.search`)."""
    return lambda path, leaf: is_kernel(path, leaf) and not any(re.search(pattern, path) for pattern in patterns)


def make_masks(
    scores: PyTree,
    sparsity: Share | Mapping[str, Share],
    *,
    prunable: Predicate = is_kernel,
    scope: Scope = "global",
    structure: str = "unstructured",
    masks: PyTree | None = None,
) -> PyTree:
    """Masks that keep the highest scores.

    Args:
      scores: a tree like the parameters', real values, higher is more important.
      sparsity: the share of what is prunable to remove, in [0, 1), may be traced; or a share for each prunable path,
        which then hold instead of a scope.
      prunable: which leaves.
      scope: `global`, one ranking over all leaves; `uniform`, the same share of every leaf; `erk`, shares by the
        Erdos-Renyi-kernel rule (https://arxiv.org/abs/1911.11134); `lamp`, one ranking of scores made comparable
        between leaves (https://arxiv.org/abs/2010.07611).
      structure: `unstructured`; `N:M`, at least N of each M inputs kept, in groups along the last axis but one; or
        `RxC`, blocks of R inputs by C outputs (the last two axes), scored by their sums. N:M knows no scope: it keeps
        max(N, round(M * (1 - sparsity))) in every group.
      masks: earlier masks, whose pruned weights stay pruned and count as pruned.

    Raises:
      ValueError: a sparsity outside of [0, 1), nothing that is prunable, a structure that does not divide a leaf.
    """
    # Check everything that does not depend on values, so that a bad argument fails before anything is traced.
    candidates = {path: x for path, x in leaves(scores).items() if x.ndim and prunable(path, x)}
    if not candidates:
        raise ValueError(
            "nothing to prune: no leaf is prunable; the default predicate looks for leaves named `kernel`; "
            f"leaves: {abbreviate(leaves(scores))}"
        )
    if scope not in get_args(Scope):
        raise ValueError(f"unknown scope {scope!r}; choose one of {', '.join(get_args(Scope))}")
    shares = dict(sparsity) if isinstance(sparsity, Mapping) else dict.fromkeys(candidates, sparsity)
    for path in candidates:
        if path not in shares:
            raise ValueError(f"no sparsity is given for {path}")
        if not isinstance(shares[path], jax.core.Tracer) and not 0 <= float(shares[path]) < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {shares[path]}")
    check_structure(candidates, structure)
    kind, *size = structure_of(structure)
    block = size if kind == "block" else (1, 1)

    # Rank blocks, not weights: one key for each block, and the lowest key of all for what is pruned already.
    previous = {} if masks is None else {p: m for p, m in leaves(masks).items() if p in candidates and m.ndim}
    keys = {}
    for path, x in candidates.items():
        x = _block_sums(jnp.where(previous.get(path, True), x, 0).astype(jnp.float32), block)
        alive = _block_sums(previous[path], block) > 0 if path in previous else True
        keys[path] = sortable(_lamp(x) if scope == "lamp" else x, alive)

    # N:M counts inside each group of inputs; everything else counts over one leaf or over all of them.
    if kind == "n:m":
        kept = {path: _n_of_m(key, shares[path], *size) for path, key in keys.items()}
    else:
        kept = _largest_in_scope(keys, {path: candidates[path].shape for path in keys}, sparsity, shares, scope)

    # Bring blocks back to the weights' shape. Single weights inside a kept block may have been pruned before.
    new = {path: _repeat_blocks(x, block) & previous.get(path, True) for path, x in kept.items()}
    default = jax.tree.map(lambda _: jnp.ones((), bool), scores) if masks is None else masks
    return map_with_path(lambda path, _, mask: new.get(path, mask), scores, default)


def structure_of(name: str) -> tuple[str, int, int]:
    """(`n:m`, N, M) or (`block`, rows, columns) for the name of a structure; `unstructured` are blocks of one.

    Raises:
      ValueError: no such structure.
    """
    if name == "unstructured":
        return "block", 1, 1
    if (match := re.fullmatch(r"(\d+):(\d+)", name)) and 0 < int(match[1]) < int(match[2]):
        return "n:m", int(match[1]), int(match[2])
    if (match := re.fullmatch(r"(\d+)x(\d+)", name)) and int(match[1]) and int(match[2]):
        return "block", int(match[1]), int(match[2])
    raise ValueError(f"unknown structure {name!r}: choose unstructured, N:M such as 2:4, or ROWSxCOLUMNS such as 4x1")


def check_structure(arrays: Mapping[str, jax.Array], structure: str) -> None:
    """Refuse a structure that does not divide one of these leaves.

    Raises:
      ValueError: that, naming the leaf.
    """
    kind, first, second = structure_of(structure)
    rows, columns = (second, 1) if kind == "n:m" else (first, second)
    for path, x in arrays.items():
        if rows * columns > 1 and (x.ndim < 2 or x.shape[-2] % rows or x.shape[-1] % columns):
            shape = "x".join(map(str, x.shape))
            raise ValueError(f"{structure} does not divide {path} of shape {shape}, whose inputs and outputs come last")


def erk_shares(shapes: Sequence[Sequence[int]], sparsity: Share) -> jax.Array:
    """The share to remove of each leaf, float32 [L]: Erdos-Renyi-kernel, https://arxiv.org/abs/1911.11134.

    A leaf's density is proportional to (sum of its dimensions) / (their product), at most 1, so that all leaves
    together keep the share `1 - sparsity`.
    """
    sizes = jnp.array([math.prod(shape) for shape in shapes], jnp.float32)
    raw = jnp.array([sum(shape) / math.prod(shape) for shape in shapes], jnp.float32)
    target = (1 - sparsity) * sizes.sum()

    def density(dense: jax.Array) -> jax.Array:
        rest = jnp.where(dense, 0, raw * sizes).sum()
        return jnp.where(dense, 1.0, raw * (target - jnp.where(dense, sizes, 0).sum()) / jnp.maximum(rest, 1e-9))

    # Whoever would be more than dense is dense, which leaves more to the others: at most L rounds of it.
    start = jnp.zeros(len(shapes), bool)
    dense = jax.lax.fori_loop(0, len(shapes), lambda _, dense: dense | (density(dense) > 1), start)
    return 1 - density(dense)


def largest(keys: Sequence[jax.Array], counts: jax.Array, group: Sequence[int]) -> list[jax.Array]:
    """Boolean arrays that are True at the `counts[g]` largest keys of each group of arrays; the earlier of equal ones.

    By bisection over the bits of keys, then of positions: passes that count, no sort, and counts may be traced.

    Args:
      keys: uint32 arrays of any shape.
      counts: int32 [G].
      group: which group, in [0, G), each array belongs to.
    """
    sums = np.zeros((len(counts), len(keys)), np.int32)
    sums[list(group), np.arange(len(keys))] = 1
    starts = np.zeros(len(keys), np.uint32)
    for g in range(len(counts)):
        members = [i for i, of_key in enumerate(group) if of_key == g]
        starts[members] = np.cumsum([0, *(keys[i].size for i in members)])[:-1]
    positions = [
        jnp.arange(key.size, dtype=jnp.uint32).reshape(key.shape) + start
        for key, start in zip(keys, starts, strict=True)
    ]

    def group_counts(tests: list[jax.Array]) -> jax.Array:
        return (jnp.asarray(sums) * jnp.stack([test.sum(dtype=jnp.int32) for test in tests])[None]).sum(1)

    def largest_value(condition: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """The largest uint32 [G] for which `condition` still holds; it must hold up to some value."""

        def bit(i: jax.Array, value: jax.Array) -> jax.Array:
            higher = value | (jnp.uint32(1) << (jnp.uint32(31) - i.astype(jnp.uint32)))
            return jnp.where(condition(higher), higher, value)

        return jax.lax.fori_loop(0, 32, bit, jnp.zeros(len(counts), jnp.uint32))

    threshold = largest_value(lambda t: group_counts([k >= t[g] for k, g in zip(keys, group, strict=True)]) >= counts)
    above = [key > threshold[g] for key, g in zip(keys, group, strict=True)]
    equal = [key == threshold[g] for key, g in zip(keys, group, strict=True)]
    missing = counts - group_counts(above)
    # The last position that may not be taken yet with so many of the equal ones before it.
    end = largest_value(
        lambda c: group_counts([e & (p < c[g]) for e, p, g in zip(equal, positions, group, strict=True)]) <= missing
    )
    return [a | (e & (p < end[g])) for a, e, p, g in zip(above, equal, positions, group, strict=True)]


def sortable(x: jax.Array, alive: jax.Array | bool = True) -> jax.Array:
    """uint32 in the order of float32 values, for `largest`; 0, below all of them, where `alive` is False."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x.astype(jnp.float32)), jnp.uint32)  # -0 is 0
    return jnp.where(alive, jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31)), jnp.uint32(0))


def _largest_in_scope(
    keys: dict[str, jax.Array],
    shapes: dict[str, Sequence[int]],
    sparsity: Share | Mapping[str, Share],
    shares: dict[str, Share],
    scope: Scope,
) -> dict[str, jax.Array]:
    sizes = np.array([key.size for key in keys.values()])
    group = list(range(len(keys)))
    if isinstance(sparsity, Mapping) or scope == "uniform":
        share = jnp.stack([jnp.asarray(shares[path]) for path in keys])
    elif scope == "erk":
        share = erk_shares([shapes[path] for path in keys], sparsity)
    else:
        share, group, sizes = jnp.asarray(sparsity)[None], [0] * len(keys), sizes.sum(keepdims=True)
    counts = jnp.asarray(sizes, jnp.int32) - jnp.round(share * sizes.astype(np.float32)).astype(jnp.int32)
    return dict(zip(keys, largest(list(keys.values()), counts, group), strict=True))


def _lamp(x: jax.Array) -> jax.Array:
    """Squares over the sum of all squares that are not smaller, https://arxiv.org/abs/2010.07611."""
    x = jnp.ldexp(x, -jnp.frexp(jnp.abs(x).max())[1])  # a power of two, so that squares neither vanish nor overflow
    # Ascending; of equal ones the later first, so that the earlier is kept.
    order = x.size - 1 - jnp.argsort(x.ravel()[::-1], stable=True)
    squares = jnp.square(x.ravel()[order])
    rest = jnp.cumsum(squares[::-1])[::-1]
    return jnp.zeros(x.size).at[order].set(squares / jnp.maximum(rest, jnp.finfo(jnp.float32).tiny)).reshape(x.shape)


def _n_of_m(key: jax.Array, sparsity: Share, n: int, m: int) -> jax.Array:
    """True at the largest keys of each m along the last axis but one."""
    groups = jnp.moveaxis(key, -2, -1).reshape(*key.shape[:-2], key.shape[-1], -1, m)
    own, other = groups[..., :, None], groups[..., None, :]
    before = jnp.tril(jnp.ones((m, m), bool), -1).reshape((1,) * (groups.ndim - 1) + (m, m))
    rank = ((other > own) | ((other == own) & before)).sum(-1)
    keep = rank < jnp.maximum(n, jnp.round(m * (1 - jnp.asarray(sparsity))))
    return jnp.moveaxis(keep.reshape(*key.shape[:-2], key.shape[-1], -1), -1, -2)


def _block_sums(x: jax.Array, block: Sequence[int]) -> jax.Array:
    """Sums over blocks of the last two axes."""
    rows, columns = block
    if rows * columns == 1:
        return x
    parts = x.reshape(*x.shape[:-2], x.shape[-2] // rows, rows, x.shape[-1] // columns, columns)
    return parts.sum((-3, -1))


def _repeat_blocks(x: jax.Array, block: Sequence[int]) -> jax.Array:
    """The inverse of `_block_sums` for masks: each value repeated over its block."""
    rows, columns = block
    return x if rows * columns == 1 else jnp.repeat(jnp.repeat(x, rows, -2), columns, -1)


def sparsity_of(masks: PyTree) -> jax.Array:
    """The share of prunable weights that masks prune, float32 scalar in [0, 1]; 0 where nothing is prunable."""
    prunable = [m for m in jax.tree.leaves(masks) if m.ndim]
    size = sum(m.size for m in prunable)
    return jnp.asarray(sum((~m).sum(dtype=jnp.float32) for m in prunable) / size if size else 0.0, jnp.float32)


def check_masks(masks: PyTree, params: PyTree) -> None:
    """Refuse masks that are not these parameters', or that leave nothing of a leaf.

    Raises:
      ValueError: that, naming the first such leaf.
    """
    arrays, masks = leaves(params), leaves(masks)
    for path in sorted(arrays.keys() ^ masks.keys()):
        raise ValueError(f"masks of another model: {path} is only in the {'model' if path in arrays else 'masks'}")
    for path, mask in masks.items():
        if mask.ndim and mask.shape != arrays[path].shape:
            raise ValueError(f"masks of another model: {path} is {mask.shape} there, {arrays[path].shape} in the model")
        if not np.asarray(mask).any():
            raise ValueError(f"nothing would be left of {path}: lower the sparsity, or exclude it")


def pack(masks: PyTree) -> PyTree:
    """Eight masks' values a byte, NumPy uint8 [ceil(size / 8)] leaves; a 0-d leaf stays as it is. On the host."""
    return jax.tree.map(lambda m: np.packbits(np.asarray(m)) if m.ndim else np.asarray(m), masks)


def unpack(packed: PyTree, params: PyTree) -> PyTree:
    """The inverse of `pack`, given arrays (or their shapes) that the masks belong to.

    Raises:
      ValueError: a leaf of another size.
    """

    def unpack_leaf(path: str, x: np.ndarray, bits: np.ndarray) -> np.ndarray:
        if not bits.ndim:
            return bits
        if bits.size != -(-math.prod(x.shape) // 8):
            raise ValueError(
                f"masks of another model: {path} has {bits.size * 8} bits for {math.prod(x.shape)} weights"
            )
        return np.unpackbits(bits, count=math.prod(x.shape)).astype(bool).reshape(x.shape)

    return map_with_path(unpack_leaf, params, packed)
