"""Heat maps and images as pictures: enlarged, blurred, scaled to [0, 1], laid out in a grid."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.resnet import stride_of


def upsample(
    maps: jax.Array, size: tuple[int, ...], *, align_corners: bool = False, first: float | None = None
) -> jax.Array:
    """Enlarge maps [B, h, w] to float32 [B, *size] bilinearly, as OpenCV and PyTorch do.

    `first` is the pixel on which the first position of a map is centred, see `Network.first_center`; positions are then
    a power of two of pixels apart. None means that they tile the image.
    """
    sizes = zip(maps.shape[1:], size, strict=True)
    rows, columns = (_interpolation(old, new, align_corners, first) for old, new in sizes)
    return jnp.einsum("Hh,bhw,Ww->bHW", rows, maps.astype(jnp.float32), columns, precision="highest")


def _interpolation(old: int, new: int, align_corners: bool, first: float | None) -> np.ndarray:
    """Weights [new, old] of the two nearest old pixels for each new one; their centres align, or those at the ends."""
    if align_corners:
        first, stride = 0.0, max(new - 1, 1) / max(old - 1, 1)
    elif first is None:
        first, stride = (new / old - 1) / 2, new / old
    else:
        stride = stride_of((old,), (new,))
    centers = (np.arange(new) - first) / stride
    distance = np.abs(np.clip(centers, 0, old - 1)[:, None] - np.arange(old)[None])
    return np.maximum(1 - distance, 0).astype(np.float32)


def blur(images: jax.Array, sigma: float) -> jax.Array:
    """Blur images [B, H, W, C] with a Gaussian of `sigma` pixels, whose weights sum to 1 at the edges too."""

    def weights(size: int) -> np.ndarray:
        distance = np.arange(size)[:, None] - np.arange(size)[None]
        values = np.exp(-np.square(distance / sigma) / 2)
        return (values / values.sum(1, keepdims=True)).astype(np.float32)

    rows, columns = (weights(size) for size in images.shape[1:3])
    return jnp.einsum("Hh,bhwc,Ww->bHWc", rows, images, columns, precision="highest")


def rescale(maps: jax.Array) -> jax.Array:
    """Scale each map [B, ...] to [0, 1] by its minimum and maximum; a constant one becomes 0."""
    axes = tuple(range(1, maps.ndim))
    low, high = maps.min(axes, keepdims=True), maps.max(axes, keepdims=True)
    return (maps - low) / jnp.where(high > low, high - low, 1)


def grid(tiles: jax.Array, columns: int | None = None, *, gap: int = 1, fill: float = 1.0) -> jax.Array:
    """Lay out tiles [N, h, w] or [N, h, w, C], N > 0, in rows as one picture [H, W] or [H, W, C]; square by default."""
    count, height, width, *channels = tiles.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    none = ((0, 0),) * len(channels)
    tiles = jnp.pad(tiles, ((0, 0), (0, gap), (0, gap), *none), constant_values=fill)
    tiles = jnp.pad(tiles, ((0, rows * columns - count), (0, 0), (0, 0), *none), constant_values=fill)
    tiles = tiles.reshape(rows, columns, height + gap, width + gap, *channels)
    picture = jnp.moveaxis(tiles, 2, 1).reshape(rows * (height + gap), columns * (width + gap), *channels)
    return picture[: picture.shape[0] - gap, : picture.shape[1] - gap]
