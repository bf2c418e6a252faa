"""`python -m pretrain [PRESET] [--FIELD VALUE ...]`: pretrain; the last line on stdout is the result as JSON."""

from pretrain.presets import PRESETS
from train.cli import run_command, start


def main(argv: list[str] | None = None) -> None:
    """Parse, run, print the result."""
    run_command("pretrain", PRESETS, argv, default="digits_simclr")


if __name__ == "__main__":
    start(main)
