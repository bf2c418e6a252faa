"""What a search has found: a table, importances, a picture, and the best config as a file for `--config`."""

import dataclasses
import math
import sys
from typing import Any

from train.config_file import replaced
from train.drawing import new_figure, save_figure
from train.errors import UsageError
from train.prune.layers import aligned
from train.run_folder import environment, write_json
from train.search.storage import Search, load_optuna
from train.spaces import Choice, Integers, LogUniform, Range

BEST, RESULT, PICTURE = "best.json", "search.json", "search.png"


def deliver(search: Search) -> dict[str, Any]:
    """Print the table, write best.json, search.json and search.png, and return the result.

    Accuracies are those of the validation split, in [0, 1]; `importance` is the share of their variance that a field
    explains (fANOVA, Hutter et al. 2014, https://proceedings.mlr.press/v32/hutter14.html).
    """
    rows = trial_rows(search)
    best = max((row for row in rows if row["outcome"] == "complete"), key=lambda row: row["accuracy"], default=None)
    outcomes = [row["outcome"] for row in rows]
    result = {
        "preset": search.preset,
        "trials": {outcome: outcomes.count(outcome) for outcome in OUTCOMES if outcome in outcomes},
        "best": best,
        "first": rows[0],
        "importance": importances(search),
        "trial_seconds": round(sum(row["seconds"] or 0 for row in rows), 1),
        "starts": len(search.study.user_attrs["starts"]),
        "out": str(search.out),
        **environment(),
    }
    print(table(search, rows, best), file=sys.stderr)
    if best is None:
        print("no trial was completed: widen or move the ranges", file=sys.stderr)
    else:
        config = dataclasses.asdict(dataclasses.replace(replaced(search.base, best["values"]), out=None))
        found = {"preset": search.preset, "config": config, "search": best}
        write_json(search.out / BEST, found)
        program = "python -m train --config"
        print(f"the best is {search.out / BEST}; train and test it: {program} {search.out / BEST}", file=sys.stderr)
    write_json(search.out / RESULT, {**result, "ranges": search.study.user_attrs["settings"]["ranges"], "rows": rows})
    try:
        draw(search, rows, result["importance"])
    except UsageError as error:
        print(f"note: no picture: {error}", file=sys.stderr)
    return result


OUTCOMES = ("complete", "stopped early", "diverged", "failed")


def trial_rows(search: Search) -> list[dict[str, Any]]:
    """The finished trials: number, values by field, accuracy (the last one, if any), epochs, outcome, seconds."""
    rows = []
    for trial in search.study.get_trials(deepcopy=False):
        if trial.state.is_finished():
            outcome = trial.user_attrs.get("outcome", "failed")
            rows.append(
                {
                    "trial": trial.number,
                    "values": {name: trial.params.get(name) for name in search.space},
                    "accuracy": trial.value,
                    "epochs": trial.user_attrs.get("epochs"),
                    "outcome": outcome,
                    "seconds": trial.user_attrs.get("seconds"),
                    "restarts": trial.user_attrs.get("restarts", 0),
                }
            )
    return rows


