"""The operations and the memory of a step, what the devices offer of both, and how near a step comes to that.

By convention only convolutions and dense layers count, two operations for each multiply-add, including the taps that
fall on padding. Training costs three forward passes, less the gradient for the images, which is never computed.
"""

import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from resnet_jax.masks import no_masks
from resnet_jax.parallel import AXIS, batch_sharding
from train.prune.layers import layer_table
from train.state import init_variables

# Sides of the matrices whose product is the ceiling; larger ones are left out once a product takes `LONG` seconds.
CPU_SIDES, SIDES = (512, 1024, 2048), (4096, 8192)
LONG = 0.1
# Bytes that a pass over an array reads, and again that it writes, far more than any cache holds: on the host, and on
# an accelerator, where 2 GiB take half a millisecond and the start of a pass some microseconds.
CPU_COPIED, COPIED = 1 << 28, 1 << 30
CHAIN = 0.05  # seconds that a timed program should last, so that launching it and waiting for it hardly count


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

    `peak_tflops` is `peak` (stated, for one device) times the devices, or the best measured chain of products of random
    square matrices in `dtype`, one on each device; `copy_gb_s` is what passes over a large array in place read and
    write in a second. Either chain runs inside one program and each link needs the one before, so nothing is left out.
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

    # Two products an iteration: the second one's result takes the place of the first one's operand, without a copy.
    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(spec, spec, spec, PartitionSpec()), out_specs=spec)
    def chain(x: jax.Array, a: jax.Array, b: jax.Array, count: jax.Array) -> jax.Array:
        return lax.fori_loop(0, count, lambda _, x: x @ a @ b, x)

    # Random values: on constant ones a GPU draws less power, and runs faster than it ever does in a network. With this
    # deviation, products neither grow nor vanish.
    @partial(jax.jit, static_argnums=1, out_shardings=batch_sharding(mesh))
    def draw(key: jax.Array, side: int) -> jax.Array:
        return jax.random.normal(key, (mesh.size * side, side), dtype) * side**-0.5

    best = 0.0
    for side in CPU_SIDES if _on_cpu(mesh) else SIDES:
        matrices = [draw(key, side) for key in jax.random.split(jax.random.key(0), 3)]
        seconds = _quickest(partial(chain, *matrices)) / 2
        best = max(best, mesh.size * 2 * side**3 / seconds / 1e12)
        if seconds > LONG:
            break
    return best


def _copy_gb_s(mesh: Mesh) -> float:
    # CPU devices share the host's memory; every other device has its own.
    size = CPU_COPIED // 4 // mesh.size * mesh.size if _on_cpu(mesh) else COPIED // 4 * mesh.size
    array = jax.jit(lambda: jnp.arange(size, dtype=jnp.float32), out_shardings=batch_sharding(mesh))()

    # In place: on a CPU, new memory would take most of the time.
    @partial(jax.jit, donate_argnums=0, out_shardings=batch_sharding(mesh))
    def passes(x: jax.Array, count: int) -> jax.Array:
        return lax.fori_loop(0, count, lambda i, x: i.astype(x.dtype) - x, x)

    def run(count: int) -> jax.Array:
        nonlocal array
        array = passes(array, count)
        return array

    return 2 * array.nbytes / _quickest(run) / 1e9


def _on_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def _quickest(run: Callable[[int], jax.Array]) -> float:
    """Seconds of one iteration of a program of `count` iterations: the best of five runs, after one that compiles."""
    jax.block_until_ready(run(1))
    count, best = 1, math.inf
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(run(count))
        best = min(best, (time.perf_counter() - began) / count)
        count = max(int(CHAIN / best), 1)
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


@contextmanager
def one_core() -> Iterator[None]:
    """Keep this thread, and the threads that start meanwhile, on one core where the system can.

    A neighbour on one of several cores delays every barrier of oneDNN's threads, but hardly XLA's; on one core it slows
    both by the same factor, so their ratio holds. It has no effect on backends that were started before.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


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
