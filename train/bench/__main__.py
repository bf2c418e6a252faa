"""`python -m train.bench [--FIELD VALUE ...]`: a table on stderr; the last line on stdout is the result as JSON."""

import json
import sys

import jax

from train.bench.config import PRESETS
from train.bench.measure import bench
from train.bench.table import render
from train.cli import parse
from train.errors import one_line
from train.runtime import keep_memory


def main(argv: list[str] | None = None) -> None:
    """Parse, measure, print the result."""
    _, config = parse("python -m train.bench", PRESETS, sys.argv[1:] if argv is None else argv, default="step")
    if config.device == "cpu":
        # The default device decides on data types and compiler options, and can be chosen only before it is used.
        jax.config.update("jax_platforms", "cpu")
    kept = keep_memory()
    result = bench(config, process={"keeps_memory": kept})
    print(render(result), file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    with one_line():
        main()
