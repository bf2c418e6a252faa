"""How fast runs train, against their single step: `python results/loop_rate.py ROUNDS PRESET [--FIELD VALUE ...]`.

Interleaved in one process: blocks of single steps, each waited for as `train.bench` does, and whole runs, with several
steps per call (the default) and with one. A run's rate is its images over its seconds of training: validation and
checkpoints after every epoch count, compilation does not. Prints one JSON line.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax

from train.cli import parse, start
from train.presets import PRESETS
from train.run import Training, make_pieces, run, start_state
from train.run_folder import environment
from train.session import open_session

BLOCK = 2.0  # seconds of single steps before each run


def single_step(config: Any, folder: str) -> Callable[[], float]:
    """Prepare the run's single step; the result times it: images/s by the median over `BLOCK` seconds."""
    session = open_session(dataclasses.replace(config, steps_per_call=1, out=f"{folder}/single"))
    pieces = make_pieces(session)
    state = session.place(start_state(session, pieces))
    training = Training(session, pieces, state)
    batch = next(session.stream)
    state, _ = training.step(state, batch)

    def rate() -> float:
        nonlocal state
        seconds: list[float] = []
        while sum(seconds) < BLOCK:
            began = time.perf_counter()
            state, metrics = training.step(state, batch)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - began)
        return config.batch / statistics.median(seconds)

    return rate


def main() -> None:
    """Time, and print the figures."""
    rounds, (preset, config) = int(sys.argv[1]), parse("loop_rate", PRESETS, sys.argv[2:], default="digits")
    with tempfile.TemporaryDirectory() as folder:
        single = single_step(config, folder)

        def whole(number: int, per_call: int | None) -> float:
            options = {"steps_per_call": per_call, "out": f"{folder}/{number}-{per_call}"}
            result = run(dataclasses.replace(config, **options), preset)
            return result["steps"] * config.batch / result["seconds"]

        rows: list[dict[str, Any]] = []
        for number in range(rounds):
            row: dict[str, Any] = {"single_step": [single()]}
            for name, per_call in (("run", config.steps_per_call), ("run_one_step_per_call", 1)):
                row |= {name: whole(number, per_call), "single_step": [*row["single_step"], single()]}
            rows.append(row)
    # The block after a run depends on that run, so all blocks of single steps count alike.
    step = statistics.median(rate for row in rows for rate in row["single_step"])
    figures = {}
    for name in ("run", "run_one_step_per_call"):
        ratios = [row[name] / step for row in rows]
        figures[name] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    about = {"preset": preset, "batch": config.batch, "epochs": config.epochs}
    print(json.dumps({**about, "over_single_step": figures, "images_per_second": rows, **environment()}))


if __name__ == "__main__":
    start(main)
