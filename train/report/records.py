"""Runs of every pipeline as they are read for a page, finished or not, and their grouping by configuration."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from train.config import flat
from train.errors import UsageError
from train.loop import read_rows
from train.report import collect, run_name
from train.run_folder import FREE_FIELDS

# Kinds of runs: the figure of the result that ranks them, and its name.
SCORES = {
    "training": ("validation_accuracy", "validation accuracy"),
    "pruning": ("validation_accuracy", "validation accuracy"),
    "pretraining": ("validation_linear_accuracy", "validation accuracy of a linear probe"),
    "detection": ("validation_ap", "validation AP"),
}
# Fields of the configuration that only runs of one kind have.
FIELDS = {"objective": "pretraining", "prune": "pruning", "detector": "detection"}
# What runs of one setting may differ in: their seed, and what changes no result.
SEEDS = {"seed", "primitives", *FREE_FIELDS}
MISSING = "-"


@dataclass(frozen=True)
class Run:
    """One run: its name on the page, folder or file, and record (`train.report.collect`; less if it is unfinished)."""

    name: str
    path: Path
    record: Mapping[str, Any]
    finished: bool

    @property
    def kind(self) -> str:
        """A key of `SCORES`."""
        return next((kind for field, kind in FIELDS.items() if field in self.record["config"]), "training")

    @property
    def dataset(self) -> str:
        return self.record.get("dataset") or self.settings.get("data.name", MISSING)

    @property
    def score(self) -> float | None:
        """The result's figure of `SCORES`, in [0, 1]; None if it is unfinished or has no labels."""
        return self.record.get(SCORES[self.kind][0]) if self.finished else None

    @property
    def class_scores(self) -> list[tuple[str, float]]:
        """(class, test accuracy in [0, 1], or AP for detection); empty where the result has none.

        Names may repeat, files of runs know only the numbers of classes, and accuracy is nan without test images.
        """
        if (found := self.record.get("test_per_class")) is not None:
            return [(name, scores["ap"]) for name, scores in found.items() if scores["ap"] is not None]
        values = [math.nan if x is None else x for x in self.record.get("test_per_class_accuracy", [])]
        return list(zip(self.record.get("classes") or map(str, range(len(values))), values, strict=False))

    def _rates(self) -> list[tuple[float, float]]:
        batch, rates, before = self.settings.get("batch", 0), [], None
        for row in (row for row in self.record["history"] if "seconds" in row):
            if before is not None and row["seconds"] > before["seconds"]:
                steps = row["step"] - before["step"]
                rates.append((row["epoch"], batch * steps / (row["seconds"] - before["seconds"])))
            # Rows of one call share their time; a resumed run starts its clock again.
            if before is None or row["seconds"] != before["seconds"]:
                before = row
        return rates

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration by `group.field`."""
        return flat(self.record["config"])

    @property
    def validation_images(self) -> int | None:
        """Number of validation images that the score is a share of, where the run's folder tells."""
        if self.kind == "detection":  # AP is not a share of the images
            return None
        return self.record.get("images", {}).get("validation", {}).get("count")

    def curve(self, figure: str) -> list[tuple[float, float]]:
        """(epoch, value) of a figure in the history; without a last mean over a few steps only, which is noisy.

        `images_per_second` is computed from the `seconds` of the rows, which runs of older versions do not have.
        """
        if figure == "images_per_second":
            return self._rates()
        rows = [row for row in self.record["history"] if row.get(figure) is not None]
        spans = [b["step"] - a["step"] for a, b in pairwise(rows)]
        if len(spans) > 1 and not figure.startswith("validation") and spans[-1] < max(spans) / 2:
            rows = rows[:-1]
        return [(row["epoch"], row[figure]) for row in rows]


@dataclass(frozen=True)
class Group:
    """The runs of one setting, which differ only in their seed."""

    name: str
    runs: tuple[Run, ...]

    @property
    def scores(self) -> list[float]:
        """Scores of the finished runs."""
        return [run.score for run in self.runs if run.score is not None]

    @property
    def score(self) -> float:
        """Mean score; -1 without one, which ranks last."""
        return fmean(self.scores) if self.scores else -1

    @property
    def spread(self) -> float | None:
        """Standard deviation of the scores over seeds."""
        return stdev(self.scores) if len(self.scores) > 1 else None

    def mean(self, figure: str) -> float | None:
        """Mean of a figure of the results."""
        values = [run.record[figure] for run in self.runs if run.record.get(figure) is not None]
        return fmean(values) if values else None


def read_run(path: Path, among: Sequence[Path]) -> Run:
    """Read a run for the page: a finished one, or what an unfinished one has written so far.

    Raises:
      UsageError: it is not a run, or cannot be read.
    """
    name = run_name(path, among)
    if path.is_file():
        record, finished = collect(path), True
    else:
        about = _read_json(path / "config.json")
        finished = (path / "result.json").exists()
        sofar = {"config": about.get("config"), "history": read_rows(path / "metrics.jsonl")}
        record = {**about, **(collect(path) if finished else sofar)}
        confusion = path / "confusion.json"
        if finished and confusion.exists():
            record["confusion"] = _read_json(confusion)
    if not isinstance(record.get("config"), dict) or not isinstance(record["history"], list):
        raise UsageError(f"{path} is not a run: its configuration or history cannot be read")
    return Run(name, path, record, finished)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{path.parent} holds no run: {path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} cannot be read: it holds no object")
    return content


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group runs whose configurations differ only in `SEEDS`, best score first; ties keep the order of `runs`.

    Unfinished runs are groups of their own.
    """
    alike: dict[str, list[Run]] = {}
    for run in runs:
        setting = {name: value for name, value in run.settings.items() if name not in SEEDS}
        pieces = run.record.get("replaced", [])
        alike.setdefault(json.dumps([run.kind, run.finished, setting, pieces], sort_keys=True, default=str), []).append(
            run
        )
    names = [_group_name(group) for group in alike.values()]
    groups = [
        Group(name if names.count(name) == 1 else group[0].name, tuple(group))
        for name, group in zip(names, alike.values(), strict=True)
    ]
    return sorted(groups, key=lambda group: -group.score)


def _group_name(runs: Sequence[Run]) -> str:
    """The name that runs share without their seed at its end, else their preset; one run keeps its name."""
    if len(runs) == 1:
        return runs[0].name
    start, *others = {re.sub(r"[-_. /]*(seed)?[-_. ]*\d+$", "", run.name) for run in runs}
    return start if start and not others else str(runs[0].record.get("preset", runs[0].name))


def differences(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """The settings that differ between groups: value per group by field; `MISSING` where a run has no such field."""
    settings = [group.runs[0].settings for group in groups]
    names = dict.fromkeys(name for one in settings for name in one if name not in SEEDS)
    values = {name: [one.get(name, MISSING) for one in settings] for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}
