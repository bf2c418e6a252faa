"""Assignment of ground-truth boxes to anchors or proposals, and sampling of those to train on."""

import jax
import jax.numpy as jnp
from jax import lax

BACKGROUND = -1
"""Index that `match` gives to a box without an object."""

NEITHER = -2
"""Index that `match` gives to a box that overlaps an object too little to match and too much for background."""


def match(overlaps: jax.Array, valid: jax.Array, high: float, low: float, *, low_quality: bool = False) -> jax.Array:
    """Return the index of the truth that each of A boxes matches, int32 [A]: `BACKGROUND` or `NEITHER` if none.

    A box matches the valid truth that it overlaps most (ties: the lower index), if by at least `high`; it is background
    below `low` and neither in between. Without a valid truth, all are background.

    Args:
      overlaps: IoU [G, A] of truths and boxes.
      valid: bool [G]; the others are padding.
      low_quality: if the boxes that overlap a truth most (several, if they do equally) match too, whatever their
        overlap. As in torchvision, they match the truth that they overlap most themselves; unlike there, a truth that
        no box overlaps has no such boxes.
    """
    # One more row, which loses to every overlap, keeps the maxima defined without truths.
    nothing = jnp.full_like(overlaps, -1, shape=(1, overlaps.shape[1]))
    overlaps = jnp.concatenate([jnp.where(valid[:, None], overlaps, -1), nothing])
    best, truth = overlaps.max(0), overlaps.argmax(0).astype(jnp.int32)
    matches = jnp.where(best >= high, truth, jnp.where(best < low, BACKGROUND, NEITHER))
    if low_quality:
        claimed = (overlaps == overlaps.max(1, keepdims=True)) & (overlaps > 0)
        matches = jnp.where(claimed.any(0), truth, matches)
    return matches


def matched_rows(x: jax.Array, matched: jax.Array) -> jax.Array:
    """Return the row of x [G, ...], of truths, that each box has by `match`, [A, ...]; any row where it has none."""
    none = jnp.zeros((1, *x.shape[1:]), x.dtype)  # there may be no truths
    return jnp.concatenate([x, none])[matched.clip(0)]


def sample(
    key: jax.Array, positive: jax.Array, negative: jax.Array, count: int, fraction: float
) -> tuple[jax.Array, jax.Array]:
    """Draw at most `count` of A boxes uniformly without replacement; return masks bool [A] of positives and negatives.

    Positives fill at most int(count * fraction) places, and negatives all other places, as far as there are any.
    """
    positive_key, negative_key = jax.random.split(key)
    most = int(count * fraction)
    positives = _draw(positive_key, positive, most, most)
    negatives = _draw(negative_key, negative, count - positives.sum(), count)
    return positives, negatives


def _draw(key: jax.Array, among: jax.Array, count: int | jax.Array, most: int) -> jax.Array:
    """Draw `count` (at most `most`) of the entries of `among` [A]: those of the highest random priorities."""
    priority = jnp.where(among, jax.random.uniform(key, among.shape), -1)
    values, indices = lax.top_k(priority, min(most, len(among)))
    drawn = (jnp.arange(len(values)) < count) & (values >= 0)
    return jnp.zeros_like(among).at[indices].set(drawn)
