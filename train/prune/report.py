"""Show what pruning did: `python -m train.prune report RUN` (one run) and `curve RUN...` (accuracy by sparsity)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.drawing import check_picture, new_figure, save_figure
from train.errors import OneLineParser, UsageError
from train.hub import source_path
from train.paths import check_file, local_path
from train.prune.layers import Row, aligned, short
from train.prune.layers import text as layers_text
from train.prune.measure import Report, measure
from train.ranges import check_ranges
from train.report import check_comparable, collect
from train.run_folder import environment, write_json

Curves = dict[str, dict[float, list[float]]]  # name -> sparsity -> pruned accuracies

ABOVE: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 2, "fontsize": 8, "frameon": False}


def report_main(argv: Sequence[str]) -> None:
    """Print the report of a run; write it as JSON and draw it on request."""
    about = "Compare a pruned run with the network that it started from."
    parser = OneLineParser(prog="python -m train.prune report", description=about)
    parser.add_argument("run", type=local_path, help="a finished run of pruning")
    parser.add_argument("--before", type=source_path, help="the run that it started from, if that has moved alone")
    parser.add_argument("--json", type=local_path, help="write the report to this file")
    parser.add_argument("--picture", type=local_path, help="draw it to this file: .png, .svg or .pdf")
    parser.add_argument(
        "--sensitivity",
        type=float,
        nargs="*",
        metavar="SPARSITY",
        help="also measure accuracy with only one layer pruned, to these sparsities (default: 0.5 0.8 0.9 0.95)",
    )
    parser.add_argument("--steps", type=int, default=20, help="timed calls per block; 0 skips latency")
    args = parser.parse_args(argv)
    shares = () if args.sensitivity is None else tuple(args.sensitivity) or (0.5, 0.8, 0.9, 0.95)
    check_ranges({"sensitivity": shares, "steps": args.steps}, {"[0, 1)": "sensitivity", "[0, inf)": "steps"})
    # Refuse files that cannot be written before minutes of measuring.
    if args.picture:
        check_picture(args.picture)
    if args.json:
        check_file(args.json)
    report = measure(args.run, before=args.before, shares=shares, steps=args.steps)
    print(text(report))
    if args.json:
        write_json(args.json, {**report, **environment()})
    if args.picture:
        draw(report, args.picture)


def curve_main(argv: Sequence[str]) -> None:
    """Print a table of several runs, accuracy by sparsity; draw it on request."""
    about = "Compare runs of pruning: accuracy by sparsity."
    parser = OneLineParser(prog="python -m train.prune curve", description=about)
    parser.add_argument(
        "runs", nargs="+", type=local_path, help="finished runs, or JSON files of python -m train.report --json"
    )
    parser.add_argument("--picture", type=local_path, help="draw them to this file: .png, .svg or .pdf")
    args = parser.parse_args(argv)
    runs = [collect(path) for path in args.runs]
    for path, run in zip(args.runs, runs, strict=True):
        if "pruned_accuracy" not in run:
            raise UsageError(f"{path} is not a run of pruning")
    check_comparable(runs)
    dense, curves = float(np.mean([run["dense_accuracy"] for run in runs])), curves_of(runs)
    print(table(curves, dense))
    if args.picture:
        draw_curves(curves, dense, args.picture)


def text(report: Report) -> str:
    """Format both networks side by side, the layers, and their sensitivity, for a terminal 100 columns wide."""
    lines: list[Sequence[str]] = [("", "before", "after", "")]
    for label, *values, form, change in _figures(report):
        lines.append((label, *map(form, values), change))
    parts = [aligned(lines, "<>><")]
    if report["after"]["nonzero_macs"] < report["after"]["macs"]:
        parts[0] += "\nZeros are multiplied like other weights: only smaller shapes compute less."
    parts.append("Weights and MACs kept in each layer\n" + layers_text(report["layers"]))
    if found := report["sensitivity"]:
        lines = [("layer", *(f"{100 * share:g}%" for share in found["sparsities"]))]
        lines += [(short(path), *(f"{100 * x:.1f}" for x in row)) for path, row in _curves(report).items()]
        parts.append("Accuracy (%) with only one layer pruned to a sparsity of\n" + aligned(lines, "<"))
    return "\n\n".join(parts)


def _millions(macs: float) -> str:
    return f"{macs / 1e6:,.3f} M"


QUANTITIES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("accuracy", "accuracy", "{:.2%}".format),
    ("bytes stored", "bytes", "{:,}".format),
    ("parameters", "parameters", "{:,}".format),
    ("parameters kept", "kept_parameters", "{:,}".format),
    ("MACs an image", "macs", _millions),
    ("MACs of those kept", "nonzero_macs", _millions),
)


def _figures(report: Report) -> list[tuple[str, float, float, Callable[[float], str], str]]:
    """(label, before, after, formatter, change in words) of each quantity that is compared."""
    figures = []
    for label, name, form in QUANTITIES:
        before, after = (report[side][name] for side in ("before", "after"))
        if name == "accuracy":
            change = f"{100 * (after - before):+.2f} points"
        elif before == after:
            change = "the same"
        else:
            change = f"{before / after:.2f}x less" if after < before else f"{after / before:.2f}x more"
        figures.append((label, before, after, form, change))
    for batch, timed in (report["latency"] or {}).items():
        before, after = (timed[side]["step_ms"] for side in ("before", "after"))
        speedup = timed["after"]["speedup"]
        change = f"{speedup['value']:.2f}x as fast ({speedup['low']:.2f} to {speedup['high']:.2f})"
        figures.append((f"latency, batch {batch}", before, after, "{:,.2f} ms".format, change))
    return figures


def _curves(report: Report) -> dict[str, list[float]]:
    """Accuracies by path from `sensitivity`, in the order of the forward pass."""
    curves = report["sensitivity"]["accuracy"]
    return {row["path"]: curves[row["path"]] for row in report["layers"] if row["path"] in curves}


def draw(report: Report, picture: Path) -> None:
    """Draw kept weights by layer, before and after, and the sensitivity of each layer. Needs the extra `plot`.

    Raises:
      UsageError: matplotlib is not installed.
    """
    rows = report["layers"]
    figure = new_figure(14, min(max(7.5, 1 + 0.18 * len(rows)), 18))
    from matplotlib import colormaps

    # One colour per layer, by depth, for its bar and its curve.
    colours = colormaps["turbo"](np.linspace(0.05, 0.95, len(rows)))
    grid = [["layers", "sides"], ["layers", "curves"]] if report["sensitivity"] else [["layers", "sides"]]
    panels = figure.subplot_mosaic(grid)
    plot_layers(panels["layers"], rows, colours)
    _draw_sides(panels["sides"], report)
    if report["sensitivity"]:
        _draw_sensitivity(panels["curves"], report, colours)
    for axes in panels.values():
        axes.grid(alpha=0.3, axis="both" if axes.lines else "x")
        axes.set_axisbelow(True)
    save_figure(figure, picture)


def plot_layers(axes: Any, rows: Sequence[Row], colours: Any) -> None:
    """Bars of all weights and of the kept ones on a logarithmic scale, labelled with the kept share in percent."""
    names = [short(row["path"]) for row in rows]
    weights = axes.barh(names, [row["parameters"] for row in rows], color="0.86", label="before")
    axes.barh(names, [row["kept"] for row in rows], color=colours, label="after")
    axes.bar_label(weights, [f"{1 - row['sparsity']:.1%}" for row in rows], padding=3, fontsize=7)
    axes.set_xlim(max(min(row["kept"] for row in rows) / 3, 1), 5 * max(row["parameters"] for row in rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params("y", labelsize=7.5)
    axes.set(xscale="log", xlabel="weights (logarithmic)", title="kept weights by layer")
    axes.legend(**ABOVE)


def _draw_sides(axes: Any, report: Report) -> None:
    """Bars relative to before, labelled with the values."""
    names, before, after, forms, _ = zip(*_figures(report), strict=True)
    shares = [100 * new / old if old else 100 for old, new in zip(before, after, strict=True)]
    axes.barh(names, [100] * len(names), color="0.86", label="before")
    axes.barh(names, shares, 0.5, color="C0", label="after")
    for place, (old, new, form) in enumerate(zip(before, after, forms, strict=True)):
        label = f" {form(old)} \N{RIGHTWARDS ARROW} {form(new)}"
        axes.text(max(100, shares[place]), place, label, va="center", fontsize=7.5)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.5 * max(100, *shares))
    axes.set(xlabel="% of before", title="before and after")
    axes.legend(**ABOVE)


def _draw_sensitivity(axes: Any, report: Report, colours: Any) -> None:
    """One curve per layer in the colour of its bar."""
    found, curves = report["sensitivity"], _curves(report)
    for row, colour in zip(report["layers"], colours, strict=True):
        if row["path"] in curves:
            accuracies = [100 * accuracy for accuracy in curves[row["path"]]]
            axes.plot([100 * share for share in found["sparsities"]], accuracies, "o-", color=colour, ms=3.5, lw=1.2)
    axes.axhline(100 * found["baseline"], color="grey", lw=0.8, ls=":")
    axes.set(
        xlabel="sparsity (%)", ylabel="accuracy (%)", title="accuracy with only one layer pruned (colours as left)"
    )


def name_of(run: Report) -> str:
    """Name a run by its pruning: schedule, score, and scope, structure and start if they are not the defaults."""
    p = run["config"]["prune"]
    when = p["restart"] if p["schedule"] == "iterative" else p["schedule"].replace("_", "-")
    others = [p[field] for field, usual in (("scope", "global"), ("structure", "unstructured")) if p[field] != usual]
    return " ".join([when, p["score"], *others, *(["from random weights"] if p["start"] == "random" else [])])


def curves_of(runs: Sequence[Report]) -> Curves:
    """Collect test accuracies by name and sparsity (rounded to 0.001, because counts are integers), one per seed."""
    curves: Curves = {}
    for run in runs:
        points = curves.setdefault(name_of(run), {})
        points.setdefault(round(run["sparsity"], 3), []).append(run["pruned_accuracy"])
    return {name: dict(sorted(points.items())) for name, points in curves.items()}


def table(curves: Curves, dense: float) -> str:
    """Markdown: one row per method, one column per sparsity; test accuracy in percent, mean (deviation) over seeds."""
    sparsities = sorted({s for points in curves.values() for s in points})
    rows = [["pruned", *(f"{100 * s:g} %" for s in sparsities)], ["---"] * (1 + len(sparsities))]
    rows.append(["not at all", *[_cell([dense])] * len(sparsities)])
    rows += [[name, *(_cell(points.get(s, [])) for s in sparsities)] for name, points in curves.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(accuracies: Sequence[float]) -> str:
    values = 100 * np.array(accuracies)
    if not len(values):
        return ""
    return f"{values.mean():.1f}" + (f" ({values.std(ddof=1):.1f})" if len(values) > 1 else "")


def draw_curves(curves: Curves, dense: float, picture: Path) -> None:
    """Draw one line per method over evenly spaced sparsities. Needs the extra `plot`."""
    figure = new_figure(7, 4.2)
    axes = figure.subplots()
    plot_curves(axes, curves, dense)
    axes.grid(alpha=0.3)
    save_figure(figure, picture)


def plot_curves(axes: Any, curves: Curves, dense: float) -> None:
    """Plot one line per method over evenly spaced sparsities into axes of matplotlib."""
    sparsities = sorted({s for points in curves.values() for s in points})
    for index, (name, points) in enumerate(curves.items()):
        places = [sparsities.index(s) for s in points]
        means = [100 * float(np.mean(values)) for values in points.values()]
        axes.plot(places, means, f"C{index}{'o-' if len(places) > 1 else 'D'}", ms=5, label=name)
        for x, values in zip(places, points.values(), strict=True):
            axes.plot([x] * len(values), [100 * v for v in values], f"C{index}.", ms=3)
    axes.axhline(100 * dense, color="grey", lw=1, ls=":", label="dense")
    axes.set_xticks(range(len(sparsities)), [f"{100 * s:g}" for s in sparsities])
    axes.set(xlabel="sparsity (%)", ylabel="test accuracy (%)")
    axes.legend(fontsize=8)
