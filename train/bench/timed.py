"""Steps, their parts and other runners, timed within seconds unless flags say how often; the figures of a step."""

import time
from typing import Any

import jax
import numpy as np

from train import runtime
from train.bench import work
from train.bench.config import REPEATS, STEPS, WARMUP, BenchConfig
from train.bench.prepared import Prepared, Stepper, compiled_for, compiler_options
from train.bench.tasks import kernels
from train.data.batches import ResidentBatches
from train.data.sources import Arrays
from train.from_config import compute_dtype
from train.timing import Runner, interleaved, summary

Counts = dict[str, int]  # how often something was timed: `warmup`, `settle`, `steps` and `repeats` of `interleaved`

# Seconds for timing steps that are waited for, steps one ahead, and a step's parts; other runners get those of a step.
STEP, AHEAD, PARTS = 10.0, 6.0, 8.0
SLOW = 0.1  # seconds of a call; refilling the caches after a different runner takes a hundredth of that


def time_runners(
    runners: dict[str, Runner],
    config: BenchConfig,
    *,
    seconds: float = STEP,
    fewest: int = 1,
    settle: int | None = None,
    ahead: bool = False,
    call: float | None = None,
) -> tuple[dict[str, np.ndarray], Counts]:
    """Time runners, interleaved, as often as the config says, or as often as fits into about `seconds`.

    Args:
      fewest: steps of a block, unless the config gives them.
      settle: as in `interleaved`; None means one if there are several runners that are not slow.
      ahead: as in `interleaved`.
      call: seconds that calling each of them once takes, if they are warm; otherwise they are warmed up first.

    Returns:
      (seconds by runner [repeats, steps], how often).
    """
    warmup, call = warm_up(runners, config, seconds / 5) if call is None else (0, call)
    if settle is None:
        settle = int(len(runners) > 1 and call / len(runners) < SLOW)
    steps, repeats = how_often(config, seconds / call, fewest, settle)
    counts = {"settle": settle, "steps": steps, "repeats": repeats}
    return interleaved(runners, **counts, warmup=0, ahead=ahead), {"warmup": warmup, **counts}


def warm_up(runners: dict[str, Runner], config: BenchConfig, seconds: float) -> tuple[int, float]:
    """Call each runner twice, and more often as the config says or until `seconds` have passed.

    Returns:
      (calls of each runner, seconds that the last call of each took together; the first also compiles).
    """
    spent: list[float] = []
    longest = config.warmup or WARMUP
    while len(spent) < 2 or (len(spent) < longest and (config.warmup or sum(spent[1:]) < seconds)):
        began = time.perf_counter()
        for runner in runners.values():
            jax.block_until_ready(runner())
        spent.append(time.perf_counter() - began)
    return len(spent), spent[-1]


def how_often(config: BenchConfig, rounds: float, fewest: int, settle: int) -> tuple[int, int]:
    """(steps, repeats): the config's, otherwise as many of the usual ones as fit into `rounds` calls of each runner.

    Short blocks come before few blocks, as intervals are based on the spread of blocks.
    """
    repeats = config.repeats or min(max(int(rounds / ((config.steps or fewest) + settle)), 2), REPEATS)
    steps = config.steps or min(max(int(rounds / repeats) - settle, fewest), STEPS)
    return steps, repeats


def time_steps(prepared: dict[str, Prepared], config: BenchConfig) -> None:
    """Time steps, interleaved: each waited for, then as training runs them, one ahead. Fills in `seconds`, `counts`."""
    runtime.say("timing the step" if len(prepared) == 1 else f"timing the steps: {', '.join(prepared)}")
    seconds = STEP if config.shares and not config.versus else STEP + PARTS
    each, often = time_runners({n: one.stepper for n, one in prepared.items()}, config, seconds=seconds)
    dispatched = {n: one.stepper.dispatched[-each[n].size :] for n, one in prepared.items()}
    # One step ahead: in a block of one step, none would be.
    runners = {n: one.stepper.ahead for n, one in prepared.items()}
    call = sum(float(np.median(seconds)) for seconds in each.values())
    ahead, counts = time_runners(runners, config, seconds=AHEAD, fewest=2, ahead=True, call=call)
    for name, one in prepared.items():
        one.seconds = {"each": each[name], "dispatch": np.asarray(dispatched[name]), "ahead": ahead[name]}
        one.counts = {"step": often, "ahead": counts}


