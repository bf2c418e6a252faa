"""Masks over parameters: boolean trees with their structure, and a 0-d True for each leaf that is never pruned.

`make_masks` turns scores (`resnet_jax.scores`) into masks. It works on any parameter tree, prunes exact counts (ties
keep the lower index), and takes a traced sparsity, so that a schedule (`resnet_jax.mask_schedules`) compiles once.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.parallel import vary_like
from resnet_jax.tree import Predicate, PyTree, abbreviate, is_kernel, leaves, map_with_path

Scope = Literal["global", "uniform", "erk", "lamp"]
Share = float | jax.Array


def no_masks(params: PyTree) -> PyTree:
    """Return masks that keep everything: 0-d True for each leaf, which is free to store and to apply."""
    return jax.tree.map(lambda _: jnp.ones((), bool), params)


def full_masks(params: PyTree, prunable: Predicate = is_kernel) -> PyTree:
    """Return masks that keep everything: True in the shape of each `prunable` leaf, 0-d True elsewhere."""
    return map_with_path(lambda path, x: jnp.ones(x.shape if prunable(path, x) else (), bool), params)


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    """Set parameters to zero where a mask is False; shapes and dtypes are unchanged."""
    return jax.tree.map(lambda p, m: jnp.where(m, p, jnp.zeros((), p.dtype)), params, masks)


def kernels_except(patterns: Sequence[str]) -> Predicate:
    """Return a predicate for kernels (`is_kernel`) whose path matches none of the regular expressions (`re.search`)."""
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
    """Return masks that keep the highest scores.

    Args:
      scores: a tree with the structure of the parameters; real values, higher means more important.
      sparsity: the fraction of prunable weights to remove, in [0, 1), may be traced; or a fraction for each prunable
        path, which replaces the scope.
      prunable: the leaves to prune; scalars are never pruned.
      scope: `global` ranks all leaves together; `uniform` removes the same fraction of each leaf; `erk` sets fractions
        by the Erdos-Renyi-kernel rule (https://arxiv.org/abs/1911.11134); `lamp` ranks all leaves together after
        making their scores comparable (https://arxiv.org/abs/2010.07611).
      structure: `unstructured`; `N:M` keeps at least N of every M inputs, in groups along the second to last axis;
        `RxC` prunes blocks of R inputs by C outputs (the last two axes), scored by their sums. N:M ignores the scope
        and keeps max(N, round(M * (1 - sparsity))) in each group.
      masks: previous masks; the weights they prune stay pruned and count as pruned.

    Raises:
      ValueError: a sparsity is outside [0, 1), no leaf is prunable, or the structure does not divide a leaf.
    """
    # Validate at trace time: none of these checks depends on the scores' values.
    candidates = {path: x for path, x in leaves(scores).items() if x.ndim and prunable(path, x)}
    if not candidates:
        raise ValueError(
            "nothing to prune: no leaf is prunable; the default predicate looks for leaves named `kernel`; "
            f"leaves: {abbreviate(leaves(scores))}"
        )
    if scope not in get_args(Scope):
        raise ValueError(f"unknown scope {scope!r}; choose one of {', '.join(get_args(Scope))}")
    shares = dict(sparsity) if isinstance(sparsity, Mapping) else dict.fromkeys(candidates, sparsity)
    if missing := sorted(candidates.keys() - shares.keys()):
        raise ValueError(f"no sparsity is given for {missing[0]}")
    for path in candidates:
        if not isinstance(shares[path], jax.core.Tracer) and not 0 <= float(shares[path]) < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {shares[path]}")
    check_structure(candidates, structure)
    kind, first, second = structure_of(structure)
    block = (first, second) if kind == "block" else (1, 1)

    # Compute one sort key per block (a single weight if unstructured); blocks that are already pruned get the lowest.
    previous = {} if masks is None else {p: m for p, m in leaves(masks).items() if p in candidates and m.ndim}
    keys = {}
    for path, x in candidates.items():
        x = _block_sums(jnp.where(previous.get(path, True), x, 0).astype(jnp.float32), block)
        alive = _block_sums(previous[path], block) > 0 if path in previous else True
        keys[path] = sortable(_lamp(x) if scope == "lamp" else x, alive)

    # N:M selects within each group of inputs; the other structures select within a leaf or over all leaves.
    if kind == "n:m":
        kept = {path: _n_of_m(key, shares[path], first, second) for path, key in keys.items()}
    else:
        sizes, group = np.array([key.size for key in keys.values()]), list(range(len(keys)))
        if isinstance(sparsity, Mapping) or scope == "uniform":
            share = jnp.stack([jnp.asarray(shares[path]) for path in keys])
        elif scope == "erk":
            share = erk_shares([candidates[path].shape for path in keys], sparsity)
        else:
            share, group, sizes = jnp.asarray(sparsity)[None], [0] * len(keys), sizes.sum(keepdims=True)
        counts = jnp.asarray(sizes, jnp.int32) - jnp.round(share * sizes.astype(np.float32)).astype(jnp.int32)
        kept = dict(zip(keys, largest(list(keys.values()), counts, group), strict=True))

    # Expand blocks to weights; single weights inside a kept block may have been pruned before.
    if block != (1, 1):
        kept = {path: jnp.repeat(jnp.repeat(x, block[0], -2), block[1], -1) for path, x in kept.items()}
    new = {path: x & previous.get(path, True) for path, x in kept.items()}
    default = jax.tree.map(lambda _: jnp.ones((), bool), scores) if masks is None else masks
    return map_with_path(lambda path, _, mask: new.get(path, mask), scores, default)


def structure_of(name: str) -> tuple[str, int, int]:
    """Parse the name of a structure: (`n:m`, N, M), or (`block`, rows, columns), which are 1, 1 if unstructured.

    Raises:
      ValueError: the structure is unknown.
    """
    if name == "unstructured":
        return "block", 1, 1
    if (match := re.fullmatch(r"(\d+):(\d+)", name)) and 0 < int(match[1]) < int(match[2]):
        return "n:m", int(match[1]), int(match[2])
    if (match := re.fullmatch(r"(\d+)x(\d+)", name)) and int(match[1]) and int(match[2]):
        return "block", int(match[1]), int(match[2])
    raise ValueError(f"unknown structure {name!r}: choose unstructured, N:M such as 2:4, or ROWSxCOLUMNS such as 4x1")


def check_structure(arrays: Mapping[str, jax.Array], structure: str) -> None:
    """Check that a structure divides each of these leaves.

    Raises:
      ValueError: it does not; the message names the leaf.
    """
    kind, first, second = structure_of(structure)
    rows, columns = (second, 1) if kind == "n:m" else (first, second)
    for path, x in arrays.items():
        if rows * columns > 1 and (x.ndim < 2 or x.shape[-2] % rows or x.shape[-1] % columns):
            shape = "x".join(map(str, x.shape))
            raise ValueError(f"{structure} does not divide {path} of shape {shape} (inputs, outputs last)")


def erk_shares(shapes: Sequence[Sequence[int]], sparsity: Share) -> jax.Array:
    """Return the sparsity of each leaf, float32 [L], by the Erdos-Renyi-kernel rule: https://arxiv.org/abs/1911.11134.

    The density of a leaf is proportional to (sum of its dimensions) / (their product), at most 1, and all leaves
    together have density `1 - sparsity`.
    """
    sizes = jnp.array([math.prod(shape) for shape in shapes], jnp.float32)
    raw = jnp.array([sum(shape) / math.prod(shape) for shape in shapes], jnp.float32)
    target = (1 - sparsity) * sizes.sum()

    def density(dense: jax.Array) -> jax.Array:
        rest = jnp.where(dense, 0, raw * sizes).sum()
        return jnp.where(dense, 1.0, raw * (target - jnp.where(dense, sizes, 0).sum()) / jnp.maximum(rest, 1e-9))

    # Clamp layers whose density exceeds 1 and redistribute; this converges in at most L rounds.
    start = vary_like(jnp.zeros(len(shapes), bool), sparsity)
    dense = jax.lax.fori_loop(0, len(shapes), lambda _, dense: dense | (density(dense) > 1), start)
    return 1 - density(dense)


def largest(keys: Sequence[jax.Array], counts: jax.Array, group: Sequence[int]) -> list[jax.Array]:
    """Return boolean arrays that are True at the `counts[g]` largest keys of each group; ties keep the lower index.

    Bisects over the bits of the keys, then of the positions. Each pass only counts, so nothing is sorted and `counts`
    may be traced.

    Args:
      keys: uint32 arrays of any shape.
      counts: int32 [G].
      group: the group, in [0, G), of each array.
    """
    # Number the elements of each group consecutively over its arrays: positions break ties.
    positions, ends = [], [0] * len(counts)
    for key, g in zip(keys, group, strict=True):
        positions.append(jnp.arange(key.size, dtype=jnp.uint32).reshape(key.shape) + np.uint32(ends[g]))
        ends[g] += key.size
    belongs = (np.arange(len(counts))[:, None] == np.array(group)[None]).astype(np.int32)

    def group_counts(tests: list[jax.Array]) -> jax.Array:
        return (belongs * jnp.stack([test.sum(dtype=jnp.int32) for test in tests])[None]).sum(1)

    def largest_value(condition: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Return the largest uint32 [G] that satisfies `condition`, which must hold up to some value and not beyond."""

        def bit(i: jax.Array, value: jax.Array) -> jax.Array:
            higher = value | (jnp.uint32(1) << (jnp.uint32(31) - i.astype(jnp.uint32)))
            return jnp.where(condition(higher), higher, value)

        zeros = vary_like(jnp.zeros(len(counts), jnp.uint32), (*keys, counts))
        return jax.lax.fori_loop(0, 32, bit, zeros)

    # Everything above the threshold is kept; ties at the threshold fill the remaining places.
    threshold = largest_value(lambda t: group_counts([k >= t[g] for k, g in zip(keys, group, strict=True)]) >= counts)
    above = [key > threshold[g] for key, g in zip(keys, group, strict=True)]
    equal = [key == threshold[g] for key, g in zip(keys, group, strict=True)]
    missing = counts - group_counts(above)
    # Largest cutoff that admits at most `missing` tied entries.
    end = largest_value(
        lambda c: group_counts([e & (p < c[g]) for e, p, g in zip(equal, positions, group, strict=True)]) <= missing
    )
    return [a | (e & (p < end[g])) for a, e, p, g in zip(above, equal, positions, group, strict=True)]


def sortable(x: jax.Array, alive: jax.Array | bool = True) -> jax.Array:
    """Map float32 values to uint32 keys in the same order, for `largest`; 0, below all others, where not `alive`."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x.astype(jnp.float32)), jnp.uint32)  # -0 is 0
    return jnp.where(alive, jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31)), jnp.uint32(0))


def _lamp(x: jax.Array) -> jax.Array:
    """Divide squared scores by the sum of all squares that are not smaller: https://arxiv.org/abs/2010.07611."""
    x = jnp.ldexp(x, -jnp.frexp(jnp.abs(x).max())[1])  # a power of two: squares neither underflow nor overflow
    # Ascending, with ties in descending index so that the lower index is kept.
    order = x.size - 1 - jnp.argsort(x.ravel()[::-1], stable=True)
    squares = jnp.square(x.ravel()[order])
    rest = jnp.cumsum(squares[::-1])[::-1]
    return jnp.zeros(x.size).at[order].set(squares / jnp.maximum(rest, jnp.finfo(jnp.float32).tiny)).reshape(x.shape)


def _n_of_m(key: jax.Array, sparsity: Share, n: int, m: int) -> jax.Array:
    """Return True at the largest keys of each group of m along the second to last axis."""
    groups = jnp.moveaxis(key, -2, -1).reshape(*key.shape[:-2], key.shape[-1], -1, m)
    own, other = groups[..., :, None], groups[..., None, :]
    before = jnp.tril(jnp.ones((m, m), bool), -1).reshape((1,) * (groups.ndim - 1) + (m, m))
    rank = ((other > own) | ((other == own) & before)).sum(-1)
    keep = rank < jnp.maximum(n, jnp.round(m * (1 - jnp.asarray(sparsity))))
    return jnp.moveaxis(keep.reshape(*key.shape[:-2], key.shape[-1], -1), -1, -2)


def _block_sums(x: jax.Array, block: tuple[int, int]) -> jax.Array:
    """Sum over blocks of the last two axes."""
    if block == (1, 1):
        return x
    rows, columns = block
    parts = x.reshape(*x.shape[:-2], x.shape[-2] // rows, rows, x.shape[-1] // columns, columns)
    return parts.sum((-3, -1))


def sparsity_of(masks: PyTree) -> jax.Array:
    """Return the fraction of prunable weights that are pruned, a float32 scalar in [0, 1]; 0 if none is prunable."""
    prunable = [m for m in jax.tree.leaves(masks) if m.ndim]
    size = sum(m.size for m in prunable)
    return jnp.asarray(sum((~m).sum(dtype=jnp.float32) for m in prunable) / size if size else 0.0, jnp.float32)


def check_masks(masks: PyTree, params: PyTree) -> None:
    """Check that masks fit these parameters and leave something of each leaf.

    Raises:
      ValueError: they do not; the message names the first such leaf.
    """
    arrays, masks = leaves(params), leaves(masks)
    for path in sorted(arrays.keys() ^ masks.keys()):
        place = "model" if path in arrays else "masks"
        raise ValueError(f"the masks come from a different model: {path} is only in the {place}")
    for path, mask in masks.items():
        if mask.ndim and mask.shape != arrays[path].shape:
            raise ValueError(f"the masks come from a different model: {path} is {mask.shape}, not {arrays[path].shape}")
        if not np.asarray(mask).any():
            raise ValueError(f"nothing would be left of {path}: lower the sparsity, or exclude it")


def pack(masks: PyTree) -> PyTree:
    """Pack masks into bits on the host: NumPy uint8 [ceil(size / 8)] leaves; 0-d leaves stay as they are."""
    return jax.tree.map(lambda m: np.packbits(np.asarray(m)) if m.ndim else np.asarray(m), masks)


def unpack(packed: PyTree, params: PyTree) -> PyTree:
    """Invert `pack`, given the arrays (or shapes) that the masks belong to.

    Raises:
      ValueError: a leaf has a different size.
    """

    def unpack_leaf(path: str, x: np.ndarray, bits: np.ndarray) -> np.ndarray:
        if not bits.ndim:
            return bits
        if bits.size != -(-math.prod(x.shape) // 8):
            raise ValueError(
                f"the masks come from a different model: {path} has {bits.size * 8} bits, not {math.prod(x.shape)}"
            )
        return np.unpackbits(bits, count=math.prod(x.shape)).astype(bool).reshape(x.shape)

    return map_with_path(unpack_leaf, params, packed)
