"""`python -m train.bench [--FIELD VALUE ...]`: a table on stderr; the last line on stdout is the result as JSON."""

import sys
from collections.abc import Callable
from typing import Any

from train.bench import bench
from train.bench.config import PRESETS, BenchConfig, check, unused
from train.bench.table import render
from train.bench.tasks import TASKS
from train.cli import parse, start
from train.config import check_changes
from train.json_text import to_json


def main(
    argv: list[str] | None = None,
    *,
    program: str = "python -m train.bench",
    presets: dict[str, Callable[[], BenchConfig]] = PRESETS,
    **options: Any,
) -> None:
    """Parse, measure, print the result; the first preset is the default, and `options` are those of `bench`."""
    preset, config = parse(program, presets, sys.argv[1:] if argv is None else argv, default=next(iter(presets)))
    check(config, options.get("tasks", TASKS))
    check_changes(config, presets[preset](), unused)
    result = bench(config, **options)
    print(render(result), file=sys.stderr)
    print(to_json(result))


if __name__ == "__main__":
    start(main)
