"""Losses of self-supervised learning, as plain functions of embeddings.

Embeddings are float [B, D], one row an example; several views of the same examples are [V, B, D]. Everything is
computed in float32 whatever their dtype, and with full precision of the products. Where a loss is a mean over examples
it is returned for each of them, [B]; losses of a whole batch's statistics are scalars.

With `axis_name` the batch is split over that axis (`pmap`, `shard_map`) and all shards' embeddings take part: the mean
over shards is then the loss of the whole batch, and the mean of the shards' gradients is its gradient.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from resnet_jax.keys import example_index
from resnet_jax.parallel import all_rows, mean_over, vary

# Similarities that are held at once, 16 MiB of float32: beyond it `contrast` goes row block by row block.
MAX_SIMILARITIES = 1 << 22


# --- one against the others -------------------------------------------------------------------------------------------


def nt_xent(
    *views: jax.Array, temperature: float = 0.5, axis_name: str | None = None, block: int | None = None
) -> jax.Array:
    """SimCLR's loss in nats, float32 [B], of two or more views' embeddings [B, D]: https://arxiv.org/abs/2002.05709.

    Each view is asked for its twin among all the other embeddings by cosine similarity / `temperature` (> 0); an
    example's loss is the mean over its views, and with three or more of them over a view's twins. `block`: see
    `contrast`.
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
    """SupCon's loss L_out in nats, float32 [B], of embeddings [V, B, D]: https://arxiv.org/abs/2004.11362.

    All views of all examples with the same label, int [B], are positives of one another.
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
    """InfoNCE in nats, float32 [B]: each query [B, D] is asked for its own key [B, D], by cosine / `temperature`.

    Among the other keys of the whole batch, as in MoCo v3 (https://arxiv.org/abs/2104.02057), or, where they are given,
    among `negatives` [K, D] alone, as in MoCo (https://arxiv.org/abs/1911.05722).
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
    """Cross entropy of finding the keys [C, D] of a query's own group among all keys, float32 nats for each query [R].

    Similarities are plain products: normalise first. `groups` are int [R] and [C]; with `places`, int [R] and [C], a
    query never meets the key of its own place. The loss of a query whose group has no key is 0.

    Args:
      block: rows of the similarity matrix at a time, in the gradient too; None takes all R at once while R x C is at
        most `MAX_SIMILARITIES`, and as many as fit into that beyond. The value does not depend on it.
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
    """The row of `bank` [K, D] that is most similar to each query [B, D] by cosine, [B, D]."""
    return bank[jnp.argmax(_products(unit(queries), unit(bank)), axis=1)]


def enqueue(queue: jax.Array, embeddings: jax.Array, step: jax.Array, *, axis_name: str | None = None) -> jax.Array:
    """The queue [K, D] with the whole batch's embeddings [B, D], normalised, in place of its oldest.

    K is a multiple of the whole batch; where the oldest are follows from the number of the step.

    Raises:
      ValueError: it is not.
    """
    rows = all_rows(unit(embeddings), axis_name)
    if len(queue) % len(rows):
        raise ValueError(f"a queue of {len(queue)} is no multiple of a batch of {len(rows)}")
    start = step % (len(queue) // len(rows)) * len(rows)
    return jax.lax.dynamic_update_slice_in_dim(queue, rows, start, axis=0)


# --- towards a target -------------------------------------------------------------------------------------------------


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Cosine similarity of the rows of [..., D], float32 [...]; rows of length 0 are similar to nothing."""
    return jnp.sum(unit(a) * unit(b), axis=-1)


def byol(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    """Squared distance of normalised predictions and targets, `2 - 2 cos`, [..., D] to [...].

    https://arxiv.org/abs/2006.07733; no gradient flows into the targets.
    """
    return 2 - 2 * cosine(predictions, jax.lax.stop_gradient(targets))


# --- statistics of the batch ------------------------------------------------------------------------------------------


def barlow_twins(a: jax.Array, b: jax.Array, *, redundancy: float = 0.0051, axis_name: str | None = None) -> jax.Array:
    """Distance of two views' cross-correlation [D, D] from the identity, off the diagonal times `redundancy`.

    https://arxiv.org/abs/2103.03230. Each dimension is first brought to mean 0 and variance 1 (+ 1e-5) over the batch.
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
    """Invariance of two views, variance of at least 1 in every dimension, no covariance between dimensions.

    https://arxiv.org/abs/2105.04906, the terms weighted as named: mean squared distance; the mean of how far each
    standard deviation (of variance + 1e-4) falls short of 1; squared covariances, summed over pairs, divided by D.
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


# --- prototypes -------------------------------------------------------------------------------------------------------


def sinkhorn(
    scores: jax.Array, *, epsilon: float = 0.05, iterations: int = 3, axis_name: str | None = None
) -> jax.Array:
    """Soft assignment [B, K] of examples to prototypes that uses all of them equally: https://arxiv.org/abs/2006.09882.

    Of scores [B, K] / `epsilon`; rows sum to 1. No gradient flows through it.
    """
    scores = jax.lax.stop_gradient(scores).astype(jnp.float32) / epsilon
    # In logarithms: of exp(score / 0.05) little is left when it underflows.
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
    """SwAV's loss in nats, float32 [B]: every view predicts the others' assignments: https://arxiv.org/abs/2006.09882.

    `scores` [V, B, K] are cosines of embeddings and prototypes. The first `assigned` views, the large ones, are
    assigned by `sinkhorn`; the loss is the mean over pairs of an assigned view and another.
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
    """DINO's loss in nats, float32 [B]: the student's views predict the teacher's others: https://arxiv.org/abs/2104.14294.

    Args:
      student: scores [V, B, K], the teacher's views first.
      teacher: scores [G, B, K] of the large views; no gradient flows into them.
      center: [K], subtracted from the teacher's; no gradient flows into it. See `update_center`.
    """
    targets = jax.nn.softmax((teacher.astype(jnp.float32) - center[None, None]) / teacher_temperature)
    return _mean_cross_entropy(
        jax.lax.stop_gradient(targets), jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    )


def update_center(
    center: jax.Array, teacher: jax.Array, *, momentum: float = 0.9, axis_name: str | None = None
) -> jax.Array:
    """DINO's next center [K]: a moving average of the mean of the teacher's scores [G, B, K] over the whole batch."""
    mean = mean_over(teacher.astype(jnp.float32).mean((0, 1)), axis_name)
    return momentum * center + (1 - momentum) * mean


def _mean_cross_entropy(targets: jax.Array, log_p: jax.Array) -> jax.Array:
    """Cross entropy [B], mean over pairs of a target view [G, B, K] and another view of `log_p` [V, B, K]."""
    pairs = [(g, v) for g in range(len(targets)) for v in range(len(log_p)) if g != v]
    return -jnp.stack([jnp.sum(targets[g] * log_p[v], axis=-1) for g, v in pairs]).mean(0)


# --- pieces -----------------------------------------------------------------------------------------------------------


def unit(x: jax.Array) -> jax.Array:
    """Rows of [..., D] at length 1, float32; those of length 0 stay, with a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-12))


def _products(a: jax.Array, b: jax.Array) -> jax.Array:
    """[R, D] and [C, D] to [R, C]: the accelerators' default precision would round to 8 bits of mantissa."""
    return jnp.matmul(a, b.T, precision="highest")


def _by_rows(
    losses: Callable[[tuple[jax.Array, ...]], jax.Array], arrays: tuple[jax.Array, ...], columns: int, block: int | None
) -> jax.Array:
    """`losses` [R] of arrays [R, ...], each held against `columns` others, `block` rows at a time; see `contrast`."""
    rows = len(arrays[0])
    block = min(block or max(MAX_SIMILARITIES // columns, 1), rows)
    if block == rows:
        return losses(arrays)
    # Rows that fill up the last block ask like any other, and are dropped.
    padding = -rows % block
    blocks = jax.tree.map(
        lambda x: jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1)).reshape(-1, block, *x.shape[1:]), arrays
    )
    return jax.lax.map(jax.checkpoint(losses), blocks).reshape(-1)[:rows]


def _gather(x: jax.Array, axis_name: str | None, *, axis: int = 0) -> jax.Array:
    """All shards' parts of the batch, whose gradient each shard then sends to all."""
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, axis=axis, tiled=True)


