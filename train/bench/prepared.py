"""One step made ready: compiled cold and from the cache, laid out on its devices, called once."""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.experimental.serialize_executable import serialize
from jax.sharding import Mesh

from resnet_jax.parallel import batch_sharding, compile_step, place, replicated
from resnet_jax.tree import PyTree
from train import runtime
from train.bench import work
from train.bench.config import BenchConfig
from train.bench.tasks import Step, Workload, kernels
from train.errors import UsageError
from train.from_config import compute_dtype


class Stepper:
    """Calls a step as a loop does: with `carried` the new state goes into the next call. Records each dispatch.

    Attributes:
      dispatched: host seconds until each call returned, [calls]; the device may still be busy after that.
    """

    def __init__(self, step: Any, state: PyTree, batch: PyTree, *, carried: bool) -> None:
        self.step, self.state, self.batch, self.carried = step, state, batch, carried
        self.dispatched: list[float] = []

    def __call__(self) -> Any:
        began = time.perf_counter()
        result = self.step(self.state, self.batch)
        self.dispatched.append(time.perf_counter() - began)
        if self.carried:
            self.state = result[0]
        return result

    def ahead(self) -> Any:
        """A call whose result can still be waited for after the next call, which consumes the state of this one."""
        result = self()
        return result[1] if self.carried else result


@dataclass(kw_only=True)
class Prepared:
    """A compiled step with its arguments on their devices.

    Attributes:
      start: seconds of each phase up to the first result; see `start`.
      traces: how often the step was traced, by compilation: `cold` is the one that runs, `warm` the one from the cache.
      seconds: `each` and `ahead` [repeats, steps], `dispatch` [calls]; filled in by `time_steps`.
      counts: how often the `step` and those one `ahead` were timed; filled in by `time_steps`.
    """

    config: BenchConfig
    mesh: Mesh
    workload: Workload
    stepper: Stepper
    compiled: Any
    start: dict[str, Any]
    traces: Counter[str]
    seconds: dict[str, np.ndarray] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)


def prepare(config: BenchConfig, mesh: Mesh, workload: Workload) -> Prepared:
    """Compile a workload's step, cold and from the cache, and call it once.

    Raises:
      UsageError: a batch that does not fit into memory, unknown compiler options.
    """
    traces: Counter[str] = Counter()

    def build(name: str) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            traces[name] += 1
            return workload.step(*args, **kwargs)

        return compiled_for(config, mesh, rows=workload.rows, donate=workload.carried and config.donate)(counted)

    runtime.say(f"compiling {config.task} of {config.model}, batch {config.batch}")
    try:
        state, batch = place(workload.state, replicated(mesh)), make_batch(workload.batch, config, mesh)
        step, compiled, times = start(build, state, batch)
        check_fits(config, mesh, compiled)
        stepper = Stepper(step, state, batch, carried=workload.carried)
        began = time.perf_counter()
        jax.block_until_ready(stepper())
        times["first_run_s"] = time.perf_counter() - began
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise UsageError(f"out of memory with --batch {config.batch}: choose a smaller one") from None
        if config.xla and "option" in str(error).lower():
            raise UsageError(f"--xla {' '.join(config.xla)}: {str(error).splitlines()[0]}") from None
        raise
    return Prepared(
        config=config, mesh=mesh, workload=workload, stepper=stepper, compiled=compiled, start=times, traces=traces
    )


def check_fits(config: BenchConfig, mesh: Mesh, compiled: Any) -> None:
    """Refuse, before it runs, a step that by the compiler's plan needs more memory than there is.

    Raises:
      UsageError: that, with a batch that would fit.
    """
    device = mesh.devices.flat[0]
    sharing = mesh.size if device.platform == "cpu" else 1  # CPU devices share the host's memory
    planned, there = work.memory(compiled)["planned_bytes"] * sharing, work.available_bytes(device)
    if there is not None and planned > there:
        fitting = int(config.batch * there / planned * 0.9) // mesh.size * mesh.size
        hint = f"about {fitting} would" if fitting else "choose a smaller model or --image-size"
        needed = f"{planned / 2**30:.1f} GiB of the {there / 2**30:.1f} GiB available"
        raise UsageError(f"--batch {config.batch} does not fit: the compiled step needs {needed}; {hint}")


