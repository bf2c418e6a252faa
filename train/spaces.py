"""Typed ranges of hyper-parameters, declared next to the presets (`train.presets.SPACES`) or written as text."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from train.config_file import as_kind, described, field_kinds, meant, replaced
from train.errors import UsageError


@dataclass(frozen=True)
class Uniform:
    """Any number in [low, high]."""

    low: float
    high: float


@dataclass(frozen=True)
class LogUniform:
    """Any number in [low, high], uniform in its logarithm; `low` is above 0."""

    low: float
    high: float


@dataclass(frozen=True)
class Integers:
    """A whole number in [low, high], with `log` uniform in its logarithm."""

    low: int
    high: int
    log: bool = False


@dataclass(frozen=True, init=False)
class Choice:
    """One of these values, which have no order: `Choice(32, 64, 128)`."""

    values: tuple[Any, ...]

    def __init__(self, *values: Any) -> None:
        object.__setattr__(self, "values", values)


Range = Uniform | LogUniform | Integers | Choice
Reasons = Callable[[Any], Mapping[str, str]]
Space = Mapping[str, Range]  # by field name, such as "optim.lr"

# Fields that would change what is compared (images and their split, how often it is measured), or where a run is.
FIXED = {"data.name", "data.dir", "data.validation", "data.split_seed", "data.broken", "eval_every", "seed", "out"}
FIXED |= {"cache", "mode", "distributed", "keep_last", "keep_best", "log_every", "eval_batch", "save_steps", "select"}


def contains(span: Range, value: Any) -> bool:
    """Whether a value is in a range."""
    if isinstance(span, Choice):
        return value in span.values
    return isinstance(value, int | float) and span.low <= value <= span.high


def as_text(span: Range) -> str:
    """Write a range as `read_range` reads it: `0.001:1:log`, `1:8`, `32,64`."""
    if isinstance(span, Choice):
        return ",".join(str(value).lower() if isinstance(value, bool) else str(value) for value in span.values)
    log = isinstance(span, LogUniform) or (isinstance(span, Integers) and span.log)
    return f"{span.low:.10g}:{span.high:.10g}" + ":log" * log


def with_ranges(space: Space, texts: tuple[str, ...], kind: type) -> dict[str, Range]:
    """Add ranges written as `FIELD=LOW:HIGH`, `FIELD=LOW:HIGH:log` or `FIELD=A,B,C`; `FIELD=fixed` removes one.

    Raises:
      UsageError: an unknown field, or a text or value that does not fit its type.
    """
    kinds, found = field_kinds(kind), dict(space)
    for text in texts:
        name, equals, written = text.strip().removeprefix("--").partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not written.strip():
            raise UsageError(f"--range {text!r} is not of the form FIELD=LOW:HIGH, FIELD=LOW:HIGH:log or FIELD=A,B,C")
        if name not in kinds:
            raise UsageError(f"--range {text}: unknown field {name!r}: {meant(name, kinds)}--help lists all fields")
        found.pop(name, None)
        if written.strip() != "fixed":
            found[name] = read_range(written, kinds[name], text)
    return found


def read_range(written: str, kind: Any, text: str) -> Range:
    """Read the range of a field of type `kind`; `text` is the whole flag, for messages.

    Raises:
      UsageError: it does not fit the type.
    """
    low, *rest = (part.strip() for part in written.split(":"))
    if not rest:
        return Choice(*(_value(part, kind, text) for part in written.split(",")))
    if len(rest) > 2 or rest[1:] not in ([], ["log"]):
        raise UsageError(f"--range {text}: write LOW:HIGH or LOW:HIGH:log")
    bounds = [_value(bound, kind, text) for bound in (low, rest[0])]
    log = rest[1:] == ["log"]
    if not all(isinstance(bound, int | float) and not isinstance(bound, bool) for bound in bounds):
        raise UsageError(f"--range {text}: the field must be {described(kind)}: list its values as A,B,C")
    lowest, highest = bounds
    if all(isinstance(bound, int) for bound in bounds):
        return Integers(lowest, highest, log)
    return LogUniform(lowest, highest) if log else Uniform(lowest, highest)


def _value(word: str, kind: Any, text: str) -> Any:
    """A word as a value of a field's type."""
    word = word.strip()
    candidates: list[Any] = [{"true": True, "false": False, "none": None}.get(word.lower(), word)]
    with suppress(ValueError):
        candidates.append(float(word))
    for candidate in candidates:
        try:
            return as_kind(candidate, kind)
        except ValueError:
            continue
    raise UsageError(f"--range {text}: the field must be {described(kind)}, got {word!r}")


def check_space(space: Space, config: Any, check: Callable[[Any], None], reasons: Reasons) -> None:
    """Check ranges before anything runs.

    Args:
      config: values of the fields that are not searched.
      check: refuses a config that cannot work, see `train.config.check`.
      reasons: maps a config to its fields that have no effect, see `train.config.unused`.

    Raises:
      UsageError: no range, a range that is empty, not of the field's type or not allowed for it, or a field that
        cannot be searched.
    """
    if not space:
        raise UsageError(
            "there is nothing to search: pass --range FIELD=LOW:HIGH, such as --range optim.lr=0.001:1:log"
        )
    kinds = field_kinds(type(config))
    # A field may have an effect only with some value of a different one that is searched too.
    choices = [(name, value) for name, span in space.items() if isinstance(span, Choice) for value in span.values]
    unused = [reasons(config), *(reasons(replaced(config, dict([choice]))) for choice in choices if choice[0] in kinds)]
    for name, span in space.items():
        if name not in kinds:
            raise UsageError(f"unknown field {name!r} in a range: {meant(name, kinds)}--help lists all fields")
        flag = f"--range {name}={as_text(span)}"
        if name in FIXED:
            raise UsageError(f"{flag}: a search keeps {name} fixed, so that its trials can be compared")
        if all(name in found for found in unused):
            raise UsageError(f"{flag}: {name} has no effect {unused[0][name]}; leave it out with --range {name}=fixed")
        if isinstance(getattr(span, "values", (0,))[0], tuple):
            raise UsageError(f"{flag}: lists cannot be searched")
        values = span.values if isinstance(span, Choice) else (span.low, span.high)
        _check_extent(span, flag)
        for value in values:
            try:
                fits = as_kind(value, kinds[name]) == value and not (isinstance(value, float) and kinds[name] is int)
            except ValueError:
                fits = False
            if not fits or (isinstance(span, Uniform | LogUniform) and not _takes_floats(kinds[name])):
                raise UsageError(f"{flag}: the field must be {described(kinds[name])}, not {type(span).__name__}")
            try:
                check(replaced(config, {name: value}))
            except UsageError as error:
                raise UsageError(f"{flag}: {error}") from None


def _takes_floats(kind: Any) -> bool:
    try:
        return as_kind(0.5, kind) == 0.5
    except ValueError:
        return False


def _check_extent(span: Range, flag: str) -> None:
    """Refuse a range with fewer than two values, or a logarithmic one that reaches 0."""
    if isinstance(span, Choice):
        if len(set(span.values)) < len(span.values):
            raise UsageError(f"{flag} lists a value twice")
        if len(span.values) < 2:
            raise UsageError(f"{flag} leaves no choice: list two or more values, or set the field with its own flag")
        return
    if not span.low < span.high:
        raise UsageError(f"{flag} is empty: the lower bound must be below the upper one")
    if (isinstance(span, LogUniform) or (isinstance(span, Integers) and span.log)) and span.low <= 0:
        raise UsageError(f"{flag}: the lower bound of a logarithmic range must be above 0")
