"""Losses as plain functions of logits and targets, computed in float32."""

import jax
import jax.numpy as jnp


def softmax_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the cross entropy in nats, float32 [B], of logits [B, K] against target distributions [B, K]."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.sum(targets * log_p, axis=-1)


def sigmoid_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the binary cross entropy in nats summed over classes, float32 [B], of logits and targets [B, K].

    As in "ResNet strikes back" (https://arxiv.org/abs/2110.00476) except for the threshold: targets in [0, 1] are used
    as is, so mixed labels have two positive classes.
    """
    logits = logits.astype(jnp.float32)
    return -jnp.sum(targets * jax.nn.log_sigmoid(logits) + (1 - targets) * jax.nn.log_sigmoid(-logits), axis=-1)


def smooth_labels(targets: jax.Array, smoothing: float) -> jax.Array:
    """Mix targets [B, K] with the uniform distribution by `smoothing` in [0, 1]: https://arxiv.org/abs/1512.00567."""
    return targets * (1 - smoothing) + smoothing / targets.shape[-1]


LOSSES = {"softmax": softmax_cross_entropy, "sigmoid": sigmoid_cross_entropy}
"""Losses by name: `(logits [B, K], targets [B, K]) -> float32 [B]`."""
