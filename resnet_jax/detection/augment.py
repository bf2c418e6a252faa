"""Random augmentation of images with boxes: pure functions `(key, image, size, boxes, labels) -> (image, ..., labels)`.

They are for one example; `augment_batch` maps them over a batch. The image is float32 [H, W, C] in [0, 1] (until it is
normalized), 0 on the right and below its true `size` int32 [2] (height, width), and stays so. Boxes are float32 [M, 4]
(x1, y1, x2, y2) in its pixels, labels int32 [M], -1 where a row is padding. Rows keep their places, so other arrays of
objects stay aligned; a box that an augmentation loses becomes padding.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from resnet_jax.augment import Augment, masked_color_jitter
from resnet_jax.detection.padding import inside
from resnet_jax.keys import Key

Example = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""(image, size, boxes, labels) of one example."""
BoxAugment = Callable[[Key, jax.Array, jax.Array, jax.Array, jax.Array], Example]
"""A pure function `(key, image, size, boxes, labels) -> (image, size, boxes, labels)` of a typed key."""


def identity(key: Key, image: jax.Array, size: jax.Array, boxes: jax.Array, labels: jax.Array) -> Example:
    """Return the example unchanged."""
    return image, size, boxes, labels


def compose(*augments: BoxAugment) -> BoxAugment:
    """Apply the augmentations in order; the i-th draws from `fold_in(key, i)`, so appending keeps earlier draws."""

    def augment(key: Key, *example: jax.Array) -> Example:
        image, size, boxes, labels = example
        for position, step in enumerate(augments):
            image, size, boxes, labels = step(jax.random.fold_in(key, position), image, size, boxes, labels)
        return image, size, boxes, labels

    return augment


def randomly(augment: BoxAugment, p: float = 0.5) -> BoxAugment:
    """Apply an augmentation with probability `p`; both outcomes are always computed."""

    def augment_or_keep(key: Key, *example: jax.Array) -> Example:
        gate, inner = jax.random.split(key)
        applied = jax.random.bernoulli(gate, p)
        image, size, boxes, labels = map(
            lambda new, old: jnp.where(applied, new, old), augment(inner, *example), example
        )
        return image, size, boxes, labels

    return augment_or_keep


def augment_batch(augment: BoxAugment, keys: Key, batch: dict[str, Any]) -> dict[str, Any]:
    """Augment a batch's `image` [B, H, W, C] (uint8, scaled to [0, 1], or float32), `size`, `boxes` and `labels`.

    Example i draws from the typed key `keys[i]`; other arrays of the batch are kept.

    Raises:
      TypeError: the images have a different dtype.
    """
    images = batch["image"]
    if images.dtype == jnp.uint8:
        images = images.astype(jnp.float32) / 255
    elif images.dtype != jnp.float32:
        raise TypeError(f"images must be uint8 or float32, got {images.dtype}")
    names = ("image", "size", "boxes", "labels")
    results = jax.vmap(augment)(keys, images, *(batch[name] for name in names[1:]))
    return {**batch, **dict(zip(names, results, strict=True))}


def on_pixels(augment: Augment) -> BoxAugment:
    """Lift an augmentation of pixels that moves none, such as `normalize`; the padding is 0 afterwards."""

    def augment_pixels(key: Key, image: jax.Array, size: jax.Array, boxes: jax.Array, labels: jax.Array) -> Example:
        return jnp.where(inside(image.shape[:2], 1, size)[..., None], augment(key, image), 0), size, boxes, labels

    return augment_pixels


def color_jitter(
    brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4, hue: float = 0.1
) -> BoxAugment:
    """Jitter colors as `resnet_jax.augment.color_jitter` does, as if there were no padding."""
    jitter = masked_color_jitter(brightness, contrast, saturation, hue)

    def augment(key: Key, image: jax.Array, size: jax.Array, boxes: jax.Array, labels: jax.Array) -> Example:
        mask = inside(image.shape[:2], 1, size)
        return jnp.where(mask[..., None], jitter(key, image, mask), 0), size, boxes, labels

    return augment


