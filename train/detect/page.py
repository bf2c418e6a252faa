"""One page about a detector: its metrics, precision by recall, kinds of errors, and its best and worst images."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train import page
from train.detect.draw import Drawn, contact_sheet, draw_best_and_worst
from train.detect.metrics import Detections, Truth, at_recalls, voc_ap
from train.detect.mistakes import Curve, count_errors, curves
from train.drawing import new_figure
from train.errors import UsageError
from train.page import Cell, Html, KeyFigure, Section
from train.paths import check_file
from train.report import charts
from train.report.tables import cell
from train.report.verdict import percent

MEANINGS = {
    "duplicate": "a second box on an object that has one: a lower IoU threshold of non-maximum suppression removes it",
    "poor localisation": "the right class on an object, but the boxes share only 10 to 50 % of their union",
    "wrong class": "a good box on an object of a different class",
    "both": "a loose box on an object of a different class",
    "background": "a box where no object is, or one that is not annotated",
    "missed": "an object without a box of sufficient score, be it loose or of the wrong class",
}
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, np.inf)}


def write_page(
    html: Path,
    title: str,
    metrics: Mapping[str, Any],
    detections: Sequence[Detections],
    truths: Sequence[Truth],
    classes: Sequence[str],
    read: Callable[[int], np.ndarray],
    *,
    least: float = 0.5,
    count: int = 6,
) -> list[Path]:
    """Write `detection_page`, and contact sheets best.png and worst.png to the folder of its name; return the paths.

    For `read`, `least` and `count` see `draw_best_and_worst`.

    Raises:
      UsageError: a file cannot be written, or matplotlib is not installed.
    """
    check_file(html)
    images = draw_best_and_worst(detections, truths, classes, read, least=least, count=count)
    text = detection_page(title, metrics, detections, truths, classes, images, least=least)
    sheets = {f"{name}.png": shown for name, shown in zip(("best", "worst"), images, strict=True) if shown}
    folder = html.with_suffix("")
    try:
        html.write_text(text, encoding="utf-8")
        folder.mkdir(exist_ok=True)
        for name, shown in sheets.items():
            (folder / name).write_bytes(page.encode(contact_sheet(shown)))
    except OSError as error:
        raise UsageError(f"cannot write {error.filename}: {error.strerror}") from None
    return [html, *(folder / name for name in sheets)]


def detection_page(
    title: str,
    metrics: Mapping[str, Any],
    detections: Sequence[Detections],
    truths: Sequence[Truth],
    classes: Sequence[str],
    images: tuple[Sequence[Drawn], Sequence[Drawn]] = ((), ()),
    *,
    least: float = 0.5,
) -> str:
    """Make the page from `coco_metrics` and what they were computed from.

    Args:
      images: the best and the worst, of `draw_best_and_worst` with the same `least`.
      least: lowest score of a detection that is drawn or counted as an error.

    Raises:
      UsageError: matplotlib is not installed.
    """
    voc = voc_ap(detections, truths, classes)
    errors = count_errors(detections, truths, least=least)
    objects = sum(int(np.sum(~truth.crowd)) for truth in truths)
    common = max(MEANINGS, key=lambda kind: errors[kind])
    lead = f"AP {_figure(metrics['ap'])} on {len(truths):,} images: {errors['correct']:,} of {objects:,} objects found"
    lead += f"; most frequent error: {common} ({errors[common]:,})." if errors[common] else "."
    figures = [
        KeyFigure(_figure(metrics["ap"]), "AP", "mean over IoU 0.50 to 0.95"),
        KeyFigure(_figure(metrics["ap50"]), "AP50", "boxes need not fit closely"),
        KeyFigure(_figure(metrics["ap75"]), "AP75", "boxes must fit closely"),
        KeyFigure(_figure(metrics["ar_100"]), "AR", "share found by 100 boxes an image"),
        KeyFigure(_figure(voc["all_points"]), "VOC AP", f"at 11 points {_figure(voc['eleven_points'])}"),
    ]
    with charts.styled():
        drawn = errors_and_curves(errors, curves(detections, truths, classes), least)
        return page.page(
            title,
            lead,
            page.key_figures(figures),
            page.section("Errors", *drawn),
            page.section("Classes and sizes", class_table(metrics, voc, truths, classes), size_table(metrics, truths)),
            *image_sections(*images, least),
        )


def _figure(value: float | None) -> str:
    return "none" if value is None else percent(value)


def errors_and_curves(errors: Mapping[str, int], found: Mapping[str, Curve], least: float) -> list[Html]:
    """Bars of the kinds of errors, the curves, and what the kinds mean."""
    names = list(MEANINGS)
    bars = charts.draw_bars(
        names, [errors[name] for name in names], "number", lambda value: f"{value:,.0f}", [1] * len(names)
    )
    caption = f"Detections with scores of at least {least:g}: {errors['correct']:,} are correct (IoU of at least 0.5)."
    drawings = [page.figure(bars, caption, alt="number of errors by kind")]
    if found:
        caption = "Precision by recall at IoU 0.5, each point at a different lowest score."
        drawings.append(page.figure(draw_curves(found), caption, alt="precision by recall"))
    rows = [[name, meaning] for name, meaning in MEANINGS.items()]
    return [page.figures(*drawings), page.details("What the kinds mean", page.table(("error", "what it is"), rows))]


def draw_curves(found: Mapping[str, Curve]) -> Any:
    """Precision by recall, a line for each class; of many classes the lines are grey, and their mean has a colour."""
    figure = new_figure(charts.WIDTH, charts.HEIGHT + 0.4)
    axes, few = figure.subplots(), len(found) <= charts.MOST
    for at, (name, curve) in enumerate(found.items()):
        # Begin at recall 0, and fall to 0 where recall ends.
        steps = [np.append(0, curve.recall), np.append(curve.precision[:1], curve.precision)]
        look: dict[str, Any] = {"color": f"C{at}", "lw": 1.8, "label": charts.short(name, 18)}
        axes.plot(*steps, **(look if few else {"color": "C7", "lw": 0.7, "alpha": 0.5}))
    if not few:
        recalls = np.linspace(0, 1, 101)
        mean = np.mean([at_recalls(curve.recall, curve.precision, recalls) for curve in found.values()], axis=0)
        axes.plot(recalls, mean, color="C0", lw=2.2, label=f"mean of {len(found)} classes")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.03))
    figure.legend(loc="outside upper left", ncols=3, fontsize=9, frameon=False)
    return figure


def class_table(
    metrics: Mapping[str, Any], voc: Mapping[str, Any], truths: Sequence[Truth], classes: Sequence[str]
) -> Html:
    """AP of each class that has objects, the hardest class on top."""
    labels = np.concatenate([np.zeros(0, int), *(truth.labels[~truth.crowd] for truth in truths)])
    objects = np.bincount(labels, minlength=len(classes))
    rows: list[list[Cell]] = []
    for name, number in zip(classes, objects.tolist(), strict=True):
        coco, other = metrics["per_class"][name], voc["per_class"][name]
        if coco["ap"] is not None:
            values = (coco["ap"], coco["ap50"], other["all_points"], other["eleven_points"])
            rows.append([name, number, *(cell(value, percent) for value in values)])
    rows.sort(key=lambda row: row[2].value if isinstance(row[2], page.Number) else 0)
    return page.table(("class", "objects", "AP", "AP50", "VOC", "VOC, 11 points"), rows, caption="by class")


def size_table(metrics: Mapping[str, Any], truths: Sequence[Truth]) -> Html:
    """AP and recall by the area of objects."""
    sides = np.concatenate([np.zeros((0, 2)), *((x.boxes[:, 2:] - x.boxes[:, :2])[~x.crowd] for x in truths)])
    areas, rows = sides.prod(1), []
    for name, (low, high) in SIZES.items():
        number = int(np.sum((areas >= low) & (areas < high)))
        values = (metrics[f"ap_{name}"], metrics[f"ar_{name}"])
        limits = {"small": "below 32²", "medium": "32² to 96²", "large": "from 96²"}[name]
        rows.append([f"{name} ({limits} pixels)", number, *(cell(value, percent) for value in values)])
    return page.table(("size", "objects", "AP", "AR"), rows, caption="by area of the object")


def image_sections(best: Sequence[Drawn], worst: Sequence[Drawn], least: float) -> list[Section]:
    """The best and the worst images with their boxes; no section where there are none."""
    about = page.paragraph(
        f"Solid: detections with scores of at least {least:g}. Dashed: annotated objects. Ordered by F1 at IoU 0.5."
    )
    found = []
    for title, images in (("Best images", best), ("Worst images", worst)):
        if images:
            tiles = [page.tile(page.encode(picture, "jpeg"), caption) for picture, caption in images]
            found.append(page.section(title, about, page.image_grid(tiles, smallest=320)))
    return found
