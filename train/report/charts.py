"""The charts of the page: small drawings of one question each. They need the extra `plot`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from train.drawing import new_figure
from train.report.records import Group, Run
from train.svg import LIGHT

WIDTH, HEIGHT = 4.8, 3.1  # inches: text stays legible when a phone shrinks the chart
MOST = len(LIGHT) - 1  # settings with a colour of their own; the last colour is for all others
MARKERS = "osD^vPX"
CONFUSED = 30  # most classes that a confusion matrix shows


@contextmanager
def styled() -> Iterator[None]:
    """The look of the charts that are drawn and saved inside."""
    import matplotlib
    from cycler import cycler

    look: Any = {
        "axes.prop_cycle": cycler(color=LIGHT),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.5,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "savefig.dpi": 150,
    }
    with matplotlib.rc_context(look):
        yield


def colour(index: int) -> str:
    """Colour of the setting at this rank."""
    return f"C{min(index, MOST)}"


def short(name: str, most: int = 24) -> str:
    """Shorten a name in the middle, and escape dollar signs, which would start a formula."""
    cut = name if len(name) <= most else f"{name[: most // 2]}\N{HORIZONTAL ELLIPSIS}{name[-(most // 2 - 1) :]}"
    return cut.replace("$", r"\$")


def draw_scores(groups: Sequence[Group], label: str) -> Any:
    """Scores in percent, a row per setting, best on top: a point per seed and a bar at the mean."""
    figure = new_figure(WIDTH, 0.9 + 0.34 * len(groups))
    axes = figure.subplots()
    for row, group in enumerate(groups):
        tint = colour(row)
        values = [100 * score for score in group.scores]
        axes.plot(values, [row] * len(values), MARKERS[row % 7] if row < MOST else "o", color=tint, ms=7, alpha=0.75)
        axes.plot([100 * group.score] * 2, [row - 0.3, row + 0.3], color=tint, lw=2.5)
        text = f"{100 * group.score:.1f}"
        axes.annotate(
            text, (1, row), xycoords=("axes fraction", "data"), va="center", fontweight="bold" if row == 0 else "normal"
        )
    axes.set_yticks(range(len(groups)), [short(group.name) for group in groups])
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.margins(x=0.08)
    axes.spines["left"].set_visible(False)
    axes.tick_params("y", length=0)
    axes.set_xlabel(f"{label} (%)")
    axes.grid(False, axis="y")
    return figure


def draw_curves(
    groups: Sequence[Group], name: str, label: str, *, scale: float = 1, zoom: bool = False, dots: bool = False
) -> Any | None:
    """A figure of the history by epoch: a line at the mean of a setting's seeds, a band from the lowest to the highest.

    Lines are labelled at their end. With `zoom` the axis leaves out most of the first quarter of training. None if no
    run has two values.
    """
    lines = [(at, group.name, *band(group.runs, name, scale)) for at, group in enumerate(groups)]
    lines = [line for line in lines if len(line[2]) > 1]
    if not lines:
        return None
    figure = new_figure(WIDTH, HEIGHT)
    axes = figure.subplots()
    for at, _, epochs, low, mean, high in reversed(lines):
        marker = MARKERS[at % 7] if dots and at < MOST else ""
        axes.plot(epochs, mean, color=colour(at), lw=1.8 if at < MOST else 1, marker=marker, ms=4)
        if np.any(high > low):
            axes.fill_between(epochs, low, high, color=colour(at), alpha=0.2 if len(lines) < 5 else 0.1, lw=0)
    if zoom:
        # Leave out the steep start, but nothing after the first quarter.
        late = [epochs >= epochs[0] + (epochs[-1] - epochs[0]) * (len(epochs) > 4) / 4 for _, _, epochs, *_ in lines]
        lowest = min(np.min(line[3][part]) for line, part in zip(lines, late, strict=True))
        highest = max(np.max(line[5][part]) for line, part in zip(lines, late, strict=True))
        if lowest < highest:
            axes.set_ylim(lowest - 0.08 * (highest - lowest), highest + 0.08 * (highest - lowest))
    axes.set(xlabel="epoch", title=label)
    if len(groups) > 1:
        label_ends(axes, [(at, title, mean[-1]) for at, title, _, _, mean, _ in lines if at < MOST])
    return figure


def label_ends(axes: Any, ends: Sequence[tuple[int, str, float]], most: int = 18) -> None:
    """Write (rank, name, last value) of lines to the right of the axes, in their colours, without overlap.

    Names longer than `most` characters are shortened.
    """
    bottom, top = axes.get_ylim()
    wanted = sorted(((value - bottom) / (top - bottom), at, title) for at, title, value in ends)
    gap = 0.075
    places: list[float] = []
    for place, _, _ in wanted:
        places.append(max(place, places[-1] + gap if places else 0))
    # Those pushed above the top move down again.
    limit = 1.0
    for index in reversed(range(len(places))):
        places[index] = min(places[index], limit)
        limit = places[index] - gap
    for place, (_, at, title) in zip(places, wanted, strict=True):
        axes.annotate(
            f" {short(title, most)}", (1, place), xycoords="axes fraction", va="center", color=colour(at), fontsize=9
        )


def band(runs: Sequence[Run], name: str, scale: float = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(epochs, lowest, mean, highest) of a figure over seeds, at the epochs that all of them have reached."""
    curves = [np.array(curve, float).T for run in runs if (curve := run.curve(name))]
    if not curves:
        return (np.zeros(0),) * 4
    longest = max(curves, key=lambda curve: curve.shape[1])[0]
    epochs = longest[longest <= min(curve[0, -1] for curve in curves)]
    values = scale * np.stack([np.interp(epochs, *curve) for curve in curves])
    return epochs, values.min(0), values.mean(0), values.max(0)


