"""Non-maximum suppression: exact, with static shapes, without a loop over boxes."""

import jax
import jax.numpy as jnp
from jax import lax

from resnet_jax.detection.boxes import iou

BLOCK = 1024


def nms(
    boxes: jax.Array,
    scores: jax.Array,
    threshold: float | jax.Array,
    *,
    groups: jax.Array | None = None,
    valid: jax.Array | None = None,
) -> jax.Array:
    """Return which boxes greedy non-maximum suppression keeps, bool [N], in the order of `boxes`.

    Greedy suppression takes boxes by descending score and drops each one that overlaps a kept one by more than
    `threshold`. Whether it keeps a box depends only on the boxes before it. So iterating "keep what no kept box before
    it overlaps" from any start settles the first box in the first round, at least one more in every further round, and
    its only fixed point is the greedy result.

    Args:
      boxes: float32 [N, 4]; coordinates may be negative, and boxes without area overlap nothing.
      scores: [N]; ties go to the lower index.
      threshold: IoU, compared in float32.
      groups: int [N], classes or levels; only boxes of the same group suppress each other.
      valid: bool [N]; the others are not kept and suppress nothing.
    """
    count = len(boxes)
    groups = jnp.zeros(count, jnp.int32) if groups is None else groups
    valid = jnp.ones(count, bool) if valid is None else valid
    order = jnp.argsort(scores, descending=True, stable=True)

    # Blocks of boxes are settled one after the other, so that no matrix exceeds [N, block].
    block = min(BLOCK, count)
    padding = -count % block if block else 0
    ordered = jax.tree.map(
        lambda x: jnp.pad(x[order], ((0, padding),) + ((0, 0),) * (x.ndim - 1)), (boxes, groups, valid)
    )

    def suppresses(a, b) -> jax.Array:
        return (iou(a[0], b[0]) > threshold) & (a[1][:, None] == b[1][None])

    def settle(keep: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        part = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, block), ordered)
        candidates = part[2]
        if padding + count > block:  # kept boxes of earlier blocks; later ones are not kept yet
            candidates &= ~(suppresses(ordered, part) & keep[:, None]).any(0)
        within = suppresses(part, part) & jnp.triu(jnp.ones((block, block), bool), 1)

        def round_(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            kept, _ = state
            after = candidates & ~(within & kept[:, None]).any(0)
            return after, (after != kept).any()

        kept, _ = lax.while_loop(lambda state: state[1], round_, (candidates, candidates.any()))
        return lax.dynamic_update_slice_in_dim(keep, kept, start, 0), None

    keep, _ = lax.scan(settle, jnp.zeros(count + padding, bool), jnp.arange(0, count + padding, max(block, 1)))
    return jnp.zeros(count, bool).at[order].set(keep[:count])
