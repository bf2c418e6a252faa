"""Losses of detectors, elementwise, and their means over the examples that count in the whole batch."""

import jax
import jax.numpy as jnp

from resnet_jax.parallel import sum_over, vary


def smooth_l1(errors: jax.Array, beta: float) -> jax.Array:
    """Huber loss over `beta`: quadratic up to an error of `beta`, then |error| - beta / 2; |error| if `beta` is 0."""
    size = jnp.abs(errors)
    if beta == 0:
        return size
    return jnp.where(size < beta, 0.5 * size**2 / beta, size - 0.5 * beta)


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Binary cross entropy in nats of logits against targets in [0, 1], elementwise."""
    return jax.nn.softplus(logits) - logits * targets


def focal(logits: jax.Array, targets: jax.Array, *, alpha: float = 0.25, gamma: float = 2.0) -> jax.Array:
    """Focal loss, elementwise, of logits against targets 0 or 1: https://arxiv.org/abs/1708.02002.

    Binary cross entropy times (1 - p)^gamma, where p is the probability of the target, and times `alpha` for targets 1
    and 1 - `alpha` for targets 0.
    """
    p = jax.nn.sigmoid(logits)
    wrong = p * (1 - targets) + (1 - p) * targets
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    return weight * wrong**gamma * binary_cross_entropy(logits, targets)


def mean_of(total: jax.Array, count: jax.Array, axis_name: str | None) -> jax.Array:
    """Divide a shard's sum by the number of examples, such that the mean over shards is that over the whole batch.

    Shards count different numbers of examples, so a mean over each of them would not do. 0 if there are no examples.
    """
    if axis_name is None:
        return total / jnp.maximum(count, 1)
    shards = jax.lax.axis_size(axis_name)
    everywhere = vary(sum_over(count, axis_name), axis_name)
    return total * shards / jnp.maximum(everywhere, 1)
