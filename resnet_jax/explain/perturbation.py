"""Heat maps from scores of images with hidden parts: float32 [B, H, W]; no gradients, so any function will do."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.explain.maps import upsample
from resnet_jax.explain.network import Network
from resnet_jax.explain.sampling import total
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
    """Return the mean loss of score over the windows that hide each pixel, https://arxiv.org/abs/1311.2901.

    `chunk` of the windows are computed at once. If `stride` does not divide what a window leaves, the last is cut off
    at the edge.

    Raises:
      ValueError: `stride` is not between 1 and `window`.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"stride must be between 1 and the window's {window} pixels, got {stride}")
    height, width = images.shape[1:3]
    starts = [range(0, math.ceil(max(0, size - window) / stride) * stride + 1, stride) for size in (height, width)]
    corners = np.stack(np.meshgrid(*starts, indexing="ij"), -1).reshape(-1, 2)
    before = target(network.outputs(images))

    def loss(corner: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows, columns = jnp.arange(height) - corner[0], jnp.arange(width) - corner[1]
        inside = ((rows >= 0) & (rows < window))[:, None] & ((columns >= 0) & (columns < window))[None]
        hidden = jnp.where(inside[None, :, :, None], baseline, images)
        lost = before - target(network.outputs(hidden))
        return lost[:, None, None] * inside[None], inside.astype(jnp.float32)

    losses, counts = total(loss, jnp.asarray(corners), chunk)
    return losses / counts[None]


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
    """Return the mean score over random masks that keep each pixel, https://arxiv.org/abs/1806.07421.

    A mask is a grid of about `cells` by `cells`, each kept with probability `kept`, enlarged bilinearly and shifted at
    random. Scores are averaged with the mask as their weight; the paper divides by the expected weight instead, which
    is noisier.
    """
    height, width = images.shape[1:3]
    cell = math.ceil(height / cells), math.ceil(width / cells)

    def sample(key: Key) -> tuple[jax.Array, jax.Array]:
        key_cells, key_shift = jax.random.split(key)
        coarse = jax.random.bernoulli(key_cells, kept, (1, cells + 1, cells + 1))
        fine = upsample(coarse, (cell[0] * (cells + 1), cell[1] * (cells + 1)))[0]
        start = jax.random.randint(key_shift, (2,), 0, jnp.asarray(cell))
        mask = jax.lax.dynamic_slice(fine, start, (height, width))
        weight = mask[None, :, :, None]
        scores = target(network.outputs(weight * images + (1 - weight) * baseline))
        return scores[:, None, None] * mask[None], mask

    scores, masks = total(sample, jax.random.split(key, samples), chunk)
    return scores / (masks[None] + 1e-6)