def shares(one: Prepared) -> tuple[dict[str, float], Counts]:
    """Shares of a fed step's time that add up to 1: drawing the batch on the device (training), then the step's parts.

    Growing parts of the step are compiled separately and timed interleaved; each part is the difference of medians to
    the one before. XLA fuses across their borders, so the shares are approximate. Also returns how often.
    """
    config, mesh = one.config, one.mesh
    runners: dict[str, Runner] = {}
    if "label" in one.workload.batch and one.workload.carried:
        specs = one.workload.batch
        host = {name: np.asarray(x).reshape(specs[name].shape) for name, x in one.stepper.batch.items()}
        arrays = Arrays(images=host["image"], labels=host["label"])
        batches = ResidentBatches(arrays, batch=config.batch, seed=0, mesh=mesh, mode=config.mode)
        runners["input"] = batches.__next__
    state = jax.tree.map(lambda x: x.copy(), one.stepper.state)  # the whole step consumes its own
    for number, (name, part) in enumerate(one.workload.parts.items()):
        if part is None:
            runners[name] = one.stepper
        else:
            step = compiled_for(config, mesh, rows=number == 0)(part)
            runners[name] = Stepper(step, state, one.stepper.batch, carried=False)
    runtime.say(f"compiling and timing the parts: {', '.join(runners)}")
    seconds, counts = time_runners(runners, config, seconds=PARTS)
    return split({name: float(np.median(part)) for name, part in seconds.items()}), counts


def split(medians: dict[str, float]) -> dict[str, float]:
    """Shares by part, each at least 0 and 1 together, of the seconds of growing parts; `input` stands by itself."""
    parts = {name: seconds for name, seconds in medians.items() if name != "input"}
    # From the last back: a part that seems slower than what contains it adds nothing.
    reached = np.minimum.accumulate(list(parts.values())[::-1])[::-1]
    added = dict(zip(parts, np.diff(reached, prepend=0.0).tolist(), strict=True))
    added = {name: medians[name] for name in medians if name == "input"} | added
    whole = sum(added.values())
    return {name: seconds / whole for name, seconds in added.items()}


def described(one: Prepared, ceilings: dict[str, Any]) -> dict[str, Any]:
    """The figures of a timed step."""
    config, devices, batch = one.config, one.mesh.size, one.config.batch
    steady, often = summary(one.seconds["each"]), one.counts["step"]
    seconds = steady["step_ms"] / 1e3
    chosen, _, remark = kernels(config)
    peak, source = work.peak_memory(one.mesh.devices.flat[0])
    return {
        "task": config.task,
        "model": config.model,
        "parameters": one.workload.parameters,
        "batch": batch,
        "image_size": config.image_size,
        "dtype": np.dtype(compute_dtype(config.dtype)).name,
        "mode": config.mode,
        "kernels": chosen,
        "kernels_remark": remark,
        "compiler_options": compiler_options(config),
        "images_per_second": batch / seconds,
        "step_ms": steady["step_ms"],
        "start": one.start,
        "traces": one.traces["cold"],
        "steady": {
            **{name: often[name] for name in ("warmup", "steps", "repeats")},
            **steady,
            "dispatch_ms": float(np.median(one.seconds["dispatch"]) * 1e3),
            "images_per_second": batch / seconds,
            "images_per_second_per_device": batch / seconds / devices,
            "pipelined_images_per_second": batch / float(np.median(one.seconds["ahead"].mean(1))),
        },
        "counts": dict(one.counts),
        **work.figures(
            one.workload.flops, one.compiled, images=batch, devices=devices, seconds=seconds, ceilings=ceilings
        ),
        "memory": {**work.memory(one.compiled), "peak_bytes": peak, "peak_source": source},
    }