def draw_confusion(confusion: np.ndarray, classes: Sequence[str]) -> Any:
    """A confusion matrix, true class by row, shaded by the share of the true class, with counts.

    Of more than `CONFUSED` classes it shows those with the most errors.

    Args:
      confusion: int [P, 3], rows of true class, predicted class and how often, as in `train.steps.summarize`.
    """
    true, predicted, counts = confusion.T
    of_class = np.bincount(true, counts, len(classes))
    wrong = np.where(true == predicted, 0, counts)
    errors = sum(np.bincount(side, wrong, len(classes)) for side in (true, predicted))
    shown = np.sort(np.argsort(-errors, kind="stable")[:CONFUSED])
    place = np.full(len(classes), -1)
    place[shown] = np.arange(len(shown))
    size, names = len(shown), [short(str(classes[at]), 12) for at in shown]
    figure = new_figure(*(max(WIDTH, 0.32 * size) * np.array([1, 0.92])))
    axes = figure.subplots()
    for row, column, count, share in zip(place[true], place[predicted], counts, counts / of_class[true], strict=True):
        if min(row, column) < 0:
            continue
        right = row == column
        # Errors are rare: the root of their share shows them.
        look = {"color": "C0" if right else "C1", "alpha": 0.35 * share if right else 0.9 * share**0.5}
        axes.add_patch(_rectangle((column - 0.5, row - 0.5), 1, 1, **look))
        axes.text(column, row, f"{count:,}", ha="center", va="center", fontsize=8 if size < 16 else 6)
    slanted = max(map(len, names)) >= 3
    turn: Any = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    axes.set_xticks(range(size), names, fontsize=8, **turn)
    axes.set_yticks(range(size), names, fontsize=8)
    axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), xlabel="predicted", ylabel="true class", aspect="equal")
    axes.grid(False)
    return figure


def _rectangle(*place: Any, **look: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(*place, lw=0, **look)


def draw_bars(
    names: Sequence[str], values: Sequence[float], label: str, form: Callable[[float], str], ranks: Sequence[int]
) -> Any:
    """Horizontal bars from zero, labelled with their values, in the colours of `ranks`."""
    figure = new_figure(WIDTH, 0.9 + 0.34 * len(names))
    axes = figure.subplots()
    bars = axes.barh([short(name) for name in names], values, 0.62, color=[colour(rank) for rank in ranks])
    axes.bar_label(bars, [form(value) for value in values], padding=4, fontsize=9)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.margins(x=0.18)
    axes.spines["left"].set_visible(False)
    axes.tick_params("y", length=0)
    axes.set_xlabel(label)
    axes.grid(False, axis="y")
    return figure


def draw_classes(groups: Sequence[Group], ranks: Sequence[int], label: str) -> Any:
    """Mean score of each class, a row per class, a point per setting; the hardest classes are on top."""
    scores = [[run.class_scores for run in group.runs if run.class_scores] for group in groups]
    classes = [name for name, _ in scores[0][0]]
    means = [
        (at, group, 100 * np.mean([[score for _, score in run] for run in runs], axis=0))
        for at, group, runs in zip(ranks, groups, scores, strict=True)
    ]
    order = np.argsort(np.mean([mean for *_, mean in means], axis=0), kind="stable")
    figure = new_figure(WIDTH, 1.1 + 0.24 * len(order))
    axes = figure.subplots()
    for at, group, mean in reversed(means):
        axes.plot(mean[order], range(len(order)), MARKERS[at % 7], color=colour(at), ms=6, label=short(group.name))
    axes.set_yticks(range(len(order)), [short(str(classes[at]), 20) for at in order])
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set(xlabel=label)
    if len(groups) > 1:
        figure.legend(loc="outside upper left", ncols=2, fontsize=9, frameon=False)
    return figure
