"""`--config FILE`: fields of a config as JSON, complete or partial, nested as in config.json or by flag name."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from train.config import flat, pipeline
from train.errors import UsageError, suggestion
from train.json_text import to_json
from train.paths import local_path, relocated


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """A file of settings.

    Attributes:
      path: the file.
      fields: value by field name, such as {"optim.lr": 0.1}; not checked yet.
      preset: the preset that it names, if any.
      record: the whole file if it describes a run (its `config` key has the fields), else empty.
    """

    path: Path
    fields: dict[str, Any]
    preset: str | None
    record: dict[str, Any]


# Fields of runs by version 0.1.0 that have no effect on a run today.
FORMER = [("primitives", kind) for kind in ("auto", "onednn")] + [("distributed", False)]


def read_config_file(name: str) -> ConfigFile:
    """Read a file of settings; only its form is checked, see `with_fields`.

    Raises:
      UsageError: it cannot be read, is not a JSON object, or names a preset that is not text.
    """
    path = local_path(name)
    path = path / "config.json" if path.is_dir() else path
    try:
        whole = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"--config {name} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--config {name} is not JSON: {error}") from None
    fields = whole.get("config", whole) if isinstance(whole, dict) else whole
    if not isinstance(fields, dict):
        raise UsageError(f'--config {name} must hold an object of fields, such as {{"optim": {{"lr": 0.1}}}}')
    preset = whole.get("preset")
    if not isinstance(preset, str | None):
        raise UsageError(f"--config {name}: preset must be text, got {to_json(preset)}")
    recorded = fields is not whole
    named = {key: value for key, value in fields.items() if recorded or key != "preset"}
    return ConfigFile(path, flat(named), preset, whole if recorded else {})


def with_fields(config: Any, file: ConfigFile) -> Any:
    """Replace the fields of a config by those of a file; paths of a run that has moved are found from here.

    Raises:
      UsageError: an unknown field, a value of the wrong type, or a run of a different pipeline.
    """
    ours = pipeline(type(config))
    theirs = file.record.get("pipeline", ours)
    if theirs != ours:
        raise UsageError(f"--config {file.path} describes a run of {theirs}, not of {ours}")
    kinds, values = field_kinds(type(config)), {}
    if any(name.startswith("prune.") for name in file.fields) and "prune.sparsity" not in kinds:
        raise UsageError(f"--config {file.path} describes a run of train.prune, not of {ours}")
    for name, value in file.fields.items():
        if file.record and (name, value) in FORMER:
            continue
        if name not in kinds:
            hint = meant(name, kinds)
            raise UsageError(f"--config {file.path}: unknown field {name!r}: {hint}--help lists all fields")
        try:
            values[name] = as_kind(value, kinds[name])
        except ValueError as error:
            raise UsageError(f"--config {file.path}: {name} must be {error}, got {to_json(value)}") from None
    if file.record:
        saved = {**file.record, "cwd": str(file.record.get("cwd", ""))}
        values |= relocated(values, file.path.parent, saved)
    return replaced(config, values)


def replaced(config: Any, values: dict[str, Any]) -> Any:
    """Replace fields of a config by name, such as {"optim.lr": 0.1}."""
    own = {name: value for name, value in values.items() if "." not in name}
    for group in {name.partition(".")[0] for name in values if "." in name}:
        inner = {name.partition(".")[2]: value for name, value in values.items() if name.startswith(f"{group}.")}
        own[group] = replaced(getattr(config, group), inner)
    return dataclasses.replace(config, **own)


def field_kinds(kind: type, prefix: str = "") -> dict[str, Any]:
    """Annotated types of a config's fields by name: {"optim.weight_decay": float}."""
    kinds: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for name, hint in ((field.name, hints[field.name]) for field in dataclasses.fields(kind)):
        inner = dataclasses.is_dataclass(hint)
        kinds |= field_kinds(hint, f"{prefix}{name}.") if inner else {prefix + name: hint}
    return kinds


def as_kind(value: Any, kind: Any) -> Any:
    """Convert a JSON value to the type of its field: lists to tuples, whole floats to ints, ints to floats.

    Raises:
      ValueError: it does not fit; the message says what the type takes.
    """
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    for option in options:
        try:
            return _converted(value, option)
        except (TypeError, ValueError, OverflowError):
            continue
    raise ValueError(described(kind))


def _converted(value: Any, kind: Any) -> Any:
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError
        inner = get_args(kind)
        inner = inner[:1] * len(value) if inner[-1] is ... else inner
        return tuple(_converted(one, each) for one, each in zip(value, inner, strict=True))
    if get_origin(kind) is Literal:
        if value in get_args(kind) and isinstance(value, str):
            return value
        raise ValueError
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if (kind is float and number) or (kind is int and number and float(value).is_integer()):
        return kind(value)
    if kind not in (int, float) and isinstance(value, kind):
        return value
    raise TypeError


WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}


def described(kind: Any) -> str:
    """Say what a field of this type must be: "a whole number or null"."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(described, get_args(kind)))
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is not tuple:
        return WORDS[kind]
    first, *rest = get_args(kind)
    return f"a list of {PLURALS[first] if rest == [...] else f'{1 + len(rest)} {PLURALS[first]}'}"


def meant(name: str, valid: Iterable[str], dashes: str = "") -> str:
    """Suggest fields, after `dashes`, for a name that is not one: the same name or all of a group, or near names."""
    last = name.rpartition(".")[2]
    same = [dashes + one for one in valid if one.rpartition(".")[2] == last or one.startswith(f"{name}.")]
    return f"did you mean {' or '.join(same[:4])}? " if same else suggestion(name, [dashes + one for one in valid])
