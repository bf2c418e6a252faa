"""Show what pruning did: `python -m train.prune report RUN` (one run) and `curve RUN...` (accuracy by sparsity)."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.errors import UsageError
from train.prune.layers import Row, aligned, short
from train.prune.layers import text as layers_text
from train.prune.measure import Report, measure
from train.report import check_picture, collect, new_figure, save_figure
from train.run_folder import environment, write_json

Curves = dict[str, dict[float, list[float]]]  # name -> sparsity -> pruned accuracies

NAMED = 24  # curves in a legend that is still readable
ABOVE: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 2, "fontsize": 8, "frameon": False}


def report_main(argv: Sequence[str] | None = None) -> None:
    """Print the report of a run; write it as JSON and draw it on request."""
    about = "Compare a pruned run with the network that it started from."
    parser = argparse.ArgumentParser(prog="python -m train.prune report", description=about)
    parser.add_argument("run", type=Path, help="a finished run of pruning")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    parser.add_argument("--picture", type=Path, help="draw it to this file: .png, .svg or .pdf")
    parser.add_argument(
        "--sensitivity",
        type=float,
        nargs="*",
        metavar="SPARSITY",
        help="also measure accuracy with only one layer pruned, to these sparsities (default: 0.5 0.8 0.9 0.95)",
    )
    parser.add_argument("--images", type=int, default=1000, help="validation images for --sensitivity")
    parser.add_argument("--steps", type=int, default=20, help="timed calls per block; 0 skips latency")
    parser.add_argument("--repeats", type=int, default=10, help="blocks per network")
    args = parser.parse_args(argv)
    if args.images < 1 or args.steps < 0 or args.repeats < 2:
        raise UsageError("--images needs 1 or more, --steps 0 or more, --repeats 2 or more")
    shares = () if args.sensitivity is None else tuple(args.sensitivity) or (0.5, 0.8, 0.9, 0.95)
    if not all(0 <= share < 1 for share in shares):
        raise UsageError(f"--sensitivity {' '.join(map(str, shares))}: sparsities are in [0, 1)")
    if args.picture:  # refuse a picture that cannot be drawn before minutes of measuring
        check_picture(args.picture)
    report = measure(args.run, shares=shares, images=args.images, steps=args.steps, repeats=args.repeats)
    print(text(report))
    if args.json:
        write_json(args.json, {**report, **environment()})
    if args.picture:
        draw(report, args.picture)


def curve_main(argv: Sequence[str] | None = None) -> None:
    """Print a table of several runs, accuracy by sparsity; draw it on request."""
    about = "Compare runs of pruning: accuracy by sparsity."
    parser = argparse.ArgumentParser(prog="python -m train.prune curve", description=about)
    parser.add_argument(
        "runs", nargs="+", type=Path, help="finished runs, or JSON files of python -m train.report --json"
    )
    parser.add_argument("--picture", type=Path, help="draw them to this file: .png, .svg or .pdf")
    args = parser.parse_args(argv)
    runs = [collect(path) for path in args.runs]
    for path, run in zip(args.runs, runs, strict=True):
        if "pruned_accuracy" not in run:
            raise UsageError(f"{path} is not a run of pruning")
    dense, curves = float(np.mean([run["dense_accuracy"] for run in runs])), curves_of(runs)
    print(table(curves, dense))
    if args.picture:
        draw_curves(curves, dense, args.picture)


def text(report: Report) -> str:
    """Format both networks side by side, the layers, and their sensitivity, for a terminal 100 columns wide."""
    lines: list[Sequence[str]] = [("", "before", "after", "")]
    for (label, before, after, form), change in zip(_figures(report), _changes(report), strict=True):
        lines.append((label, form(before), form(after), change))
    parts = [aligned(lines, "<>><")]
    if report["after"]["nonzero_macs"] < report["after"]["macs"]:
        parts[0] += "\nZeros are multiplied like other weights: only smaller shapes compute less."
    parts.append("Weights and MACs kept in each layer\n" + layers_text(report["layers"]))
    if found := report["sensitivity"]:
        lines = [("layer", *(f"{100 * share:g}%" for share in found["sparsities"]))]
        lines += [(short(path), *(f"{100 * x:.1f}" for x in row)) for path, row in _curves(report).items()]
        parts.append("Accuracy (%) with only one layer pruned to a sparsity of\n" + aligned(lines, "<"))
    return "\n\n".join(parts)


def _figures(report: Report) -> list[tuple[str, float, float, Callable[[float], str]]]:
    """(label, before, after, formatter) of each quantity that is compared."""
    sides = report["before"], report["after"]

    def millions(macs: float) -> str:
        return f"{macs / 1e6:,.3f} M"

    named = [
        ("accuracy", "accuracy", "{:.2%}".format),
        ("bytes stored", "bytes", "{:,}".format),
        ("parameters", "parameters", "{:,}".format),
        ("parameters kept", "kept_parameters", "{:,}".format),
        ("MACs an image", "macs", millions),
        ("MACs of those kept", "nonzero_macs", millions),
    ]
    figures = [(label, *(side[name] for side in sides), form) for label, name, form in named]
    for batch in report["before"]["latency_ms"]:
        times = [side["latency_ms"][batch] for side in sides]
        figures.append((f"latency, batch {batch}", *times, "{:,.2f} ms".format))
    return figures


def _changes(report: Report) -> list[str]:
    """Describe the change of each of `_figures`."""
    (_, *accuracy, _), *figures = _figures(report)
    changes = [f"{100 * (accuracy[1] - accuracy[0]):+.2f} points"]
    for _, before, after, _ in figures[: len(figures) - len(report["before"]["latency_ms"])]:
        if before == after:
            changes.append("the same")
        else:
            changes.append(f"{before / after:.2f}x less" if after < before else f"{after / before:.2f}x more")
    for timed in (report["latency"] or {}).values():
        speedup = timed["after"]["speedup"]
        changes.append(f"{speedup['value']:.2f}x as fast ({speedup['low']:.2f} to {speedup['high']:.2f})")
    return changes


def _curves(report: Report) -> dict[str, list[float]]:
    """Accuracies by path from `sensitivity`, in the order of the forward pass."""
    curves = report["sensitivity"]["accuracy"]
    return {row["path"]: curves[row["path"]] for row in report["layers"] if row["path"] in curves}


def draw(report: Report, picture: Path) -> None:
    """Draw kept weights by layer, before and after, and the sensitivity of each layer. Needs the extra `plot`.

    Raises:
      UsageError: matplotlib is not installed.
    """
    figure = new_figure(14, min(max(7.5, 1 + 0.18 * len(report["layers"])), 18))
    left, right = figure.subfigures(1, 2)
    _draw_layers(left.subplots(), report["layers"])
    if report["sensitivity"]:
        sides, curves = right.subplots(2, 1, height_ratios=(1, 1.5))
        _draw_sensitivity(curves, report)
        names = None if len(_curves(report)) <= NAMED else f"the {NAMED} most sensitive layers"
        handles = curves.get_legend_handles_labels()
        look: dict[str, Any] = {"fontsize": 7, "title_fontsize": 8, "handlelength": 1.5, "columnspacing": 1}
        right.legend(*handles, **look, ncols=4, title=names, loc="outside lower center")
    else:
        sides = right.subplots()
    _draw_sides(sides, report)
    for axes in figure.axes:
        axes.grid(alpha=0.3, axis="both" if axes.lines else "x")
        axes.set_axisbelow(True)
    save_figure(figure, picture)


def _draw_layers(axes: Any, rows: Sequence[Row]) -> None:
    """Bars of all weights and of the kept ones on a logarithmic scale, labelled with the kept share in percent."""
    axes.barh(range(len(rows)), [row["parameters"] for row in rows], color="0.86", label="before")
    axes.barh(range(len(rows)), [row["kept"] for row in rows], color=_colours(len(rows)), label="after")
    for place, row in enumerate(rows):
        axes.text(row["parameters"], place, f" {100 * (1 - row['sparsity']):.3g}%", va="center", fontsize=7)
    axes.set_xscale("log")
    axes.set_xlim(max(min(row["kept"] for row in rows) / 3, 1), 5 * max(row["parameters"] for row in rows))
    axes.set_yticks(range(len(rows)), [short(row["path"]) for row in rows], fontsize=7.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set(xlabel="weights (logarithmic)", title="kept weights by layer")
    axes.legend(**ABOVE)


def _draw_sides(axes: Any, report: Report) -> None:
    """Bars relative to before, labelled with the values."""
    figures = _figures(report)
    shares = [100 * after / before if before else 100 for _, before, after, _ in figures]
    axes.barh(range(len(figures)), [100] * len(figures), color="0.86", label="before")
    axes.barh(range(len(figures)), shares, 0.5, color="C0", label="after")
    for place, (_, before, after, form) in enumerate(figures):
        label = f" {form(before)} \N{RIGHTWARDS ARROW} {form(after)}"
        axes.text(max(100, shares[place]), place, label, va="center", fontsize=7.5)
    axes.set_yticks(range(len(figures)), [label for label, *_ in figures], fontsize=8)
    axes.set_ylim(len(figures) - 0.4, -0.6)
    axes.set_xlim(0, 1.5 * max(100, *shares))
    axes.set(xlabel="% of before", title="before and after")
    axes.legend(**ABOVE)


def _draw_sensitivity(axes: Any, report: Report) -> None:
    """One curve per layer in the colour of its bar; the legend names the layers that lose most."""
    order = [row["path"] for row in report["layers"]]
    colours, curves = dict(zip(order, _colours(len(order)), strict=True)), _curves(report)
    named = sorted(curves, key=lambda path: sum(curves[path]))[:NAMED]
    shares = [100 * share for share in report["sensitivity"]["sparsities"]]
    for number, (path, accuracies) in enumerate(curves.items()):
        # Adjacent layers have similar colours, so markers distinguish them.
        look = {"marker": "os^D"[number % 4], "label": short(path)} if path in named else {"alpha": 0.3}
        axes.plot(shares, [100 * accuracy for accuracy in accuracies], color=colours[path], ms=3.5, lw=1.2, **look)
    axes.axhline(100 * report["sensitivity"]["baseline"], color="grey", lw=0.8, ls=":")
    axes.set(xlabel="sparsity (%)", ylabel="accuracy (%)", title="accuracy with one layer alone pruned")


def _colours(number: int) -> list[Any]:
    """One colour per layer, by depth."""
    from matplotlib import colormaps

    return [colormaps["turbo"](0.05 + 0.9 * i / max(number - 1, 1)) for i in range(number)]


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
    sparsities = sorted({s for points in curves.values() for s in points})
    place = {s: i for i, s in enumerate(sparsities)}
    for index, (name, points) in enumerate(curves.items()):
        means = [100 * float(np.mean(values)) for values in points.values()]
        at = [place[s] for s in points]
        axes.plot(at, means, f"C{index}o-" if len(at) > 1 else f"C{index}D", ms=5, label=name)
        for x, values in zip(at, points.values(), strict=True):
            axes.plot([x] * len(values), [100 * v for v in values], f"C{index}.", ms=3)
    axes.axhline(100 * dense, color="grey", lw=1, ls=":", label="dense")
    axes.set_xticks(range(len(sparsities)), [f"{100 * s:g}" for s in sparsities])
    axes.set(xlabel="sparsity (%)", ylabel="test accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, picture)
