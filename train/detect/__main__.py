"""`python -m train.detect [PRESET] [--FIELD VALUE ...]`: train an object detector.

`python -m train.detect report RUN` shows what a finished run detects, and `python -m train.detect explain RUN IMAGE...
--out DIR` which pixels made its boxes. The last line on stdout is the result as JSON.
"""

import sys
from functools import partial

from train.cli import run_command, start
from train.config import check_changes
from train.detect.config import unused
from train.detect.presets import PRESETS


def main(argv: list[str] | None = None) -> None:
    """Parse, run, print the result."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["report"]:
        from train.detect.outputs import report_main

        return report_main(argv[1:])
    if argv[:1] == ["explain"]:
        from train.detect.explain import explain_main

        return explain_main(argv[1:])
    check = partial(check_changes, reasons=unused)
    run_command("train.detect", PRESETS, argv, default="shapes_fasterrcnn", check=check)


if __name__ == "__main__":
    start(main)
