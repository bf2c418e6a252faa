"""Figures of a whole image set: functions from data to a matplotlib figure. They need the extra `plot`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.drawing import new_figure
from train.explain.images import evenly
from train.explain.mistakes import Calibration
from train.report import charts

NAMED = 20  # most classes that a legend names, and layers that an axis names
THUMBNAIL = 16  # points
APART = 0.06  # least distance of two thumbnails, as a share of the picture


def scatter(
    points: np.ndarray, labels: np.ndarray, classes: Sequence[str], shown: np.ndarray, images: np.ndarray, title: str
) -> Any:
    """Draw points [N, 2] in the colours of their labels, and thumbnails uint8 [M, H, W, C] at the positions `shown`."""
    from matplotlib import colormaps
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    figure = new_figure(8, 6)
    axes = figure.subplots()
    many = len(classes) > 10
    colours = [colormaps["turbo"](at / (len(classes) - 1)) if many else f"C{at}" for at in range(len(classes))]
    for label in np.unique(labels):
        name = classes[label] if len(classes) <= NAMED else None
        axes.scatter(*points[labels == label].T, s=14, color=colours[label], alpha=0.7, linewidths=0, label=name)
    for at, image in zip(shown, images, strict=True):
        tile = OffsetImage(in_colour(image), zoom=THUMBNAIL / max(image.shape[:2]), interpolation="nearest")
        frame = {"lw": 1.2, "edgecolor": colours[labels[at]]}
        # Next to its point, so that it does not hide it.
        axes.add_artist(
            AnnotationBbox(tile, points[at], (11, 11), boxcoords="offset points", pad=0.05, bboxprops=frame)
        )
    axes.set(title=title, xticks=[], yticks=[])
    if 1 < len(classes) <= NAMED:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8, markerscale=2)
    return figure


def spread(points: np.ndarray, most: int, apart: float = APART) -> np.ndarray:
    """Choose at most `most` positions of points [N, 2], each the farthest from those chosen before it.

    Two of them are at least `apart` times the extent of all points from each other.
    """
    scaled = (points - points.min(0)) / np.maximum(np.ptp(points, axis=0), 1e-12)
    chosen = [0]
    distance = np.full(len(points), np.inf)
    while len(chosen) < most:
        distance = np.minimum(distance, np.square(scaled - scaled[chosen[-1]]).sum(1))
        if distance.max() < apart**2:
            break
        chosen.append(int(distance.argmax()))
    return np.array(chosen)


def reliability_figure(calibration: Calibration) -> Any:
    """Draw accuracy by confidence with the diagonal of a calibrated classifier, and the number of predictions."""
    figure = new_figure(5, 5)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bins = len(calibration.counts)
    width, middles = 1 / bins, (np.arange(bins) + 0.5) / bins
    upper.bar(middles, np.nan_to_num(calibration.accuracy), width * 0.9, color="C0", label="accuracy in the bin")
    upper.plot([0, 1], [0, 1], "--", color="#7f7f7f", lw=1, label="calibrated")
    upper.plot(
        calibration.confidence, calibration.accuracy, "o", color="C1", ms=4, label="at the bin's mean confidence"
    )
    upper.set(ylabel="accuracy", ylim=(0, 1.02), title=f"expected calibration error {calibration.error:.3f}")
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    lower.bar(middles, calibration.counts, width * 0.9, color="C7")
    lower.set(xlabel="confidence", ylabel="predictions", xlim=(0, 1))
    return figure


def landscape_figure(places: np.ndarray, losses: np.ndarray) -> Any:
    """Draw mean losses [S, S] at `places` [S] along two directions as contours, with the network in the middle."""
    figure = new_figure(6, 5)
    axes = figure.subplots()
    shown = np.log10(np.maximum(losses, 1e-6)).T
    filled = axes.contourf(places, places, shown, levels=24, cmap="viridis")
    lines = axes.contour(
        places, places, losses.T, levels=np.geomspace(*_range(losses), 8), colors="#fdfdfd", linewidths=0.6
    )
    axes.clabel(lines, fmt="%.2g", fontsize=7)
    axes.plot(0, 0, "o", color="#d62728", ms=5)
    axes.set(xlabel="first direction (1 = the filters' norm)", ylabel="second direction", aspect="equal")
    figure.colorbar(filled, label="log10 of the loss (nats)")
    return figure


def cascade_figure(curves: Mapping[str, Mapping[str, float]], thick: str) -> Any:
    """Draw mean rank correlations by layer, a line per method from that of the trained network, which is 1."""
    figure = new_figure(charts.WIDTH, 1.2 * charts.HEIGHT)
    axes = figure.subplots()
    layers = ["trained", *next(iter(curves.values()))]
    for at, (name, values) in enumerate(curves.items()):
        width = 3 if name == thick else 1.5
        axes.plot([1, *values.values()], marker="o", ms=width + 1.5, lw=width, color=charts.colour(at))
    axes.axhline(0, color="#b0b0b0", lw=1, zorder=0)
    named = evenly(len(layers), NAMED)
    turn: Any = {"rotation": 60, "ha": "right", "rotation_mode": "anchor", "fontsize": 8}
    axes.set_xticks(named, [layers[at] for at in named], **turn)
    axes.set(title="similarity to the trained network's map", xlabel="random weights from the head to")
    ends = [(at, name, [*values.values()][-1]) for at, (name, values) in enumerate(curves.items())]
    charts.label_ends(axes, ends, most=20)
    return figure


def _range(losses: np.ndarray) -> tuple[float, float]:
    low = max(float(losses.min()), 1e-6)
    return low, max(float(losses.max()), low * 1.01)


def gallery(rows: Sequence[Sequence[np.ndarray]], captions: Sequence[Sequence[str]], *, side: float = 1.7) -> Any:
    """Draw rows of pictures uint8 [H, W, C] with captions; rows may differ in length."""
    columns = max(map(len, rows))
    figure = new_figure(side * columns, (side + 0.3) * len(rows))
    for number, (row, texts) in enumerate(zip(rows, captions, strict=True)):
        for column, (picture, text) in enumerate(zip(row, texts, strict=True)):
            axes = figure.add_subplot(len(rows), columns, number * columns + column + 1)
            axes.imshow(in_colour(picture), interpolation="nearest")
            axes.set_title(text, fontsize=7)
            axes.axis("off")
    return figure


def in_colour(image: np.ndarray) -> np.ndarray:
    """An image uint8 [H, W, 1 or 3] as [H, W, 3]."""
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Lay a heat map [H, W] over an image uint8 [H, W, C]: uint8 [H, W, 3], on the image in grey.

    A map of one sign goes from black at its lowest value over red to yellow; in others red supports and blue opposes.
    Values above the 99th percentile have the same colour.
    """
    from matplotlib import colormaps

    largest = float(np.abs(heat).max())
    signed = bool(heat.min() < 0 < heat.max())
    low = 0.0 if signed else float(heat.min())
    top = float(np.quantile(np.abs(heat) if signed else heat - low, 0.99))
    scaled = np.clip((heat - low) / max(top, 1e-3 * largest, 1e-12), -1, 1)
    colours = colormaps["RdBu_r"]((scaled + 1) / 2) if signed else colormaps["inferno"](scaled)
    grey = in_colour(image).mean(-1, keepdims=True) / 255
    return np.rint(255 * (0.4 * grey + 0.6 * colours[..., :3])).astype(np.uint8)
