"""A profiler trace of some steps of a run: `--profile FROM:TO`."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from train.errors import UsageError


def traced_steps(profile: str | None, steps: int | None = None) -> tuple[int, int] | None:
    """Parse `--profile FROM:TO`, the numbers of the first and last step to trace, from 1; `steps`: those of the run.

    Raises:
      UsageError: it is not of this form, it is empty, or it begins or ends outside the run.
    """
    if profile is None:
        return None
    if not re.fullmatch(r"\d{1,10}:\d{1,10}", profile):
        raise UsageError(f"--profile {profile!r} is not of the form FROM:TO, such as 100:110")
    first, last = map(int, profile.split(":"))
    if not 1 <= first <= last:
        raise UsageError(f"--profile {profile}: steps count from 1, and FROM must not be above TO")
    if steps is not None and last > steps:
        raise UsageError(f"--profile {profile}: the run has only {steps} steps")
    return first, last


class Trace:
    """Traces the steps `first` to `last` of a run into a folder; a profiler that fails does not stop the run.

    `train.loop.fit` ends its calls before `first` and after `last`, so exactly these steps are traced, with the
    evaluations between them, also where one call computes several steps. With `folder` None, as on all hosts but the
    first, the calls end at the same steps, and nothing is traced.
    """

    def __init__(self, first: int, last: int, folder: Path | None, say: Callable[[str], None]) -> None:
        self.first, self.last, self.folder, self.say = first, last, folder, say
        self.running = False

    def room(self, number: int) -> int:
        """Most steps of the call after step `number`."""
        ends = [end - number for end in (self.first - 1, self.last) if end > number]
        return min(ends, default=2**31)

    def before(self, number: int, state: Any) -> None:
        """Begin if the step after `number` is the first one, when the devices have computed `state`."""
        if self.folder is not None and number == self.first - 1:
            jax.block_until_ready(state)
            try:
                jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
                self.running = True
            except Exception as error:
                self._fail(error)

    def after(self, number: int, state: Any) -> None:
        """End if `number` is the last step, when the devices have computed `state`."""
        if self.running and number == self.last:
            jax.block_until_ready(state)
            self.close()
            self.say(
                f"traced steps {self.first} to {self.last}: open {self.folder}/plugins/profile/*/"
                "perfetto_trace.json.gz at ui.perfetto.dev, or the folder with xprof (docs/tracking.md)"
            )

    def close(self) -> None:
        """Write what was traced, if the trace is still running."""
        if self.running:
            self.running = False
            try:
                jax.profiler.stop_trace()
            except Exception as error:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.say(f"note: no profile is written, the run goes on: {type(error).__name__}: {error}"[:300])
