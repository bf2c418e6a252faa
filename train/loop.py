"""The training loop: dispatch steps, then read the previous ones' metrics, so the device never waits for the host."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.errors import DivergedError, RunError
from train.json_text import to_json
from train.paths import replace_file
from train.state import TrainState
from train.steps import summarize
from train.tracing import Trace

Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
# (number, rows): the metrics of the last steps, up to step `number`
Log = Callable[[int, list[dict[str, float]]], None]
# (every, call): `call(state)` after every `every` steps, and after the last
Hook = tuple[int, Callable[[TrainState], None]]


def fit(
    step: Step,
    state: TrainState,
    data: Any,
    *,
    steps: int,
    per_call: int = 1,
    hooks: Sequence[Hook] = (),
    log: Log = lambda number, rows: None,
    trace: Trace | None = None,
) -> TrainState:
    """Train until `state.step` is `steps`.

    Args:
      data: an iterator of batches, see `train.data.batches.Batches`.
      per_call: most steps per call, which ends early where a hook is due; above 1, `step` is made by
        `train.chunks.many_steps`, and `data` has the chunks of `train.data.batches.ResidentBatches`.
      log: receives the metrics of each call's steps as floats, one call late; see `Log`.
      trace: profiles some of the steps; calls also end where it begins and ends.

    Raises:
      DivergedError: a loss, gradient or parameter that is not finite, with the step's number; hooks are not called with
        that state.
    """
    number = int(state.step)
    late: tuple[int, int, dict[str, jax.Array]] | None = None

    def read_metrics() -> None:
        if late is None:
            return
        last, count, metrics = late
        columns = {name: np.ravel(x)[:count].tolist() for name, x in jax.device_get(metrics).items()}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        for at, row in enumerate(rows, last - len(rows) + 1):
            if bad := [name for name, value in row.items() if not math.isfinite(value)]:
                raise DivergedError(f"{' and '.join(bad)} at step {at} is not finite: {ADVICE}")
        log(last, rows)

    most = 1  # the first call shows at once that the run works
    while number < steps:
        count = min(most, steps - number, *(every - number % every for every, _ in hooks))
        if trace is not None:
            trace.before(number, state)
            count = min(count, trace.room(number))
        most = per_call
        batch = next(data) if per_call == 1 else data.chunk(count, per_call)
        state, metrics = step(state, batch)
        number += count
        if trace is not None:
            trace.after(number, state)
        read_metrics()
        late = number, count, metrics
        due = [call for every, call in hooks if number % every == 0 or number == steps]
        if due:
            # Hooks may save the state, so first check that its metrics are finite, and what the update made of it.
            read_metrics()
            late = None
            check_finite(state)
            for call in due:
                call(state)
    read_metrics()
    check_finite(state)
    return state


def check_finite(state: TrainState) -> None:
    """Check the parameters, the running statistics and the moving average of a state.

    Raises:
      DivergedError: one of them is not finite.
    """
    fields = {name: getattr(state, name, None) for name in ("params", "batch_stats", "ema")}
    bad = [name for name, fits in _all_finite(fields).items() if not fits]
    if bad:
        named = " and ".join(WORDS[name] for name in bad)
        raise DivergedError(f"{named} after step {int(state.step)} are not finite: {ADVICE}")


WORDS = {"params": "the parameters", "batch_stats": "the running statistics", "ema": "the averaged parameters"}
ADVICE = "lower the learning rate, clip gradients or warm up longer"


@jax.jit
def _all_finite(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: jnp.all(jnp.asarray([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)], bool))
        for name, tree in fields.items()
    }


def evaluate(
    step: Callable[[Any, Any], dict[str, jax.Array]], variables: Any, batches: Iterable[Any]
) -> dict[str, Any]:
    """Sum `step(variables, batch)` over all batches in float64 and summarise; see `train.steps.summarize`.

    Raises:
      ValueError: there are no batches.
    """
    parts: list[dict[str, Any]] = []
    for batch in batches:
        parts.append(step(variables, batch))
        # Fetch the sums of the batch before, now that this one is dispatched.
        parts[-2:-1] = [jax.device_get(part) for part in parts[-2:-1]]
    if not parts:
        raise ValueError("no examples were evaluated")
    columns = {name: [part[name] for part in jax.device_get(parts)] for name in parts[0]}
    pairs = np.concatenate(columns.pop("pairs"))
    found: dict[str, Any] = {name: np.sum(rows, axis=0, dtype=np.float64) for name, rows in columns.items()}
    return summarize({**found, "pairs": pairs})


class Progress:
    """Report progress on stderr (step, epoch, loss, accuracy, images/s, time left) and in a JSONL file.

    A terminal gets one line that is updated in place; a log file gets a line every few seconds. A JSONL row is written
    every `every` steps, with means over those steps, the values of `extra(step)`, and the `seconds` of training since
    this process's first call, without pauses. `send` also receives each row; `shown` names the metrics to print,
    if the step has them; `silent` prints nothing.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        start: int,
        steps: int,
        epoch_steps: float,
        batch: int,
        every: int,
        extra: Callable[[int], dict[str, float]] = lambda step: {},
        send: Callable[[dict[str, Any]], None] = lambda row: None,
        shown: Sequence[str] = ("loss", "accuracy"),
        silent: bool = False,
    ) -> None:
        self.steps, self.epoch_steps, self.batch, self.every = steps, epoch_steps, batch, every
        self.extra, self.send, self.shown, self.silent = extra, send, shown, silent
        self.file = None
        if path is not None:
            # The steps after the checkpoint that a run resumes from are trained again: drop their rows.
            keep = [row for row in read_rows(path) if row["step"] <= start]
            replace_file(path, "".join(to_json(row) + "\n" for row in keep).encode())
            self.file = path.open("a", buffering=1)
        self.terminal = sys.stderr.isatty()
        self.window: list[dict[str, float]] = []
        self.last_shown = self.begun = time.perf_counter()
        self.first: int | None = None
        self.last = start
        self.paused = 0.0  # seconds to exclude from the rate
        self.elapsed = 0.0  # seconds of training from the first call to the last one

    def log(self, number: int, rows: list[dict[str, float]]) -> None:
        now = time.perf_counter()
        if self.first is None:  # exclude compilation from the rate
            self.begun, self.first, self.paused = now, number, 0.0
        self.last, self.elapsed = number, now - self.begun - self.paused
        for step, metrics in enumerate(rows, number - len(rows) + 1):
            self.window.append(metrics)
            if step % self.every == 0 or step == self.steps:
                means = {name: float(np.mean([m[name] for m in self.window])) for name in metrics}
                self.window = []
                place = {"step": step, "epoch": round(step / self.epoch_steps, 4), "seconds": round(self.elapsed, 3)}
                self.row({**place, **means, **self.extra(step)})
                if self.terminal or now - self.last_shown >= 5 or step == self.steps:
                    self.last_shown = now
                    self.say(self.line(step, means), stays=not self.terminal)

    def line(self, step: int, means: dict[str, float]) -> str:
        rate = self.images_per_second
        left = timedelta(seconds=round((self.steps - step) * self.batch / rate) if rate else 0)
        values = "  ".join(f"{name.replace('_', ' ')} {means[name]:.4g}" for name in self.shown if name in means)
        epoch = f"epoch {step / self.epoch_steps:.1f}/{round(self.steps / self.epoch_steps, 1):g}"
        return f"step {step}/{self.steps}  {epoch}  {values}  {rate:,.0f} images/s  {left} left"

    def say(self, line: str, *, stays: bool = True) -> None:
        """Print a line; on a terminal the next one overwrites it unless it `stays`."""
        if not self.silent:
            text = f"\r{line:<110}" if self.terminal else line
            print(text, end="\n" if stays else "", file=sys.stderr, flush=True)

    def row(self, row: dict[str, Any]) -> None:
        if self.file is not None:
            try:
                self.file.write(to_json(row) + "\n")
            except OSError as error:
                raise RunError(f"cannot write {self.file.name}: {error}") from None
        self.send(row)

    @property
    def images_per_second(self) -> float:
        """Rate from the first call to the last one, excluding the first (it may compile) and pauses."""
        return (self.last - (self.first or 0)) * self.batch / self.elapsed if self.elapsed else 0.0

    def close(self) -> None:
        if self.terminal and not self.silent:
            print(file=sys.stderr)
        if self.file is not None:
            self.file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSONL file; a truncated last line is dropped."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
