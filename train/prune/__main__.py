"""`python -m train.prune [RUN | PRESET] [--FIELD VALUE ...]`: train (or take a run), prune, keep training, deliver.

The last line on stdout is the result as JSON. `python -m train.prune report RUN` shows what pruning did, and
`curve RUN...` compares several runs.
"""

import sys
from functools import partial

from train.cli import arranged, kinds_of, run_command, start
from train.config import check_changes
from train.errors import UsageError
from train.paths import local_path
from train.prune.config import PruneConfig, of_run, unused
from train.prune.presets import PRESETS


def main(argv: list[str] | None = None) -> None:
    """Parse, run, print the result."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["report"], ["curve"]):
        from train.prune import report

        return (report.report_main if argv[0] == "report" else report.curve_main)(argv[1:])
    helps = {"-h", "--help"} & {*argv}
    words = argv[:1] if helps else arranged(argv, kinds_of(PruneConfig))[0]
    named = next((word for word in words if word not in PRESETS and not word.startswith("-")), "")
    run = local_path(named)
    exists = bool(named) and (run / "config.json").exists()
    if named and not exists and ("/" in named or run.exists()):
        raise UsageError(f"{named} is neither a preset ({', '.join(PRESETS)}) nor a run folder")

    def given() -> PruneConfig:
        """Settings of the named run."""
        return of_run(run)

    presets = {**PRESETS, named: given} if exists else PRESETS
    check = partial(check_changes, reasons=unused)
    run_command("train.prune", presets, argv, default="digits_prune", check=check, known=PRESETS)


if __name__ == "__main__":
    start(main)
