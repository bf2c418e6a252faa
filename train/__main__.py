"""`python -m train [PRESET] [--FIELD VALUE ...]`: a supervised run; the last line on stdout is its result as JSON."""

import json
import sys

from train.command import parse
from train.errors import one_line
from train.presets import PRESETS


def main(argv: list[str] | None = None) -> None:
    """Parse, run, print the result."""
    preset, config = parse("python -m train", PRESETS, sys.argv[1:] if argv is None else argv, default="digits")
    from train.run import run  # after parsing: --help and typing errors answer before jax is up

    print(json.dumps(run(config, preset)))


if __name__ == "__main__":
    with one_line():
        main()
