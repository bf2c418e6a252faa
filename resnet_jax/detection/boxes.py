"""Boxes float32 [..., 4]: (x1, y1, x2, y2) in pixels, continuous, so that a width is x2 - x1."""

import math

import jax
import jax.numpy as jnp

MAX_LOG_SCALE = math.log(1000 / 16)  # of a decoded side over its anchor's, as in torchvision and Detectron2
MIN_SIDE = 1e-6  # pixels; smaller sides are encoded as this, so that rows of padding give finite targets


def area(boxes: jax.Array) -> jax.Array:
    """Area [...] of boxes [..., 4], in square pixels."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Intersection over union [N, M], in [0, 1], of boxes [N, 4] and [M, 4]; 0 for two boxes without area."""
    intersection, union = _intersection_and_union(a, b)
    return _ratio(intersection, union)


def generalized_iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Generalized IoU [N, M], in [-1, 1], of boxes [N, 4] and [M, 4] (https://arxiv.org/abs/1902.09630).

    It is the IoU minus the part of the smallest enclosing box that neither box covers.
    """
    intersection, union = _intersection_and_union(a, b)
    ax1, ay1, ax2, ay2 = (x[:, None] for x in a.T)
    bx1, by1, bx2, by2 = (x[None] for x in b.T)
    width = jnp.maximum(ax2, bx2) - jnp.minimum(ax1, bx1)
    height = jnp.maximum(ay2, by2) - jnp.minimum(ay1, by1)
    hull = width.clip(0) * height.clip(0)
    return _ratio(intersection, union) - _ratio(hull - union, hull)


def clip(boxes: jax.Array, size: jax.Array) -> jax.Array:
    """Clip boxes [..., 4] to an image of `size` (height, width), which may be traced."""
    x1, y1, x2, y2 = jnp.moveaxis(boxes, -1, 0)
    height, width = size[0], size[1]
    return jnp.stack([x1.clip(0, width), y1.clip(0, height), x2.clip(0, width), y2.clip(0, height)], -1)


def encode(
    boxes: jax.Array, anchors: jax.Array, weights: tuple[float, float, float, float] = (1, 1, 1, 1)
) -> jax.Array:
    """Regression targets [..., 4] that take anchors to boxes, both [..., 4] (https://arxiv.org/abs/1506.01497).

    They are the shift of the centre over the anchor's sides and the logarithms of the ratios of the sides, times
    `weights`. They are finite for boxes and anchors without area too.
    """
    center, sides = _center_and_sides(boxes)
    anchor_center, anchor_sides = _center_and_sides(anchors)
    sides, anchor_sides = jnp.maximum(sides, MIN_SIDE), jnp.maximum(anchor_sides, MIN_SIDE)
    targets = jnp.concatenate([(center - anchor_center) / anchor_sides, jnp.log(sides / anchor_sides)], -1)
    return targets * _like(weights, targets)


def decode(
    deltas: jax.Array, anchors: jax.Array, weights: tuple[float, float, float, float] = (1, 1, 1, 1)
) -> jax.Array:
    """Boxes [..., 4] from regression outputs and anchors, both [..., 4]: the inverse of `encode`.

    A side grows to at most 1000/16 times its anchor's, so that the exponential cannot overflow.
    """
    deltas = deltas / _like(weights, deltas)
    center, sides = _center_and_sides(anchors)
    center = deltas[..., :2] * sides + center
    sides = jnp.exp(deltas[..., 2:].clip(max=MAX_LOG_SCALE)) * sides
    return jnp.concatenate([center - 0.5 * sides, center + 0.5 * sides], -1)


def _intersection_and_union(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Matrix by matrix, not [N, M, 2], which XLA does not vectorise on CPU.
    ax1, ay1, ax2, ay2 = (x[:, None] for x in a.T)
    bx1, by1, bx2, by2 = (x[None] for x in b.T)
    width = jnp.minimum(ax2, bx2) - jnp.maximum(ax1, bx1)
    height = jnp.minimum(ay2, by2) - jnp.maximum(ay1, by1)
    intersection = width.clip(0) * height.clip(0)
    return intersection, area(a)[:, None] + area(b)[None] - intersection


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Quotient, or 0 where the denominator is not positive; so is its gradient."""
    positive = denominator > 0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1), 0)


def _center_and_sides(boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
    sides = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * sides, sides


def _like(weights: tuple[float, ...], x: jax.Array) -> jax.Array:
    """Weights in the rank and the dtype of x [..., 4]."""
    return jnp.asarray(weights, x.dtype).reshape((1,) * (x.ndim - 1) + (4,))
