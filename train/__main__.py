"""`python -m train [PRESET] [--FIELD VALUE ...]`: a supervised run; the last line on stdout is its result as JSON."""

import json
import sys

import jax

from train.cli import parse
from train.errors import one_line
from train.presets import PRESETS
from train.runtime import keep_memory


def main(argv: list[str] | None = None) -> None:
    """Parse, run, print the result."""
    preset, config = parse("python -m train", PRESETS, sys.argv[1:] if argv is None else argv, default="digits")
    from train.run import run  # after parsing: --help and typing errors need not wait for it

    result = run(config, preset)
    if jax.process_index() == 0:
        print(json.dumps(result))


if __name__ == "__main__":
    with one_line():
        keep_memory()
        main()
