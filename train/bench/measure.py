"""A benchmark from top to bottom."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from resnet_jax.parallel import make_mesh
from train.bench.augments import augments
from train.bench.compare import against_stored, read_result, versus
from train.bench.config import OTHER_TASKS, STEP_TASKS, BenchConfig, check, other
from train.bench.device import ceilings, devices_of, surroundings
from train.bench.gate import gate, load_gate
from train.bench.inputs import inputs
from train.bench.prepared import Prepared, described, prepare, say, shares, time_steps
from train.bench.tasks import TASKS
from train.data.batches import check_batch
from train.errors import UsageError
from train.from_config import compute_dtype
from train.run_folder import environment, write_json
from train.timing import interleaved, ratio

SMALL = 32  # the batch of `all` on a CPU


def bench(config: BenchConfig, *, process: dict[str, Any] | None = None) -> dict[str, Any]:
    """Measure what `config` says; the result is also in a file of its own in `out`.

    `process` is what else to note of this process, such as `train.runtime.keep_memory`, which the command line calls.

    Raises:
      UsageError: what the user can mend. RunError: a gate that does not hold.
    """
    check(config)
    second = other(config) if config.versus else None
    stored = read_result(Path(config.compare), config) if config.compare else None
    plain = load_gate(Path(config.gate), config.gate_record) if config.gate else None
    make_folder(config.out)
    around = surroundings()
    mesh = make_mesh(devices_of(config.device))

    if plain is not None:
        result = gate(config, plain)
    else:
        for side in (config, second, stored.config if stored else None):
            check_batch((side or config).batch, mesh.size)
        # First of all, before anything has warmed the machine.
        say("measuring what the device can do at best")
        ceiling = ceilings(mesh, compute_dtype(config.dtype), config.peak)
        if second is not None:
            result = versus(config, second, mesh, ceiling)
        elif stored is not None:
            result = against_stored(config, stored, mesh, ceiling)
        elif config.all:
            result = {"task": "all", "all": every_task(config, mesh, ceiling)}
        else:
            result = measured(config, mesh, ceiling)
        result["ceilings"] = ceiling
    result |= {**environment(), **around, **(process or {}), "config": dataclasses.asdict(config)}
    if config.out is not None:
        result["file"] = str(write(Path(config.out), result))
    return result


def measured(config: BenchConfig, mesh: Mesh, ceiling: dict[str, Any]) -> dict[str, Any]:
    """One task's figures."""
    if config.task == "augment":
        return augments(config, mesh)
    if config.task == "input":
        return inputs(config, mesh)
    workload = TASKS[config.task](config)
    one = prepare(config, mesh, workload)
    group = {"step": one}
    beside = {"dense": workload.dense, "busy": workload.busy}
    group |= {name: prepare(config, mesh, other) for name, other in beside.items() if other is not None}
    time_steps(group, config)
    if config.profile is not None:
        profile(one, config.profile)
    result = described(one, ceiling)
    if config.shares:
        result["shares"] = shares(one)
    if "dense" in group:
        dense = group["dense"].seconds["each"]
        result["dense_step_ms"] = float(np.median(dense) * 1e3)
        result["masking_overhead"] = ratio(one.seconds["each"], dense)
        busy, step = (np.median(group[name].seconds["each"]) for name in ("busy", "step"))
        result["new_masks_ms"] = float(max(busy - step, 0) * 1e3)
    if config.task == "predict":
        result["latency_ms"] = latency(config, mesh)
    return result


def every_task(config: BenchConfig, mesh: Mesh, ceiling: dict[str, Any]) -> dict[str, Any]:
    """All tasks in turn, on a CPU with a small batch."""
    if mesh.devices.flat[0].platform == "cpu":
        config = dataclasses.replace(config, batch=min(config.batch, max(SMALL // mesh.size, 1) * mesh.size))
    tasks = STEP_TASKS + OTHER_TASKS
    return {task: measured(dataclasses.replace(config, task=task), mesh, ceiling) for task in tasks}


def latency(config: BenchConfig, mesh: Mesh) -> dict[str, Any]:
    """Milliseconds of classifying one image at a time on one device: median and 95th percentile."""
    single = dataclasses.replace(config, batch=1, cache="none")
    one = prepare(single, make_mesh([mesh.devices.flat[0]]), TASKS["predict"](single))
    seconds = interleaved({"one": one.stepper}, steps=config.steps, repeats=config.repeats, warmup=config.warmup)
    p50, p95 = np.percentile(seconds["one"], [50, 95]) * 1e3
    return {"batch": 1, "p50": float(p50), "p95": float(p95)}


def profile(one: Prepared, folder: str) -> None:
    """Three steps under JAX's profiler, for TensorBoard or Perfetto."""
    with jax.profiler.trace(folder):
        for _ in range(3):
            jax.block_until_ready(one.stepper())


def make_folder(out: str | None) -> None:
    """Make `out` before hours were spent on what goes there."""
    if out is not None:
        try:
            Path(out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make the folder --out {out}: {error.strerror}") from None


def write(out: Path, result: dict[str, Any]) -> Path:
    """A file of its own for a result, named by what it is of; a second of a kind gets -2."""
    config = result["config"]
    size = f"{config['batch']}x{config['image_size']}"
    action = next((name for name in ("versus", "compare", "gate") if config[name]), result["task"])
    kind = jax.devices()[0].device_kind.replace(" ", "_").replace("/", "_")
    stem = "-".join([action, config["model"], size, config["dtype"], config["mode"], kind])
    names = [out / f"{stem}.json", *(out / f"{stem}-{n}.json" for n in range(2, 10_000))]
    path = next(path for path in names if not path.exists())
    write_json(path, result)
    return path
