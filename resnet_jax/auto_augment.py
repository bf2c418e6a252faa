"""RandAugment and TrivialAugment: random operations from one table, at a fixed or random strength."""

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.augment import Augment, Image, blend, invert_above, is_color, luma
from resnet_jax.keys import Key

# Maximum strength of each operation: shear (pixels per pixel), translation (pixels), rotation (degrees), change of the
# blending factor, bits dropped, decrease of the threshold. RandAugment translates by fractions of the image size.
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
BINS = 31  # strengths, from 0 to the maximum
_SIGNED = np.array([op not in ("posterize", "solarize") for op in _OPS])
_FAMILY = np.array([0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 4, 5, 6])  # index into the branches of `_apply_op`


def trivial_augment() -> Augment:
    """Apply one of 14 operations at one of 31 strengths, both drawn uniformly (TrivialAugmentWide).

    https://arxiv.org/abs/2103.10158, with torchvision's ranges. C is 1 or 3. Geometric operations use the nearest
    pixel, and 0 outside the image; posterize and equalize round to 8 bits and have no gradient. Under vmap, every
    family of operations is computed for every image.
    """

    def augment(key: Key, image: Image) -> Image:
        level_key, key = jax.random.split(key)
        level = jax.random.randint(level_key, (), 0, BINS).astype(jnp.float32) / (BINS - 1)
        return _random_op(key, image, _WIDE, level)

    return augment


def rand_augment(num_ops: int = 2, magnitude: int = 9) -> Augment:
    """Apply `num_ops` of 14 operations, drawn uniformly, at strength `magnitude` in [0, 31) (RandAugment).

    https://arxiv.org/abs/1909.13719, with torchvision's ranges. C is 1 or 3. The rest is as in `trivial_augment`.

    Raises:
      ValueError: the magnitude is out of range.
    """
    if not 0 <= magnitude < BINS:
        raise ValueError(f"the magnitude must be in [0, {BINS}), not {magnitude}")

    def augment(key: Key, image: Image) -> Image:
        rows, columns = image.shape[:2]
        maxima = _RAND | {name: _RAND[name] * n for name, n in (("translate_x", columns), ("translate_y", rows))}
        for position in range(num_ops):
            image = _random_op(jax.random.fold_in(key, position), image, maxima, magnitude / (BINS - 1))
        return image

    return augment


def _random_op(key: Key, image: Image, maxima: dict[str, float], level: jax.Array | float) -> Image:
    op_key, sign_key = jax.random.split(key)
    op = jax.random.randint(op_key, (), 0, len(_OPS))
    strength = level * jnp.asarray(list(maxima.values()), jnp.float32)[op]
    negative = jax.random.bernoulli(sign_key) & jnp.asarray(_SIGNED)[op]
    return _apply_op(image, op, jnp.where(negative, -strength, strength))


def _apply_op(image: Image, op: jax.Array, strength: jax.Array) -> Image:
    """Apply operation number `op` of `_OPS`; a family shares one computation because vmap computes every branch."""
    is_color(image)
    image = jnp.asarray(image)  # a NumPy array cannot be indexed by a traced row
    families = (
        lambda: image,
        lambda: _warp(image, op, strength),
        lambda: _enhance(image, op, 1 + strength),
        lambda: _posterize(image, 8 - jnp.round(strength).astype(jnp.int32)),
        lambda: invert_above(image, 1 - strength),
        lambda: _autocontrast(image),
        lambda: _equalize(image),
    )
    return jax.lax.switch(jnp.asarray(_FAMILY)[op], families)


def _warp(image: Image, op: jax.Array, strength: jax.Array) -> Image:
    """Shear about the top left corner, translate, or rotate about the center: one affine map from output to input."""

    def for_op(name: str, value: jax.Array) -> jax.Array:
        return jnp.where(op == _OPS.index(name), value, 0.0)

    rows, columns = image.shape[:2]
    y, x = jnp.arange(rows)[:, None] + 0.5, jnp.arange(columns)[None] + 0.5
    angle = for_op("rotate", jnp.radians(strength))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    shift_x, shift_y = for_op("translate_x", jnp.trunc(strength)), for_op("translate_y", jnp.trunc(strength))
    x0, y0 = columns / 2, rows / 2
    source_x = x0 + cos * (x - x0) + (for_op("shear_x", strength) * y - sin * (y - y0)) - shift_x
    source_y = y0 + cos * (y - y0) + (for_op("shear_y", strength) * x + sin * (x - x0)) - shift_y
    row, column = jnp.floor(source_y).astype(jnp.int32), jnp.floor(source_x).astype(jnp.int32)
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    return jnp.where(inside[..., None], image[row.clip(0, rows - 1), column.clip(0, columns - 1)], 0.0)


def _enhance(image: Image, op: jax.Array, factor: jax.Array) -> Image:
    gray = luma(image)
    target = jnp.where(op == _OPS.index("contrast"), jnp.mean(gray), jnp.where(op == _OPS.index("color"), gray, 0.0))
    return blend(image, jnp.where(op == _OPS.index("sharpness"), _smooth(image), target), factor)


def _smooth(image: Image) -> Image:
    """Apply the 3x3 filter [[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13; the border stays unchanged."""
    if min(image.shape[:2]) < 3:
        return image
    rows = image[:-2] + image[1:-1] + image[2:]
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    return image + jnp.pad((total - 9 * image[1:-1, 1:-1]) / 13, ((1, 1), (1, 1), (0, 0)))


def _levels(image: Image) -> jax.Array:
    return jnp.round(image.clip(0.0, 1.0) * 255).astype(jnp.int32)


def _posterize(image: Image, bits: jax.Array | int) -> Image:
    return (_levels(image) & -(1 << (8 - jnp.asarray(bits)))).astype(image.dtype) / 255


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
