"""The benchmark of compiled steps: `python -m train.bench [--FIELD VALUE ...]`, or in a notebook

from train.bench import BenchConfig, bench
result = bench(BenchConfig(model="resnet20", batch=128))
print(result["images_per_second"])
"""

import os
import time
from dataclasses import asdict, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from resnet_jax.parallel import make_mesh
from train.bench.compare import gate, versus
from train.bench.config import BenchConfig, check, other
from train.bench.feeding import Augmentations, augmentations, augments, inputs
from train.bench.prepared import prepare
from train.bench.tasks import TASKS, Tasks
from train.bench.timed import described, shares, time_runners, time_steps
from train.bench.work import ceilings, one_core, usable_cores
from train.data.batches import check_batch
from train.from_config import compute_dtype
from train.paths import local_path, make_folder
from train.run_folder import environment, write_json
from train.runtime import say
from train.timing import ratio

__all__ = ["BenchConfig", "bench"]

# Environment variables that a speed depends on.
TUNABLES = ("XLA_FLAGS", "LD_PRELOAD", "GLIBC_TUNABLES", "JAX_PLATFORMS", "OMP_NUM_THREADS")


def bench(config: BenchConfig, *, tasks: Tasks = TASKS, augmentations: Augmentations = augmentations) -> dict[str, Any]:
    """Measure what `config` describes; with `out`, the result is also written to a file of its own.

    Args:
      tasks: the tasks to choose from, in addition to `augment` and `input`.
      augmentations: timed by the task `augment`; `train` must be one of them.

    Raises:
      UsageError: something that the user can fix.
      RunError: a gate that fails.
    """
    check(config, tasks)
    second = other(config, tasks) if config.versus else None
    if config.out is not None:
        make_folder(local_path(config.out), "cannot make the folder --out")  # before the time is spent
    conditions = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "usable_cores": usable_cores(),
        "environment_variables": {name: os.environ[name] for name in TUNABLES if name in os.environ},
    }

    if config.gate is not None:
        with one_core():
            result = gate(config, make_mesh(jax.devices()[:1]))
    else:
        mesh = make_mesh()
        for one in (config, second or config):
            check_batch(one.batch, mesh.size)
        # Before anything has warmed up the machine.
        say("measuring the ceilings of the device")
        ceiling = ceilings(mesh, compute_dtype(config.dtype), config.peak)
        if second is not None:
            result = versus(config, second, mesh, tasks, ceiling)
        elif config.task == "augment":
            result = augments(config, mesh, augmentations)
        elif config.task == "input":
            result = inputs(config, mesh)
        else:
            result = measured(config, mesh, tasks, ceiling)
        result["ceilings"] = ceiling
    result |= {**environment(), **conditions, "config": asdict(config)}
    if config.out is not None:
        path = free_path(local_path(config.out), result)
        write_json(path, result)
        result["file"] = str(path)
    return result


def measured(config: BenchConfig, mesh: Mesh, tasks: Tasks, ceiling: dict[str, Any]) -> dict[str, Any]:
    """The figures of one task's step, of its parts, and of its variants."""
    workload = tasks[config.task](config)
    one = prepare(config, mesh, workload)
    variants = {name: prepare(config, mesh, variant) for name, variant in workload.variants.items()}
    time_steps({"step": one, **variants}, config)
    if config.profile is not None:
        with jax.profiler.trace(str(local_path(config.profile))):
            for _ in range(3):
                jax.block_until_ready(one.stepper())
    result = described(one, ceiling)
    if config.shares:
        result["shares"], result["counts"]["parts"] = shares(one)
    if variants:
        seconds = {name: variant.seconds["each"] for name, variant in variants.items()}
        result["dense_step_ms"] = float(np.median(seconds["dense"]) * 1e3)
        result["masking_overhead"] = ratio(one.seconds["each"], seconds["dense"])
        new_masks = np.median(seconds["every"]) - np.median(one.seconds["each"])
        result["new_masks_ms"] = float(max(new_masks, 0) * 1e3)
    if config.task == "predict":
        # Latency: a single image on one device.
        single = replace(config, batch=1)
        one = prepare(single, make_mesh([mesh.devices.flat[0]]), tasks[config.task](single))
        seconds, result["counts"]["latency"] = time_runners({"one": one.stepper}, config)
        p50, p95 = np.percentile(seconds["one"], [50, 95]) * 1e3
        result["latency_ms"] = {"batch": 1, "p50": float(p50), "p95": float(p95)}
    return result


def free_path(out: Path, result: dict[str, Any]) -> Path:
    """A file name that says what a result measured; if it is taken, with -2, -3 and so on."""
    config = result["config"]
    action = next((name for name in ("versus", "gate") if config[name]), result["task"])
    kind = jax.devices()[0].device_kind.replace(" ", "_").replace("/", "_")
    size = f"{config['batch']}x{config['image_size']}"
    stem = "-".join([action, config["model"], size, config["dtype"], config["mode"], kind])
    suffixes = chain([""], (f"-{n}" for n in count(2)))
    paths = (out / f"{stem}{suffix}.json" for suffix in suffixes)
    return next(path for path in paths if not path.exists())
