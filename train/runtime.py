"""Process-wide setup of a pipeline: hosts, the folder of compiled programs, freed memory, compiler options.

The mains of training and benchmarks do it, and `train.run.run` for the cache; importing never does.
"""

import ctypes
import hashlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from resnet_jax.onednn import cache_folder
from train.errors import RunError, UsageError

# glibc's mallopt, malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_compiled(folder: str = "auto") -> Path | None:
    """Keep compiled programs in a folder, so that a second start finds them; returns the folder, None if switched off.

    `auto` is JAX's own setting (JAX_COMPILATION_CACHE_DIR) where there is one, else `cache_folder()`/compiled, apart
    for each kind of processor: code for one may not run on a different one. `none` keeps nothing.

    Raises:
      UsageError: the folder cannot be made.
    """
    if folder == "none":
        _use(None)
        return None
    given = getattr(jax.config, "jax_compilation_cache_dir", None)
    if folder == "auto" and given:
        return Path(given)
    try:
        path = cache_folder() / "compiled" / _processor() if folder == "auto" else Path(folder).expanduser()
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        if folder == "auto":
            return None  # no home, or one that cannot be written to: then each start compiles
        raise UsageError(f"--cache {folder}: cannot make it: {getattr(error, 'strerror', error)}") from None
    _use(str(path))
    # JAX leaves out what compiled in under a second; a start on CPU is made of such programs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return path


def _use(folder: str | None) -> None:
    if getattr(jax.config, "jax_compilation_cache_dir", None) != folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()  # JAX looks once a process where its cache is


def _processor() -> str:
    """The instruction set, hashed."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        said = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        said = f"{sys.platform} {os.environ.get('PROCESSOR_IDENTIFIER', '')}"
    return hashlib.sha256(said.encode()).hexdigest()[:8]


def keep_memory() -> bool:
    """On CPU, let glibc keep what XLA frees: it frees and allocates all temporaries in each step.

    Pages handed back and faulted in again are a quarter of the step time of a small network. Whatever the process has
    freed then stays its own until it ends. Called before JAX starts its threads; returns whether it did anything.
    """
    if sys.platform != "linux" or not cpu_only():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in musl
    if mallopt is None:
        return False
    # Nothing is mapped by itself or given back, however large (thresholds end at 2 GiB, which a step's temporaries
    # exceed); one arena: only the main one can grow without limit.
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_ARENA_MAX: 1}
    done = [mallopt(name, value) for name, value in settings.items()]
    return all(done)


def cpu_only() -> bool:
    """Whether JAX will have only the CPU as a device, found out without starting it."""
    platforms = getattr(jax.config, "jax_platforms", None) or ""
    if platforms:
        return platforms == "cpu"
    return not metadata.entry_points(group="jax_plugins") and util.find_spec("libtpu") is None


def join_hosts(distributed: str | None) -> None:
    """Make this process one of several: `auto`, or COORDINATOR:PORT,COUNT,INDEX; None is a single process.

    Raises:
      RunError: the others cannot be reached.
    """
    if distributed is None or jax.distributed.is_initialized():
        return
    try:
        if distributed == "auto":
            jax.distributed.initialize()
        else:
            address, hosts, index = distributed.rsplit(",", 2)
            jax.distributed.initialize(address, int(hosts), int(index))
    except (RuntimeError, ValueError) as error:
        raise RunError(f"cannot join the other hosts (--distributed {distributed}): {error}") from None


def say(line: str) -> None:
    """A line on stderr, once for all hosts."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr)


def compiler_options(dtype: Any, *, plain: bool = True) -> dict[str, Any]:
    """XLA options for networks of this dtype on this backend, `plain` or not, for `jax.jit(compiler_options=...)`.

    Only on CPU. Plain convolutions in float32: options that keep XLA from fusing the weight gradient's transposition
    into the backward pass before it, and from handing convolutions to YNN; 1.2 to 1.8 times as fast (docs/speed.md).
    bfloat16: no YNN at all, which in jax 0.12 returns nan for some networks, a 3-stage ResNet on 32x32 images for one.
    """
    if jax.default_backend() != "cpu":
        return {}
    if jnp.dtype(dtype) == jnp.bfloat16:
        return known_options({YNN: ""})
    return known_options({"xla_cpu_opt_preset": "CPU_OPT_PRESET_FAST_COMPILE", YNN: YNN_FOR_FLOAT32}) if plain else {}


def xla_options(given: tuple[str, ...]) -> dict[str, str | bool]:
    """`--xla`'s NAME=VALUE each, as `jax.jit(compiler_options=...)` takes them."""
    words = {"true": True, "false": False}
    pairs = (option.split("=", 1) for option in given)
    return {name: words.get(value.lower(), value) for name, value in pairs}


YNN = "xla_cpu_experimental_ynn_fusion_type"
YNN_FOR_FLOAT32 = "LIBRARY_FUSION_TYPE_REDUCE,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"


def known_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options, if this jaxlib knows them all: it refuses what it does not know."""
    return dict(options) if _accepted(tuple(options.items())) else {}


@cache
def _accepted(options: tuple[tuple[str, Any], ...]) -> bool:
    try:
        jax.jit(lambda x: x, compiler_options=dict(options)).lower(0.0).compile()
    except (jax.errors.JaxRuntimeError, ValueError):
        return False
    return True


def compile_in(
    pool: ThreadPoolExecutor, step: Any, state: Any, batch: Any, *, pmap: bool = False, xla: Sequence[str] = ()
) -> Callable[[], tuple[Any, float]]:
    """Trace the step here and compile it in the pool; call what this returns for (the program, seconds).

    Tracing stays in this thread, whose settings (`jax.default_matmul_precision` and the like) are the caller's. pmap
    compiles when it is called.
    """
    if pmap:
        return lambda: (step, 0.0)
    began = time.perf_counter()
    lowered = step.lower(state, batch)
    traced = time.perf_counter() - began

    def compiled() -> tuple[Any, float]:
        began = time.perf_counter()
        try:
            program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if xla and "option" in str(error):
                raise UsageError(f"--xla {' '.join(xla)}: {error}") from None
            raise
        return program, traced + time.perf_counter() - began

    return pool.submit(compiled).result
