"""`python -m train.explain RUN [IMAGE | FOLDER ...] --out DIR [--FIELD VALUE ...]`: what does a network look at?

RUN is a run folder (of training, pruning or pretraining), a sparse file in one, or a model by name, such as
cifar10_resnet20. Without images, some of the run's own are taken. DIR gets index.html, which needs no other file,
scores.json and the pictures as PNG files. The last line on stdout is the result as JSON.
"""

import sys
from collections.abc import Sequence

from train.cli import arranged, kinds_of, parse, start
from train.errors import UsageError
from train.explain.config import ExplainConfig, check
from train.json_text import to_json


def _usual() -> ExplainConfig:
    return ExplainConfig()


_usual.__doc__ = __doc__  # the description in --help


def parsed(argv: Sequence[str]) -> tuple[str, list[str], ExplainConfig]:
    """Parse a command line to (the network's name, images and folders, config).

    Raises:
      UsageError: no network is named, an unknown flag, a config that cannot work.
    """
    helps = {"-h", "--help"} & {*argv}
    words, flags = ([], {}) if helps else arranged(argv, kinds_of(ExplainConfig))
    given = [word for name, values in flags.items() for word in (f"--{name}", *values)]
    _, config = parse("python -m train.explain", {"RUN": _usual}, ["--help"] if helps else given, default="RUN")
    if not words:
        raise UsageError("name a run folder, or a model by name: python -m train.explain RUN --out DIR")
    run, *images = words
    check(config)
    return run, images, config


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, explain, print the result."""
    arguments = parsed(sys.argv[1:] if argv is None else argv)
    from train.explain.run import explain  # after parsing, so that --help and mistyped flags do not wait for it

    print(to_json(explain(*arguments)))


if __name__ == "__main__":
    start(main)
