"""`python -m train.prune [RUN | PRESET] [--FIELD VALUE ...]`: train (or take a run), prune, train on, deliver.

The last line on stdout is the result as JSON. `python -m train.prune report RUN` says what it did, `curve RUN...` sets
several side by side.
"""

import json
import sys
from pathlib import Path

import jax

from train.cli import parse
from train.errors import UsageError, one_line
from train.prune.config import PruneConfig, check_changes, of_run
from train.prune.presets import PRESETS
from train.runtime import keep_memory


def main(argv: list[str] | None = None) -> None:
    """Parse, run, print the result."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["report"], ["curve"]):
        from train.prune import report

        return (report.report_main if argv[0] == "report" else report.curve_main)(argv[1:])
    named = argv[0] if argv and not argv[0].startswith("-") and argv[0] not in PRESETS else ""
    if named and ("/" in named or Path(named).exists()) and not (Path(named) / "config.json").exists():
        raise UsageError(f"{named} is neither a preset ({', '.join(PRESETS)}) nor a run's folder")
    presets = dict(PRESETS)
    if named and (Path(named) / "config.json").exists():

        def given() -> PruneConfig:
            """A run that is there: its own settings."""
            return of_run(Path(named))

        presets[named] = given
    preset, config = parse("python -m train.prune", presets, argv, default="digits_prune")
    check_changes(config, presets[preset]())
    from train.prune.run import run  # after parsing: --help and typing errors need not wait for it

    result = run(config, preset if preset in PRESETS else "custom")
    if jax.process_index() == 0:
        print(json.dumps(result))


if __name__ == "__main__":
    with one_line():
        keep_memory()
        main()
