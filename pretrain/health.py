"""Health of a representation: measures of collapse in features [B, D], one row per image, and the verdict on a run."""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.contrastive import cosine, unit

# A mean cosine c between different images gives a `feature_std` of about sqrt(1 - c): here c = 0.9975.
COLLAPSED_STD = 0.05
# A dimension is dead if its standard deviation is at most this fraction of the features' root mean square.
DEAD_STD = 1e-3
# Features of this many images or fewer span too few dimensions to tell a collapse from too little data.
FEW_IMAGES = 3
# Rows of the distance matrix to hold in memory at once.
ROWS = 256


def health(features_a: Any, features_b: Any) -> dict[str, float]:
    """Measure two views' features [B, D] of the same images; measures of one view use the first.

    Returns:
      alignment: mean squared distance of the two views of an image, normalised, in [0, 4]; this measure and uniformity
        are those of https://arxiv.org/abs/2005.10242.
      positive_similarity: mean cosine of the two views of an image.
      uniformity: log of the mean over pairs of different images of exp(-2 d²), d the distance of their normalised
        features. In [-8, 0], lower is more uniform, 0 when collapsed (or without pairs).
      negative_similarity: mean cosine over pairs of different images; 0 without pairs.
      feature_std: mean over dimensions of the standard deviation of the normalised features, times sqrt(D). 0 when
        collapsed, about 1 when isotropic: https://arxiv.org/abs/2011.10566.
      dead_fraction: fraction of the dimensions, in [0, 1], that hardly vary; see `DEAD_STD`.
      rank_me, effective_rank: `rank` of the features, and of the features without their mean.
      images, dimensions: the sizes B and D, which bound the ranks.

    Raises:
      ValueError: the shapes differ or are not [B, D], the arrays are empty, or some features are not finite.
    """
    a, b = np.asarray(features_a, np.float32), np.asarray(features_b, np.float32)
    if a.shape != b.shape or a.ndim != 2 or not a.size:
        raise ValueError(f"features must have one shape [B, D] and not be empty, got {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("some features are not finite")
    measures = {name: float(value) for name, value in _measures(a, b).items()}
    ranks = {"rank_me": rank(a), "effective_rank": rank(a, center=True)}
    return measures | ranks | {"images": float(len(a)), "dimensions": float(a.shape[1])}


@jax.jit
def _measures(a: jax.Array, b: jax.Array) -> dict[str, jax.Array]:
    units, count = unit(a), len(a)
    # The sum of all pairs' products is the squared length of the sum.
    products = jnp.sum(jnp.square(units.sum(0))) - jnp.sum(jnp.square(units))
    # `<=` rather than `<`, so that every dimension of all-zero features is dead.
    dead = a.std(0) <= DEAD_STD * jnp.sqrt(jnp.square(a).mean())
    return {
        "alignment": jnp.sum(jnp.square(units - unit(b)), axis=-1).mean(),
        "positive_similarity": cosine(a, b).mean(),
        "uniformity": uniformity(units),
        "negative_similarity": products / max(count * (count - 1), 1),
        "feature_std": units.std(0).mean() * a.shape[1] ** 0.5,
        "dead_fraction": dead.mean(dtype=jnp.float32),
    }


def uniformity(x: jax.Array, *, block: int = ROWS) -> jax.Array:
    """Compute the uniformity of normalised rows [B, D], `block` rows of the distance matrix at a time; see `health`."""
    count = len(x)
    if count < 2:
        return jnp.zeros(())
    squares, places = jnp.sum(jnp.square(x), axis=-1), jnp.arange(count)

    def log_sum(own: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        row, square, place = own
        distance = jnp.maximum(squares + square - 2 * jnp.matmul(x, row, precision="highest"), 0.0)
        return jax.nn.logsumexp(jnp.where(places == place, -jnp.inf, -2 * distance))

    sums = jax.lax.map(log_sum, (x, squares, places), batch_size=min(block, count))
    return jax.nn.logsumexp(sums) - jnp.log(count) - jnp.log(count - 1)


def rank(x: Any, *, center: bool = False) -> float:
    """RankMe, exp of the entropy of the normalised singular values of features [B, D]: https://arxiv.org/abs/2210.02885.

    Computed on the host in float64; in [1, min(B, D)], and 0 if all features are 0. `center` subtracts the mean row
    first, which gives the effective rank: 0 if all rows are equal.
    """
    x = np.asarray(x, np.float64)
    singular = np.linalg.svd(x - x.mean(0) if center else x, compute_uv=False)
    # Drop singular values of the size of float32 rounding errors: those span every dimension and would look healthy.
    singular = singular[singular > np.finfo(np.float32).eps * np.linalg.norm(x)]
    p = singular / singular.sum()
    return float(np.exp(-np.sum(p * np.log(p)))) if p.size else 0.0


def collapse_step(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """Find the step from which `projection_std` stays below 0.05 to the end of a run's history, or None.

    A dip that recovers is not a collapse, and neither is a single last row, unless it is the only one. Rows have `step`
    and are in order; those without `projection_std` are skipped.
    """
    rows = [row for row in rows if "projection_std" in row]
    below = list(takewhile(lambda row: row["projection_std"] < COLLAPSED_STD, reversed(rows)))
    return int(below[-1]["step"]) if len(below) >= max(min(2, len(rows)), 1) else None


def verdict(rows: Sequence[Mapping[str, Any]], final: Mapping[str, float]) -> str:
    """Judge a run's representations in one sentence: collapsed to a point, collapsed to few dimensions, or healthy.

    With `FEW_IMAGES` or fewer in `final`, only the history is judged.

    Args:
      rows: the run's history, as for `collapse_step`.
      final: the result of `health` at the end of the run.
    """
    step = collapse_step(rows)
    if step is not None:
        last = next(row for row in reversed(rows) if "projection_std" in row)
        similarity = last.get("projection_negative_similarity", final["negative_similarity"])
        return (
            f"representations have collapsed: since step {step} every image is projected to nearly the same point "
            f"(spread {last['projection_std']:.2g}, mean similarity of different images {similarity:.4f})"
        )
    rank, dimensions, dead = final["effective_rank"], final["dimensions"], final["dead_fraction"]
    of = f"effective rank {rank:.{int(rank < 10)}f} of {dimensions:.0f}"
    views = f"positives {final['positive_similarity']:.2f} similar, negatives {final['negative_similarity']:.2f}"
    images = final["images"]
    if images <= FEW_IMAGES:
        return f"too few validation images ({images:.0f}) to judge the representations: {of}, {views}"
    # A few images cannot span many dimensions: without their mean, one less than their number.
    possible = min(dimensions, images - 1)
    if rank < max(min(2, possible / 2), 0.02 * min(dimensions, images)):
        return f"representations have collapsed to few dimensions: {of}, {dead:.0%} dead dimensions, {views}"
    if dead > 0.5:
        return f"representations are healthy: {of}, {views}, but {dead:.0%} of the dimensions are dead"
    return f"representations are healthy: {of}, {dead:.0%} dead dimensions, {views}"
