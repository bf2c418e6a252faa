"""Health of a representation: measures of collapse in features [B, D], one row per image, and the verdict on a run."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.contrastive import cosine, unit

# A mean cosine c between different images gives a `feature_std` of about sqrt(1 - c): here c = 0.9975.
COLLAPSED_STD = 0.05
# A dimension is dead if its standard deviation is at most this fraction of the features' root mean square.
DEAD_STD = 1e-3
# Rows of the distance matrix to hold in memory at once.
ROWS = 256


# --- two views --------------------------------------------------------------------------------------------------------


def alignment(a: jax.Array, b: jax.Array) -> jax.Array:
    """Mean squared distance of paired normalised rows of [B, D] and [B, D], in [0, 4]: https://arxiv.org/abs/2005.10242."""
    return jnp.sum(jnp.square(unit(a) - unit(b)), axis=-1).mean()


def mean_similarity(a: jax.Array, b: jax.Array) -> jax.Array:
    """Mean cosine of paired rows of [B, D] and [B, D]."""
    return cosine(a, b).mean()


# --- spread -----------------------------------------------------------------------------------------------------------


def uniformity(x: jax.Array) -> jax.Array:
    """log of the mean over pairs of different rows of exp(-2 d²), d the distance of normalised rows of [B, D].

    In [-8, 0], lower is more uniform, 0 when collapsed (or without pairs): https://arxiv.org/abs/2005.10242.
    """
    count = len(x)
    if count < 2:
        return jnp.zeros(())
    x = unit(x)
    squares, places = jnp.sum(jnp.square(x), axis=-1), jnp.arange(count)

    def log_sum(own: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        row, square, place = own
        distance = jnp.maximum(squares + square - 2 * jnp.matmul(x, row, precision="highest"), 0.0)
        return jax.nn.logsumexp(jnp.where(places == place, -jnp.inf, -2 * distance))

    sums = jax.lax.map(log_sum, (x, squares, places), batch_size=min(ROWS, count))
    return jax.nn.logsumexp(sums) - jnp.log(count) - jnp.log(count - 1)


def mean_negative_similarity(x: jax.Array) -> jax.Array:
    """Mean cosine over pairs of different rows of [B, D]; 0 without pairs."""
    x = unit(x)
    # The sum of all pairs' products is the squared length of the sum.
    among_others = jnp.sum(jnp.square(x.sum(0))) - jnp.sum(jnp.square(x))
    return among_others / max(len(x) * (len(x) - 1), 1)


def feature_std(x: jax.Array) -> jax.Array:
    """Mean over dimensions of the standard deviation of the normalised rows of [B, D], times sqrt(D).

    0 when collapsed, about 1 when isotropic: https://arxiv.org/abs/2011.10566.
    """
    return unit(x).std(0).mean() * x.shape[1] ** 0.5


def dead_fraction(x: jax.Array) -> jax.Array:
    """Fraction of the dimensions, in [0, 1], that hardly vary over the rows of [B, D]; see `DEAD_STD`."""
    x = jnp.asarray(x, jnp.float32)
    # `<=` rather than `<`, so that every dimension of all-zero features is dead.
    return (x.std(0) <= DEAD_STD * jnp.sqrt(jnp.square(x).mean())).mean(dtype=jnp.float32)


# --- rank -------------------------------------------------------------------------------------------------------------


def rank_me(x: Any) -> float:
    """RankMe, exp of the entropy of the normalised singular values of features [B, D]: https://arxiv.org/abs/2210.02885.

    Computed on the host in float64; in [1, min(B, D)], and 0 if all features are 0.
    """
    x = np.asarray(x, np.float64)
    return _rank(x, np.linalg.norm(x))


def effective_rank(x: Any) -> float:
    """`rank_me` of features [B, D] after subtracting their mean row: 0 if all rows are equal."""
    x = np.asarray(x, np.float64)
    return _rank(x - x.mean(0), np.linalg.norm(x))


def _rank(x: np.ndarray, size: np.floating) -> float:
    singular = np.linalg.svd(x, compute_uv=False)
    # Drop singular values of the size of float32 rounding errors: those span every dimension and would look healthy.
    singular = singular[singular > np.finfo(np.float32).eps * size]
    p = singular / singular.sum()
    return float(np.exp(-np.sum(p * np.log(p)))) if p.size else 0.0


# --- all of it --------------------------------------------------------------------------------------------------------


def health(features_a: Any, features_b: Any) -> dict[str, float]:
    """Compute all of the above from two views' features [B, D] of the same images; measures of one view use the first.

    Returns:
      `alignment`, `positive_similarity`, `uniformity`, `negative_similarity`, `feature_std`, `dead_fraction`,
      `rank_me`, `effective_rank`, and the sizes `images` (B) and `dimensions` (D), which bound the ranks.

    Raises:
      ValueError: the shapes differ or are not [B, D], the arrays are empty, or some features are not finite.
    """
    a, b = np.asarray(features_a, np.float32), np.asarray(features_b, np.float32)
    if a.shape != b.shape or a.ndim != 2 or not a.size:
        raise ValueError(
            f"two views' features must have one shape [B, D] and not be empty, got {a.shape} and {b.shape}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("some features are not finite")
    numbers = _numbers(jnp.asarray(a), jnp.asarray(b))
    ranks = {"rank_me": rank_me(a), "effective_rank": effective_rank(a)}
    sizes = {"images": float(len(a)), "dimensions": float(a.shape[1])}
    return {name: float(value) for name, value in numbers.items()} | ranks | sizes


@jax.jit
def _numbers(a: jax.Array, b: jax.Array) -> dict[str, jax.Array]:
    return {
        "alignment": alignment(a, b),
        "positive_similarity": mean_similarity(a, b),
        "uniformity": uniformity(a),
        "negative_similarity": mean_negative_similarity(a),
        "feature_std": feature_std(a),
        "dead_fraction": dead_fraction(a),
    }


def collapse_step(rows: Sequence[Mapping[str, Any]], *, threshold: float = COLLAPSED_STD) -> int | None:
    """Find the step from which `projection_std` stays below `threshold` to the end of a run's history, or None.

    A dip that recovers is not a collapse, and neither is a single last row, unless it is the only one. Rows have `step`
    and are in order; those without `projection_std` are skipped.
    """
    rows = [row for row in rows if "projection_std" in row]
    below = 0
    while below < len(rows) and rows[-1 - below]["projection_std"] < threshold:
        below += 1
    return int(rows[-below]["step"]) if below >= max(min(2, len(rows)), 1) else None


def verdict(rows: Sequence[Mapping[str, Any]], final: Mapping[str, float]) -> str:
    """Judge a run's representations in one sentence: collapsed to a point, collapsed to few dimensions, or healthy.

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
    # A few images cannot span many dimensions.
    if rank < max(2, 0.02 * min(dimensions, final["images"])):
        return f"representations have collapsed to few dimensions: {of}, {dead:.0%} dead dimensions, {views}"
    if dead > 0.5:
        return f"representations are healthy: {of}, {views}, but {dead:.0%} of the dimensions are dead"
    return f"representations are healthy: {of}, {dead:.0%} dead dimensions, {views}"
