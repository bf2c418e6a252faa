"""ROIAlign: a grid of bilinear samples in each box of a feature map or a feature pyramid."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


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

    Each of size * size bins of a box is the mean of sampling * sampling bilinear samples. Samples more than one cell
    outside the map are 0, and those nearer snap to its border, as in torchvision.

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
    size: int = 7,
    sampling: int = 2,
    canonical_size: int = 224,
    canonical_level: int = 4,
) -> jax.Array:
    """Pool boxes [N, 4] of a feature pyramid, maps [H_l, W_l, C], to [N, size, size, C], each from one level.

    A box of canonical_size ** 2 square pixels belongs to the level of stride 2 ** canonical_level, one half or twice as
    large to the next (https://arxiv.org/abs/1612.03144), and those beyond the ends to the first or last level.

    Raises:
      ValueError: the strides are not successive powers of 2, one for each map.
    """
    first = int(math.log2(strides[0]))
    if list(strides) != [2 ** (first + i) for i in range(len(features))]:
        raise ValueError(f"strides of {len(features)} maps must be successive powers of 2, not {tuple(strides)}")
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    level = jnp.floor(canonical_level + jnp.log2(jnp.sqrt(area.clip(0)) / canonical_size) + 1e-6)
    levels = level.clip(first, first + len(features) - 1).astype(jnp.int32) - first
    return _pool(features, boxes, levels, [1 / stride for stride in strides], size, sampling, False)


def _pool(
    features: Sequence[jax.Array],
    boxes: jax.Array,
    levels: jax.Array,
    scales: Sequence[float],
    size: int,
    sampling: int,
    aligned: bool,
) -> jax.Array:
    """Gather the four neighbours of each sample from all levels in one array [cells, C]."""
    shapes = np.array([x.shape[:2] for x in features], np.int32)
    starts = np.cumsum([0, *shapes.prod(1)[:-1]], dtype=np.int32)
    cells = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in features])
    boxes = boxes * jnp.asarray(scales, jnp.float32)[levels][:, None] - 0.5 * aligned

    heights, widths = jnp.asarray(shapes)[levels].T
    rows, row_weights = _samples(boxes[:, 1], boxes[:, 3], heights, size, sampling, aligned)
    columns, column_weights = _samples(boxes[:, 0], boxes[:, 2], widths, size, sampling, aligned)
    first = jnp.asarray(starts)[levels]
    index = first[:, None, None] + rows[:, :, None] * widths[:, None, None] + columns[:, None, :]
    weights = (row_weights[:, :, None] * column_weights[:, None, :]).astype(cells.dtype)
    grid = (len(boxes), size, 2 * sampling, size, 2 * sampling)
    return jnp.einsum(
        "nyaxbc,nyaxb->nyxc",
        cells.at[index].get(mode="promise_in_bounds").reshape(*grid, -1),
        weights.reshape(grid),
    )


def _samples(
    low: jax.Array, high: jax.Array, extent: jax.Array, size: int, sampling: int, aligned: bool
) -> tuple[jax.Array, jax.Array]:
    """Cells int32 [N, size * sampling * 2] along one axis, two for each sample, and weights that sum to 1 in a bin."""
    length = high - low if aligned else jnp.maximum(high - low, 1)
    bins = (length / size)[:, None, None]
    offsets = (jnp.arange(sampling) + 0.5)[None, None] * (bins / sampling)
    position = low[:, None, None] + jnp.arange(size)[None, :, None] * bins + offsets
    last = (extent - 1)[:, None, None]
    inside = (position >= -1) & (position <= last + 1)
    position = position.clip(0, last)
    cell = jnp.floor(position).astype(jnp.int32)
    cells = jnp.stack([cell, jnp.minimum(cell + 1, last)], -1)
    weights = jnp.stack([1 - (position - cell), position - cell], -1) * inside[..., None] / sampling
    return cells.reshape(len(low), -1), weights.reshape(len(low), -1)
