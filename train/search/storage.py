"""The SQLite storage of a search: its study, and which trials belong to processes that are alive.

Processes take turns by a lock on a file, which the system releases when a process dies; so a trial that nobody holds
was interrupted, and the next process takes it over, in its own run folder.
"""

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from train.config import TrainConfig
from train.errors import RunError, UsageError
from train.paths import sqlite_url
from train.spaces import Space

try:
    import fcntl
except ImportError:  # Windows: one process per search
    fcntl = None  # type: ignore[assignment]

DATABASE = "search.db"
LOCK_SECONDS = 20.0  # how long to wait for a different program that has locked the database
LIVES = 3  # a trial that has ended this many processes since its last validation has failed


@dataclass(frozen=True, kw_only=True)
class Search:
    """An open search: its study in the folder `out`, the ranges, the run that they vary, and the number of trials."""

    study: Any
    out: Path
    preset: str
    base: TrainConfig
    space: Space
    trials: int


def load_optuna() -> Any:
    """Import Optuna.

    Raises:
      UsageError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise UsageError('a search needs Optuna: pip install -e ".[search]"') from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


@contextmanager
def one_at_a_time(out: Path) -> Iterator[None]:
    """Wait for the other processes of a search that are in such a block."""
    file = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def hold(out: Path, number: int) -> int | None:
    """Hold a trial for this process; returns a file descriptor for `release`, None if a living process holds it."""
    file = os.open(out / f".trial-{number}", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file


def release(out: Path, number: int, file: int) -> None:
    """Let go of a trial."""
    (out / f".trial-{number}").unlink(missing_ok=True)
    os.close(file)


def open_study(out: Path, settings: dict[str, Any], pruner: Any) -> Any:
    """Open or create the study in a search's folder.

    Args:
      settings: what decides a search's trials, as JSON; a study keeps those that it was created with.

    Raises:
      UsageError: the folder cannot be used, or holds a different search; the database is locked or not of a search.
    """
    optuna, settings = load_optuna(), json.loads(json.dumps(settings))
    if (out / "config.json").exists():
        raise UsageError(f"{out} is the folder of a run: choose a different --out")
    if "?" in str(out.absolute()):
        raise UsageError(f"{out}: SQLite takes no path with a question mark: choose a different --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(out):
            check_database(out / DATABASE)
            with locked_means(UsageError, out):
                from sqlalchemy.pool import NullPool  # closes each connection after its use; comes with Optuna

                options = {"connect_args": {"timeout": LOCK_SECONDS}, "poolclass": NullPool}
                url = sqlite_url(out / DATABASE).replace("{", "{{").replace("}", "}}")  # Optuna takes a template
                storage = optuna.storages.RDBStorage(url, options)
                study = optuna.create_study(
                    storage=storage, study_name="search", direction="maximize", load_if_exists=True, pruner=pruner
                )
                saved = study.user_attrs.get("settings")
                check_settings(out, saved or settings, settings)
                if saved is None:
                    study.set_user_attr("settings", settings)
    except OSError as error:
        raise UsageError(f"cannot use the folder {out}: {error.strerror}") from None
    return study


def check_database(path: Path) -> None:
    """Refuse a file that is not the database of a search, which Optuna would add its tables to.

    Raises:
      UsageError: it is not, or a different program has locked it.
    """
    if not path.exists():
        return
    try:
        uri = f"file:{quote(str(path.absolute()))}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=LOCK_SECONDS)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.OperationalError as error:
        raise UsageError(f"{path}: {error}; end the program that uses it, or choose a different --out") from None
    except sqlite3.DatabaseError:
        tables = {"something else"}
    if tables and "studies" not in tables:
        raise UsageError(f"{path} is not the database of a search: move it away, or choose a different --out")


@contextmanager
def locked_means(kind: type[Exception], out: Path) -> Iterator[None]:
    """Raise errors of the database as `kind`, in one line: it is locked, full, or of a different Optuna."""
    optuna = load_optuna()
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "optuna" not in str(error).lower():
            raise
        reason = str(error.__cause__ or error).splitlines()[0]
        raise kind(f"{out / DATABASE}: {reason}; run the same command again, or choose a different --out") from None


def check_settings(out: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to continue a search with different settings, whose trials could not be compared.

    Raises:
      UsageError: they differ.
    """
    changes = []
    for part in wanted:
        before, now = saved.get(part), wanted[part]
        if isinstance(now, dict) and isinstance(before, dict):
            names = now.keys() | before.keys() if part == "ranges" else now.keys() & before.keys()
            changes += [
                f"{name} {before.get(name, 'fixed')} -> {now.get(name, 'fixed')}"
                for name in sorted(names)
                if before.get(name) != now.get(name)
            ]
        elif before != now:
            changes.append(f"{part} {before} -> {now}")
    if changes:
        listed = ", ".join(changes)
        raise UsageError(f"{out} holds a search with different settings ({listed}); choose a different --out")


def storage_error(out: Path) -> Any:
    """Errors of the database while a search runs, which keeps its finished trials."""
    return locked_means(RunError, out)
