"""Parse the command line of every pipeline: a preset's name, then its fields as flags (tyro)."""

import contextlib
import dataclasses
import importlib
import inspect
import io
import re
import sys
from collections.abc import Callable, Container, Sequence
from typing import Any, Literal, get_args, get_origin

import jax
import tyro

from resnet_jax.resnet import MODELS
from train.config_file import field_kinds, meant, read_config_file, with_fields
from train.errors import UsageError, one_line, suggestion, unknown
from train.json_text import to_json
from train.paths import is_folder
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
      check: called with the config and the one before its flags; raises to refuse the config.
      known: presets that the result names; it calls all others "custom". None means all presets.

    Raises:
      UsageError: see `parse`.
    """
    command = read_command(f"python -m {program}", presets, sys.argv[1:] if argv is None else argv, default=default)
    preset, config = command.preset, command.config
    check(config, command.start)
    # Import after parsing, so that --help and mistyped flags do not wait for it.
    run = importlib.import_module(f"{program}.run").run
    result = run(config, preset if known is None or preset in known else "custom")
    if jax.process_index() == 0:
        print(to_json(result))


def parse(program: str, presets: dict[str, Callable[[], Any]], argv: Sequence[str], *, default: str) -> tuple[str, Any]:
    """Parse `argv` to (preset's name, its config with the flags applied); see `read_command`."""
    command = read_command(program, presets, argv, default=default)
    return command.preset, command.config


@dataclasses.dataclass(frozen=True)
class Command:
    """A parsed command line: the preset's name, its config with the fields of `--config`, and with the flags too."""

    preset: str
    start: Any
    config: Any


def read_command(program: str, presets: dict[str, Callable[[], Any]], argv: Sequence[str], *, default: str) -> Command:
    """Parse `argv`: flags win over the fields of the file that `--config` names, and these over the preset's.

    Without a preset, the file's own is used; the record of a run of a different preset is called "custom".

    Raises:
      UsageError: an unknown preset, flag or field, or a value of the wrong type; the message is one line.
    """
    kinds = kinds_of(type(presets[default]()))
    helps = "-h" in argv or "--help" in argv
    words, flags = ([one for one in argv if one in presets][:1], {}) if helps else arranged(argv, kinds)
    file = read_config_file(flags.pop("config")[0]) if "config" in flags else None
    preset = words[0] if words else (file and file.preset) or default
    custom = not words and file is not None and bool(file.record) and preset not in presets
    if preset not in presets and not custom:
        raise UsageError(f"{unknown('preset', preset, presets)}{_not_a_preset(preset)}")
    if len(words) > 1:
        raise UsageError(f"{' '.join(words[1:])!r} belongs to no flag: only the preset, {preset}, comes without one")
    start = presets[default if custom else preset]()
    if helps:
        about = f"{inspect.getdoc(presets[preset])}\n\nPresets: {', '.join(presets)}.\n\n{ABOUT_CONFIG}"
        tyro.cli(type(start), prog=f"{program} {preset}", description=about, default=start, args=["-h"])
    if file is not None:
        start = with_fields(start, file)
    output = io.StringIO()
    written = [word for name, values in flags.items() for word in _written(name, values, kinds[name])]
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            config = tyro.cli(type(start), prog=program, default=start, args=written)
            return Command("custom" if custom else preset, start, config)
    except SystemExit:
        raise UsageError(_plain(output.getvalue())) from None


def kinds_of(config: type) -> dict[str, Any]:
    """Annotated types of a config's fields by flag's name: {"optim.weight-decay": float}."""
    return {name.replace("_", "-"): kind for name, kind in field_kinds(config).items()}


def arranged(argv: Sequence[str], kinds: dict[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """Split a command line into (words that belong to no flag, values by flag); of a repeated flag the last counts.

    Raises:
      UsageError: an unknown flag, or one without its value.
    """
    words: list[str] = []
    flags: dict[str, list[str]] = {}
    kinds = {**kinds, "config": str}
    rest = [one for one in argv if one != "--"]
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if not _is_flag(word) and not (equals and flag.replace("_", "-") in kinds):
            words.append(word)
            continue
        typed = re.sub(r"^[-\u2013\u2014]*", "--", flag)
        name = typed[2:].lower().replace("_", "-")
        positive = re.sub(r"(^|\.)no-", r"\1", name)
        name, negated = (name, False) if name in kinds or positive not in kinds else (positive, True)
        if name == "preset":
            words += [value] if equals else []
            continue
        if name not in kinds or (negated and kinds[name] is not bool):
            ours = ELSEWHERE.get(name.rpartition(".")[2])
            hint = f"did you mean --{ours}? " if ours in kinds else meant(name, kinds, "--")
            raise UsageError(f"unknown field {typed!r}: {hint}--help lists all fields")
        if kinds[name] is bool:
            given = value if equals else rest.pop(0) if rest and rest[0].lower() in TRUTH else "true"
            if given.lower() not in TRUTH:
                raise UsageError(f"--{name} {given}: it is a switch, --{name} or --{_negative(name)}")
            flags[name] = [str(TRUTH[given.lower()] != negated)]
        elif equals:
            flags[name] = [value]
        elif _is_tuple(kinds[name]):
            flags[name] = []
            while rest and not _is_flag(rest[0]) and (_is_number(rest[0]) or not _holds_numbers(kinds[name])):
                flags[name].append(rest.pop(0))
        elif rest and (not _is_flag(rest[0]) or name == "versus"):  # the value of --versus looks like a flag
            flags[name] = [rest.pop(0)]
        else:
            raise UsageError(f"--{name} needs a value")
    return words, flags


ABOUT_CONFIG = "--config FILE reads fields from JSON, such as the config.json of a run; flags win over it."
TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
# What other programs call our fields.
ELSEWHERE = {
    "learning-rate": "optim.lr",
    "wd": "optim.weight-decay",
    "optimizer": "optim.name",
    "arch": "model",
    "dataset": "data.name",
    "batch-size": "batch",
    "output": "out",
    "output-dir": "out",
    "sparsity": "prune.sparsity",
    "temperature": "objective.temperature",
}


def _is_flag(word: str) -> bool:
    return bool(re.match(r"[-\u2013\u2014]+[A-Za-z]", word)) and not _is_number(word)


def _is_number(word: str) -> bool:
    """Whether a word is a number, several, or None."""
    try:
        return all(one.lower() == "none" or float(one) is not None for one in _split(word))
    except ValueError:
        return False


def _split(word: str) -> list[str]:
    """`(0.5, 0.75)` and `0.5,0.75` to their parts."""
    return [one for one in re.split(r"[,\s]+", word.strip("()[] ")) if one]


def _base(kind: Any) -> Any:
    """A field's type without its None."""
    others = [one for one in get_args(kind) if one is not type(None)]
    return others[0] if type(None) in get_args(kind) and len(others) == 1 else kind


def _is_tuple(kind: Any) -> bool:
    return get_origin(_base(kind)) is tuple


def _holds_numbers(kind: Any) -> bool:
    return bool({int, float} & {_base(kind), *get_args(_base(kind))})


def _written(name: str, values: list[str], kind: Any) -> list[str]:
    """A flag and its values as tyro reads them.

    Raises:
      UsageError: an empty value, a word for a number, or none of the choices.
    """
    if kind is bool:
        return [f"--{name}" if values == ["True"] else f"--{_negative(name)}"]
    if _holds_numbers(kind):
        values = [one for value in values for one in _split(value)]
        values = ["None" if one.lower() == "none" else one for one in values]
        whole = int in (_base(kind), *get_args(_base(kind)))
        values = [_number(name, one, whole, type(None) in get_args(kind)) for one in values]
    sizes = get_args(_base(kind)) if _is_tuple(kind) else (kind,)
    if values not in ([], ["None"]) and _holds_numbers(kind) and ... not in sizes and len(values) != len(sizes):
        raise UsageError(f"--{name} takes {len(sizes)} value{'s' * (len(sizes) > 1)}, got {len(values)}")
    if _is_tuple(kind):
        return [f"--{name}", *(one for one in values if one)]
    if not "".join(values).strip():
        raise UsageError(f"--{name} is empty: give it a value or leave it out")
    choices = get_args(_base(kind)) if get_origin(_base(kind)) is Literal else values
    if values[0] not in choices:
        raise UsageError(f"--{name} {values[0]!r}: {suggestion(values[0], choices)}choose one of {', '.join(choices)}")
    return [f"--{name}={' '.join(values)}"]


def _number(name: str, word: str, whole: bool, optional: bool) -> str:
    """A number as Python writes it; where it must be whole, `1e2` and `64.0` are the integers that they equal."""
    try:
        if optional and word == "None":
            return word
        number = int(word) if word.replace("_", "").isdecimal() else float(word)
        if not whole or isinstance(number, int):
            return word
        if number.is_integer():
            return str(int(number))
    except (ValueError, OverflowError):
        pass
    raise UsageError(f"--{name} takes {'whole numbers' if whole else 'numbers'}, got {word!r}")


def _negative(name: str) -> str:
    group, dot, last = name.rpartition(".")
    return f"{group}{dot}no-{last}"


def _not_a_preset(word: str) -> str:
    """What a word was probably meant for, as an addition to the message."""
    if word in MODELS:
        return f"; {word} is a model: --model {word}"
    if is_folder(word.strip()):
        return f"; a folder of images is --data.name folder:{word}"
    return ""


def _plain(text: str) -> str:
    """Flatten tyro's boxed message to one line."""
    text = re.sub(r"\x1b\[[0-9;]*m|[─-╿]", " ", text)
    text = re.sub(r"(-{3,}|\s)+", " ", text)
    return re.sub(r"Argument helptext:.*|For full helptext.*", "", text).strip(" :") or "these flags cannot be parsed"
