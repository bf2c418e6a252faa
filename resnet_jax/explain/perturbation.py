"""Heat maps from what the score loses when parts of the images are hidden: float32 [B, H, W]; no gradients."""

import jax

from resnet_jax.explain.network import Network
from resnet_jax.explain.targets import Target
from resnet_jax.keys import Key


def occlusion(
    network: Network,
    images: jax.Array,
    target: Target,
    *,
    window: int = 8,
    stride: int = 4,
    baseline: float | jax.Array = 0.0,
    chunk: int = 16,
) -> jax.Array:
    """Return the mean loss of score over the windows that hide each pixel, https://arxiv.org/abs/1311.2901."""
    raise NotImplementedError


def rise(
    network: Network,
    images: jax.Array,
    target: Target,
    *,
    key: Key,
    samples: int = 1024,
    cells: int = 7,
    kept: float = 0.5,
    baseline: float | jax.Array = 0.0,
    chunk: int = 16,
) -> jax.Array:
    """Return the mean score over random masks that keep each pixel, https://arxiv.org/abs/1806.07421."""
    raise NotImplementedError
