"""Timing: interleaved runners, medians with their spread, ratios with an interval. Independent of networks.

A runner is called without arguments and returns the arrays to wait for. Runners to compare are timed in the same
process, interleaved block by block, with every second block in reverse order (ABBA), so that a machine that slows down
affects all of them; the interval of a ratio comes from the blocks, as steps within a block are not independent.
"""

import gc
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from scipy.special import stdtrit

Runner = Callable[[], Any]

RESAMPLES = 1000


def interleaved(
    runners: dict[str, Runner],
    *,
    steps: int,
    repeats: int,
    warmup: int,
    settle: int | None = None,
    ahead: bool = False,
) -> dict[str, np.ndarray]:
    """Time each step in seconds: float64 [repeats, steps] by runner; a row is a block.

    Args:
      steps: timed calls per block.
      repeats: blocks per runner.
      warmup: untimed calls of each runner at the start.
      settle: untimed calls before each block; None means one if there are several runners, as caches then hold a
        different runner's data.
      ahead: wait for each call's arrays only after the next is dispatched, as `train.loop.fit` does; times are then
        those between consecutive ends. Otherwise wait for each call before the next.
    """
    untimed = int(len(runners) > 1) if settle is None else settle
    seconds = {name: np.zeros((repeats, steps)) for name in runners}
    # Suspend Python's garbage collector, as `timeit` does.
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for runner in runners.values():
            for _ in range(warmup):
                jax.block_until_ready(runner())
        for block in range(repeats):
            for name in list(runners)[:: -1 if block % 2 else 1]:
                for _ in range(untimed):
                    jax.block_until_ready(runners[name]())
                seconds[name][block] = _block(runners[name], steps, ahead)
    finally:
        if collects:
            gc.enable()
    return seconds


def _block(runner: Runner, steps: int, ahead: bool) -> np.ndarray:
    """Time each step of one block in seconds, [steps]."""
    marks = [time.perf_counter()]
    late = runner() if ahead else None
    for number in range(steps):
        if ahead:
            now, late = late, runner() if number + 1 < steps else None
        else:
            now = runner()
        jax.block_until_ready(now)
        marks.append(time.perf_counter())
    return np.diff(marks)


def summary(seconds: np.ndarray) -> dict[str, float]:
    """Summarise all steps, in milliseconds: median, quartiles, extremes, 95th percentile; `spread` is IQR / median."""
    percents = {"": 50, "_q1": 25, "_q3": 75, "_min": 0, "_max": 100, "_p95": 95}
    figures = {f"step_ms{name}": float(np.percentile(seconds, q) * 1e3) for name, q in percents.items()}
    return {**figures, "spread": (figures["step_ms_q3"] - figures["step_ms_q1"]) / figures["step_ms"]}


def ratio(a: np.ndarray, b: np.ndarray, confidence: float = 0.95) -> dict[str, float]:
    """Median of `a` over median of `b`, seconds [repeats, steps] each, timed interleaved: `value`, `low`, `high`.

    The interval is Student's around the logarithm, with a standard error from a bootstrap over pairs of blocks
    (https://arxiv.org/abs/1411.5279 section 4): with few blocks, percentiles would be wrong far too often. The same
    numbers give the same interval.

    Raises:
      ValueError: shapes that do not match, or fewer than two blocks.
    """
    if a.ndim != 2 or len(a) != len(b) or len(a) < 2:
        raise ValueError(f"a ratio takes two or more pairs of blocks [repeats, steps], not {a.shape} and {b.shape}")
    blocks = len(a)
    drawn = np.random.default_rng(0).integers(0, blocks, (RESAMPLES, blocks))
    logs = [np.log(np.median(a[rows]) / np.median(b[rows])) for rows in drawn]
    # Resamples of n blocks vary less than new blocks would, by (n - 1) / n.
    error = np.std(logs) * np.sqrt(blocks / (blocks - 1))
    value = np.median(a) / np.median(b)
    margin = np.exp(stdtrit(blocks - 1, (1 + confidence) / 2) * error)
    return {"value": float(value), "low": float(value / margin), "high": float(value * margin)}
