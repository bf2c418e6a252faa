"""Anchors: boxes of given areas and shapes, centred on the cells of a feature map."""

from collections.abc import Sequence

import numpy as np


def anchor_grid(
    shape: tuple[int, int], stride: tuple[int, int], size: float, ratios: Sequence[float] = (0.5, 1, 2)
) -> np.ndarray:
    """Anchors float32 [h * w * R, 4] of a feature map of shape (h, w), ordered by row, column, ratio.

    Each has about size * size square pixels; a ratio is height over width. As in torchvision, anchors are centred on
    the first pixel of their cell, and their corners are rounded to whole pixels around it.

    Args:
      shape: height and width of the feature map.
      stride: pixels of the image between its rows and between its columns.
    """
    heights = np.sqrt(np.asarray(ratios, np.float32))
    widths = 1 / heights
    cell = np.stack([-widths, -heights, widths, heights], 1) * np.float32(size) / 2
    y, x = np.meshgrid(np.arange(shape[0]) * stride[0], np.arange(shape[1]) * stride[1], indexing="ij")
    shifts = np.stack([x, y, x, y], -1).astype(np.float32)
    return (shifts.reshape(-1, 1, 4) + cell.round()).reshape(-1, 4)
