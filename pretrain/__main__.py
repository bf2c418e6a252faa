"""`python -m pretrain [PRESET] [--FIELD VALUE ...]`: pretrain; the last line on stdout is the result as JSON."""

from functools import partial

from pretrain.config import unused
from pretrain.presets import PRESETS
from train.cli import run_command, start
from train.config import check_changes


def main(argv: list[str] | None = None) -> None:
    """Parse, run, print the result."""
    run_command("pretrain", PRESETS, argv, default="digits_simclr", check=partial(check_changes, reasons=unused))


if __name__ == "__main__":
    start(main)
