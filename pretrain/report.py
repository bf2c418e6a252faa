"""Compare runs of pretraining: `python -m pretrain.report RUN... [--picture FILE.png] [--table]`.

RUN is a run folder, or a JSON file that `train.report --json` wrote.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.drawing import new_figure, save_figure
from train.errors import OneLineParser, UsageError, one_line
from train.paths import local_path
from train.report import check_comparable, collect, run_name

Run = dict[str, Any]


def minutes(run: Run, step: int) -> float:
    """Minutes of training, without evaluations, that a run took for its first `step` steps; nan if unknown."""
    return step * run["config"]["batch"] / (run["images_per_second"] or math.nan) / 60


def draw(runs: dict[str, Run], picture: Path) -> None:
    """Draw validation accuracy by kNN and online linear probe, and the effective rank of the features, over time.

    Needs the extra `plot`.
    """
    figure = new_figure(10, 4.2)
    accuracy, spread = figure.subplots(1, 2)
    for index, (name, run) in enumerate(runs.items()):
        colour = f"C{index}"
        looks = [row for row in run["history"] if "effective_rank" in row]
        at = [minutes(run, row["step"]) for row in looks]
        spread.plot(at, [row["effective_rank"] for row in looks], f"{colour}o-", ms=3, label=name)
        if "knn_accuracy" not in run:  # pretrained without labels
            continue
        knn = [100 * row["validation_knn_accuracy"] for row in looks]
        linear = [100 * row["validation_online_linear_accuracy"] for row in looks]
        accuracy.plot(at, knn, f"{colour}o-", ms=3, label=f"{name}: kNN")
        accuracy.plot(at[1:], linear[1:], f"{colour}--", lw=1, label=f"{name}: linear probe, online")
        accuracy.plot([at[-1]], [100 * run["validation_linear_accuracy"]], f"{colour}*", ms=9)
        if index == 0:
            accuracy.axhline(knn[0], color="grey", lw=0.8, ls=":", label="kNN of random weights")
    accuracy.set(xlabel="minutes of training", ylabel="validation accuracy (%)")
    accuracy.set_title("stars: linear probe trained offline", fontsize=9)
    spread.set(xlabel="minutes of training", ylabel="effective rank of the features")
    for axes in (accuracy, spread):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    save_figure(figure, picture)


def table(runs: Sequence[Run]) -> str:
    """Make a Markdown table, one row per method: test accuracies in percent, mean (standard deviation) over seeds.

    Raises:
      UsageError: runs on different sets or of different networks, which cannot be compared in one table.
    """
    check_comparable(runs)

    def cell(values: Sequence[float], digits: int = 1) -> str:
        spread = f" ({np.std(values, ddof=1):.{digits}f})" if len(values) > 1 else ""
        return f"{np.mean(values):.{digits}f}{spread}"

    def row(name: str, group: Sequence[Run], prefix: str = "") -> str:
        knn, linear = (cell([100 * run[f"{prefix}{kind}_accuracy"] for run in group]) for kind in ("knn", "linear"))
        online = "" if prefix else cell([100 * run["online_linear_accuracy"] for run in group])
        seconds = "" if prefix else cell([60 * minutes(run, run["steps"]) for run in group], 0)
        return f"| {name} | {knn} | {linear} | {online} | {seconds} | {len(group)} |"

    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run["objective"], []).append(run)
    # Random weights do not depend on the method: count them once per seed.
    seeds = {run["seed"]: run for run in runs}
    return "\n".join(
        [
            "| method | kNN | linear, offline | linear, online | training, s | runs |",
            "|---|---|---|---|---|---|",
            row("random weights", list(seeds.values()), "random_"),
            *(row(name, group) for name, group in groups.items()),
        ]
    )


def read(path: Path, *, labelled: bool = False) -> Run:
    """Read a run of pretraining from its folder or from a file that `train.report --json` wrote.

    Raises:
      UsageError: not a finished run of pretraining, or, with `labelled`, one without accuracies.
    """
    run = collect(path)
    if "objective" not in run:
        raise UsageError(f"{path} is not a run of pretraining")
    if labelled and "knn_accuracy" not in run:
        raise UsageError(f"{path} was pretrained without labels: it has no accuracies for a table")
    return run


def main(argv: Sequence[str] | None = None) -> None:
    """Read the runs; draw a picture or print a table, as the flags request."""
    parser = OneLineParser(prog="python -m pretrain.report", description=__doc__)
    parser.add_argument(
        "runs", nargs="+", type=local_path, help="run folders, or JSON files that train.report --json wrote"
    )
    parser.add_argument("--picture", type=local_path, help="draw the curves to this file: .png, .svg or .pdf")
    parser.add_argument("--table", action="store_true", help="print a Markdown table, one row per method")
    args = parser.parse_args(argv)
    if not (args.picture or args.table):
        raise UsageError("nothing to do: pass --picture FILE or --table")
    runs = {run_name(path, args.runs): read(path, labelled=args.table) for path in args.runs}
    if args.picture:
        draw(runs, args.picture)
    if args.table:
        print(table(list(runs.values())))


if __name__ == "__main__":
    with one_line():
        main()
