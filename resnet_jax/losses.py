"""Losses as plain functions of logits and targets, in float32."""

import jax
import jax.numpy as jnp

from resnet_jax.keys import example_index


def softmax_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross entropy in nats, float32 [B], of logits [B, K] and target distributions [B, K] that sum to 1."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.sum(targets * log_p, axis=-1)


def sigmoid_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Binary cross entropy summed over classes, float32 [B]: each class is its own question.

    As in "ResNet strikes back" (https://arxiv.org/abs/2110.00476), but for their threshold: targets in [0, 1] are
    taken as they are, so mixed labels ask for both of their classes.
    """
    logits = logits.astype(jnp.float32)
    return -jnp.sum(targets * jax.nn.log_sigmoid(logits) + (1 - targets) * jax.nn.log_sigmoid(-logits), axis=-1)


def smooth_labels(targets: jax.Array, smoothing: float) -> jax.Array:
    """Mix targets [B, K] with the uniform distribution: weight `smoothing` in [0, 1], https://arxiv.org/abs/1512.00567."""
    return targets * (1 - smoothing) + smoothing / targets.shape[-1]


def nt_xent(a: jax.Array, b: jax.Array, *, temperature: float = 0.5, axis_name: str | None = None) -> jax.Array:
    """SimCLR's loss in nats, float32 [B], of two views' embeddings [B, D]: https://arxiv.org/abs/2002.05709.

    Each view is asked for its twin among the other 2B - 1 by cosine similarity / `temperature` (> 0); an example's loss
    is the mean over its two views. With `axis_name` the batch is split over that axis and all shards' embeddings take
    part: the mean over shards is then that of the whole batch, and so is its gradient.
    """
    a, b = (_unit(x.astype(jnp.float32)) for x in (a, b))
    every_a, every_b = a, b
    if axis_name is not None:
        every_a, every_b = (jax.lax.all_gather(x, axis_name, tiled=True) for x in (a, b))
    # The accelerators' default precision would round the embeddings to 8 bits of mantissa.
    similarity = jnp.matmul(jnp.concatenate([a, b]), jnp.concatenate([every_a, every_b]).T, precision="highest")
    own = example_index(len(a), axis_name)
    itself = jnp.concatenate([own, own + len(every_a)])
    twin = jnp.concatenate([own + len(every_a), own])
    columns = jnp.arange(similarity.shape[1])
    logits = jnp.where(columns[None] == itself[:, None], -jnp.inf, similarity / temperature)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), twin[:, None], axis=1)[:, 0]
    return (losses[: len(a)] + losses[len(a) :]) / 2


def _unit(x: jax.Array) -> jax.Array:
    """Rows of length 1; those of length 0 stay, with a finite gradient."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-12))


LOSSES = {"softmax": softmax_cross_entropy, "sigmoid": sigmoid_cross_entropy}
