"""Random image augmentation as pure functions `(key, image) -> image`.

An image is float32 [H, W, C] in [0, 1] (until `normalize`), a key is a typed `jax.random.key`. A factory takes the
hyper-parameters and returns such a function, so they compose, and run under jit, vmap, grad and shard_map alike.
Shapes are static. Resampling weights sum to one only up to rounding: values may leave [0, 1] by about 1e-6.
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
Size = int | tuple[int, int]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# --- combinators ------------------------------------------------------------------------------------------------------


def identity(key: Key, image: Image) -> Image:
    """Return the image [H, W, C] as it is."""
    del key
    return image


def compose(*augments: Augment) -> Augment:
    """Apply the augmentations in turn; the i-th draws from `fold_in(key, i)`, so appending changes no other."""

    def augment(key: Key, image: Image) -> Image:
        for position, step in enumerate(augments):
            image = step(jax.random.fold_in(key, position), image)
        return image

    return augment


def randomly(augment: Augment, p: float = 0.5) -> Augment:
    """Apply a shape-preserving augmentation with probability `p`, else return the image; both are always computed."""

    def maybe(key: Key, image: Image) -> Image:
        gate, inner = jax.random.split(key)
        return jnp.where(jax.random.bernoulli(gate, p), augment(inner, image), image)

    return maybe


def choose(*augments: Augment) -> Augment:
    """Apply one of the augmentations, drawn uniformly; all must return one shape, and under vmap all are computed."""

    def augment(key: Key, image: Image) -> Image:
        pick, inner = jax.random.split(key)
        return jax.lax.switch(jax.random.randint(pick, (), 0, len(augments)), augments, inner, image)

    return augment


def augment_batch(augment: Augment, keys: Key, images: jax.Array) -> jax.Array:
    """Augment every image with its own key.

    keys [B]; images [B, H, W, C], uint8 (scaled to float32 in [0, 1] here) or float32 (used as it is), else TypeError.
    """
    if images.dtype == jnp.uint8:
        images = images.astype(jnp.float32) / 255
    elif images.dtype != jnp.float32:
        raise TypeError(f"images must be uint8 or float32, got {images.dtype}")
    return jax.vmap(augment)(keys, images)


def preprocess_batch(augment: Augment, images: jax.Array) -> jax.Array:
    """Apply a deterministic augmentation, such as evaluation preprocessing, to images [B, H, W, C] as `augment_batch`.

    The result is the same in every call: should the augmentation draw, image i draws from `fold_in(key(0), i)`.
    """
    return augment_batch(augment, example_keys(jax.random.key(0), jnp.arange(len(images))), images)


# --- crops, flips and resampling --------------------------------------------------------------------------------------


def normalize(mean: float | Sequence[float] = IMAGENET_MEAN, std: float | Sequence[float] = IMAGENET_STD) -> Augment:
    """Return `(image - mean) / std`; `mean` and `std` are scalars or one number per channel, for images in [0, 1]."""
    centre, scale = (np.asarray(value, np.float32).reshape(1, 1, -1) for value in (mean, std))

    def augment(key: Key, image: Image) -> Image:
        del key
        if {centre.size, scale.size} - {1, image.shape[-1]}:
            raise ValueError(f"normalize: {centre.size} means, {scale.size} stds for an image of shape {image.shape}")
        return (image - centre) / scale

    return augment


def random_crop(padding: int = 4, *, mode: str = "constant") -> Augment:
    """Pad by `padding` pixels on every side (`mode`: "constant" = zeros, or "reflect") and crop [H, W, C] at random."""
    if mode not in ("constant", "reflect"):
        raise ValueError(f"mode must be 'constant' or 'reflect', got {mode!r}")

    def augment(key: Key, image: Image) -> Image:
        padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode=mode)
        top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
        return jax.lax.dynamic_slice(padded, (top, left, jnp.zeros_like(top)), image.shape)

    return augment


def random_flip(p: float = 0.5) -> Augment:
    """Mirror the image [H, W, C] left to right with probability `p`."""
    return randomly(lambda key, image: image[:, ::-1], p)


def center_crop(size: Size) -> Augment:
    """Cut the central `size` (int or (h, w)) out of [H, W, C]; ValueError if the image is smaller."""
    height, width = _pair(size)

    def augment(key: Key, image: Image) -> Image:
        del key
        if height > image.shape[0] or width > image.shape[1]:
            raise ValueError(f"cannot cut {height}x{width} out of an image of shape {image.shape}")
        top, left = round((image.shape[0] - height) / 2), round((image.shape[1] - width) / 2)
        return image[top : top + height, left : left + width]

    return augment


def resize(size: Size, *, antialias: bool = True) -> Augment:
    """Resample [H, W, C] bilinearly to `size` (int = square, or (h, w)); `antialias` averages when shrinking."""
    height, width = _pair(size)

    def augment(key: Key, image: Image) -> Image:
        del key
        rows = _resampling(image.shape[0], 0.0, float(image.shape[0]), height, antialias)
        columns = _resampling(image.shape[1], 0.0, float(image.shape[1]), width, antialias)
        return _resample(image, rows, columns)

    return augment


def random_resized_crop(
    size: Size,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    antialias: bool = False,
) -> Augment:
    """Cut a random box and resample it bilinearly to `size` (int or (h, w)), https://arxiv.org/abs/1409.4842.

    The box has a share of the area uniform in `scale` and a log-uniform width:height in `ratio`; after ten misfits it
    is the largest central box that keeps `ratio`, as in torchvision. Without `antialias` shrinking skips pixels.
    """
    height, width = _pair(size)

    def augment(key: Key, image: Image) -> Image:
        rows, columns = image.shape[:2]
        fallback_height = min(rows, round(columns / ratio[0]))
        fallback_width = min(columns, round(rows * ratio[1]))
        box_height, box_width, top, left, fits = _random_box(key, rows, columns, scale, ratio)
        box_height = jnp.where(fits, box_height, fallback_height)
        box_width = jnp.where(fits, box_width, fallback_width)
        top = jnp.where(fits, top, (rows - fallback_height) // 2)
        left = jnp.where(fits, left, (columns - fallback_width) // 2)
        return _resample(
            image,
            _resampling(rows, top, box_height, height, antialias),
            _resampling(columns, left, box_width, width, antialias),
        )

    return augment


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _uniform(key: Key, shape: tuple[int, ...], low: ArrayLike, high: ArrayLike) -> jax.Array:
    return jax.random.uniform(key, shape, jnp.float32, low, high)


def _random_box(
    key: Key, rows: int, columns: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[jax.Array, ...]:
    """Draw ten boxes and keep the first that fits: height, width, top, left (whole numbers, float32) and `fits`."""
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    area = rows * columns * _uniform(area_key, (10,), *scale)
    aspect = jnp.exp(_uniform(ratio_key, (10,), math.log(ratio[0]), math.log(ratio[1])))
    heights, widths = jnp.round(jnp.sqrt(area / aspect)), jnp.round(jnp.sqrt(area * aspect))
    fitting = (heights >= 1) & (heights <= rows) & (widths >= 1) & (widths <= columns)
    first = jnp.argmax(fitting)
    height, width = heights[first], widths[first]
    down, right = _uniform(place_key, (2,), 0.0, 1.0)
    top, left = jnp.floor(down * (rows - height + 1)), jnp.floor(right * (columns - width + 1))
    return height, width, top, left, fitting[first]


def _resampling(length: int, start: jax.Array | float, extent: jax.Array | float, size: int, antialias: bool):
    """Matrix [size, length] that resamples the pixels [start, start + extent) bilinearly to `size`; rows sum to one."""
    step = extent / size
    centre = (start + (jnp.arange(size, dtype=jnp.float32) + 0.5) * step - 0.5)[:, None]
    pixel = jnp.arange(length, dtype=jnp.float32)[None]
    weights = jnp.maximum(0.0, 1 - jnp.abs(pixel - centre) / (jnp.maximum(step, 1.0) if antialias else 1.0))
    # Dropping the pixels outside and dividing by the rest equals repeating the edge of the box.
    weights = jnp.where((pixel >= start) & (pixel < start + extent), weights, 0.0)
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def _resample(image: Image, rows: jax.Array, columns: jax.Array) -> Image:
    # The accelerators' default precision would round the pixels to 8 bits of mantissa.
    image = jnp.einsum("xw,hwc->xhc", columns, image, precision="highest")
    return jnp.einsum("yh,xhc->yxc", rows, image, precision="highest")


# --- erasing ----------------------------------------------------------------------------------------------------------


def cutout(size: Size = 16, *, p: float = 1.0, fill: float = 0.0) -> Augment:
    """Fill a box of `size` (int or (h, w)) around a random pixel, clipped at the border, with probability `p`.

    https://arxiv.org/abs/1708.04552; apply after `normalize` to fill with the mean, as the paper does.
    """
    height, width = _pair(size)

    def augment(key: Key, image: Image) -> Image:
        return jnp.where(random_centred_box(key, image.shape[0], image.shape[1], height, width), fill, image)

    return randomly(augment, p)


def random_erasing(
    *,
    p: float = 0.5,
    scale: tuple[float, float] = (0.02, 0.33),
    ratio: tuple[float, float] = (0.3, 3.3),
    value: float = 0.0,
) -> Augment:
    """Fill a random box that lies inside the image, of area share `scale` and log-uniform width:height `ratio`.

    https://arxiv.org/abs/1708.04896; nothing is erased if none of ten boxes fits.
    """

    def augment(key: Key, image: Image) -> Image:
        rows, columns = image.shape[:2]
        height, width, top, left, fits = _random_box(key, rows, columns, scale, ratio)
        return jnp.where(fits & _box(rows, columns, height, width, top, left), value, image)

    return randomly(augment, p)


def _box(rows: int, columns: int, height, width, top, left) -> jax.Array:
    """Boolean [rows, columns, 1], True inside the box."""
    y, x = jnp.arange(rows)[:, None, None], jnp.arange(columns)[None, :, None]
    return (y >= top) & (y < top + height) & (x >= left) & (x < left + width)


def random_centred_box(key: Key, rows: int, columns: int, height: Any, width: Any) -> jax.Array:
    """Boolean [rows, columns, 1], True in a box of `height` x `width` pixels around a random one, cut at the border."""
    y, x = jax.random.randint(key, (2,), 0, np.array([rows, columns]))
    return _box(rows, columns, height, width, y - height // 2, x - width // 2)


# --- colour -----------------------------------------------------------------------------------------------------------


def color_jitter(brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4, hue: float = 0.1) -> Augment:
    """Change brightness, contrast, saturation and hue in random order, as torchvision's ColorJitter.

    Factors are uniform in [max(0, 1 - s), 1 + s], the hue shift in [-hue, hue] turns, hue <= 0.5. C is 3, or 1
    (brightness and contrast only). Every one of the 24 orders is equally likely.
    """
    if min(brightness, contrast, saturation, hue) < 0 or hue > 0.5:
        raise ValueError("strengths must not be negative, and hue must not exceed 0.5")
    strengths = np.array([brightness, contrast, saturation], np.float32)

    def augment(key: Key, image: Image) -> Image:
        shifts_hue = hue > 0 and _is_colour(image)
        factor_key, order_key, shift_key, turn_key = jax.random.split(key, 4)
        factors = _uniform(factor_key, (3,), np.maximum(0, 1 - strengths), 1 + strengths)
        order = jax.random.permutation(order_key, 3)
        turn = jax.random.randint(turn_key, (), 0, 4) if shifts_hue else 3
        planes = [image[..., channel] for channel in range(image.shape[-1])]

        # Brightness, contrast and saturation all blend the image with another: one formula serves any order. The hue
        # shift comes after `turn` of them: they run before and after it, with factor 1 where it is not their turn.
        # Without the barriers XLA recomputes every blend for each of its readers, four times slower on a CPU.
        def blend(planes: list[jax.Array], op: jax.Array, factor: jax.Array) -> list[jax.Array]:
            luma = _luma(planes)
            other = jnp.where(op == 0, 0.0, jnp.where(op == 1, jnp.mean(luma), luma))
            return jax.lax.optimization_barrier([_blend(plane, other, factor) for plane in planes])

        for slot in range(3):
            planes = blend(planes, order[slot], jnp.where(slot < turn, factors[order[slot]], 1.0))
        if shifts_hue:
            planes = jax.lax.optimization_barrier(_shift_hue(planes, _uniform(shift_key, (), -hue, hue)))
            for slot in range(3):
                planes = blend(planes, order[slot], jnp.where(slot < turn, 1.0, factors[order[slot]]))
        return jnp.stack(planes, axis=-1)

    return augment


def grayscale(p: float = 0.2) -> Augment:
    """Replace all three channels by the luma (0.2989, 0.587, 0.114) with probability `p`; C = 1 passes unchanged."""
    return randomly(lambda key, image: jnp.broadcast_to(_gray(image), image.shape), p)


def solarize(threshold: float = 0.5, *, p: float = 0.2) -> Augment:
    """Invert every value that is at least `threshold` (in [0, 1]), with probability `p`."""
    return randomly(lambda key, image: _solarize(image, threshold), p)


def gaussian_blur(sigma: tuple[float, float] = (0.1, 2.0), *, kernel_size: int | None = None) -> Augment:
    """Blur [H, W, C] with a standard deviation uniform in `sigma` (pixels), reflected at the border.

    `kernel_size` is odd; by default about a tenth of the image's height, and at least 3 (https://arxiv.org/abs/2002.05709).
    """
    if kernel_size is not None and kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")

    def augment(key: Key, image: Image) -> Image:
        radius = max(1, image.shape[0] // 20) if kernel_size is None else kernel_size // 2
        weights = jnp.exp(-0.5 * (jnp.arange(-radius, radius + 1) / _uniform(key, (), *sigma)) ** 2)
        weights = weights / jnp.sum(weights)
        padded = jnp.pad(image, ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
        height, width, _ = image.shape
        shifts = range(2 * radius + 1)
        rows = reduce(operator.add, (weights[i] * padded[i : i + height] for i in shifts))
        return reduce(operator.add, (weights[i] * rows[:, i : i + width] for i in shifts))

    return augment


def _is_colour(image: Image) -> bool:
    if image.shape[-1] not in (1, 3):
        raise ValueError(f"a colour operation takes 1 or 3 channels, got an image of shape {image.shape}")
    return image.shape[-1] == 3


def _luma(planes: Sequence[jax.Array]) -> jax.Array:
    return planes[0] if len(planes) == 1 else 0.2989 * planes[0] + 0.587 * planes[1] + 0.114 * planes[2]


def _gray(image: Image) -> jax.Array:
    """Luma [H, W, 1]."""
    return _luma([image[..., channel : channel + 1] for channel in range(3 if _is_colour(image) else 1)])


def _blend(image: jax.Array, other: jax.Array | float, factor: jax.Array) -> jax.Array:
    return jnp.clip(factor * image + (1 - factor) * other, 0.0, 1.0)


def _shift_hue(planes: Sequence[jax.Array], turns: jax.Array) -> list[jax.Array]:
    red, green, blue = planes
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    # Not `value == red`: a compiler that computes `red` twice may round it in two ways.
    is_red, is_green = (red >= green) & (red >= blue), green >= blue
    offset = jnp.where(is_red, green - blue, jnp.where(is_green, blue - red, red - green))
    sector = jnp.where(is_red, 0.0, jnp.where(is_green, 2.0, 4.0))
    hue = sector + offset / jnp.where(chroma > 0, chroma, 1.0) + 6 * turns

    def channel(position: int) -> jax.Array:
        k = position + hue
        k = k - 6 * jnp.floor(k / 6)
        return value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0.0, 1.0)

    return [channel(5), channel(3), channel(1)]


# --- automatic augmentation -------------------------------------------------------------------------------------------

# The largest strength of every operation: shear (pixels per pixel), shift (pixels), rotation (degrees), change of a
# blending factor, bits dropped, lowering of the threshold. RandAugment's shifts are shares of the image's side.
_WIDE = {
    "identity": 0.0, "shear_x": 0.99, "shear_y": 0.99, "translate_x": 32.0, "translate_y": 32.0, "rotate": 135.0,
    "brightness": 0.99, "color": 0.99, "contrast": 0.99, "sharpness": 0.99,
    "posterize": 6.0, "solarize": 1.0, "autocontrast": 0.0, "equalize": 0.0,
}  # fmt: skip
_RAND = _WIDE | {
    "shear_x": 0.3, "shear_y": 0.3, "translate_x": 150 / 331, "translate_y": 150 / 331, "rotate": 30.0,
    "brightness": 0.9, "color": 0.9, "contrast": 0.9, "sharpness": 0.9, "posterize": 4.0,
}  # fmt: skip
_OPS = tuple(_WIDE)
_SIGNED = np.array([op not in ("posterize", "solarize") for op in _OPS])
_FAMILY = np.array([0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 4, 5, 6])  # index into the branches of `_apply_op`


def trivial_augment(*, num_bins: int = 31, fill: float = 0.0) -> Augment:
    """Apply one of 14 operations at one of `num_bins` strengths, both drawn uniformly (TrivialAugmentWide).

    https://arxiv.org/abs/2103.10158, ranges as in torchvision. C is 1 or 3. Geometry takes the nearest pixel, `fill`
    beyond the border; posterize and equalize round to 8 bits and have no gradient. Under vmap every family of
    operations is computed for every image.
    """

    def augment(key: Key, image: Image) -> Image:
        level_key, key = jax.random.split(key)
        level = jax.random.randint(level_key, (), 0, num_bins) / (num_bins - 1)
        return _random_op(key, image, _WIDE, level, fill)

    return augment


def rand_augment(num_ops: int = 2, magnitude: int = 9, *, num_bins: int = 31, fill: float = 0.0) -> Augment:
    """Apply `num_ops` of 14 operations, drawn uniformly, at strength `magnitude` in [0, num_bins) (RandAugment).

    https://arxiv.org/abs/1909.13719, ranges as in torchvision. C is 1 or 3. Otherwise as `trivial_augment`.
    """

    def augment(key: Key, image: Image) -> Image:
        rows, columns = image.shape[:2]
        maxima = _RAND | {name: _RAND[name] * n for name, n in (("translate_x", columns), ("translate_y", rows))}
        for position in range(num_ops):
            image = _random_op(jax.random.fold_in(key, position), image, maxima, magnitude / (num_bins - 1), fill)
        return image

    return augment


def _random_op(key: Key, image: Image, maxima: dict[str, float], level: jax.Array | float, fill: float) -> Image:
    op_key, sign_key = jax.random.split(key)
    op = jax.random.randint(op_key, (), 0, len(_OPS))
    strength = level * jnp.asarray(list(maxima.values()), jnp.float32)[op]
    negative = jax.random.bernoulli(sign_key) & jnp.asarray(_SIGNED)[op]
    return _apply_op(image, op, jnp.where(negative, -strength, strength), fill)


def _apply_op(image: Image, op: jax.Array, strength: jax.Array, fill: float = 0.0) -> Image:
    """Apply operation number `op` of `_OPS`; families share one computation, because vmap computes every branch."""
    _is_colour(image)
    image = jnp.asarray(image)
    families = (
        lambda: image,
        lambda: _warp(image, op, strength, fill),
        lambda: _enhance(image, op, 1 + strength),
        lambda: _posterize(image, 8 - jnp.round(strength).astype(jnp.int32)),
        lambda: _solarize(image, 1 - strength),
        lambda: _autocontrast(image),
        lambda: _equalize(image),
    )
    return jax.lax.switch(jnp.asarray(_FAMILY)[op], families)


def _warp(image: Image, op: jax.Array, strength: jax.Array, fill: float) -> Image:
    """Shear about the top left corner, shift, or rotate about the centre: one affine map from output to input."""

    def only(name: str, value: jax.Array) -> jax.Array:
        return jnp.where(op == _OPS.index(name), value, 0.0)

    rows, columns = image.shape[:2]
    y, x = jnp.arange(rows)[:, None] + 0.5, jnp.arange(columns)[None] + 0.5
    angle = only("rotate", jnp.radians(strength))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    shift_x, shift_y = only("translate_x", jnp.trunc(strength)), only("translate_y", jnp.trunc(strength))
    x0, y0 = columns / 2, rows / 2
    source_x = x0 + cos * (x - x0) + (only("shear_x", strength) * y - sin * (y - y0)) - shift_x
    source_y = y0 + cos * (y - y0) + (only("shear_y", strength) * x + sin * (x - x0)) - shift_y
    row, column = jnp.floor(source_y).astype(jnp.int32), jnp.floor(source_x).astype(jnp.int32)
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    return jnp.where(inside[..., None], image[row.clip(0, rows - 1), column.clip(0, columns - 1)], fill)


def _enhance(image: Image, op: jax.Array, factor: jax.Array) -> Image:
    gray = _gray(image)
    flat = jnp.where(op == _OPS.index("contrast"), jnp.mean(gray), jnp.where(op == _OPS.index("color"), gray, 0.0))
    return _blend(image, jnp.where(op == _OPS.index("sharpness"), _smooth(image), flat), factor)


def _smooth(image: Image) -> Image:
    """The 3x3 filter [[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13; the border keeps its values."""
    if min(image.shape[:2]) < 3:
        return image
    rows = image[:-2] + image[1:-1] + image[2:]
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    return image + jnp.pad((total - 9 * image[1:-1, 1:-1]) / 13, ((1, 1), (1, 1), (0, 0)))


def _levels(image: Image) -> jax.Array:
    return jnp.round(image.clip(0.0, 1.0) * 255).astype(jnp.int32)


def _posterize(image: Image, bits: jax.Array | int) -> Image:
    return (_levels(image) & -(1 << (8 - jnp.asarray(bits)))).astype(image.dtype) / 255


def _solarize(image: Image, threshold: jax.Array | float) -> Image:
    return jnp.where(image >= threshold, 1 - image, image)


def _autocontrast(image: Image) -> Image:
    low, high = image.min((0, 1), keepdims=True), image.max((0, 1), keepdims=True)
    return jnp.where(high > low, (image - low) / jnp.where(high > low, high - low, 1.0), image)


def _equalize(image: Image) -> Image:
    def channel(plane: jax.Array) -> jax.Array:
        counts = jnp.zeros(256, jnp.int32).at[plane.ravel()].add(1, mode="promise_in_bounds")
        step = (plane.size - counts[jnp.max(plane)]) // 255
        table = (jnp.cumsum(counts) - counts + step // 2) // jnp.maximum(step, 1)
        return jnp.where(step > 0, jnp.minimum(table, 255)[plane], plane)

    return jax.vmap(channel, -1, -1)(_levels(image)).astype(image.dtype) / 255


AUGMENTS: dict[str, Callable[..., Augment]] = {
    "normalize": normalize,
    "random_crop": random_crop,
    "random_flip": random_flip,
    "center_crop": center_crop,
    "resize": resize,
    "random_resized_crop": random_resized_crop,
    "cutout": cutout,
    "random_erasing": random_erasing,
    "color_jitter": color_jitter,
    "grayscale": grayscale,
    "solarize": solarize,
    "gaussian_blur": gaussian_blur,
    "trivial_augment": trivial_augment,
    "rand_augment": rand_augment,
}
