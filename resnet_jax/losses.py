"""Losses as plain functions of logits and targets, in float32."""

import jax
import jax.numpy as jnp


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


LOSSES = {"softmax": softmax_cross_entropy, "sigmoid": sigmoid_cross_entropy}
"""The losses by name: `(logits [B, K], targets [B, K]) -> float32 [B]`."""
