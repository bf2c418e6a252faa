"""`python -m pretrain [PRESET] [--FIELD VALUE ...]`: a run of pretraining; the last line on stdout is its result."""

import json
import sys

import jax

from pretrain.presets import PRESETS
from train.cli import parse
from train.errors import one_line
from train.runtime import keep_memory


def main(argv: list[str] | None = None) -> None:
    """Parse, run, print the result."""
    given = sys.argv[1:] if argv is None else argv
    preset, config = parse("python -m pretrain", PRESETS, given, default="digits_simclr")
    from pretrain.run import run  # after parsing: --help and typing errors need not wait for it

    result = run(config, preset)
    if jax.process_index() == 0:
        print(json.dumps(result))


if __name__ == "__main__":
    with one_line():
        keep_memory()
        main()
