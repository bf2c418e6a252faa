"""Non-maximum suppression: exact, with static shapes, without a loop over boxes."""

import jax
import jax.numpy as jnp
from jax import lax

from resnet_jax.detection.boxes import iou
from resnet_jax.parallel import vary_like
from resnet_jax.tree import PyTree

BLOCK = 256


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
    if not count:
        return jnp.zeros(0, bool)
    groups = jnp.zeros(count, jnp.int32) if groups is None else groups
    valid = jnp.ones(count, bool) if valid is None else valid
    boxes, groups, scores, valid = vary_like((boxes, groups, scores, valid), (boxes, groups, scores, valid, threshold))
    boxes, scores = lax.stop_gradient((boxes, scores))

    # Blocks of sorted boxes are settled one after the other: no matrix is larger than a block squared.
    block = min(BLOCK, count)
    order = jnp.argsort(scores, descending=True, stable=True)
    padding = ((0, -count % block),)
    ordered = (jnp.pad(boxes[order], (*padding, (0, 0))), jnp.pad(groups[order], padding))
    candidates = jnp.pad(valid[order], padding)

    def part(tree: PyTree, number: jax.Array) -> PyTree:
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, number * block, block), tree)

    def suppresses(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> jax.Array:
        return (iou(a[0], b[0]) > threshold) & (a[1][:, None] == b[1][None])

    def settle(number: jax.Array, keep: jax.Array) -> jax.Array:
        """Replace one block of `keep`, which holds the candidates, by those of them to keep."""
        here = part(ordered, number)

        def drop(earlier: jax.Array, left: jax.Array) -> jax.Array:
            return left & ~(suppresses(part(ordered, earlier), here) & part(keep, earlier)[:, None]).any(0)

        left = lax.fori_loop(0, number, drop, part(keep, number))
        within = suppresses(here, here) & jnp.triu(jnp.ones((block, block), bool), 1)

        def again(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            kept = left & ~(within & state[0][:, None]).any(0)
            return kept, (kept != state[0]).any()

        kept, _ = lax.while_loop(lambda state: state[1], again, (left, left.any()))
        return lax.dynamic_update_slice_in_dim(keep, kept, number * block, 0)

    keep = lax.fori_loop(0, len(candidates) // block, settle, candidates)
    return jnp.zeros_like(valid).at[order].set(keep[:count])
