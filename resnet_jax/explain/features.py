"""What a network has learned: filters, feature maps, and images that activate a channel or a class most."""

from collections.abc import Callable

import jax

from resnet_jax.explain.network import Network
from resnet_jax.explain.targets import Target
from resnet_jax.keys import Key

Goal = Callable[[jax.Array], jax.Array]
"""`images [B, H, W, C] -> [B]`: what `visualize` maximizes."""


def channel_goal(network: Network, layer: str, channels: jax.Array) -> Goal:
    """Return a goal: image i of a batch activates channel `channels[i]` of a layer, int32 [B], on average."""
    raise NotImplementedError


def output_goal(network: Network, target: Target) -> Goal:
    """Return a goal: each image scores high, such as `class_score(jnp.arange(10))` for ten images of ten classes."""
    raise NotImplementedError


def visualize(
    goal: Goal,
    *,
    key: Key,
    shape: tuple[int, int, int, int],
    mean: tuple[float, ...] = (0.5, 0.5, 0.5),
    std: tuple[float, ...] = (0.25, 0.25, 0.25),
    steps: int = 256,
    rate: float = 0.05,
    jitter: int = 4,
    smoothness: float = 0.0,
) -> jax.Array:
    """Maximize a goal from noise: images [B, H, W, C] in [0, 1], https://distill.pub/2017/feature-visualization.

    The goal sees (images - mean) / std, shifted at random by up to `jitter` pixels in each step.
    """
    raise NotImplementedError


def filters(network: Network, path: str | None = None) -> jax.Array:
    """Return a convolution's kernels [K, h, w, C], each scaled to [0, 1]; the first with as many inputs as colours.

    Raises:
      ValueError: there is no such kernel (the message lists them).
    """
    raise NotImplementedError


def feature_maps(network: Network, images: jax.Array, layer: str | None = None, *, limit: int = 64) -> jax.Array:
    """Return the first `limit` channels of a layer as tiles [B, K, h, w], each scaled to [0, 1]."""
    raise NotImplementedError
