"""Mask schedules: when masks change in training, each a pure function `(step, params, grads, masks, key) -> masks`.

A schedule runs inside the compiled step and is traced once; in steps that change nothing it costs a comparison. `step`
is the number of updates done, `grads` include those of pruned weights, and `masks` are the current ones, already
applied to `params`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from resnet_jax.masks import largest, sortable
from resnet_jax.scores import random
from resnet_jax.tree import Predicate, PyTree, abbreviate, is_kernel, leaves, map_with_path

MaskSchedule = Callable[[jax.Array, PyTree, PyTree, PyTree, jax.Array], PyTree]
"""Pure function `(step, params, grads, masks, key) -> masks`; see the module."""
MaskFn = Callable[[PyTree, PyTree, PyTree, jax.Array, jax.Array], PyTree]
"""`(params, grads, masks, key, sparsity) -> masks`: computes scores, then calls `make_masks` or `channel_masks`."""


def cubic_sparsity(step: jax.Array, *, begin_step: int, end_step: int, final: float, initial: float = 0.0) -> jax.Array:
    """Interpolate from `initial` at `begin_step` to `final` at `end_step`, fast at first: https://arxiv.org/abs/1710.01878."""
    progress = jnp.clip((step - begin_step) / max(end_step - begin_step, 1), 0.0, 1.0)
    return final + (initial - final) * (1 - progress) ** 3


def gradual(
    mask_fn: MaskFn, *, final: float, begin_step: int, end_step: int, every: int, initial: float = 0.0
) -> MaskSchedule:
    """Prune gradually, every `every` steps from `begin_step` and for the last time at `end_step`.

    The sparsity follows `cubic_sparsity`: https://arxiv.org/abs/1710.01878.
    """

    def remask(step: jax.Array, params: PyTree, grads: PyTree, masks: PyTree, key: jax.Array) -> PyTree:
        due = _is_due(step, begin_step, end_step, every) | (step == end_step)
        sparsity = cubic_sparsity(step, begin_step=begin_step, end_step=end_step, final=final, initial=initial)
        return jax.lax.cond(due, lambda: mask_fn(params, grads, masks, key, sparsity), lambda: masks)

    return remask


def alternating(mask_fn: MaskFn, *, final: float, begin_step: int, end_step: int, every: int) -> MaskSchedule:
    """Alternate between sparse and dense phases of `every` steps (AC/DC): https://arxiv.org/abs/2106.12379.

    The first sparse phase begins at `begin_step` (1 or later); from `end_step` on, the network stays sparse. A dense
    phase frees all weights that have a mask, whatever pruned them.
    """

    def remask(step: jax.Array, params: PyTree, grads: PyTree, masks: PyTree, key: jax.Array) -> PyTree:
        dense_masks = jax.tree.map(jnp.ones_like, masks)
        due = _is_due(step, begin_step, end_step, every)
        phase = (step - begin_step) // every % 2  # 0 is sparse
        prune = (due & (phase == 0)) | (step == end_step)
        free = due & (phase == 1)
        return jax.lax.cond(
            prune,
            lambda: mask_fn(params, grads, dense_masks, key, jnp.asarray(final, jnp.float32)),
            lambda: jax.tree.map(lambda m, dense: m | (free & dense), masks, dense_masks),
        )

    return remask


def rigl(
    *, end_step: int, every: int, fraction: float = 0.3, grow: str = "gradient", prunable: Predicate = is_kernel
) -> MaskSchedule:
    """Drop the smallest weights of each leaf and grow the same number elsewhere, every `every` steps until `end_step`.

    Args:
      fraction: the fraction of a leaf's weights replaced at first, in (0, 1); it decays to 0 at `end_step` by a cosine.
      grow: `gradient` grows where the gradient is largest (RigL, https://arxiv.org/abs/1911.11134), `random` anywhere
        (SET, https://arxiv.org/abs/1707.04780). New weights start at zero; dropped ones do not return in that update.
      prunable: the leaves whose weights move; other masks stay unchanged.

    Raises:
      ValueError: `grow` is unknown; or, when the schedule is called, no prunable leaf has a mask.
    """
    if grow not in ("gradient", "random"):
        raise ValueError(f"unknown growth {grow!r}; choose gradient or random")

    def remask(step: jax.Array, params: PyTree, grads: PyTree, masks: PyTree, key: jax.Array) -> PyTree:
        due = _is_due(step, every, end_step, every)
        share = fraction / 2 * (1 + jnp.cos(jnp.pi * step / end_step))
        movable = {path: m for path, m in leaves(masks).items() if m.ndim and prunable(path, m)}
        if not movable:
            raise ValueError(
                "nothing to prune: no prunable leaf has a mask; start from `full_masks`; the default predicate looks "
                f"for leaves named `kernel`; leaves: {abbreviate(leaves(masks))}"
            )

        def replace() -> PyTree:
            weights, growth_scores = leaves(params), leaves(grads if grow == "gradient" else random(params, key=key))
            # A leaf grows as many weights as it drops, limited by the number of pruned ones.
            active = jnp.stack([m.sum(dtype=jnp.int32) for m in movable.values()])
            free = jnp.array([m.size for m in movable.values()], jnp.int32) - active
            count = jnp.minimum(jnp.floor(share * active).astype(jnp.int32), free)
            # Growth ranks only weights that were pruned before, so dropped weights cannot return in the same update.
            each = list(range(len(movable)))
            kept = largest([sortable(jnp.abs(weights[path]), m) for path, m in movable.items()], active - count, each)
            grown = largest([sortable(jnp.abs(growth_scores[path]), ~m) for path, m in movable.items()], count, each)
            new = {path: (k & m) | g for (path, m), k, g in zip(movable.items(), kept, grown, strict=True)}
            return map_with_path(lambda path, m: new.get(path, m), masks)

        return jax.lax.cond(due, replace, lambda: masks)

    return remask


def _is_due(step: jax.Array, begin_step: int, end_step: int, every: int) -> jax.Array:
    return (step >= begin_step) & (step < end_step) & ((step - begin_step) % every == 0)
