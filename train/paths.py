"""Paths as users write them, and paths in the config of a run that has moved."""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from train.errors import RunError, UsageError

# Prefixes of data sets in a folder or file of the user's own.
FOLDERS = ("folder:", "coco:", "voc:", "yolo:")
# Fields of a config that hold a path, or a path after one of these prefixes.
PATHS = ("init", "prune.masks", "data.name")


def local_path(path: str | Path) -> Path:
    """Make a path of what a user wrote: `~` is the home folder. Nothing need be there.

    Raises:
      UsageError: a remote address such as gs://BUCKET/RUN, the home of an unknown user, or a path that the system does
        not take: a name that is too long, links in a circle, a folder without permission.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://|(gs|s3|az|abfss?|hdfs|https?|file):/", str(path)):
        raise UsageError(f"{path} is not a local folder: mount it or copy it, and name the local path")
    try:
        local = Path(path).expanduser()
        local.stat()
    except RuntimeError:
        raise UsageError(f"{path}: there is no such user's home folder") from None
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    return local


def check_file(path: Path) -> None:
    """Refuse a file that could not be written, before anything is measured; writes nothing.

    Raises:
      UsageError: its folder does not exist, or the system does not allow it.
    """
    if not path.parent.is_dir() or path.is_dir():
        reason = "it is a folder" if path.is_dir() else f"{path.parent} is not a folder"
        raise UsageError(f"cannot write {path}: {reason}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"cannot write {path}: permission denied")


def make_folder(path: Path, problem: str = "cannot write to") -> None:
    """Create a folder and its parents, unless it is there.

    Raises:
      UsageError: it cannot be created; the message begins with `problem`.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{problem} {path}: {error.strerror}") from None


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically: readers see the old file or the new one.

    Raises:
      RunError: the file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise RunError(f"cannot write {path}: {error}") from None


def is_folder(text: str) -> bool:
    """Whether what a user wrote names a folder that is there."""
    try:
        return bool(text) and local_path(text).is_dir()
    except UsageError:
        return False


def sqlite_url(path: Path) -> str:
    """The address of an SQLite file for SQLAlchemy, which comes with Optuna and MLflow."""
    from sqlalchemy.engine import URL, make_url

    name = str(path.absolute())
    plain = f"sqlite:///{name}"
    # Quoted only where it has to be: MLflow creates the folders in an address as they are spelt there.
    return plain if make_url(plain).database == name else URL.create("sqlite", database=name).render_as_string()


def split_prefix(text: str) -> tuple[str, str]:
    """Split `folder:PATH` and the like into ("folder:", "PATH"); without a prefix, the first is empty."""
    prefix = next((prefix for prefix in FOLDERS if text.startswith(prefix)), "")
    return prefix, text.removeprefix(prefix)


def located(text: str, run: Path, saved: dict[str, Any]) -> str:
    """Find a path of a run's config from here: relative to the run folder, which may have moved, or as it was typed.

    Args:
      text: a path, or one after a prefix, as in `folder:PATH`.
      run: the run folder where it is now.
      saved: the run's config.json.
    """
    prefix, path = split_prefix(text)
    typed, base = _expanded(path), Path(saved.get("cwd", ""))
    out = saved["config"].get("out") or f"runs/{saved.get('preset')}-seed{saved['config'].get('seed')}"
    before, source = base / _expanded(out), base / typed
    places = [typed]
    if before.is_absolute() == source.is_absolute():  # else it is unknown where the command was typed
        now = Path(os.path.normpath(run.absolute() / os.path.relpath(source, before)))
        places = [now, typed, source]
    found = next((place for place in places if place.exists()), typed)
    return text if same_place(found, typed) else f"{prefix}{found}"


def relocated(fields: Mapping[str, Any], run: Path, saved: dict[str, Any]) -> dict[str, str]:
    """The paths among the fields of a run's config, such as {"init": "runs/dense"}, found from here; see `located`."""
    paths = {name: text for name in PATHS if (text := fields.get(name))}
    if "data.name" in paths and not paths["data.name"].startswith(FOLDERS):
        del paths["data.name"]
    return {name: located(text, run, saved) for name, text in paths.items()}


def same_place(one: str | Path, other: str | Path) -> bool:
    """Whether two paths, or two `folder:PATH`, name the same place."""
    (kind, path), (other_kind, other_path) = map(split_prefix, map(str, (one, other)))
    return kind == other_kind and _expanded(path).resolve() == _expanded(other_path).resolve()


def _expanded(path: str) -> Path:
    """A path with its `~`, which stays where this machine does not have that user."""
    return Path(os.path.expanduser(path))
