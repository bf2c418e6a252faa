"""Comparisons in one process: two configs (`--versus`), and our steps with plain ones that never change (`--gate`).

A gate's file defines `PIPELINES: dict[str, Callable[[int], Callable[[], Any]]]`: batch size to a runner that does one
step and returns its arrays. A slower machine slows both down, so only the ratio of times, ours to plain, counts. Next
to it, `gate.json` holds the limit of that ratio for each pipeline, by kind of device and of convolution kernels:
{"cpu onednn": {"train": 0.8}}.
"""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from resnet_jax import augment as aug
from train.bench.config import BenchConfig
from train.bench.prepared import described, prepare, time_steps
from train.bench.tasks import TASKS, UPDATE_EVERY, Tasks, kernels, train
from train.bench.work import ceilings
from train.errors import RunError, UsageError, unknown
from train.from_config import compute_dtype
from train.run_folder import write_json
from train.runtime import say
from train.timing import Runner, interleaved, ratio

TOLERANCE = 1.15
BATCH = 32  # small, so that the gate takes a minute on two cores


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
    if rates["low"] <= 1 <= rates["high"]:
        return f"no difference beyond noise: A is {span(rates)} as fast as B"
    return f"A is {span(rates)} as fast as B"


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


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A gate's plain pipelines, and the path and content of its limits."""

    pipelines: dict[str, Callable[[int], Runner]]
    path: Path
    limits: dict[str, dict[str, float]]


def load_gate(file: Path, record: bool) -> Gate:
    """A gate's file and its limits, which may be missing if they are about to be recorded.

    Raises:
      UsageError: a file that is missing, broken or defines no PIPELINES of known names; limits that are missing.
    """
    spec = importlib.util.spec_from_file_location("plain_steps", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise UsageError(f"--gate {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"--gate {file} cannot be loaded: {type(error).__name__}: {error}") from None
    pipelines = getattr(module, "PIPELINES", None)
    if not isinstance(pipelines, dict) or not pipelines:
        raise UsageError(f"--gate {file} does not define PIPELINES: a dict of name to (batch -> runner)")
    for name in pipelines:
        if name not in OURS:
            raise unknown("pipeline", name, OURS)
    path, limits = file.with_name("gate.json"), {}
    if path.exists() or not record:
        try:
            stored = json.loads(path.read_text())
            limits = {kind: {name: float(limit) for name, limit in those.items()} for kind, those in stored.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UsageError(f"cannot read the limits {path} ({error}): write them with --gate-record") from None
    return Gate(pipelines=pipelines, path=path, limits=limits)


def gate(config: BenchConfig, plain: Gate, mesh: Mesh) -> dict[str, Any]:
    """Time our steps and the plain ones, interleaved, on one device in float32, pipeline by pipeline.

    Raises:
      UsageError: no limits for this kind of device.
      RunError: pipelines that are slower than their limit allows, twice.
    """
    config = replace(config, model="resnet20", batch=BATCH, image_size=32, classes=10, dtype="float32", mode="jit")
    config = replace(config, cache="none", xla=())

    def runners(name: str) -> tuple[Runner, Runner]:
        return prepare(config, mesh, OURS[name](config)).stepper, plain.pipelines[name](BATCH)

    kind = f"{mesh.devices.flat[0].platform} {kernels(config)[0]}"
    limits = None if config.gate_record else plain.limits.get(kind, {})
    missing = [name for name in plain.pipelines if limits is not None and name not in limits]
    if missing:
        problem = f"{plain.path} has no limit on {kind} for {', '.join(missing)}"
        raise UsageError(f"{problem}: write them with --gate-record")
    counts = {"steps": config.steps, "repeats": config.repeats, "warmup": config.warmup}
    found = judged(runners, list(plain.pipelines), limits, **counts)
    if config.gate_record:
        recorded = {name: round(one["value"], 3) for name, one in found.items()}
        write_json(plain.path, {**plain.limits, kind: recorded})
    slow = ", ".join(
        f"{name} takes {one['value']:.2f}x the plain step's time (limit {one['limit']:.2f}x)"
        for name, one in found.items()
        if not one["passed"]
    )
    if slow:
        raise RunError(f"more than {TOLERANCE - 1:.0%} slower than {plain.path} allows: {slow}")
    return {"task": "gate", "gate": {"kind": kind, "tolerance": TOLERANCE, "batch": BATCH, "pipelines": found}}


def judged(
    runners: Callable[[str], tuple[Runner, Runner]],
    names: list[str],
    limits: dict[str, float] | None,
    *,
    steps: int,
    repeats: int,
    warmup: int,
) -> dict[str, dict[str, Any]]:
    """For each pipeline the ratio of times, ours to plain, its interval, and whether it passes; progress on stderr.

    A pipeline fails if even the low end of the interval is above `TOLERANCE` times the limit, in two measurements.
    """
    found = {}
    for name in names:
        ours, plain = runners(name)
        for attempt in (1, 2):
            seconds = interleaved({"ours": ours, "plain": plain}, steps=steps, repeats=repeats, warmup=warmup)
            one: dict[str, Any] = ratio(seconds["ours"], seconds["plain"])
            limit = None if limits is None else limits[name]
            passed = limit is None or one["low"] <= limit * TOLERANCE
            outcome = "" if limit is None else f", limit {limit:.2f}x: {'passes' if passed else 'slower'}"
            say(f"{name}: ours takes {span(one)} the plain step's time{outcome}")
            found[name] = {**one, "limit": limit, "passed": passed, "measured": attempt}
            if passed:
                break
    return found
