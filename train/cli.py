"""Parse the command line of every pipeline: a preset's name, then its fields as flags (tyro)."""

import contextlib
import difflib
import importlib
import inspect
import io
import re
import sys
from collections.abc import Callable, Container, Sequence
from typing import Any

import jax
import tyro

from train.config import flat
from train.errors import UsageError, one_line, unknown
from train.json_text import to_json
from train.runtime import keep_memory, use_own_precision


def start(main: Callable[[], None]) -> None:
    """Run `main` as the whole process: report the user's errors in one line, keep freed memory, compute in 32 bits."""
    with one_line():
        keep_memory()
        use_own_precision()
        main()


def run_command(
    program: str,
    presets: dict[str, Callable[[], Any]],
    argv: Sequence[str] | None,
    *,
    default: str,
    check: Callable[[Any, Any], None] = lambda config, default: None,
    known: Container[str] | None = None,
) -> None:
    """Parse a command line, run the pipeline, and print its result as the last line on stdout.

    Args:
      program: package of the pipeline; its module `run` defines `run(config, preset)`.
      argv: command-line arguments; None uses those of the process.
      default: preset to use if none is named.
      check: called with the config and the preset's unchanged one; raises to refuse the config.
      known: presets that the result names; it calls all others "custom". None means all presets.

    Raises:
      UsageError: see `parse`.
    """
    preset, config = parse(f"python -m {program}", presets, sys.argv[1:] if argv is None else argv, default=default)
    check(config, presets[preset]())
    # Import after parsing, so that --help and mistyped flags do not wait for it.
    run = importlib.import_module(f"{program}.run").run
    result = run(config, preset if known is None or preset in known else "custom")
    if jax.process_index() == 0:
        print(to_json(result))


def parse(program: str, presets: dict[str, Callable[[], Any]], argv: Sequence[str], *, default: str) -> tuple[str, Any]:
    """Parse `argv` to (preset's name, its config with the flags applied).

    Raises:
      UsageError: an unknown preset or flag, or a value of the wrong type; the message is one line.
    """
    argv = list(argv)
    if "--versus" in argv[:-1]:  # its value looks like a flag: `--versus "--batch 64"` becomes `--versus=--batch 64`
        place = argv.index("--versus")
        argv[place : place + 2] = [f"--versus={argv[place + 1]}"]
    preset = argv.pop(0) if argv and not argv[0].startswith("-") else default
    if preset not in presets:
        raise unknown("preset", preset, presets)
    config = presets[preset]()
    about = f"{inspect.getdoc(presets[preset])}\n\nPresets: {', '.join(presets)}."
    if "-h" in argv or "--help" in argv:
        return preset, tyro.cli(type(config), prog=f"{program} {preset}", description=about, default=config, args=argv)
    _check_names(argv, flat(config))
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            return preset, tyro.cli(type(config), prog=program, default=config, args=argv)
    except SystemExit:
        raise UsageError(_plain(output.getvalue())) from None


def _check_names(argv: Sequence[str], fields: dict[str, Any]) -> None:
    known = {f"--{name.replace('_', '-')}" for name in fields}
    for argument in argv:
        flag = argument.split("=", 1)[0].replace("_", "-")
        positive = re.sub(r"(--|\.)no-", r"\1", flag)
        if flag.startswith("--") and not {flag, positive} & known:
            near = difflib.get_close_matches(flag, known)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise UsageError(f"unknown field {flag!r}: {hint}--help lists all fields")


def _plain(text: str) -> str:
    """Flatten tyro's boxed message to one line."""
    text = re.sub(r"\x1b\[[0-9;]*m|[─-╿]", " ", text)
    text = re.sub(r"(-{3,}|\s)+", " ", text)
    return re.sub(r"Argument helptext:.*|For full helptext.*", "", text).strip(" :") or "these flags cannot be parsed"
