"""The machine: which devices, what they can do at best, how much memory there is and was used."""

import contextlib
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from resnet_jax.parallel import AXIS, batch_sharding
from train.errors import UsageError

# Sides of the matrices whose product is the ceiling; larger ones are left out once a product takes this long.
SIDES = {"cpu": (512, 1024, 2048), "gpu": (4096, 8192), "tpu": (4096, 8192)}
LONG = 0.1  # seconds
COPIED = 1 << 28  # bytes that are read, and as many written: far more than any cache holds


def devices_of(kind: str) -> list[jax.Device]:
    """This process's view of the devices of a kind: `auto` (jax's default), `cpu`, `gpu` or `tpu`.

    Raises:
      UsageError: there are none, or jax's default are others.
    """
    if kind == "auto":
        return jax.devices()
    try:
        found = jax.devices(kind)
    except RuntimeError:
        have = f"{jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()})"
        raise UsageError(f"--device {kind}: jax has none here, only {have}") from None
    if jax.default_backend() != kind:
        raise UsageError(f"--device {kind}: jax runs on {jax.default_backend()} here; set JAX_PLATFORMS={kind}")
    return found


def surroundings() -> dict[str, Any]:
    """What else a speed depends on: when, how busy the machine is, the environment's tunables."""
    names = ("XLA_FLAGS", "LD_PRELOAD", "GLIBC_TUNABLES", "JAX_PLATFORMS", "OMP_NUM_THREADS")
    load = os.getloadavg() if hasattr(os, "getloadavg") else (None,)
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "load_average": load[0],
        "usable_cores": usable_cores(),
        "environment_variables": {name: os.environ[name] for name in names if name in os.environ},
    }


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ceilings(mesh: Mesh, dtype: Any, peak: float | None) -> dict[str, Any]:
    """What all devices of the mesh do at best.

    `peak_tflops` is `peak` (stated, of one device) times the devices, or the best measured product of square matrices
    in `dtype`, each device its own; `copy_gb_s` is what adding to a large array in place reads and writes a second.
    """
    kind = mesh.devices.flat[0].platform
    measured = None if peak is not None else _matmul_tflops(mesh, dtype, SIDES.get(kind, SIDES["gpu"]))
    return {
        "matmul_tflops": measured,
        "copy_gb_s": _copy_gb_s(mesh, COPIED),
        "peak_tflops": measured if peak is None else peak * mesh.size,
        "peak_source": "measured matrix products" if peak is None else "stated",
    }


def _matmul_tflops(mesh: Mesh, dtype: Any, sides: tuple[int, ...]) -> float:
    def own(x: jax.Array) -> jax.Array:
        return x @ x

    spec = PartitionSpec(AXIS)
    product = jax.jit(jax.shard_map(own, mesh=mesh, in_specs=spec, out_specs=spec))
    best = 0.0
    for side in sides:
        x = _filled((mesh.size * side, side), dtype, mesh)
        seconds = _quickest(lambda x=x: product(x))
        best = max(best, mesh.size * 2 * side**3 / seconds / 1e12)
        if seconds > LONG:
            break
    return best


def _copy_gb_s(mesh: Mesh, size: int) -> float:
    held = [_filled((mesh.size * (size // 4 // mesh.size),), jnp.float32, mesh)]
    add = jax.jit(lambda x: x + 1, out_shardings=batch_sharding(mesh), donate_argnums=0)

    def again() -> jax.Array:
        # In place: on a CPU new memory would be most of the time.
        held[0] = add(held[0])
        return held[0]

    return 2 * held[0].nbytes / _quickest(again) / 1e9


def _filled(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> jax.Array:
    """Small values, made where they will be used."""
    make = jax.jit(lambda: jnp.full(shape, 2.0**-7, dtype), out_shardings=batch_sharding(mesh))
    return jax.block_until_ready(make())


def _quickest(runner: Any) -> float:
    """Seconds of the best of five calls, after one that compiles."""
    jax.block_until_ready(runner())
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(runner())
        seconds.append(time.perf_counter() - began)
    return float(np.min(seconds))


def available_bytes(device: jax.Device) -> int | None:
    """Memory that a device's programs can have, in bytes: its own, or what the host has left; None if neither says."""
    stats = device.memory_stats() or {}
    if device.platform != "cpu":
        return stats.get("bytes_limit")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def forget_peak() -> None:
    """Start the process's peak resident set anew, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: jax.Device) -> tuple[int, str]:
    """The most memory used so far, in bytes, and who says so: the device's allocator, else the process."""
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if peak is not None:
        return peak, "device allocator"
    source = "peak resident set of the process"
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), source
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, source
