"""Class activation maps: float32 [B, h, w], of the size of the layer whose channels they weigh."""

import jax

from resnet_jax.explain.network import Network
from resnet_jax.explain.targets import Target


def grad_cam(network: Network, images: jax.Array, target: Target, layer: str | None = None) -> jax.Array:
    """Weigh each channel by the mean of its gradient, https://arxiv.org/abs/1610.02391.

    Raises:
      ValueError: there is no such layer (the message lists them), or its output is not a map [B, h, w, K].
    """
    raise NotImplementedError


def grad_cam_plus_plus(network: Network, images: jax.Array, target: Target, layer: str | None = None) -> jax.Array:
    """Weigh each channel by a weighted mean of its positive gradients, https://arxiv.org/abs/1710.11063."""
    raise NotImplementedError


def hires_cam(network: Network, images: jax.Array, target: Target, layer: str | None = None) -> jax.Array:
    """Weigh each value by its own gradient, https://arxiv.org/abs/2011.08891."""
    raise NotImplementedError


def layer_cam(network: Network, images: jax.Array, target: Target, layer: str | None = None) -> jax.Array:
    """Weigh each value by its own gradient where that is positive, https://doi.org/10.1109/TIP.2021.3089943."""
    raise NotImplementedError


def score_cam(
    network: Network, images: jax.Array, target: Target, layer: str | None = None, *, chunk: int = 16
) -> jax.Array:
    """Weigh each channel by the score of the images masked with it, https://arxiv.org/abs/1910.01279; no gradients."""
    raise NotImplementedError


def eigen_cam(network: Network, images: jax.Array, target: Target, layer: str | None = None) -> jax.Array:
    """Project the channels on their first principal component, https://arxiv.org/abs/2008.00299; `target` is unused."""
    raise NotImplementedError
