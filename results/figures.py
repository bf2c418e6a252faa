"""Read the run files, and format what they hold."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from train.errors import UsageError

RESULTS = Path(__file__).parent

Run = dict[str, Any]


def run(name: str) -> Run:
    """Read `results/NAME.json`.

    Raises:
      UsageError: it is missing or damaged.
    """
    try:
        return json.loads((RESULTS / f"{name}.json").read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"results/{name}.json cannot be read: {error}") from None


def runs(pattern: str) -> list[Run]:
    """Read the files `results/PATTERN.json`, in the order of their names.

    Raises:
      UsageError: there are none, or one is damaged.
    """
    paths = sorted(RESULTS.glob(f"{pattern}.json"))
    if not paths:
        raise UsageError(f"there is no file results/{pattern}.json")
    return [run(f"{path.parent.name}/{path.stem}") for path in paths]


def rounded(value: Any, spec: str) -> str:
    """Format a number; one that is halfway in decimal, such as 94.355, is rounded up."""
    return format(value + 1e-9 if isinstance(value, float) else value, spec)


def percent(run: Run, name: str, digits: int = 1) -> str:
    """The accuracy `name` of a run in percent."""
    return rounded(100 * run[f"{name}_accuracy"], f".{digits}f")


def mean(group: Sequence[Run], name: str, digits: int = 1) -> str:
    """Mean (standard deviation) of the accuracy `name` over runs, in percent."""
    values = [100 * run[f"{name}_accuracy"] for run in group]
    spread = f" ({stdev(values):.{digits}f})" if len(values) > 1 else ""
    return rounded(fmean(values), f".{digits}f") + spread


def interval(ratio: Run) -> str:
    """A ratio (its 95 % interval)."""
    return f"{ratio['value']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"


def minutes(run: Run) -> float:
    """Minutes of training, without compilation, evaluations and checkpoints."""
    return run["steps"] * run["config"]["batch"] / run["images_per_second"] / 60


def milliseconds(value: float) -> str:
    """A time, with a decimal below 20 ms."""
    return f"{value:,.{0 if value >= 20 else 1}f} ms"
