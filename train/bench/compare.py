"""Comparisons in one process: two configs (`--versus`), and our steps with plain ones that never change (`--gate`).

A gate's file defines `PIPELINES: dict[str, Callable[[int], Callable[[], Any]]]`: batch size to a runner that does one
step and returns its arrays. A slower machine slows both down, so only the ratio of times, ours to plain, counts. Next
to it, `gate.json` holds the limit of that ratio for each pipeline, by kind of device and of convolution kernels:
{"cpu onednn": {"train": 0.8}}.
"""

import json
import runpy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jax.sharding import Mesh

from resnet_jax import augment as aug
from train.bench.config import REPEATS, STEPS, WARMUP, BenchConfig
from train.bench.prepared import prepare
from train.bench.tasks import TASKS, UPDATE_EVERY, Tasks, kernels, train
from train.bench.timed import described, time_steps
from train.bench.work import ceilings
from train.errors import RunError, UsageError
from train.from_config import compute_dtype
from train.paths import local_path
from train.run_folder import write_json
from train.runtime import say
from train.timing import Runner, interleaved, ratio

TOLERANCE = 1.15
ATTEMPTS = 3  # a neighbour's burst may last as long as one or two measurements
BATCH = 32  # small, so that the gate takes a few minutes on one core


# --- two configs ------------------------------------------------------------------------------------------------------


def versus(a: BenchConfig, b: BenchConfig, mesh: Mesh, tasks: Tasks, ceiling: dict[str, Any]) -> dict[str, Any]:
    """The figures of `a`, and under `versus` those of `b` and how they compare; `ceiling` is that of `a`'s dtype."""
    same = compute_dtype(a.dtype) == compute_dtype(b.dtype)
    other = ceiling if same else ceilings(mesh, compute_dtype(b.dtype), b.peak)
    sides = {name: prepare(config, mesh, tasks[config.task](config)) for name, config in (("A", a), ("B", b))}
    time_steps(sides, a)
    seconds = {name: one.seconds["each"] for name, one in sides.items()}
    # The inverse of the ratio of times, for each image, as batches may differ.
    rates = ratio(seconds["B"] / b.batch, seconds["A"] / a.batch)
    compared = {
        "step_ms_ratio": ratio(seconds["A"], seconds["B"]),
        "images_per_second_ratio": rates,
        "confidence": 0.95,
        "verdict": verdict(rates),
        "result": described(sides["B"], other),
    }
    return {**described(sides["A"], ceiling), "versus": compared}


def verdict(rates: dict[str, float]) -> str:
    """The conclusion that a ratio of images per second, A to B, allows."""
    outcome = f"A is {span(rates)} as fast as B"
    return f"no difference beyond noise: {outcome}" if rates["low"] <= 1 <= rates["high"] else outcome


def span(ratio: dict[str, float]) -> str:
    """A ratio with its interval."""
    return f"{ratio['value']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})"


# --- the gate ---------------------------------------------------------------------------------------------------------

OURS: Tasks = {
    "train": lambda config: train(config, augment=aug.normalize()),
    "augmented": lambda config: train(
        config, augment=aug.compose(aug.random_crop(4), aug.random_flip(), aug.normalize())
    ),
    "masked": lambda config: train(config, augment=aug.normalize(), prune_every=UPDATE_EVERY),
    "eval": TASKS["eval"],
}


def gate(config: BenchConfig, mesh: Mesh) -> dict[str, Any]:
    """Time our steps and the plain ones, interleaved, on one device in float32, pipeline by pipeline.

    Raises:
      UsageError: a file that cannot be loaded, no limits for this kind of device.
      RunError: pipelines that are slower than their limit allows, in every attempt.
    """
    file = local_path(config.gate or "")
    path = file.with_name("gate.json")
    try:
        plain: dict[str, Callable[[int], Runner]] = runpy.run_path(str(file))["PIPELINES"]
        stored = json.loads(path.read_text()) if path.exists() else {}
    except Exception as error:
        raise UsageError(f"--gate {config.gate} cannot be loaded: {type(error).__name__}: {error}") from None
    config = replace(config, model="resnet20", batch=BATCH, image_size=32, classes=10, dtype="float32", mode="jit")
    config = replace(config, xla=())
    kind = f"{mesh.devices.flat[0].platform} {kernels(config)[0]}"
    limits = {name: None if config.gate_record else stored.get(kind, {}).get(name) for name in plain}
    missing = [name for name, limit in limits.items() if limit is None]
    if missing and not config.gate_record:
        raise UsageError(f"{path} has no limit on {kind} for {', '.join(missing)}: write them with --gate-record")

    found = {}
    for name, limit in limits.items():
        ours = prepare(config, mesh, OURS[name](config)).stepper
        found[name] = judged(name, {"ours": ours, "plain": plain[name](BATCH)}, limit, config)
    if config.gate_record:
        write_json(path, {**stored, kind: {name: round(one["value"], 3) for name, one in found.items()}})
    slow = [f"{name} ({span(one)}, limit {one['limit']:.2f}x)" for name, one in found.items() if not one["passed"]]
    if slow:
        raise RunError(f"more than {TOLERANCE - 1:.0%} slower than {path} allows: {', '.join(slow)}")
    return {"task": "gate", "gate": {"kind": kind, "tolerance": TOLERANCE, "batch": BATCH, "pipelines": found}}


def judged(name: str, runners: dict[str, Runner], limit: float | None, config: BenchConfig) -> dict[str, Any]:
    """The ratio of times, `ours` to `plain`, its interval, and whether it passes; progress on stderr.

    A pipeline fails if even the low end of the interval is above `TOLERANCE` times the limit, in each of `ATTEMPTS`
    measurements.
    """
    steps, repeats, warmup = config.steps or STEPS, config.repeats or REPEATS, config.warmup or WARMUP
    measured, passed = 0, False
    while not passed and measured < ATTEMPTS:
        seconds = interleaved(runners, steps=steps, repeats=repeats, warmup=warmup)
        one = ratio(seconds["ours"], seconds["plain"])
        passed = limit is None or one["low"] <= limit * TOLERANCE
        outcome = "" if limit is None else f", limit {limit:.2f}x: {'passes' if passed else 'slower'}"
        say(f"{name}: ours takes {span(one)} the plain step's time{outcome}")
        measured += 1
    return {**one, "limit": limit, "passed": passed, "measured": measured}
