"""The weighted k-nearest-neighbour classifier, which measures how well features separate classes without training."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.contrastive import unit

CHUNK = 8192  # rows of a bank to compare with the queries at once


def knn_scores(
    queries: jax.Array,
    bank: jax.Array,
    labels: jax.Array,
    *,
    classes: int,
    k: int = 200,
    temperature: float = 0.1,
    chunk: int = CHUNK,
) -> jax.Array:
    """Votes of each query's k nearest neighbours by cosine similarity: https://arxiv.org/abs/1805.01978.

    A neighbour votes for its class with exp(similarity / `temperature`), here divided by that of the nearest one.
    Ties go to the lower index in the bank.

    Args:
      queries: float [Q, D].
      bank: float [N, D].
      labels: int [N] in [0, `classes`), the classes of the bank's rows.
      k: at least 1; a k above N means N.
      temperature: above 0.
      chunk: rows of the bank to compare with the queries at once.

    Returns:
      Votes, float32 [Q, `classes`]; the predicted class has the largest.
    """
    weights, voted = _nearest(queries, bank, labels, k, temperature, chunk)
    return _votes(weights, voted, jnp.arange(classes)[:, None]).T


def _nearest(
    queries: jax.Array, bank: jax.Array, labels: jax.Array, k: int, temperature: Any, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Weights float32 and classes of the k nearest neighbours [Q, k]; arguments as for `knn_scores`."""
    size = len(bank)
    k, chunk = min(k, size), min(chunk, size)
    queries = unit(queries)
    chunks = jnp.pad(unit(bank), ((0, -size % chunk), (0, 0))).reshape(-1, chunk, bank.shape[1])

    # Scan over the chunks with the k nearest so far, so that no [Q, N] matrix of similarities is held.
    def merge(nearest: tuple[jax.Array, jax.Array], part: tuple[jax.Array, jax.Array]) -> Any:
        similarity, place = nearest
        rows, start = part
        new = jnp.matmul(queries, rows.T, precision="highest")
        new = jnp.where((start + jnp.arange(chunk) < size)[None], new, -jnp.inf)
        similarity, found = jax.lax.top_k(jnp.concatenate([similarity, new], axis=1), k)
        old = jnp.take_along_axis(place, jnp.minimum(found, k - 1), axis=1)
        return (similarity, jnp.where(found < k, old, start + found - k)), None

    none = jnp.full((len(queries), k), -jnp.inf), jnp.zeros((len(queries), k), jnp.int32)
    starts = jnp.arange(len(chunks)) * chunk
    (similarity, place), _ = jax.lax.scan(merge, none, (chunks, starts))
    # Scale votes so that the nearest has 1: at low temperatures exp alone would overflow.
    weights = jnp.exp((similarity - similarity[:, :1]) / temperature)
    return weights, jnp.asarray(labels)[place]


def _votes(weights: jax.Array, voted: jax.Array, candidates: jax.Array) -> jax.Array:
    """Sum the votes [Q, k] for each of the candidate classes [C, Q] or [C, 1]: [C, Q].

    One candidate at a time: a one-hot array [Q, k, C] would be large, and a scatter has no fixed order of addition.
    """
    return jax.lax.map(lambda c: jnp.where(voted == c[:, None], weights, 0.0).sum(1), candidates)


@partial(jax.jit, static_argnames=("classes", "k"))
def _predict(
    queries: jax.Array, bank: jax.Array, labels: jax.Array, *, classes: int, k: int, temperature: float
) -> jax.Array:
    """Predicted classes, int [Q]; ties go to the lower class."""
    weights, voted = _nearest(queries, bank, labels, k, temperature, CHUNK)
    # Only the neighbours' classes have votes, which matters if there are thousands of classes.
    candidates = jnp.arange(classes)[:, None] if classes <= voted.shape[1] else voted.T
    votes = _votes(weights, voted, candidates)
    return jnp.where(votes == votes.max(0, keepdims=True), candidates, classes).min(0)


def knn_accuracy(
    queries: Any,
    query_labels: Any,
    bank: Any,
    bank_labels: Any,
    *,
    classes: int,
    k: int = 200,
    temperature: float = 0.1,
    block: int = 1024,
) -> float:
    """Accuracy in [0, 1] of `knn_scores` on the queries, `block` of them at a time.

    Raises:
      ValueError: k < 1, temperature <= 0, or features and labels that `labelled` refuses.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    queries, query_labels = labelled("queries", queries, query_labels, classes)
    bank, bank_labels = labelled("bank", bank, bank_labels, classes)
    count, block = len(queries), min(block, len(queries))
    # Pad the last block with zeros, so that all blocks share one compilation.
    queries = np.pad(queries, ((0, -count % block), (0, 0)))
    blocks = queries.reshape(-1, block, queries.shape[1])
    predict = partial(_predict, bank=jnp.asarray(bank), labels=jnp.asarray(bank_labels))
    predictions = [predict(b, classes=classes, k=k, temperature=temperature) for b in blocks]
    return float(np.mean(np.concatenate(predictions)[:count] == query_labels))


def labelled(name: str, features: Any, labels: Any, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Convert arrays to features float32 [N, D] and labels int32 [N].

    Raises:
      ValueError: the shapes, types or values are wrong; the message begins with `name`.
    """
    features, labels = np.asarray(features, np.float32), np.asarray(labels)
    if features.ndim != 2 or not features.size or labels.shape != features.shape[:1]:
        raise ValueError(f"{name}: needs features [N, D] and labels [N], got {features.shape} and {labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"{name}: labels must be integers in [0, {classes})")
    if not np.isfinite(features).all():
        raise ValueError(f"{name}: some features are not finite")
    return features, labels.astype(np.int32)
