"""`python -m train.search [PRESET] [--trials N] [--range FIELD=LOW:HIGH ...] [--FIELD VALUE ...]`: improve a config.

The same command continues a search that was stopped. The last line on stdout is the result as JSON.
"""

from train.cli import run_command, start
from train.config import check_changes
from train.search.config import PRESETS


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, search, and print the result."""
    run_command("train.search", PRESETS, argv, default="digits", check=check_changes)


if __name__ == "__main__":
    start(main)
