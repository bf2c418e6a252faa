"""`python -m train.prune curve RUN...`: runs of pruning side by side, accuracy by sparsity, as a table and a picture.

RUN is a run's folder, or a JSON file that `python -m train.report RUN --json FILE` wrote.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.errors import UsageError
from train.report import collect, new_figure, save_figure

Run = dict[str, Any]
Curves = dict[str, dict[float, list[float]]]  # name -> sparsity -> pruned accuracies


def name_of(run: Run) -> str:
    """How a run was pruned: its schedule, its score, and whatever of scope and structure is not the default."""
    p = run["config"]["prune"]
    when = p["restart"] if p["schedule"] == "iterative" else p["schedule"].replace("_", "-")
    others = [p[field] for field, usual in (("scope", "global"), ("structure", "unstructured")) if p[field] != usual]
    return " ".join([when, p["score"], *others, *(["from random weights"] if p["start"] == "random" else [])])


def curves_of(runs: Sequence[Run]) -> Curves:
    """Test accuracies by name and sparsity (in thousandths: counts are whole), several where seeds differ."""
    curves: Curves = {}
    for run in runs:
        points = curves.setdefault(name_of(run), {})
        points.setdefault(round(run["sparsity"], 3), []).append(run["pruned_accuracy"])
    return {name: dict(sorted(points.items())) for name, points in curves.items()}


def table(curves: Curves, dense: float) -> str:
    """Markdown: a row a way of pruning, a column a sparsity, test accuracy in percent (mean and deviation of seeds)."""
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


def draw(curves: Curves, dense: float, picture: Path) -> None:
    """A line a way of pruning, evenly spaced sparsities. Needs the extra `plot`."""
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


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table of some runs, and draw them where it is asked for."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m train.prune curve", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="finished runs of pruning, or their JSON files")
    parser.add_argument("--picture", type=Path, help="draw them here, as .png, .svg or .pdf")
    args = parser.parse_args(argv)
    runs = [collect(path) for path in args.runs]
    for path, run in zip(args.runs, runs, strict=True):
        if "pruned_accuracy" not in run:
            raise UsageError(f"{path} is no run of pruning")
    dense = float(np.mean([run["dense_accuracy"] for run in runs]))
    print(table(curves_of(runs), dense))
    if args.picture:
        draw(curves_of(runs), dense, args.picture)
