"""Anchors: boxes of given areas and shapes, centred on the cells of a feature map."""

from collections.abc import Sequence

import numpy as np


def anchor_grid(
    shape: tuple[int, int],
    stride: tuple[int, int],
    size: float | Sequence[float],
    ratios: Sequence[float] = (0.5, 1, 2),
) -> np.ndarray:
    """Anchors float32 [h * w * R * S, 4] of a feature map of shape (h, w), ordered by row, column, ratio, size.

    Each has about size * size square pixels; a ratio is height over width. As in torchvision, anchors are centred on
    the first pixel of their cell, and their corners are rounded to whole pixels around it.

    Args:
      shape: height and width of the feature map.
      stride: pixels of the image between its rows and between its columns.
      size: one in pixels, or several.
    """
    heights = np.sqrt(np.asarray(ratios, np.float32))
    widths = 1 / heights
    sides = np.stack([-widths, -heights, widths, heights], 1)[:, None] * np.asarray(size, np.float32).reshape(1, -1, 1)
    cell = sides.reshape(-1, 4) / 2
    y, x = np.meshgrid(np.arange(shape[0]) * stride[0], np.arange(shape[1]) * stride[1], indexing="ij")
    shifts = np.stack([x, y, x, y], -1).astype(np.float32)
    return (shifts.reshape(-1, 1, 4) + cell.round()).reshape(-1, 4)