def _batch_mean(x: jax.Array, axis_name: str | None) -> jax.Array:
    """The mean [1, D] over the whole batch of [B, D], whose gradient each shard then sends to all."""
    return vary(mean_over(x.mean(0, keepdims=True), axis_name), axis_name)


def _moments(a: jax.Array, b: jax.Array, axis_name: str | None) -> jax.Array:
    """Mean products [D, D] over the whole batch."""
    return vary(mean_over(jnp.matmul(a.T, b, precision="highest") / len(a), axis_name), axis_name)


def _off_diagonal(x: jax.Array) -> jax.Array:
    """Sum of squares of [D, D] without the diagonal, which taken off afterwards would leave its rounding errors."""
    return jnp.sum(jnp.square(jnp.where(jnp.eye(len(x), dtype=bool), 0.0, x)))


def _log_sum_of_batch(x: jax.Array, axis_name: str | None) -> jax.Array:
    """log of the sum of exp over the whole batch, [B, K] to [1, K]."""
    if axis_name is None:
        return jax.nn.logsumexp(x, axis=0, keepdims=True)
    maximum = jax.lax.pmax(x.max(0, keepdims=True), axis_name)
    return maximum + jnp.log(jax.lax.psum(jnp.exp(x - maximum).sum(0, keepdims=True), axis_name))
