"""ROIAlign: a grid of bilinear samples in each box of a feature map or a feature pyramid."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resnet_jax.detection.boxes import area
from resnet_jax.parallel import vary_like


def roi_align(
    features: jax.Array,
    boxes: jax.Array,
    scale: float,
    *,
    size: int = 7,
    sampling: int = 2,
    aligned: bool = False,
) -> jax.Array:
    """Pool boxes [N, 4] of one feature map [H, W, C] to [N, size, size, C] (https://arxiv.org/abs/1703.06870).

    Each of the size * size bins of a box is the mean of sampling * sampling bilinear samples. As in torchvision,
    samples more than one cell outside the map are 0, and those nearer snap to its border.

    The result has reverse-mode derivatives of any order with respect to the features, and none in forward mode; its
    gradient with respect to the boxes is 0.

    Args:
      boxes: in pixels of the image.
      scale: cells of the map per pixel of the image.
      aligned: if the centre of a cell is at its index plus a half, as in Detectron2; otherwise it is at its index, and
        boxes are at least one cell wide and high, as in torchvision's Faster R-CNN.
    """
    levels = jnp.zeros(len(boxes), jnp.int32)
    return _pool([features], boxes, levels, [scale], size, sampling, aligned)


def multilevel_roi_align(
    features: Sequence[jax.Array],
    boxes: jax.Array,
    strides: Sequence[int],
    *,
    image_size: jax.Array | None = None,
    size: int = 7,
    sampling: int = 2,
    canonical_size: int = 224,
    canonical_level: int = 4,
) -> jax.Array:
    """Pool boxes [N, 4] of a feature pyramid, maps [H_l, W_l, C], to [N, size, size, C], each from one level.

    A box of canonical_size ** 2 square pixels belongs to the level of stride 2 ** canonical_level, one half or twice as
    large to the next (https://arxiv.org/abs/1612.03144), and those beyond the ends to the first or last level. It is
    pooled as by `roi_align`, not aligned, whose notes on gradients apply.

    Args:
      image_size: (height, width) of the image without its padding, at whose border samples snap instead of at the
        map's; None means that there is no padding.

    Raises:
      ValueError: the strides are not successive powers of 2, one for each map.
    """
    if len(strides) != len(features):
        raise ValueError(f"{len(features)} maps need as many strides, not {tuple(strides)}")
    levels = region_levels(boxes, strides, canonical_size=canonical_size, canonical_level=canonical_level)
    extents = None if image_size is None else jnp.stack([-(-image_size // stride) for stride in strides])
    return _pool(features, boxes, levels, [1 / stride for stride in strides], size, sampling, False, extents)


def region_levels(
    boxes: jax.Array, strides: Sequence[int], *, canonical_size: int = 224, canonical_level: int = 4
) -> jax.Array:
    """Find the level of each box [N, 4] among maps of these strides, int32 [N]; see `multilevel_roi_align`.

    Raises:
      ValueError: the strides are not successive powers of 2.
    """
    first = int(math.log2(strides[0]))
    if list(strides) != [2 ** (first + i) for i in range(len(strides))]:
        raise ValueError(f"strides of {len(strides)} maps must be successive powers of 2, not {tuple(strides)}")
    side = jnp.sqrt(area(boxes).clip(0))
    level = jnp.floor(canonical_level + jnp.log2(side / canonical_size) + 1e-6)
    return level.clip(first, first + len(strides) - 1).astype(jnp.int32) - first


def _pool(
    features: Sequence[jax.Array],
    boxes: jax.Array,
    levels: jax.Array,
    scales: Sequence[float],
    size: int,
    sampling: int,
    aligned: bool,
    extents: jax.Array | None = None,
) -> jax.Array:
    """Pool boxes [N, 4], each of its level [N], from all maps laid out as one array [cells, C].

    `extents` int [L, 2] are the rows and columns of each map that are not padding; None means all.
    """
    shapes = np.array([x.shape[:2] for x in features], np.int32)
    starts = np.cumsum([0, *shapes.prod(1)[:-1]], dtype=np.int32)
    cells = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in features])
    boxes = boxes * jnp.asarray(scales, jnp.float32)[levels][:, None] - 0.5 * aligned

    heights, widths = (jnp.asarray(shapes) if extents is None else extents)[levels].T
    rows, row_weights = _samples(boxes[:, 1], boxes[:, 3], heights, size, sampling, aligned)
    columns, column_weights = _samples(boxes[:, 0], boxes[:, 2], widths, size, sampling, aligned)

    # A bin is a sum of cells times weights: products of a row's and a column's.
    terms = ((2 * sampling) ** 2, len(boxes), size, size)
    first = jnp.asarray(starts)[levels][None, None, :, None, None]
    row_length = jnp.asarray(shapes[:, 1])[levels]
    index = first + (rows * row_length[None, :, None])[:, None, :, :, None] + columns[None, :, :, None, :]
    weights = row_weights[:, None, :, :, None] * column_weights[None, :, :, None, :]
    return _weighted_sum(cells, index.reshape(terms), weights.reshape(terms))


def _samples(
    low: jax.Array, high: jax.Array, extent: jax.Array, size: int, sampling: int, aligned: bool
) -> tuple[jax.Array, jax.Array]:
    """Cells along one axis that bins [N, size] read, int32 [2 * sampling, N, size], and their weights."""
    length = high - low if aligned else jnp.maximum(high - low, 1)
    bins = (length / size)[None, :, None]
    starts = low[None, :, None] + jnp.arange(size)[None, None] * bins
    position = starts + (jnp.arange(sampling) + 0.5)[:, None, None] * bins / sampling
    last = (extent - 1)[None, :, None]
    weight = ((position >= -1) & (position <= last + 1)) / sampling
    position = position.clip(0, last)
    cell = jnp.floor(position).astype(jnp.int32)
    cells = jnp.concatenate([cell, jnp.minimum(cell + 1, last)])
    return cells, jnp.concatenate([(1 - (position - cell)) * weight, (position - cell) * weight])


@jax.custom_vjp
def _weighted_sum(cells: jax.Array, index: jax.Array, weights: jax.Array) -> jax.Array:
    """Sum over the first axis of cells[index] times weights, both [terms, ...]; constant in the weights.

    Unrolled, the sum is one pass over the output. Its gradient is a loop instead: one scatter for each term, which on
    CPU is six times faster than one scatter of all.
    """
    terms = zip(index, weights, strict=True)
    return sum(cells.at[i].get(mode="clip") * w[..., None] for i, w in terms).astype(cells.dtype)


def _forward(cells: jax.Array, index: jax.Array, weights: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _weighted_sum(cells, index, weights), (cells, index, weights)


def _backward(saved: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, None, None]:
    cells, index, weights = saved

    def add(total: jax.Array, term: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        i, w = term
        return total.at[i].add(gradient * w[..., None]), None

    zeros = vary_like(jnp.zeros(cells.shape, jnp.float32), (cells, index, weights, gradient))
    total, _ = lax.scan(add, zeros, (index, weights))
    return total.astype(cells.dtype), None, None


_weighted_sum.defvjp(_forward, _backward)
