"""The linear probe: a linear classifier on frozen features, with the learning rate chosen on a validation split."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pretrain.knn import labelled
from resnet_jax.losses import softmax_cross_entropy

LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
MOMENTUM = 0.9
BLOCK = 1024  # rows to classify at once
Split = tuple[Any, Any]  # features [N, D], labels int [N]
Weights = dict[str, jax.Array]  # kernel [D, K], bias [K]


class Probe(NamedTuple):
    """A trained probe, with logits `(features - mean) / std @ kernel + bias`.

    Attributes:
      kernel, bias: float32 [D, K] and [K].
      mean, std: float32 [D], statistics of the training features.
      learning_rate: the chosen one.
      validation_accuracy: its accuracy in [0, 1].
      validation_accuracies: accuracy by learning rate, 0 where training diverged.
    """

    kernel: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    learning_rate: float
    validation_accuracy: float
    validation_accuracies: dict[float, float]


def linear_probe(
    train: Split,
    validation: Split,
    *,
    classes: int,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int = 100,
    batch: int = 256,
    seed: int = 0,
) -> Probe:
    """Train a linear layer on standardised features at every learning rate, and keep the best on `validation`.

    Training starts from zeros and uses SGD of momentum 0.9 on the mean softmax cross entropy, with the learning rate on
    a cosine to 0. Ties go to the lowest learning rate.

    Args:
      train, validation: features [N, D] and labels int [N] in [0, `classes`).
      batch: size of the shuffled batches, at most N; an incomplete last batch of an epoch is dropped.

    Raises:
      ValueError: no learning rates, rates out of range, `epochs` or `batch` below 1, features and labels that
        `knn.labelled` refuses, or training diverged at every learning rate.
    """
    rates = sorted({float(rate) for rate in learning_rates})
    if not rates or not all(0 < rate < np.inf for rate in rates):
        raise ValueError(f"pass at least one learning rate, all above 0 and finite, got {list(learning_rates)}")
    if epochs < 1 or batch < 1:
        raise ValueError(f"epochs and batch must be at least 1, got {epochs} and {batch}")
    features, labels = labelled("train", *train, classes)
    other, other_labels = labelled("validation", *validation, classes)
    # Train one probe per learning rate at once, then drop those that diverged.
    mean, std = _moments(features)
    weights = _fit(
        (features - mean) / std,
        labels,
        jnp.asarray(rates, jnp.float32),
        jax.random.key(seed),
        classes=classes,
        epochs=epochs,
        batch=min(batch, len(features)),
    )
    kernels, biases = np.asarray(weights["kernel"]), np.asarray(weights["bias"])
    finite = np.isfinite(kernels).all((1, 2)) & np.isfinite(biases).all(1)
    predictions = np.asarray(jax.vmap(_predict, (0, None))(weights, (other - mean) / std))
    accuracies = np.where(finite, (predictions == other_labels).mean(1), 0.0)
    if not finite.any():
        raise ValueError(f"the probe diverged at every learning rate, even at the lowest, {rates[0]}")
    best = int(np.argmax(accuracies))  # ties go to the lowest rate
    return Probe(
        kernel=kernels[best],
        bias=biases[best],
        mean=mean,
        std=std,
        learning_rate=rates[best],
        validation_accuracy=float(accuracies[best]),
        validation_accuracies=dict(zip(rates, accuracies.tolist(), strict=True)),
    )


def probe_accuracy(probe: Probe, features: Any, labels: Any) -> float:
    """Accuracy in [0, 1] of a probe on features [N, D] and labels int [N].

    Raises:
      ValueError: features and labels that `knn.labelled` refuses.
    """
    features, labels = labelled("probe", features, labels, probe.kernel.shape[1])
    weights = {"kernel": jnp.asarray(probe.kernel), "bias": jnp.asarray(probe.bias)}
    return float(np.mean(np.asarray(_predict(weights, (features - probe.mean) / probe.std)) == labels))


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, float32 [D]; 1 for a dimension that varies by no more than float32 rounding."""
    mean = features.mean(0, dtype=np.float64)
    std = np.sqrt(np.square(features - mean.astype(np.float32)).mean(0, dtype=np.float64))
    moves = std > np.maximum(1e-6 * np.abs(mean), 1e-18)
    return mean.astype(np.float32), np.where(moves, std, 1.0).astype(np.float32)


def _logits(weights: Weights, features: jax.Array) -> jax.Array:
    return jnp.matmul(features, weights["kernel"], precision="highest") + weights["bias"][None]


@jax.jit
def _predict(weights: Weights, features: jax.Array) -> jax.Array:
    """Predicted classes, int32 [N], in blocks of rows, so that no logits [N, K] are held."""
    return jax.lax.map(
        lambda row: _logits(weights, row[None])[0].argmax(), features, batch_size=min(BLOCK, len(features))
    )


@partial(jax.jit, static_argnames=("classes", "epochs", "batch"))
def _fit(
    features: jax.Array, labels: jax.Array, rates: jax.Array, key: jax.Array, *, classes: int, epochs: int, batch: int
) -> Weights:
    """Train weights with a leading axis over `rates` [L]; every rate sees the same batches."""
    count, dimensions = features.shape
    steps = count // batch

    def loss_of(weights: Weights, features: jax.Array, labels: jax.Array) -> jax.Array:
        return softmax_cross_entropy(_logits(weights, features), jax.nn.one_hot(labels, classes)).mean()

    def update(weights: Weights, velocity: Weights, rate: jax.Array, *examples: jax.Array) -> tuple[Weights, Weights]:
        grads = jax.grad(loss_of)(weights, *examples)
        velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, grads)
        return jax.tree.map(lambda w, v: w - rate * v, weights, velocity), velocity

    def step(state: tuple[Weights, Weights], inputs: tuple[jax.Array, jax.Array]) -> Any:
        number, rows = inputs
        decayed = rates * (1 + jnp.cos(jnp.pi * number / (epochs * steps))) / 2
        return jax.vmap(update, (0, 0, 0, None, None))(*state, decayed, features[rows], labels[rows]), None

    def epoch(state: tuple[Weights, Weights], number: jax.Array) -> Any:
        order = jax.random.permutation(jax.random.fold_in(key, number), count)[: steps * batch]
        numbers = number * steps + jnp.arange(steps)
        return jax.lax.scan(step, state, (numbers, order.reshape(steps, batch)))

    zeros = {"kernel": jnp.zeros((len(rates), dimensions, classes)), "bias": jnp.zeros((len(rates), classes))}
    (weights, _), _ = jax.lax.scan(epoch, (zeros, zeros), jnp.arange(epochs))
    return weights