def compiled_for(config: BenchConfig, mesh: Mesh, *, rows: bool, donate: bool = False) -> Callable[[Step], Any]:
    """`compile_step` with the config's mode and options bound."""
    options = compiler_options(config)
    return partial(compile_step, mesh=mesh, mode=config.mode, donate=donate, rows=rows, compiler_options=options)


def compiler_options(config: BenchConfig) -> dict[str, Any]:
    """XLA's options: those of the pipelines, and the config's own; pmap takes none."""
    if config.mode == "pmap":
        return {}
    pipelines = runtime.compiler_options(compute_dtype(config.dtype), plain=kernels(config)[0] == "plain")
    return {**pipelines, **runtime.xla_options(config.xla)}


def make_batch(shapes: dict[str, jax.ShapeDtypeStruct], config: BenchConfig, mesh: Mesh) -> dict[str, jax.Array]:
    """Seeded noise on the devices: uint8 images, labels, all valid, as named; pmap has an axis of devices."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, shapes["image"].shape, np.uint8)
    labels = rng.integers(0, config.classes, len(images), np.int32)
    host = {"image": images, "label": labels, "valid": np.ones(len(images), bool)}
    leading = (mesh.size, -1) if config.mode == "pmap" else (-1,)
    return {name: place(host[name].reshape(*leading, *host[name].shape[1:]), batch_sharding(mesh)) for name in shapes}


# --- start: tracing, lowering, compiling ------------------------------------------------------------------------------


def start(build: Callable[[str], Any], state: PyTree, batch: PyTree) -> tuple[Any, Any, dict[str, Any]]:
    """(the jitted step, its compiled program, how long it took to get there); calls of the step use that program.

    The seconds are those of tracing (None under pmap, which traces while it lowers), of lowering, and of compiling
    twice: cold, with writing to an empty cache, and warm, read back from it as the next process would. `cache_hits` and
    `cache_misses` are JAX's own counts over both.

    Args:
      build: makes the step, as a new function in each call, so that JAX remembers nothing of the last one.
    """
    with tempfile.TemporaryDirectory() as folder, cache_in(folder):
        step = build("cold")
        compiled, cold, events = _compile(step, state, batch)
        _, warm, more = _compile(build("warm"), state, batch)
    figures = {
        "trace_s": cold["trace"] if hasattr(step, "trace") else None,
        "lower_s": cold["lower"],
        "compile_cold_s": cold["compile"],
        "compile_warm_s": warm["compile"],
        "cache_hits": (events + more)["cache_hits"],
        "cache_misses": (events + more)["cache_misses"],
        "executable_bytes": len(serialize(compiled)[0]),
    }
    return step, compiled, figures


def _compile(step: Any, state: PyTree, batch: PyTree) -> tuple[Any, dict[str, float], Counter[str]]:
    """(the compiled program, seconds of each phase, JAX's counts of events about its persistent cache)."""
    marks = [time.perf_counter()]
    traced = step.trace(state, batch) if hasattr(step, "trace") else None
    marks.append(time.perf_counter())
    lowered = step.lower(state, batch) if traced is None else traced.lower()
    marks.append(time.perf_counter())
    events: Counter[str] = Counter()

    def listen(event: str, **_: Any) -> None:
        events[event.removeprefix("/jax/compilation_cache/")] += 1

    # Only here: constants computed while tracing are compiled too, and should not count.
    jax.monitoring.register_event_listener(listen)
    try:
        compiled = lowered.compile()
    finally:
        jax.monitoring.unregister_event_listener(listen)
    marks.append(time.perf_counter())
    return compiled, dict(zip(("trace", "lower", "compile"), np.diff(marks).tolist(), strict=True)), events


@contextmanager
def cache_in(folder: str) -> Iterator[None]:
    """Send everything that is compiled inside through a persistent cache in `folder`, however small.

    Afterwards JAX's settings are as before. It checks only once for each process whether there is a cache, so both
    changes reset it.
    """
    settings = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()
