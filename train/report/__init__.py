"""Runs on one page, as a JSON file or as a picture: `python -m train.report RUN...`."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.drawing import new_figure, save_figure
from train.errors import UsageError


def collect(run: Path) -> dict[str, Any]:
    """Collect a run's result, config and history (`metrics.jsonl`): the record of a published run.

    `run` is its folder, or a JSON file that holds this record.

    Raises:
      UsageError: there is no run, or it is not finished.
    """
    try:
        if run.is_file():
            record = json.loads(run.read_text())
            if not isinstance(record, dict) or "history" not in record:
                raise UsageError(f"{run} holds no run: pass a run folder, or a file that train.report --json wrote")
            return record
        result = json.loads((run / "result.json").read_text())
        config = json.loads((run / "config.json").read_text())["config"]
        history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except FileNotFoundError as error:
        raise UsageError(f"{run} holds no finished run: {Path(error.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{run} cannot be read: {error}") from None
    return {**result, "config": config, "history": history}


def check_comparable(runs: Sequence[dict[str, Any]]) -> None:
    """Refuse to compare runs on different sets or of different networks in one table.

    Raises:
      UsageError: the sets, models or widths differ; the message lists them.
    """
    # Records of older runs have no `widths`.
    kinds = {(r["dataset"], r["model"], r["config"]["width"], *r["config"].get("widths", ())) for r in runs}
    if len(kinds) > 1:
        raise UsageError(f"a table needs runs of the same network on the same set, got {sorted(map(str, kinds))}")


def run_name(path: Path, among: Sequence[Path]) -> str:
    """Name of a run in a picture: its folder or file, after the parent folders that tell it apart from other paths."""
    paths = {Path(os.path.abspath(p)) for p in (path, *among)}

    def shown(path: Path) -> Path:
        short = path.with_suffix("") if path.suffix == ".json" else path
        return path if short in paths else short

    parts = shown(Path(os.path.abspath(path))).parts
    others = [other for p in paths if (other := shown(p).parts) != parts]
    depths = range(1, len(parts) + 1)
    depth = next(depth for depth in depths if all(other[-depth:] != parts[-depth:] for other in others))
    return Path(*parts[-depth:]).as_posix()


def draw(runs: dict[str, dict[str, Any]], picture: Path) -> None:
    """Plot training loss, and training and validation accuracy, by epoch, a colour per run. Needs the extra `plot`."""
    figure = new_figure(9, 3.6)
    loss, accuracy = figure.subplots(1, 2)
    for index, (name, run) in enumerate(runs.items()):
        colour = f"C{index}"
        loss.plot(*_curve(run, "loss"), colour, label=name)
        accuracy.plot(*_curve(run, "accuracy", 100), colour, alpha=0.35, lw=1)
        accuracy.plot(*_curve(run, "validation_accuracy", 100), f"{colour}o-", ms=4, label=name)
    loss.set(xlabel="epoch", ylabel="training loss (nats)")
    accuracy.set(xlabel="epoch", ylabel="accuracy (%)")
    accuracy.set_title("points: validation, thin: training batches", fontsize=9)
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_figure(figure, picture)


def _curve(run: dict[str, Any], figure: str, scale: float = 1) -> tuple[list[float], list[float]]:
    rows = [row for row in run["history"] if row.get(figure) is not None]
    return [row["epoch"] for row in rows], [scale * row[figure] for row in rows]
