"""The gate: our steps beside plain ones from a file that never changes, so that a slower machine slows both.

The file defines `PIPELINES: dict[str, Callable[[int], Callable[[], Any]]]`: batch size to a runner that does one step
and returns its arrays. Beside it lies `gate.json` with the ratio of times, ours to plain, of each pipeline, apart for
each kind of device and what computes convolutions there: {"cpu onednn": {"train": 0.8}}.
"""

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from resnet_jax import augment as aug
from resnet_jax.parallel import make_mesh
from train.bench.config import BenchConfig
from train.bench.device import devices_of
from train.bench.prepared import prepare
from train.bench.tasks import TASKS, UPDATE_EVERY, train
from train.bench.workload import Workload, kernels
from train.errors import RunError, UsageError, unknown
from train.run_folder import write_json
from train.timing import Runner, interleaved, ratio

TOLERANCE = 1.15
BATCH = 32  # small, so that it takes a minute on two cores


def _crop_and_flip() -> aug.Augment:
    return aug.compose(aug.random_crop(4), aug.random_flip(), aug.normalize())


OURS: dict[str, Callable[[BenchConfig], Workload]] = {
    "train": lambda config: train(config, augment=aug.normalize()),
    "augmented": lambda config: train(config, augment=_crop_and_flip()),
    "masked": lambda config: train(config, augment=aug.normalize(), prune_every=UPDATE_EVERY),
    "eval": TASKS["eval"],
}


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A gate's plain pipelines, and the file of its limits with what is in it."""

    pipelines: dict[str, Callable[[int], Runner]]
    path: Path
    limits: dict[str, dict[str, float]]


def load_gate(file: Path, record: bool) -> Gate:
    """A gate's file, and its limits unless they are about to be recorded.

    Raises:
      UsageError: a file that is missing, broken or defines no PIPELINES of known names; limits that are missing.
    """
    spec = importlib.util.spec_from_file_location("plain_steps", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise UsageError(f"--gate {file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"--gate {file} cannot be loaded: {type(error).__name__}: {error}") from None
    pipelines = getattr(module, "PIPELINES", None)
    if not isinstance(pipelines, dict) or not pipelines:
        raise UsageError(f"--gate {file} defines no PIPELINES: a dict of name to (batch -> runner)")
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


def limits_for(plain: Gate, kind: str) -> dict[str, float]:
    """The limits of each pipeline on a kind of device.

    Raises:
      UsageError: there are none, or not for all.
    """
    limits = plain.limits.get(kind, {})
    missing = [name for name in plain.pipelines if name not in limits]
    if missing:
        lacks = f"{plain.path} has no limit on {kind} for {', '.join(missing)}"
        raise UsageError(f"{lacks}: write them with --gate-record")
    return limits


def gate(config: BenchConfig, plain: Gate) -> dict[str, Any]:
    """Time our steps and the plain ones in turns on one device, in float32, pipeline by pipeline.

    Raises:
      RunError: pipelines that are slower than their limit allows, twice.
    """
    config = replace(config, model="resnet20", batch=BATCH, image_size=32, classes=10, dtype="float32", mode="jit")
    config = replace(config, cache="none", xla=())
    mesh = make_mesh(devices_of(config.device)[:1])

    def runners(name: str) -> tuple[Runner, Runner]:
        return prepare(config, mesh, OURS[name](config)).stepper, plain.pipelines[name](BATCH)

    counts = {"steps": config.steps, "repeats": config.repeats, "warmup": config.warmup}
    kind = f"{mesh.devices.flat[0].platform} {kernels(config)[0]}"
    limits = None if config.gate_record else limits_for(plain, kind)
    found = judged(runners, list(plain.pipelines), limits, **counts)
    if config.gate_record:
        recorded = {name: round(one["value"], 3) for name, one in found.items()}
        write_json(plain.path, {**plain.limits, kind: recorded})
    slow = [name for name, one in found.items() if not one["passed"]]
    if slow:
        said = ", ".join(
            f"{name} takes {found[name]['value']:.2f}x the plain step's time (limit {found[name]['limit']:.2f}x)"
            for name in slow
        )
        raise RunError(f"slower than {plain.path} allows, and {TOLERANCE - 1:.0%} more: {said}")
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
    """For each pipeline the ratio of times, ours to plain, its interval, and whether it holds; progress on stderr.

    It does not hold where even the low end is above `TOLERANCE` times the limit, in two measurements.
    """
    found = {}
    for name in names:
        ours, plain = runners(name)
        for attempt in (1, 2):
            seconds = interleaved({"ours": ours, "plain": plain}, steps=steps, repeats=repeats, warmup=warmup)
            one: dict[str, Any] = ratio(seconds["ours"], seconds["plain"])
            limit = None if limits is None else limits[name]
            passed = limit is None or one["low"] <= limit * TOLERANCE
            found[name] = {**one, "limit": limit, "passed": passed, "measured": attempt}
            span = f"{one['value']:.2f}x ({one['low']:.2f}-{one['high']:.2f})"
            held = "" if limit is None else f", limit {limit:.2f}x: {'holds' if passed else 'slower'}"
            print(f"{name}: ours takes {span} the plain step's time{held}", file=sys.stderr)
            if passed:
                break
    return found
