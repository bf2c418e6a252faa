"""`python -m train.detect [PRESET] [--FIELD VALUE ...]`: train an object detector; the last line is the result as JSON."""

from functools import partial

from train.cli import run_command, start
from train.config import check_changes
from train.detect.config import unused
from train.detect.presets import PRESETS


def main(argv: list[str] | None = None) -> None:
    """Parse, run, print the result."""
    check = partial(check_changes, reasons=unused)
    run_command("train.detect", PRESETS, argv, default="shapes_fasterrcnn", check=check)


if __name__ == "__main__":
    start(main)
