"""When masks change: schedules around a train step, each a pure `(step, params, grads, masks, key) -> masks`.

A schedule runs inside the compiled step and is traced once: between its dates it costs a comparison. `step` counts the
updates done; `grads` are those of all weights, pruned ones too; `masks` are the present ones, which `params` obey.
"""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from resnet_jax.masks import largest, sortable
from resnet_jax.scores import random
from resnet_jax.tree import Predicate, PyTree, is_kernel, leaves, map_with_path


class MaskSchedule(Protocol):
    """A schedule: see the module."""

    def __call__(self, step: jax.Array, params: PyTree, grads: PyTree, masks: PyTree, key: jax.Array) -> PyTree: ...


# (params, grads, masks, key, sparsity) -> masks: scores, then `make_masks` or `channel_masks`
MaskFn = Callable[[PyTree, PyTree, PyTree, jax.Array, jax.Array], PyTree]


def cubic_sparsity(step: jax.Array, *, begin: int, end: int, final: float, initial: float = 0.0) -> jax.Array:
    """From `initial` at `begin` to `final` at `end`, fast at first: https://arxiv.org/abs/1710.01878."""
    progress = jnp.clip((step - begin) / max(end - begin, 1), 0.0, 1.0)
    return final + (initial - final) * (1 - progress) ** 3


def gradual(make: MaskFn, *, final: float, begin: int, end: int, every: int, initial: float = 0.0) -> MaskSchedule:
    """More and more is pruned, every `every` steps from `begin`, and for the last time at `end` (Zhu & Gupta 2017)."""

    def remask(step: jax.Array, params: PyTree, grads: PyTree, masks: PyTree, key: jax.Array) -> PyTree:
        due = _every(step, begin, end, every) | (step == end)
        sparsity = cubic_sparsity(step, begin=begin, end=end, final=final, initial=initial)
        return jax.lax.cond(due, lambda: make(params, grads, masks, key, sparsity), lambda: masks)

    return remask


def alternating(make: MaskFn, *, final: float, begin: int, end: int, every: int) -> MaskSchedule:
    """AC/DC: pruned and dense for `every` steps each, from `begin` (1 or later); pruned for good at `end`.

    https://arxiv.org/abs/2106.12379. Dense phases free every weight that has a mask, whatever pruned it.
    """

    def remask(step: jax.Array, params: PyTree, grads: PyTree, masks: PyTree, key: jax.Array) -> PyTree:
        everything = jax.tree.map(jnp.ones_like, masks)
        phase = (step - begin) // every % 2  # 0 is pruned
        compress = (_every(step, begin, end, every) & (phase == 0)) | (step == end)
        free = _every(step, begin, end, every) & (phase == 1)
        pruned = lambda: make(params, grads, everything, key, jnp.asarray(final, jnp.float32))  # noqa: E731
        return jax.lax.cond(compress, pruned, lambda: jax.tree.map(lambda m, e: m | (free & e), masks, everything))

    return remask


def rigl(
    *, end: int, every: int, fraction: float = 0.3, grow: str = "gradient", prunable: Predicate = is_kernel
) -> MaskSchedule:
    """Drop the smallest weights of each leaf and grow as many others, every `every` steps until `end`.

    Args:
      fraction: share of a leaf's weights replaced at first, in (0, 1); it falls to 0 at `end` by a cosine.
      grow: `gradient`, where the gradient is largest: RigL, https://arxiv.org/abs/1911.11134; or `random`: SET,
        https://arxiv.org/abs/1707.04780. What grows starts at zero; what is dropped does not return in the same update.
      prunable: the leaves in which weights move; other masks stay.

    Raises (when called):
      ValueError: no such leaf has a mask.
    """
    if grow not in ("gradient", "random"):
        raise ValueError(f"unknown growth {grow!r}; choose gradient or random")

    def remask(step: jax.Array, params: PyTree, grads: PyTree, masks: PyTree, key: jax.Array) -> PyTree:
        due = _every(step, every, end, every)
        share = fraction / 2 * (1 + jnp.cos(jnp.pi * step / end))
        held = {path: m for path, m in leaves(masks).items() if m.ndim and prunable(path, m)}
        if not held:
            raise ValueError("nothing to prune: no prunable leaf has a mask")
        return jax.lax.cond(due, lambda: _replaced(held, params, grads, masks, key, share, grow), lambda: masks)

    return remask


def _every(step: jax.Array, begin: int, end: int, every: int) -> jax.Array:
    return (step >= begin) & (step < end) & ((step - begin) % every == 0)


def _replaced(
    held: dict[str, jax.Array],
    params: PyTree,
    grads: PyTree,
    masks: PyTree,
    key: jax.Array,
    share: jax.Array,
    grow: str,
) -> PyTree:
    weights = leaves(params)
    wanted = leaves(grads if grow == "gradient" else random(params, key=key))
    paths, each = list(held), list(range(len(held)))
    active = jnp.stack([m.sum(dtype=jnp.int32) for m in held.values()])
    free = jnp.array([m.size for m in held.values()], jnp.int32) - active
    count = jnp.minimum(jnp.floor(share * active).astype(jnp.int32), free)
    magnitudes = [sortable(jnp.abs(weights[path]), held[path]) for path in paths]
    growth = [sortable(jnp.abs(wanted[path]), ~held[path]) for path in paths]
    kept = largest(magnitudes, active - count, each)
    grown = largest(growth, count, each)
    made = {path: (k & held[path]) | g for path, k, g in zip(paths, kept, grown, strict=True)}
    return map_with_path(lambda path, m: made.get(path, m), masks)
