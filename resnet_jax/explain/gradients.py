"""Attributions by gradients: each is float32 [B, H, W, C], as large as the images."""

import jax

from resnet_jax.explain.network import Network
from resnet_jax.explain.targets import Target
from resnet_jax.keys import Key


def saliency(network: Network, images: jax.Array, target: Target) -> jax.Array:
    """Return the gradient of the score with respect to the images, https://arxiv.org/abs/1312.6034."""
    raise NotImplementedError


def input_x_gradient(network: Network, images: jax.Array, target: Target, *, baseline: float = 0.0) -> jax.Array:
    """Return (images - baseline) times the gradient, https://arxiv.org/abs/1605.01713."""
    raise NotImplementedError


def smooth_grad(
    network: Network,
    images: jax.Array,
    target: Target,
    *,
    key: Key,
    samples: int = 32,
    noise: float = 0.15,
    chunk: int = 4,
) -> jax.Array:
    """Return the mean gradient over noisy copies, https://arxiv.org/abs/1706.03825.

    The standard deviation of the noise is `noise` times each image's range; `chunk` copies are computed at once.
    """
    raise NotImplementedError


def integrated_gradients(
    network: Network,
    images: jax.Array,
    target: Target,
    *,
    baseline: float | jax.Array = 0.0,
    steps: int = 50,
    chunk: int = 4,
) -> jax.Array:
    """Integrate the gradient on the line from a baseline to the images, https://arxiv.org/abs/1703.01365.

    The attributions of an image sum to its score minus the baseline's (`trust.completeness_error`).
    """
    raise NotImplementedError


def guided_backprop(network: Network, images: jax.Array, target: Target) -> jax.Array:
    """Return the gradient where each ReLU also stops negative gradients, https://arxiv.org/abs/1412.6806.

    Raises:
      ValueError: the network has no ReLU.
    """
    raise NotImplementedError
