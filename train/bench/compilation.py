"""From a step to a program: tracing, lowering and compiling apart, cold and from a persistent cache."""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.experimental.serialize_executable import serialize
from jax.sharding import Mesh, PartitionSpec

from resnet_jax.parallel import AXIS, Mode, axis_of, batch_sharding, make_mesh, replicated
from train.errors import UsageError


def compile_rows(
    step: Callable[..., Any], *, mesh: Mesh, mode: Mode = "jit", compiler_options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile `step(state, batch, *, axis_name)` whose results have the batch's rows, each device keeping its own.

    As `resnet_jax.parallel.compile_step`, whose steps return what is the same on every device; nothing is donated.
    """
    step = partial(step, axis_name=axis_of(mode))
    if mode == "pmap":
        devices = list(make_mesh(mesh.local_devices).devices.flat)
        return jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), devices=devices)
    if mode == "shard_map":
        specs = (PartitionSpec(), PartitionSpec(AXIS))
        step = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(AXIS))
    shardings = (replicated(mesh), batch_sharding(mesh))
    return jax.jit(
        step, in_shardings=shardings, out_shardings=batch_sharding(mesh), compiler_options=compiler_options or None
    )


def start(build: Callable[[], Any], example: tuple[Any, Any], cache: str) -> tuple[Any, Any, dict[str, Any]]:
    """(the jitted step, its compiled program, how long it took to get there); calls of the step use that program.

    Seconds of tracing (None where the compiler does it while lowering: pmap), lowering, and compiling twice: cold, with
    writing to the cache, and warm, read back from it as the next process would. `cache_hits` and `cache_misses` are
    JAX's own counts over both.

    Args:
      build: makes the step, jitted anew in each call, so that JAX remembers nothing of the last one.
      example: its arguments, arrays or their shapes with shardings.
      cache: `auto` uses an empty temporary folder, `none` no cache (compiled once), else a folder, where a first
        compilation that the folder already holds counts as warm.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = {"auto": scratch, "none": None}.get(cache, cache)
        with cache_in(folder):
            step = build()
            compiled, figures = _compile(step, example)
            seconds, events = [figures.pop("compile_s")], figures.pop("events")
            hit = bool(events["cache_hits"])
            if folder is not None and not hit:
                again = _compile(build(), example)[1]
                seconds.append(again["compile_s"])
                events += again["events"]
    return (
        step,
        compiled,
        {
            **figures,
            "compile_cold_s": None if hit else seconds[0],
            "compile_warm_s": None if folder is None else seconds[-1],
            "cache_hits": events["cache_hits"],
            "cache_misses": events["cache_misses"],
            "executable_bytes": len(serialize(compiled)[0]),
        },
    )


def _compile(step: Any, example: tuple[Any, Any]) -> tuple[Any, dict[str, Any]]:
    marks = [time.perf_counter()]
    traced = step.trace(*example) if hasattr(step, "trace") else None
    marks.append(time.perf_counter())
    lowered = step.lower(*example) if traced is None else traced.lower()
    marks.append(time.perf_counter())
    # What is computed while tracing compiles too, and is not meant.
    with cache_events() as events:
        compiled = lowered.compile()
    marks.append(time.perf_counter())
    trace, lower, compile = (after - before for before, after in pairwise(marks))
    figures = {"trace_s": None if traced is None else trace, "lower_s": lower, "compile_s": compile}
    return compiled, {**figures, "events": events}


@contextmanager
def cache_in(folder: str | None) -> Iterator[None]:
    """Inside, all that is compiled goes through a persistent cache in `folder`, however small; None goes without.

    Afterwards JAX is set as before: it notes once a process whether there is a cache, so it is told to look again.
    """
    settings = {
        "jax_enable_compilation_cache": folder is not None,
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


@contextmanager
def cache_events() -> Iterator[Counter[str]]:
    """Counts of JAX's events about its persistent cache: `cache_hits`, and `cache_misses` that were then written."""
    counts: Counter[str] = Counter()

    def listen(event: str, **_: Any) -> None:
        if event.startswith("/jax/compilation_cache/"):
            counts[event.rsplit("/", 1)[-1]] += 1

    jax.monitoring.register_event_listener(listen)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_listener(listen)


@contextmanager
def one_line_faults(what: Callable[[], str], xla: Sequence[str] = ()) -> Iterator[None]:
    """Turn XLA's out-of-memory and unknown `xla` options into the user's errors; `what()` says what was being run."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise UsageError(f"out of memory: {what()}; choose a smaller --batch") from None
        if xla and "option" in str(error).lower():
            raise UsageError(f"--xla {' '.join(xla)}: {str(error).splitlines()[0]}") from None
        raise