def importances(search: Search) -> dict[str, float]:
    """Importance of each field, largest first; empty with fewer than two completed trials, or equal accuracies."""
    optuna = load_optuna()
    complete = [trial for trial in search.study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    if len({trial.value for trial in complete}) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    shares = optuna.importance.get_param_importances(search.study, evaluator=evaluator)
    return {name: round(float(share), 4) for name, share in shares.items()}


def as_shown(value: Any) -> str:
    """A value of a field in four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def percent(accuracy: float | None) -> str:
    """An accuracy in percent, or a dash."""
    return "-" if accuracy is None else f"{100 * accuracy:.2f} %"


def progress_line(search: Search, number: int) -> str:
    """The line for a trial that has just ended, with the best one so far."""
    rows = trial_rows(search)
    row = next(row for row in rows if row["trial"] == number)
    best = max((row["accuracy"] for row in rows if row["outcome"] == "complete"), default=None)
    values = ", ".join(f"{name} {as_shown(value)}" for name, value in row["values"].items())
    place = f"trial {number} ({len(rows)}/{search.trials})"
    return f"{place}: {values}: {percent(row['accuracy'])}, {row['outcome']}; best {percent(best)}"


def table(search: Search, rows: list[dict[str, Any]], best: dict[str, Any] | None) -> str:
    """The trials in columns; a star marks the best, and the last line compares it with the first."""
    header = ["trial", "validation", *search.space, "epochs", "outcome", "s"]
    lines = [
        [
            f"{'*' if row is best else ''}{row['trial']}",
            percent(row["accuracy"]),
            *map(as_shown, row["values"].values()),
            "-" if row["epochs"] is None else f"{row['epochs']:.1f}",
            row["outcome"],
            "-" if row["seconds"] is None else f"{row['seconds']:.1f}",
        ]
        for row in rows
    ]
    text = [aligned([header, *lines])]
    if best is not None:
        text.append(
            f"best on validation: trial {best['trial']}, {percent(best['accuracy'])}; the first trial, the config as "
            f"given, {percent(rows[0]['accuracy'])}"
        )
    return "\n".join(text)


def draw(search: Search, rows: list[dict[str, Any]], importance: dict[str, float]) -> None:
    """Draw parallel coordinates, a line per trial from field to field to its accuracy, and bars of the importances.

    Raises:
      UsageError: matplotlib is not installed, or the file cannot be written.
    """
    figure = new_figure(3.5 + 1.8 * len(search.space), 4.2)
    from matplotlib import colormaps

    lines, bars = figure.subplots(1, 2, width_ratios=[1 + len(search.space), 1])
    shown = [row for row in rows if row["accuracy"] is not None]
    accuracies = [row["accuracy"] for row in shown] or [0.0]
    low, high = min(accuracies), max(accuracies)
    span = (high - low) or 1.0
    for row in sorted(shown, key=lambda row: row["accuracy"]):
        share = (row["accuracy"] - low) / span
        heights = [place(search.space[name], value) for name, value in row["values"].items()]
        complete = row["outcome"] == "complete"
        colour = colormaps["viridis"](0.95 * share) if complete else "0.7"
        lines.plot([*heights, share], color=colour, lw=2 if complete else 1, ls="-" if complete else ":", alpha=0.9)
    names = [*search.space, "validation accuracy"]
    lines.set(
        xticks=range(len(names)), xticklabels=names, yticks=[], ylim=(-0.08, 1.08), xlim=(-0.15, len(names) - 0.6)
    )
    for at, name in enumerate(search.space):
        for height, label in ticks(search.space[name]):
            lines.annotate(label, (at, height), xytext=(3, 3), textcoords="offset points", fontsize=8)
    for height, accuracy in ((0, low), (1, high)):
        end = (len(names) - 1, height)
        lines.annotate(percent(accuracy), end, xytext=(3, 3), textcoords="offset points", fontsize=8)
    for at in range(len(names)):
        lines.axvline(at, color="0.3", lw=0.8, zorder=0)
    for side in ("top", "left", "right", "bottom"):
        lines.spines[side].set_visible(False)
    lines.set_title("each line is a trial; dotted ones were stopped early or diverged", fontsize=9)
    bars.barh([*reversed(importance)], [*reversed(importance.values())], color="C0")
    bars.set(xlim=(0, 1))
    bars.set_title("importance (fANOVA)", fontsize=9)
    save_figure(figure, search.out / PICTURE)


def place(span: Range, value: Any) -> float:
    """Height of a value on its field's axis, in [0, 1]."""
    if isinstance(span, Choice):
        return span.values.index(value) / (len(span.values) - 1)
    scale = math.log if isinstance(span, LogUniform) or (isinstance(span, Integers) and span.log) else float
    return (scale(value) - scale(span.low)) / (scale(span.high) - scale(span.low))


def ticks(span: Range) -> list[tuple[float, str]]:
    """Heights and labels of a field's axis: every choice, or both ends of the range."""
    values = span.values if isinstance(span, Choice) else (span.low, span.high)
    return [(place(span, value), as_shown(value)) for value in values]
