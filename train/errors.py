"""Errors that the user can fix (exit code 2) or that stopped a run (exit code 1), each shown as one line."""

import _thread
import argparse
import difflib
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

OUT_OF_MEMORY = "out of memory: lower --batch, split it with --accumulate, or choose a smaller network or images"


class UsageError(Exception):
    """Bad usage or bad input: nothing was started, or nothing lost. The message says how to fix it."""


class RunError(Exception):
    """A run that could not continue: the message says where it stopped and what was kept."""


class DivergedError(RunError):
    """A loss, gradient, parameter or statistic that is not finite."""


class LostHostError(RunError):
    """A host that stopped answering. The process ends without JAX's shutdown, which would wait for it."""


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are a `UsageError`, of one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def unknown(kind: str, name: str, valid: Iterable[str], other: Iterable[str] = ()) -> UsageError:
    """Make the error for an unknown name; it suggests the nearest valid names and lists all of them.

    `other` names are valid too, and only suggested.
    """
    valid = list(valid)
    return UsageError(f"unknown {kind} {name!r}: {suggestion(name, [*valid, *other])}choose one of {', '.join(valid)}")


def suggestion(name: str, valid: Iterable[str]) -> str:
    """Suggest the valid names nearest to `name`, whatever their case and dashes: "did you mean a or b? "."""

    def plain(name: str) -> str:
        return re.sub(r"[-_ ]", "", name.lower())

    last = {plain(one).rpartition(".")[2]: one for one in valid}
    whole = {plain(one): one for one in valid}
    near = [same[plain(name)] for same in (whole, last) if plain(name) in same]
    near = near or [whole[one] for one in difflib.get_close_matches(plain(name), whole)]
    return f"did you mean {' or '.join(dict.fromkeys(near))}? " if near else ""


@contextmanager
def one_line() -> Iterator[None]:
    """Report the errors above in one line on stderr and exit with their code; other exceptions are bugs and show."""
    # Orbax and asyncio log at length about a damaged checkpoint or a full disk, which would bury the one line.
    for library in ("absl", "asyncio", "root"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    sys.unraisablehook = _unraisable
    try:
        yield
    except (UsageError, RunError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        if isinstance(error, LostHostError):
            os._exit(1)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
    except PermissionError as error:
        print(f"error: no permission for {error.filename}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    except (MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split())
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:  # the latter of JAX
            print(f"error: {OUT_OF_MEMORY} ({text[:200]})", file=sys.stderr)
            raise SystemExit(1) from None
        # JAX_PLATFORMS names a platform that is not there.
        if not re.match(r"Unable to initialize backend|Unknown backend", text):
            raise
        print(f"error: {text}; see JAX_PLATFORMS", file=sys.stderr)
        raise SystemExit(2) from None
    except AssertionError as error:
        # JAX_PLATFORMS names a platform that this jaxlib was built without: JAX asserts that some platform is there.
        frames = traceback.extract_tb(error.__traceback__)
        if not (frames and frames[-1].filename.endswith("xla_bridge.py")):
            raise
        named = os.environ.get("JAX_PLATFORMS")
        print(f"error: no device of the platforms in JAX_PLATFORMS={named} was found", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:
        # The reader has closed the pipe, as in `python -m train --help | head`: end quietly.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted; the same command continues a run from its last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None


def _unraisable(unraisable: Any) -> None:
    """`sys.unraisablehook` that delivers a Ctrl-C again which a callback of the garbage collector received.

    It also drops writes that report to an event loop which their failure has already closed.
    """
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(0.01, _thread.interrupt_main).start()  # not now: the callback would receive this one too
    elif str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
