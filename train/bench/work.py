"""The operations and the memory of a step, what the devices offer of both, and how near a step comes to that.

By convention only convolutions and dense layers count, two operations for each multiply-add, including the taps that
fall on padding. Training costs three forward passes, less the gradient for the images, which is never computed.
"""

import math
import os
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from resnet_jax.masks import no_masks
from resnet_jax.parallel import AXIS, batch_sharding
from train.prune.layers import layer_table
from train.state import init_variables

# Sides of the matrices whose product is the ceiling; larger ones are left out once a product takes `LONG` seconds.
CPU_SIDES, SIDES = (512, 1024, 2048), (4096, 8192)
LONG = 0.1
COPIED = 1 << 28  # bytes read by a copy, and as many written: far more than any cache holds
CHAIN = 0.02  # seconds that calls without a wait between them should last, so that dispatching them does not count


# --- operations by convention -----------------------------------------------------------------------------------------


class Work(NamedTuple):
    """Operations by convention: all of them, and those of the first layer."""

    flops: float
    first: float


def forward(model: nn.Module, image_size: int) -> Work:
    """The work of a forward pass of one image [image_size, image_size, 3]; nothing is computed."""
    shape = (image_size, image_size, 3)
    variables = jax.eval_shape(partial(init_variables, model, image_shape=shape), jax.random.key(0))
    rows = layer_table(model, variables, no_masks(variables["params"]), shape)
    flops = [2.0 * row["macs"] for row in rows]
    return Work(sum(flops), flops[0])


def training(forward: Work) -> float:
    """Operations of a forward and a backward pass, from the work of the forward pass."""
    return 3 * forward.flops - forward.first


# --- ceilings ---------------------------------------------------------------------------------------------------------


def ceilings(mesh: Mesh, dtype: Any, peak: float | None) -> dict[str, Any]:
    """The best that all devices of the mesh can do together.

    `peak_tflops` is `peak` (stated, for one device) times the devices, or the best measured product of square matrices
    in `dtype`, one on each device; `copy_gb_s` is what adding to a large array in place reads and writes in a second.
    """
    measured = None if peak is not None else _matmul_tflops(mesh, dtype)
    return {
        "matmul_tflops": measured,
        "copy_gb_s": _copy_gb_s(mesh),
        "peak_tflops": measured if peak is None else peak * mesh.size,
        "peak_source": "measured matrix products" if peak is None else "stated",
    }


def _matmul_tflops(mesh: Mesh, dtype: Any) -> float:
    spec = PartitionSpec(AXIS)
    product = jax.jit(jax.shard_map(lambda x: x @ x, mesh=mesh, in_specs=spec, out_specs=spec))

    # Random values: on constant ones a GPU draws less power, and runs faster than it ever does in a network.
    @partial(jax.jit, static_argnums=(0, 1), out_shardings=batch_sharding(mesh))
    def draw(*shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(0), shape, dtype)

    best = 0.0
    for side in CPU_SIDES if mesh.devices.flat[0].platform == "cpu" else SIDES:
        x = draw(mesh.size * side, side)
        seconds = _quickest(partial(product, x))
        best = max(best, mesh.size * 2 * side**3 / seconds / 1e12)
        if seconds > LONG:
            break
    return best


def _copy_gb_s(mesh: Mesh) -> float:
    size = mesh.size * (COPIED // 4 // mesh.size)
    array = jax.jit(lambda: jnp.zeros(size), out_shardings=batch_sharding(mesh))()
    # In place: on a CPU, new memory would take most of the time.
    add = jax.jit(lambda x: x + 1, out_shardings=batch_sharding(mesh), donate_argnums=0)

    def again() -> jax.Array:
        nonlocal array
        array = add(array)
        return array

    return 2 * array.nbytes / _quickest(again) / 1e9


def _quickest(call: Callable[[], jax.Array]) -> float:
    """Seconds of a call: the best of five chains of calls that are waited for together, after one that compiles."""
    jax.block_until_ready(call())
    chain, best = 1, math.inf
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(chain):
            last = call()
        jax.block_until_ready(last)
        best = min(best, (time.perf_counter() - began) / chain)
        chain = min(max(int(CHAIN / best), 1), 100)
    return best


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(compiled: Any) -> dict[str, int]:
    """The compiler's plan, bytes on each device: arguments, results, temporaries, and what shares a place."""
    stats = compiled.memory_analysis()
    parts = {
        "arguments_bytes": stats.argument_size_in_bytes,
        "outputs_bytes": stats.output_size_in_bytes,
        "temporaries_bytes": stats.temp_size_in_bytes,
        "aliased_bytes": stats.alias_size_in_bytes,
        "code_bytes": stats.generated_code_size_in_bytes,
    }
    return {**parts, "planned_bytes": sum(parts.values()) - 2 * parts["aliased_bytes"]}


def available_bytes(device: jax.Device) -> int | None:
    """Bytes of memory that programs can have: the device's own, or what is left on the host; None if unknown."""
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def peak_memory(device: jax.Device) -> tuple[int, str]:
    """(the most memory used so far in bytes, the source of that figure: the device's allocator, else the process)."""
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if peak is not None:
        return peak, "device allocator"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "peak resident set of the process"


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- a step against the ceilings --------------------------------------------------------------------------------------


def figures(
    flops: float, compiled: Any, *, images: int, devices: int, seconds: float, ceilings: dict[str, Any]
) -> dict[str, Any]:
    """Work per image, by convention (`flops`) and as XLA counts, and how near a step comes to the ceilings.

    XLA counts the optimised program of one device. `mfu` is the conventional count as a share of the peak; `bound`
    compares the operations for each byte that XLA would move with what the ceilings offer.
    """
    cost = compiled.cost_analysis() or {}
    xla_flops, xla_bytes = (cost.get(name, 0.0) * devices / images or None for name in ("flops", "bytes accessed"))
    peak, achieved = ceilings["peak_tflops"] * 1e12, flops * images / seconds
    work: dict[str, Any] = {
        "analytic_flops_per_image": flops,
        "xla_flops_per_image": xla_flops,
        "xla_bytes_per_image": xla_bytes,
        "achieved_tflops": achieved / 1e12,
    }
    if xla_flops:
        work["ratio"] = xla_flops / flops
    if xla_bytes:
        intensity, ridge = flops / xla_bytes, peak / (ceilings["copy_gb_s"] * 1e9)
        work |= {"intensity_flops_per_byte": intensity, "ridge_flops_per_byte": ridge}
        work["bound"] = "compute" if intensity >= ridge else "memory"
    return {"work": work, "mfu": achieved / peak}
