"""`python -m train [PRESET] [--FIELD VALUE ...]`: a supervised run; the last line on stdout is its result as JSON."""

from train.cli import run_command, start
from train.config import check_changes
from train.presets import PRESETS


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, run, and print the result."""
    run_command("train", PRESETS, argv, default="digits", check=check_changes)


if __name__ == "__main__":
    start(main)
