"""`python -m train.prune [RUN | PRESET] [--FIELD VALUE ...]`: train (or take a run), prune, train on, deliver.

The last line on stdout is the result as JSON. `python -m train.prune report RUN` says what it did, `curve RUN...` sets
several side by side.
"""

import json
import sys
from functools import partial
from pathlib import Path

import jax

from train.command import parse
from train.errors import UsageError, one_line
from train.process import keep_memory
from train.prune.config import of_run
from train.prune.presets import PRESETS


def main(argv: list[str] | None = None) -> None:
    """Parse, run, print the result."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["report"]:
        from train.prune import measure

        return measure.main(argv[1:])
    if argv[:1] == ["curve"]:
        from train.prune import curve

        return curve.main(argv[1:])
    named = argv[0] if argv and not argv[0].startswith("-") and argv[0] not in PRESETS else ""
    if named and ("/" in named or Path(named).exists()) and not (Path(named) / "config.json").exists():
        raise UsageError(f"{named} is neither a preset ({', '.join(PRESETS)}) nor a run's folder")
    runs = {named: partial(of_run, Path(named))} if (Path(named) / "config.json").exists() and named else {}
    preset, config = parse("python -m train.prune", {**PRESETS, **runs}, argv, default="digits_prune")
    from train.prune.run import run  # after parsing: --help and typing errors need not wait for it

    result = run(config, "custom" if runs else preset)
    if jax.process_index() == 0:
        print(json.dumps(result))


if __name__ == "__main__":
    with one_line():
        keep_memory()
        main()
