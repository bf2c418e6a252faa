"""Random image augmentation as pure functions `(key, image) -> image`.

An image is float32 [H, W, C] in [0, 1] (until `normalize`), and a key is a typed `jax.random.key`. Each factory takes
hyperparameters and returns such a function; the functions compose and work under jit, vmap, grad and shard_map. Shapes
are static. Resampling weights sum to one only up to rounding, so values may leave [0, 1] by about 1e-6.
"""

import math
import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from resnet_jax.keys import Key, example_keys

Image = jax.Array
Augment = Callable[[Key, Image], Image]
"""A pure function `(key, image) -> image` of a typed key and a float32 image [H, W, C]."""
Size = int | tuple[int, int]
Range = tuple[float, float]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Channel means of ImageNet's training images in [0, 1]."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Channel standard deviations of ImageNet's training images in [0, 1]."""


def identity(key: Key, image: Image) -> Image:
    """Return the image [H, W, C] unchanged."""
    return image


def compose(*augments: Augment) -> Augment:
    """Apply the augmentations in order; the i-th draws from `fold_in(key, i)`, so appending keeps earlier draws."""

    def augment(key: Key, image: Image) -> Image:
        for position, step in enumerate(augments):
            image = step(jax.random.fold_in(key, position), image)
        return image

    return augment


def randomly(augment: Augment, p: float = 0.5) -> Augment:
    """Apply a shape-preserving augmentation with probability `p`; both outcomes are always computed."""

    def augment_or_keep(key: Key, image: Image) -> Image:
        gate, inner = jax.random.split(key)
        return jnp.where(jax.random.bernoulli(gate, p), augment(inner, image), image)

    return augment_or_keep


def choose(*augments: Augment) -> Augment:
    """Apply one augmentation, drawn uniformly; all must return the same shape, and under vmap all are computed."""

    def augment(key: Key, image: Image) -> Image:
        pick, inner = jax.random.split(key)
        return jax.lax.switch(jax.random.randint(pick, (), 0, len(augments)), augments, inner, image)

    return augment


def augment_batch(augment: Augment, keys: Key, images: jax.Array) -> jax.Array:
    """Augment images [B, H, W, C], uint8 (scaled to float32 in [0, 1]) or float32, each with its own typed key of [B].

    Raises:
      TypeError: the images have a different dtype.
    """
    if images.dtype == jnp.uint8:
        images = images.astype(jnp.float32) / 255
    elif images.dtype != jnp.float32:
        raise TypeError(f"images must be uint8 or float32, got {images.dtype}")
    return jax.vmap(augment)(keys, images)


def preprocess_batch(augment: Augment, images: jax.Array) -> jax.Array:
    """Apply a deterministic augmentation, such as evaluation preprocessing, as `augment_batch` does, but without keys.

    If the augmentation does draw, image i draws from `fold_in(key(0), i)`, so the result is the same in every call.
    """
    return augment_batch(augment, example_keys(jax.random.key(0), jnp.arange(len(images))), images)


def normalize(mean: float | Sequence[float] = IMAGENET_MEAN, std: float | Sequence[float] = IMAGENET_STD) -> Augment:
    """Return `(image - mean) / std` for images in [0, 1]; `mean` and `std` are scalars or one value per channel."""
    center, scale = (np.asarray(value, np.float32).reshape(1, 1, -1) for value in (mean, std))

    def augment(key: Key, image: Image) -> Image:
        if {center.size, scale.size} - {1, image.shape[-1]}:
            raise ValueError(f"normalize: {center.size} means, {scale.size} stds for an image of shape {image.shape}")
        return (image - center) / scale

    return augment


def random_crop(padding: int = 4, *, mode: str = "constant") -> Augment:
    """Pad each side by `padding` pixels (`mode` is that of `jnp.pad`; "constant" means zeros), then crop randomly."""

    def augment(key: Key, image: Image) -> Image:
        padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode=mode)
        top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
        return jax.lax.dynamic_slice(padded, (top, left, jnp.zeros_like(top)), image.shape)

    return augment


def random_flip(p: float = 0.5) -> Augment:
    """Flip the image [H, W, C] horizontally with probability `p`."""
    return randomly(lambda key, image: image[:, ::-1], p)


def center_crop(size: Size) -> Augment:
    """Crop the center of [H, W, C] to `size` (int or (h, w)); ValueError if the image is smaller."""
    height, width = _pair(size)

    def augment(key: Key, image: Image) -> Image:
        if height > image.shape[0] or width > image.shape[1]:
            raise ValueError(f"cannot crop {height}x{width} from an image of shape {image.shape}")
        top, left = round((image.shape[0] - height) / 2), round((image.shape[1] - width) / 2)
        return image[top : top + height, left : left + width]

    return augment


def resize(size: Size, *, antialias: bool = True) -> Augment:
    """Resample [H, W, C] bilinearly to `size` (int for a square, or (h, w)); `antialias` averages when downsampling."""

    def augment(key: Key, image: Image) -> Image:
        return _resample(image, (image.shape[0], image.shape[1], 0, 0), size, antialias)

    return augment


def random_resized_crop(
    size: Size, *, scale: Range = (0.08, 1.0), ratio: Range = (3 / 4, 4 / 3), antialias: bool = False
) -> Augment:
    """Crop a random box and resample it bilinearly to `size` (int or (h, w)): https://arxiv.org/abs/1409.4842.

    The box covers a fraction of the area uniform in `scale`, with an aspect ratio (width:height) log-uniform in
    `ratio`. If none of ten draws fits, it is the largest central box that respects `ratio`, as in torchvision. Without
    `antialias`, downsampling skips pixels.
    """

    def augment(key: Key, image: Image) -> Image:
        rows, columns = image.shape[:2]
        height, width = min(rows, max(round(columns / ratio[0]), 1)), min(columns, max(round(rows * ratio[1]), 1))
        central = height, width, (rows - height) // 2, (columns - width) // 2
        box, fits = _random_box(key, rows, columns, scale, ratio)
        box = [jnp.where(fits, value, fallback) for value, fallback in zip(box, central, strict=True)]
        return _resample(image, box, size, antialias)

    return augment


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _uniform(key: Key, shape: tuple[int, ...], low: ArrayLike, high: ArrayLike) -> jax.Array:
    return jax.random.uniform(key, shape, jnp.float32, low, high)


def _random_box(key: Key, rows: int, columns: int, scale: Range, ratio: Range) -> tuple[list[jax.Array], jax.Array]:
    """Draw ten boxes and return [height, width, top, left] (whole float32) of the first that fits, and `fits`."""
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    area = rows * columns * _uniform(area_key, (10,), *scale)
    aspect = jnp.exp(_uniform(ratio_key, (10,), math.log(ratio[0]), math.log(ratio[1])))
    heights, widths = jnp.round(jnp.sqrt(area / aspect)), jnp.round(jnp.sqrt(area * aspect))
    fitting = (heights >= 1) & (heights <= rows) & (widths >= 1) & (widths <= columns)
    first = jnp.argmax(fitting)
    height, width = heights[first], widths[first]
    down, right = _uniform(place_key, (2,), 0.0, 1.0)
    top, left = jnp.floor(down * (rows - height + 1)), jnp.floor(right * (columns - width + 1))
    return [height, width, top, left], fitting[first]


def _resample(image: Image, box: Sequence[ArrayLike], size: Size, antialias: bool) -> Image:
    """Resample a box (height, width, top, left) of the image bilinearly to `size`."""
    height, width, top, left = box

    def weights(length: int, start: Any, extent: Any, size: int) -> jax.Array:
        """Return a matrix [size, length] that resamples pixels [start, start + extent); rows sum to one."""
        step = extent / size
        center = (start + (jnp.arange(size, dtype=jnp.float32) + 0.5) * step - 0.5)[:, None]
        pixel = jnp.arange(length, dtype=jnp.float32)[None]
        near = jnp.maximum(0.0, 1 - jnp.abs(pixel - center) / (jnp.maximum(step, 1.0) if antialias else 1.0))
        # Dropping pixels outside the box and renormalizing is the same as repeating its edge.
        near = jnp.where((pixel >= start) & (pixel < start + extent), near, 0.0)
        return near / jnp.sum(near, axis=1, keepdims=True)

    rows = weights(image.shape[0], top, height, _pair(size)[0])
    columns = weights(image.shape[1], left, width, _pair(size)[1])
    # The default precision on accelerators would round pixels to 8 bits of mantissa.
    image = jnp.einsum("xw,hwc->xhc", columns, image, precision="highest")
    return jnp.einsum("yh,xhc->yxc", rows, image, precision="highest")


def cutout(size: Size = 16, *, p: float = 1.0, fill: float = 0.0) -> Augment:
    """With probability `p`, fill a box of `size` (int or (h, w)) around a random pixel, clipped at the border.

    https://arxiv.org/abs/1708.04552. Apply it after `normalize` to fill with the mean, as the paper does.
    """
    height, width = _pair(size)

    def augment(key: Key, image: Image) -> Image:
        return jnp.where(random_centered_box(key, image.shape[0], image.shape[1], height, width), fill, image)

    return randomly(augment, p)


def random_erasing(
    *, p: float = 0.5, scale: Range = (0.02, 0.33), ratio: Range = (0.3, 3.3), value: float = 0.0
) -> Augment:
    """With probability `p`, fill a random box inside the image: https://arxiv.org/abs/1708.04896.

    The box covers a fraction of the area uniform in `scale`, with an aspect ratio (width:height) log-uniform in
    `ratio`. Nothing is erased if none of ten draws fits.
    """

    def augment(key: Key, image: Image) -> Image:
        rows, columns = image.shape[:2]
        box, fits = _random_box(key, rows, columns, scale, ratio)
        return jnp.where(fits & _box(rows, columns, *box), value, image)

    return randomly(augment, p)


def _box(rows: int, columns: int, height, width, top, left) -> jax.Array:
    """Return a boolean [rows, columns, 1] that is True inside the box."""
    y, x = jnp.arange(rows)[:, None, None], jnp.arange(columns)[None, :, None]
    return (y >= top) & (y < top + height) & (x >= left) & (x < left + width)


def random_centered_box(key: Key, rows: int, columns: int, height: Any, width: Any) -> jax.Array:
    """Return a boolean [rows, columns, 1], True in a `height` x `width` box around a random pixel, clipped."""
    y, x = jax.random.randint(key, (2,), 0, np.array([rows, columns]))
    return _box(rows, columns, height, width, y - height // 2, x - width // 2)


def color_jitter(brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4, hue: float = 0.1) -> Augment:
    """Jitter brightness, contrast, saturation and hue in random order, like torchvision's ColorJitter.

    See `masked_color_jitter`, which takes a part of the image.
    """
    jitter = masked_color_jitter(brightness, contrast, saturation, hue)
    return lambda key, image: jitter(key, image, None)


def masked_color_jitter(
    brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4, hue: float = 0.1
) -> Callable[[Key, Image, jax.Array | None], Image]:
    """Return `color_jitter` as `(key, image, mask) -> image`: contrast is about the mean of `mask`, bool [H, W].

    Factors are uniform in [max(0, 1 - strength), 1 + strength]; the hue shift is uniform in [-hue, hue] turns, with
    hue <= 0.5. C is 3, or 1 (brightness and contrast only). All 24 orders are equally likely.

    Raises:
      ValueError: a strength is negative, or `hue` exceeds 0.5.
    """
    if min(brightness, contrast, saturation, hue) < 0 or hue > 0.5:
        raise ValueError("strengths must not be negative, and hue must not exceed 0.5")
    strengths = np.array([brightness, contrast, saturation], np.float32)

    def augment(key: Key, image: Image, mask: jax.Array | None) -> Image:
        shifts_hue = hue > 0 and is_color(image)
        factor_key, order_key, shift_key, turn_key = jax.random.split(key, 4)
        factors = _uniform(factor_key, (3,), np.maximum(0, 1 - strengths), 1 + strengths)
        order = jax.random.permutation(order_key, 3)
        turn = jax.random.randint(turn_key, (), 0, 4) if shifts_hue else 3
        planes = [image[..., channel] for channel in range(image.shape[-1])]

        # Brightness, contrast and saturation all blend the image with a target, so one formula covers any order. The
        # hue shift follows `turn` of them: all three run before and after it, with factor 1 on the inactive side.
        # Without the barriers XLA recomputes each blend for every consumer, which is four times slower on a CPU.
        def blend_planes(planes: list[jax.Array], op: jax.Array, factor: jax.Array) -> list[jax.Array]:
            gray = _weighted_sum(planes)
            target = jnp.where(op == 0, 0.0, jnp.where(op == 1, jnp.mean(gray, where=mask), gray))
            return jax.lax.optimization_barrier([blend(plane, target, factor) for plane in planes])

        for slot in range(3):
            planes = blend_planes(planes, order[slot], jnp.where(slot < turn, factors[order[slot]], 1.0))
        if shifts_hue:
            planes = jax.lax.optimization_barrier(_shift_hue(planes, _uniform(shift_key, (), -hue, hue)))
            for slot in range(3):
                planes = blend_planes(planes, order[slot], jnp.where(slot < turn, 1.0, factors[order[slot]]))
        return jnp.stack(planes, axis=-1)

    return augment


def grayscale(p: float = 0.2) -> Augment:
    """With probability `p`, replace all three channels by the luma (0.2989, 0.587, 0.114); C = 1 stays unchanged."""
    return randomly(lambda key, image: jnp.broadcast_to(luma(image), image.shape), p)


def solarize(threshold: float = 0.5, *, p: float = 0.2) -> Augment:
    """With probability `p`, invert every value that is at least `threshold` (in [0, 1])."""
    return randomly(lambda key, image: invert_above(image, threshold), p)


def gaussian_blur(sigma: Range = (0.1, 2.0)) -> Augment:
    """Blur [H, W, C] with a Gaussian of standard deviation uniform in `sigma` (pixels), reflecting at the border.

    The kernel covers about a tenth of the image height, at least 3 pixels, as in https://arxiv.org/abs/2002.05709.
    """

    def augment(key: Key, image: Image) -> Image:
        radius = max(1, image.shape[0] // 20)
        weights = jnp.exp(-0.5 * (jnp.arange(-radius, radius + 1) / _uniform(key, (), *sigma)) ** 2)
        weights = weights / jnp.sum(weights)
        padded = jnp.pad(image, ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
        height, width, _ = image.shape
        shifts = range(2 * radius + 1)
        rows = reduce(operator.add, (weights[i] * padded[i : i + height] for i in shifts))
        return reduce(operator.add, (weights[i] * rows[:, i : i + width] for i in shifts))

    return augment


def is_color(image: Image) -> bool:
    """Return whether the image has three channels rather than one; ValueError for any other number."""
    if image.shape[-1] not in (1, 3):
        raise ValueError(f"color operations take 1 or 3 channels, got an image of shape {image.shape}")
    return image.shape[-1] == 3


def _weighted_sum(planes: Sequence[jax.Array]) -> jax.Array:
    return planes[0] if len(planes) == 1 else 0.2989 * planes[0] + 0.587 * planes[1] + 0.114 * planes[2]


def luma(image: Image) -> jax.Array:
    """Return the luma (0.2989, 0.587, 0.114) of an image with 1 or 3 channels, [H, W, 1]."""
    return _weighted_sum([image[..., channel : channel + 1] for channel in range(3 if is_color(image) else 1)])


def blend(image: jax.Array, target: jax.Array | float, factor: jax.Array) -> jax.Array:
    """Return `factor * image + (1 - factor) * target`, clipped to [0, 1]."""
    return jnp.clip(factor * image + (1 - factor) * target, 0.0, 1.0)


def invert_above(image: Image, threshold: jax.Array | float) -> Image:
    """Invert every value that is at least `threshold`."""
    return jnp.where(image >= threshold, 1 - image, image)


def _shift_hue(planes: Sequence[jax.Array], turns: jax.Array) -> list[jax.Array]:
    red, green, blue = planes
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    # Not `value == red`: a compiler that computes `red` twice may round it differently each time.
    is_red, is_green = (red >= green) & (red >= blue), green >= blue
    offset = jnp.where(is_red, green - blue, jnp.where(is_green, blue - red, red - green))
    sector = jnp.where(is_red, 0.0, jnp.where(is_green, 2.0, 4.0))
    hue = sector + offset / jnp.where(chroma > 0, chroma, 1.0) + 6 * turns

    def channel(position: int) -> jax.Array:
        k = position + hue
        k = k - 6 * jnp.floor(k / 6)
        return value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0.0, 1.0)

    return [channel(5), channel(3), channel(1)]
