"""Pictures for trackers: a batch of images as one, the curves of a run."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.errors import UsageError

SIDE = 64  # pixels that small images are enlarged to, at least
COLUMNS = 8


def tiled(images: np.ndarray) -> np.ndarray:
    """Tile images [N, H, W, C] of values in [0, 1], of one or three channels, to one picture uint8 [h, w, 3]."""
    pixels = np.round(np.clip(np.nan_to_num(images), 0, 1) * 255).astype(np.uint8)
    pixels = np.broadcast_to(pixels, (*pixels.shape[:3], 3)) if pixels.shape[-1] == 1 else pixels[..., :3]
    times = max(-(-SIDE // max(pixels.shape[1:3])), 1)
    pixels = pixels.repeat(times, 1).repeat(times, 2)
    count, height, width, _ = pixels.shape
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    grid = np.full((rows * columns, height + 2, width + 2, 3), 255, np.uint8)  # a white line between images
    grid[:count, 1:-1, 1:-1] = pixels
    grid = grid.reshape(rows, columns, height + 2, width + 2, 3).swapaxes(1, 2)
    return grid.reshape(rows * (height + 2), columns * (width + 2), 3)


def curves(rows: Sequence[dict[str, Any]]) -> np.ndarray | None:
    """Draw every figure of the rows of metrics.jsonl by epoch, uint8 [h, w, 3]; None without rows or matplotlib.

    A figure and its counterpart on validation images share a panel.
    """
    names = dict.fromkeys(name for row in rows for name in row if name not in ("step", "epoch"))
    panels = list(dict.fromkeys(name.removeprefix("validation_") for name in names))
    if not panels:
        return None
    columns = min(len(panels), 3)
    try:
        from train.drawing import new_figure

        figure = new_figure(3.4 * columns, 2.4 * math.ceil(len(panels) / columns))
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except (UsageError, ImportError):
        return None
    for number, panel in enumerate(panels, 1):
        axes = figure.add_subplot(math.ceil(len(panels) / columns), columns, number)
        for name, style in ((panel, "C0-"), (f"validation_{panel}", "C1o-")):
            points = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                label = "validation" if name != panel else "training"
                axes.plot(*zip(*points, strict=True), style, lw=1.2, ms=3, label=label)
        axes.set_title(panel.replace("_", " "), fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        if panel in names and f"validation_{panel}" in names:
            axes.legend(fontsize=7)
    figure.supxlabel("epoch", fontsize=9)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]
