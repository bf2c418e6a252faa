"""Losses of self-supervised learning, as plain functions of embeddings.

Embeddings are float [B, D] with one row per example; several views of the same examples are [V, B, D]. Whatever their
dtype, losses are computed in float32 with full-precision products. Losses that average over examples are returned per
example, [B]; losses on statistics of the whole batch are scalars.

With `axis_name` the batch is split over that axis (`pmap`, `shard_map`) and the embeddings of all shards take part: the
mean over shards is the loss of the whole batch, and the mean of the shards' gradients is its gradient.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from resnet_jax.keys import example_index
from resnet_jax.parallel import all_rows, mean_over, vary

# Similarities held at once, 16 MiB of float32; `contrast` computes larger matrices in blocks of rows.
MAX_SIMILARITIES = 1 << 22


def nt_xent(
    *views: jax.Array, temperature: float = 0.5, axis_name: str | None = None, block: int | None = None
) -> jax.Array:
    """Return the SimCLR loss in nats, float32 [B], of two or more views [B, D]: https://arxiv.org/abs/2002.05709.

    For each view, classify its positive among all other embeddings by cosine similarity / `temperature` (> 0). The loss
    of an example is the mean over its views and, with three or more views, over the positives of a view. See `contrast`
    for `block`.
    """
    index = example_index(views[0].shape[0], axis_name)
    return sup_con(jnp.stack(views), index, temperature=temperature, axis_name=axis_name, block=block)


def sup_con(
    views: jax.Array,
    labels: jax.Array,
    *,
    temperature: float = 0.1,
    axis_name: str | None = None,
    block: int | None = None,
) -> jax.Array:
    """Return the SupCon loss L_out in nats, float32 [B], of embeddings [V, B, D]: https://arxiv.org/abs/2004.11362.

    All views of all examples with the same label, int [B], are positives of each other. See `contrast` for `block`.
    """
    count, size = views.shape[:2]
    keys, key_labels = _gather(unit(views), axis_name, axis=1), _gather(labels, axis_name)
    total = keys.shape[1]
    rows = jnp.arange(count)[:, None] * total + example_index(size, axis_name)[None]
    losses = contrast(
        unit(views).reshape(count * size, -1),
        keys.reshape(count * total, -1),
        groups=(jnp.tile(labels, count), jnp.tile(key_labels, count)),
        places=(rows.reshape(-1), jnp.arange(count * total)),
        temperature=temperature,
        block=block,
    )
    return losses.reshape(count, size).mean(0)


def info_nce(
    queries: jax.Array,
    keys: jax.Array,
    negatives: jax.Array | None = None,
    *,
    temperature: float = 0.2,
    axis_name: str | None = None,
    block: int | None = None,
) -> jax.Array:
    """Return InfoNCE in nats, float32 [B]: classify the key [B, D] of each query [B, D] by cosine / `temperature`.

    The negatives are the other keys of the whole batch, as in MoCo v3 (https://arxiv.org/abs/2104.02057), or
    `negatives` [K, D], at least one, alone if given, as in MoCo (https://arxiv.org/abs/1911.05722). See `contrast` for
    `block`.
    """
    queries, keys = unit(queries), unit(keys)
    if negatives is None:
        all_keys = _gather(keys, axis_name)
        groups = example_index(len(queries), axis_name), jnp.arange(len(all_keys))
        return contrast(queries, all_keys, groups=groups, temperature=temperature, block=block)
    negatives = unit(negatives)

    def losses(rows: tuple[jax.Array, ...]) -> jax.Array:
        queries, keys = rows
        positive = jnp.sum(queries * keys, axis=-1) / temperature
        negative = _products(queries, negatives) / temperature
        return jax.nn.logsumexp(jnp.concatenate([positive[:, None], negative], axis=1), axis=1) - positive

    return _by_rows(losses, (queries, keys), len(negatives), block)


def contrast(
    queries: jax.Array,
    keys: jax.Array,
    *,
    groups: tuple[jax.Array, jax.Array],
    places: tuple[jax.Array, jax.Array] | None = None,
    temperature: float,
    block: int | None = None,
) -> jax.Array:
    """Return the cross entropy of each query [R, D] against the keys [C, D] of its group, float32 nats [R].

    Similarities are plain products, so normalize first. The loss is 0 for a query whose group has no keys.

    Args:
      groups: int [R] and [C], the groups of queries and keys.
      places: int [R] and [C]; a query ignores the key of its own place.
      block: rows of the similarity matrix computed at once, in the gradient too. None means all R if R x C is at most
        `MAX_SIMILARITIES`, otherwise as many as fit into that. The value does not depend on it.
    """
    rows = (queries, groups[0], groups[0] if places is None else places[0])

    def losses(rows: tuple[jax.Array, ...]) -> jax.Array:
        queries, group, place = rows
        logits = _products(queries, keys) / temperature
        positive = group[:, None] == groups[1][None]
        if places is not None:
            same_place = place[:, None] == places[1][None]
            logits, positive = jnp.where(same_place, -jnp.inf, logits), positive & ~same_place
        number = positive.sum(1)
        mean_logit = jnp.where(positive, logits, 0.0).sum(1) / jnp.maximum(number, 1)
        return jnp.where(number > 0, jax.nn.logsumexp(logits, axis=1) - mean_logit, 0.0)

    return _by_rows(losses, rows, len(keys), block)


def nearest(queries: jax.Array, bank: jax.Array) -> jax.Array:
    """Return the row of `bank` [K, D] with the highest cosine similarity to each query [B, D], [B, D]."""
    return bank[jnp.argmax(_products(unit(queries), unit(bank)), axis=1)]


def enqueue(queue: jax.Array, embeddings: jax.Array, step: jax.Array, *, axis_name: str | None = None) -> jax.Array:
    """Replace the oldest rows of the queue [K, D], found from `step`, by the normalized embeddings [B, D] of the batch.

    Raises:
      ValueError: K is not a multiple of the size of the whole batch.
    """
    rows = all_rows(unit(embeddings), axis_name)
    if len(queue) % len(rows):
        raise ValueError(f"the queue size {len(queue)} is not a multiple of the batch size {len(rows)}")
    start = step % (len(queue) // len(rows)) * len(rows)
    return jax.lax.dynamic_update_slice_in_dim(queue, rows, start, axis=0)


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the cosine similarity of the rows of [..., D], float32 [...]; it is 0 for rows of length 0."""
    return jnp.sum(unit(a) * unit(b), axis=-1)


def byol(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the squared distance of normalized predictions and targets, `2 - 2 cos`, [..., D] to [...].

    https://arxiv.org/abs/2006.07733. No gradient flows into the targets.
    """
    return 2 - 2 * cosine(predictions, jax.lax.stop_gradient(targets))


def barlow_twins(a: jax.Array, b: jax.Array, *, redundancy: float = 0.0051, axis_name: str | None = None) -> jax.Array:
    """Return the squared distance between the cross-correlation [D, D] of two views [B, D] and the identity, a scalar.

    https://arxiv.org/abs/2103.03230. Off-diagonal terms are weighted by `redundancy`. Each dimension is standardized
    over the batch first, with 1e-5 added to the variance.
    """

    def standard(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x - _batch_mean(x, axis_name)
        return x * jax.lax.rsqrt(_batch_mean(jnp.square(x), axis_name) + 1e-5)

    correlation = _moments(standard(a), standard(b), axis_name)
    diagonal = jnp.diagonal(correlation)
    return jnp.sum(jnp.square(1 - diagonal)) + redundancy * _off_diagonal(correlation)


def vicreg(
    a: jax.Array,
    b: jax.Array,
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    axis_name: str | None = None,
) -> jax.Array:
    """Return the VICReg loss of two views [B, D], a scalar: https://arxiv.org/abs/2105.04906.

    The weighted terms are: `invariance`, the mean squared distance; `variance`, the mean shortfall of each standard
    deviation (of variance + 1e-4) below 1; `covariance`, the squared covariances summed over pairs and divided by D.
    """
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)

    def spread(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = len(x) * (1 if axis_name is None else jax.lax.axis_size(axis_name))
        x = x - _batch_mean(x, axis_name)
        moments = _moments(x, x, axis_name) * (total / max(total - 1, 1))
        diagonal = jnp.diagonal(moments)
        shortfall = jax.nn.relu(1 - jnp.sqrt(diagonal + 1e-4)).mean()
        return shortfall, _off_diagonal(moments) / x.shape[1]

    (shortfall_a, off_a), (shortfall_b, off_b) = spread(a), spread(b)
    distance = _batch_mean(jnp.square(a - b), axis_name).mean()
    return invariance * distance + variance * (shortfall_a + shortfall_b) / 2 + covariance * (off_a + off_b)


def sinkhorn(
    scores: jax.Array, *, epsilon: float = 0.05, iterations: int = 3, axis_name: str | None = None
) -> jax.Array:
    """Assign examples softly to prototypes so that all are used equally: https://arxiv.org/abs/2006.09882.

    Takes scores [B, K], which are divided by `epsilon`, and returns float32 [B, K] with rows that sum to 1, after at
    least one of the `iterations`. No gradient flows through it.
    """
    scores = jax.lax.stop_gradient(scores).astype(jnp.float32) / epsilon
    # In log space: exp(score / 0.05) underflows.
    for _ in range(iterations):
        scores = scores - _log_sum_of_batch(scores, axis_name)
        scores = jax.nn.log_softmax(scores, axis=1)
    return jnp.exp(scores)


def swav(
    scores: jax.Array,
    *,
    assigned: int = 2,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    axis_name: str | None = None,
) -> jax.Array:
    """Return the SwAV loss in nats, float32 [B]: each view predicts the assignments of the others.

    https://arxiv.org/abs/2006.09882. `scores` [V, B, K] are cosines of embeddings and prototypes. The first `assigned`
    views, the large crops, are assigned by `sinkhorn`; the loss is the mean over pairs of one of these and a different
    view.
    """
    codes = [sinkhorn(s, epsilon=epsilon, iterations=iterations, axis_name=axis_name) for s in scores[:assigned]]
    return _mean_cross_entropy(jnp.stack(codes), jax.nn.log_softmax(scores.astype(jnp.float32) / temperature))


def dino(
    student: jax.Array,
    teacher: jax.Array,
    center: jax.Array,
    *,
    temperature: float = 0.1,
    teacher_temperature: float = 0.04,
) -> jax.Array:
    """Return the DINO loss in nats, float32 [B]: each student view predicts the teacher on different views.

    https://arxiv.org/abs/2104.14294. `student` are scores [V, B, K], the teacher's views first, and `teacher` those of
    the large crops, [G, B, K], from which `center` [K] is subtracted; see `update_center`. No gradient flows into the
    latter two.
    """
    targets = jax.nn.softmax((teacher.astype(jnp.float32) - center[None, None]) / teacher_temperature)
    log_p = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    return _mean_cross_entropy(jax.lax.stop_gradient(targets), log_p)


def update_center(
    center: jax.Array, teacher: jax.Array, *, momentum: float = 0.9, axis_name: str | None = None
) -> jax.Array:
    """Update DINO's center [K], a moving average of the teacher's mean scores [G, B, K] over the whole batch."""
    mean = mean_over(teacher.astype(jnp.float32).mean((0, 1)), axis_name)
    return momentum * center + (1 - momentum) * mean


def _mean_cross_entropy(targets: jax.Array, log_p: jax.Array) -> jax.Array:
    """Average the cross entropy [B] over pairs of a target view [G, B, K] and a different view of `log_p` [V, B, K]."""
    pairs = [(g, v) for g in range(len(targets)) for v in range(len(log_p)) if g != v]
    return -jnp.stack([jnp.sum(targets[g] * log_p[v], axis=-1) for g, v in pairs]).mean(0)


def unit(x: jax.Array) -> jax.Array:
    """Normalize the rows of [..., D] to length 1, float32; rows of length 0 stay 0, with a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-12))


def _products(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply [R, D] by [C, D] to [R, C]; the default precision on accelerators would round to 8 bits of mantissa."""
    return jnp.matmul(a, b.T, precision="highest")


def _by_rows(
    losses: Callable[[tuple[jax.Array, ...]], jax.Array], arrays: tuple[jax.Array, ...], columns: int, block: int | None
) -> jax.Array:
    """Compute `losses` [R] of arrays [R, ...], each against `columns` others, in blocks of rows; see `contrast`."""
    rows = len(arrays[0])
    block = min(block or max(MAX_SIMILARITIES // columns, 1), rows)
    if block == rows:
        return losses(arrays)
    # Padding rows in the last block are computed and then discarded.
    padding = -rows % block
    blocks = jax.tree.map(
        lambda x: jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1)).reshape(-1, block, *x.shape[1:]), arrays
    )
    return jax.lax.map(jax.checkpoint(losses), blocks).reshape(-1)[:rows]


def _gather(x: jax.Array, axis_name: str | None, *, axis: int = 0) -> jax.Array:
    """Gather the whole batch; in the gradient, each shard sends its part to all others."""
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, axis=axis, tiled=True)


def _batch_mean(x: jax.Array, axis_name: str | None) -> jax.Array:
    """Average [B, D] over the whole batch, [1, D]; in the gradient, each shard sends its part to all others."""
    return vary(mean_over(x.mean(0, keepdims=True), axis_name), axis_name)


def _moments(a: jax.Array, b: jax.Array, axis_name: str | None) -> jax.Array:
    """Average products over the whole batch, [D, D]."""
    return vary(mean_over(jnp.matmul(a.T, b, precision="highest") / len(a), axis_name), axis_name)


def _off_diagonal(x: jax.Array) -> jax.Array:
    """Sum the squares of [D, D] without the diagonal; subtracting it afterwards would leave rounding errors."""
    return jnp.sum(jnp.square(jnp.where(jnp.eye(len(x), dtype=bool), 0.0, x)))


def _log_sum_of_batch(x: jax.Array, axis_name: str | None) -> jax.Array:
    """Compute the log of the sum of exp over the whole batch, [B, K] to [1, K]."""
    if axis_name is None:
        return jax.nn.logsumexp(x, axis=0, keepdims=True)
    maximum = jax.lax.pmax(x.max(0, keepdims=True), axis_name)
    return maximum + jnp.log(jax.lax.psum(jnp.exp(x - maximum).sum(0, keepdims=True), axis_name))
