"""What a process of a pipeline sets up for itself: its hosts, where compiled programs are kept, how freed memory is.

The mains of training and benchmarks do it, and `train.run.run` for the cache; importing never does.
"""

import ctypes
import hashlib
import os
import sys
from importlib import metadata, util
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from resnet_jax.onednn import cache_folder
from train.errors import RunError, UsageError

# glibc's mallopt, malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_compiled(folder: str = "auto") -> Path | None:
    """Keep compiled programs in a folder, so that a second start finds them; returns the folder, None if switched off.

    `auto` is JAX's own setting (JAX_COMPILATION_CACHE_DIR) where there is one, else `cache_folder()`/compiled, apart
    for each kind of processor: code for one may not run on another. `none` keeps nothing.

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
    """Whether JAX will have no device but the CPU, told without starting it."""
    platforms = getattr(jax.config, "jax_platforms", None) or ""
    if platforms:
        return platforms == "cpu"
    return not metadata.entry_points(group="jax_plugins") and util.find_spec("libtpu") is None


def join_hosts(distributed: str | None) -> None:
    """Make this process one of several: `auto`, or COORDINATOR:PORT,COUNT,INDEX; None stays alone.

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