def flip(key: Key, image: jax.Array, size: jax.Array, boxes: jax.Array, labels: jax.Array) -> Example:
    """Mirror the image and its boxes horizontally, within the true width."""
    columns = jnp.arange(image.shape[1])
    image = jnp.take(image, jnp.where(columns < size[1], size[1] - 1 - columns, columns), axis=1)
    x1, y1, x2, y2 = jnp.moveaxis(boxes, -1, 0)
    mirrored = jnp.stack([size[1] - x2, y1, size[1] - x1, y2], axis=-1)
    return image, size, jnp.where(labels[:, None] >= 0, mirrored, boxes), labels


def random_flip(p: float = 0.5) -> BoxAugment:
    """Flip horizontally with probability `p`."""
    return randomly(flip, p)


def scale_jitter(
    scale: tuple[float, float] = (0.1, 2.0), *, visible: float = 0.25, smallest: float = 1.0
) -> BoxAugment:
    """Rescale by a factor uniform in `scale`, then crop at random, or pad, to the same [H, W]: large scale jitter.

    https://arxiv.org/abs/2012.07177. Downsampling averages. A box of which less than a share `visible` of the area is
    left, or a side shorter than `smallest` pixels, becomes padding.
    """

    def augment(key: Key, image: jax.Array, size: jax.Array, boxes: jax.Array, labels: jax.Array) -> Example:
        factor_key, place_key = jax.random.split(key)
        factor = jax.random.uniform(factor_key, (), jnp.float32, *scale)
        scaled = jnp.maximum(jnp.floor(size * factor), 1).astype(jnp.int32)
        canvas = jnp.array(image.shape[:2], jnp.int32)
        room = jnp.maximum(scaled - canvas, 0)
        offset = jnp.floor(jax.random.uniform(place_key, (2,)) * (room + 1)).astype(jnp.int32)
        new = jnp.minimum(scaled, canvas)

        # The default precision on accelerators would round pixels to 8 bits of mantissa.
        rows, columns = (_resampling(image.shape[axis], size[axis], new[axis], offset[axis], factor) for axis in (0, 1))
        image = jnp.einsum("xw,hwc->xhc", columns, image, precision="highest")
        image = jnp.einsum("yh,xhc->yxc", rows, image, precision="highest")

        moved = boxes * factor - jnp.tile(offset[::-1], 2)[None]
        kept = jnp.clip(moved, 0, jnp.tile(new[::-1], 2)[None])
        (full, _), (area, side) = _area_and_side(moved), _area_and_side(kept)
        keep = (labels >= 0) & (area >= visible * full) & (side >= smallest)
        return image, new, jnp.where(keep[:, None], kept, 0), jnp.where(keep, labels, -1)

    return augment


def _area_and_side(boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Area and shorter side of boxes, [M] each."""
    sides = boxes[:, 2:] - boxes[:, :2]
    return jnp.prod(sides, axis=1), jnp.min(sides, axis=1)


def _resampling(length: int, true: jax.Array, new: jax.Array, offset: jax.Array, factor: jax.Array) -> jax.Array:
    """Return a matrix [length, length] that scales the first `true` pixels by `factor`, keeping `new` from `offset`."""
    pixel = jnp.arange(length, dtype=jnp.float32)
    center = (pixel + offset + 0.5) / factor - 0.5
    near = jnp.maximum(0.0, 1 - jnp.abs(center[:, None] - pixel[None]) / jnp.maximum(1 / factor, 1.0))
    # Dropping pixels outside the image and renormalizing is the same as repeating its edge.
    near = jnp.where((pixel[None] < true) & (pixel[:, None] < new), near, 0.0)
    return near / jnp.maximum(jnp.sum(near, axis=1, keepdims=True), 1e-6)
