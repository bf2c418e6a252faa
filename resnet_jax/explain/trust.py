"""Does a heat map say what the network uses? Scores of heat maps [B, H, W]; compare each with that of a random map."""

from typing import NamedTuple

import jax

from resnet_jax.explain.network import Network
from resnet_jax.explain.targets import Target
from resnet_jax.keys import Key


class Road(NamedTuple):
    """Scores [B, P] after imputing shares of the pixels: the most (`morf`) or the least (`lerf`) relevant first."""

    morf: jax.Array
    lerf: jax.Array

    def combined(self) -> jax.Array:
        """Return the mean of (lerf - morf) / 2 over the shares, [B]; higher is better, a random map has about 0."""
        raise NotImplementedError


def deletion(
    network: Network,
    images: jax.Array,
    target: Target,
    heat: jax.Array,
    *,
    steps: int = 32,
    baseline: float | jax.Array = 0.0,
    chunk: int = 16,
) -> jax.Array:
    """Return scores [B, steps + 1] as pixels become the baseline, hottest first, https://arxiv.org/abs/1806.07421.

    Entry i is the score with a share i / steps of the pixels removed. A small `area` is good.
    """
    raise NotImplementedError


def insertion(
    network: Network,
    images: jax.Array,
    target: Target,
    heat: jax.Array,
    *,
    steps: int = 32,
    baseline: float | jax.Array | None = None,
    chunk: int = 16,
) -> jax.Array:
    """Return scores [B, steps + 1] as pixels of the blurred images become sharp, hottest first; a large `area` is good.

    `baseline` replaces the blurred images.
    """
    raise NotImplementedError


def area(curves: jax.Array) -> jax.Array:
    """Return the area under curves [B, n] over [0, 1], [B]."""
    raise NotImplementedError


def road(
    network: Network,
    images: jax.Array,
    target: Target,
    heat: jax.Array,
    *,
    key: Key,
    shares: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8),
    noise: float = 0.01,
    chunk: int = 4,
) -> Road:
    """Remove and debias: impute pixels by their neighbours, https://arxiv.org/abs/2202.00449."""
    raise NotImplementedError


def infidelity(
    network: Network,
    images: jax.Array,
    target: Target,
    attribution: jax.Array,
    *,
    key: Key,
    samples: int = 64,
    scaled: bool = True,
    chunk: int = 8,
) -> jax.Array:
    """Return the mean squared error of the predicted losses of score, [B], https://arxiv.org/abs/1901.09392.

    `attribution` is a heat map [B, H, W] of contributions. `scaled` gives it the best factor first, as heat maps have
    no unit.
    """
    raise NotImplementedError


def completeness_error(
    network: Network,
    images: jax.Array,
    target: Target,
    attribution: jax.Array,
    *,
    baseline: float | jax.Array = 0.0,
) -> jax.Array:
    """Return the sum of the attributions minus the difference of score to the baseline, [B]; 0 for exact IG."""
    raise NotImplementedError
