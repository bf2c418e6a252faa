"""Experiment trackers (`--log`): the rows of metrics.jsonl, pictures and histograms for TensorBoard, W&B and MLflow.

Each tracker works in a thread of its own, so a run never waits for one. A tracker that fails is left out from then on.
"""

import math
import time
from collections.abc import Callable, Sequence
from importlib import util
from pathlib import Path
from queue import Full, Queue
from threading import Event, Thread
from typing import Any

import numpy as np

from train.errors import UsageError, unknown
from train.loop import read_rows
from train.trackers.pictures import curves, tiled
from train.trackers.writers import TRACKERS, Row, Started, figures_of

PENDING = 1000  # most calls that wait for a tracker; one that is further behind is left out
PATIENCE = 60.0  # seconds that a run waits for a tracker to start, and at its end
SAMPLE = 65536  # most values of an array in its histogram


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers exist and are installed, without importing them.

    Raises:
      UsageError: an unknown name, or a package that is missing; the message names the extra that installs it.
    """
    for name in names:
        if name not in TRACKERS:
            raise unknown("tracker", name, TRACKERS)
        package, _ = TRACKERS[name]
        found = util.find_spec(package)
        # A folder with this name, such as the `wandb` that other programs write, is found as a package without a file.
        if found is None or found.origin is None:
            raise UsageError(f'--log {name} needs {package}: pip install -e ".[{name}]"')


class Trackers:
    """The trackers of a run, each in a thread of its own; with no names, every method does nothing."""

    def __init__(self, names: Sequence[str] = (), say: Callable[[str], None] = lambda line: None) -> None:
        self.say, self.workers = say, [_Worker(name, say) for name in dict.fromkeys(names)]
        self.rows: list[Row] = []

    def start(self, out: Path, step: int, settings: dict[str, Any]) -> None:
        """Start, or go on with, the run in the folder `out`, whose metrics.jsonl holds the rows up to `step`."""
        if self.workers:
            self.rows = read_rows(out / "metrics.jsonl")
            plain = {name: x if isinstance(x, int | float | str) else str(x) for name, x in settings.items()}
            started = Started(out=out, step=step, settings=plain, rows=tuple(self.rows))
            for worker in self.workers:
                worker.begin(started)
            # Importing a tracker would slow the first steps down, so wait for it.
            for worker in self.workers:
                worker.ready.wait(PATIENCE)

    def row(self, row: Row) -> None:
        """Write a row of metrics.jsonl."""
        if self.workers:
            self.rows.append(row)
            self._send("scalars", row["step"], figures_of(row))

    def images(self, step: int, name: str, images: np.ndarray) -> None:
        """Write images in [0, 1], float [N, H, W, C] with one or three channels, as one picture."""
        self._send("image", step, name, tiled(images))

    def histograms(self, step: int, arrays: dict[str, Any]) -> None:
        """Write the distributions of parameters by name, from at most `SAMPLE` evenly spaced values of each."""
        if self.workers:
            samples = {f"parameters/{name}": _sample(np.asarray(x)) for name, x in arrays.items()}
            self._send("histograms", step, {name: x for name, x in samples.items() if x.size})

    def finish(self, result: dict[str, Any] | None) -> None:
        """Close all trackers, with the numbers of the run's result and a picture of its curves; None: it stopped."""
        if self.workers and result is not None:
            try:
                picture = curves(self.rows)
            except Exception as error:
                self.say(f"note: the curves of the run are not drawn: {_plain(error)}")
            else:
                if picture is not None:
                    self._send("image", self.rows[-1]["step"], "curves", picture)
            result = {f: x for f, x in result.items() if isinstance(x, int | float) and math.isfinite(x)}
        self._send("finish", result)
        deadline = time.monotonic() + PATIENCE
        for worker in self.workers:
            worker.end(max(deadline - time.monotonic(), 0))
        self.workers = []

    def _send(self, method: str, *arguments: Any) -> None:
        for worker in self.workers:
            worker.send(method, *arguments)


class _Worker:
    """A thread that makes a tracker and calls it."""

    def __init__(self, name: str, say: Callable[[str], None]) -> None:
        self.name, self.say, self.failed, self.ready = name, say, False, Event()
        self.calls: Queue[tuple[str, tuple[Any, ...]]] = Queue(PENDING)
        self.thread: Thread | None = None

    def begin(self, run: Started) -> None:
        self.thread = Thread(target=self._work, args=(run,), name=self.name, daemon=True)
        self.thread.start()

    def send(self, method: str, *arguments: Any) -> None:
        if self.thread is not None and not self.failed:
            try:
                self.calls.put_nowait((method, arguments))
            except Full:
                self._fail(f"it is {PENDING} entries behind")

    def end(self, seconds: float) -> None:
        if self.thread is not None and not self.failed:
            self.thread.join(seconds)
            if self.thread.is_alive():
                self._fail("it does not end")

    def _work(self, run: Started) -> None:
        method = ""
        try:
            tracker = TRACKERS[self.name][1](run)
            self.ready.set()
            while method != "finish" and not self.failed:
                method, arguments = self.calls.get()
                getattr(tracker, method)(*arguments)
        except Exception as error:
            self._fail(_plain(error))
        finally:
            self.ready.set()

    def _fail(self, reason: str) -> None:
        if not self.failed:
            self.failed = True
            self.say(f"note: --log {self.name} is left out from now on, the run goes on: {reason}")


def _plain(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _sample(array: np.ndarray) -> np.ndarray:
    """At most `SAMPLE` evenly spaced finite values of an array, copied: the next step reuses the array's memory."""
    values = np.array(array.ravel()[:: -(-array.size // SAMPLE) or 1], np.float32)
    return values[np.isfinite(values)]
