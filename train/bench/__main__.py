"""`python -m train.bench [--FIELD VALUE ...]`: a table on stderr; the last line on stdout is the result as JSON."""

import json
import sys
from collections.abc import Callable
from typing import Any

import jax

from train.bench import bench
from train.bench.config import PRESETS, BenchConfig
from train.bench.table import render
from train.cli import parse
from train.errors import one_line
from train.runtime import keep_memory


def main(
    argv: list[str] | None = None,
    *,
    program: str = "python -m train.bench",
    presets: dict[str, Callable[[], BenchConfig]] = PRESETS,
    **options: Any,
) -> None:
    """Parse, measure, print the result; the first preset is the default, and `options` are those of `bench`."""
    given = sys.argv[1:] if argv is None else argv
    _, config = parse(program, presets, given, default=next(iter(presets)))
    if config.device == "cpu":
        # The default device decides on data types and compiler options, and can only be chosen before it is used.
        jax.config.update("jax_platforms", "cpu")
    result = bench(config, process={"keeps_memory": keep_memory()}, **options)
    print(render(result), file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    with one_line():
        main()
