"""Process-wide setup of a pipeline: hosts, the folder of compiled programs, freed memory, compiler options.

Entry points do it, and `train.session.open_session` for hosts and compiled programs; importing never does.
"""

import ctypes
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata, util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from resnet_jax.onednn import cache_folder
from train.errors import LostHostError, RunError, UsageError
from train.paths import local_path

# glibc's mallopt, malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def cache_root(cache: str) -> Path | None:
    """Folder of what `--cache` keeps: `auto` is `cache_folder()`; None for `none`, or if there is no home folder."""
    if cache == "none":
        return None
    try:
        return cache_folder() if cache == "auto" else local_path(cache)
    except RuntimeError:
        return None


def decoded_folder(cache: str) -> Path | None:
    """Folder of decoded sets, see `train.data.decoded`; None keeps none."""
    root = cache_root(cache)
    return root and root / "decoded"


def keep_compiled(cache: str = "auto") -> Path | None:
    """Keep compiled programs for later runs in `cache_root`/compiled; returns their folder, None if there is none.

    `auto` is JAX's setting (JAX_COMPILATION_CACHE_DIR) if there is one, else a folder for this type of processor, as
    code compiled for one type may not run on a different one.

    Raises:
      UsageError: the folder cannot be created.
    """
    root, given = cache_root(cache), getattr(jax.config, "jax_compilation_cache_dir", None)
    if cache == "auto" and given:
        return Path(given)
    if root is None:
        if cache == "none":
            _use(None)
        return None
    path = root / "compiled" / (_processor() if cache == "auto" else "")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if cache == "auto":
            return None  # no writable home folder: every run compiles
        raise UsageError(f"--cache {cache}: cannot create it: {error.strerror}") from None
    _use(str(path))
    # By default JAX skips programs that compile in under a second, which is most of them on CPU.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return path


def _use(folder: str | None) -> None:
    if getattr(jax.config, "jax_compilation_cache_dir", None) != folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()  # JAX reads its cache's folder only once per process


def _processor() -> str:
    """Hash of the processor's instruction set, 8 hexadecimal digits."""
    flags = cpu_line("flags", "Features") or f"{sys.platform} {os.environ.get('PROCESSOR_IDENTIFIER', '')}"
    return hashlib.sha256(flags.encode()).hexdigest()[:8]


def cpu_line(*starts: str) -> str:
    """First line of /proc/cpuinfo with one of these starts, empty if there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(starts)), "")


def keep_memory() -> bool:
    """On CPU, let glibc keep the memory that XLA frees: XLA frees and reallocates all temporaries in each step.

    Returning pages and faulting them in again takes a quarter of the step time of a small network. Freed memory then
    stays with the process until it ends. Call it before JAX starts its threads; returns whether it had any effect.
    """
    if sys.platform != "linux" or not cpu_only():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in musl
    if mallopt is None:
        return False
    # Never map an allocation separately or return memory, whatever its size (thresholds end at 2 GiB, which a step's
    # temporaries exceed). Use one arena: only the main one can grow without limit.
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_ARENA_MAX: 1}
    done = [mallopt(name, value) for name, value in settings.items()]
    return all(done)


def use_own_precision() -> None:
    """Ignore JAX_ENABLE_X64 and JAX_NUMPY_DTYPE_PROMOTION: all that a run saves is float32, and so are its steps."""
    jax.config.update("jax_enable_x64", False)
    jax.config.update("jax_numpy_dtype_promotion", "standard")


def cpu_only() -> bool:
    """Whether the CPU will be JAX's only device, determined without initialising JAX."""
    platforms = getattr(jax.config, "jax_platforms", None) or ""
    if platforms:
        return platforms == "cpu"
    return not metadata.entry_points(group="jax_plugins") and util.find_spec("libtpu") is None


def join_hosts(distributed: str | None) -> None:
    """Join the other hosts: `auto`, or COORDINATOR:PORT,COUNT,INDEX; None does nothing (a single process).

    Raises:
      RunError: the other hosts cannot be reached.
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


@contextmanager
def all_hosts() -> Iterator[None]:
    """If this block fails on one host, it fails on all of them, with that host's error."""
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    # Hosts meet at JAX's coordinator, not in a collective: one may be minutes later than the others.
    if (client := _coordinator()) is not None:
        number = next(_meetings)
        text = f"{type(failed).__name__}: {failed}" if failed else ""
        try:
            client.key_value_set(f"resnet-jax/{number}/{jax.process_index()}", text or "-")
            client.wait_at_barrier(f"resnet-jax-{number}", MEETING_SECONDS * 1000)
            texts = [
                client.blocking_key_value_get(f"resnet-jax/{number}/{host}", 10_000)
                for host in range(jax.process_count())
            ]
        except jax.errors.JaxRuntimeError as error:
            raise failed or lost_host(error) from None
        bad = next((host for host, text in enumerate(texts) if text != "-"), None)
        if failed is None and bad is not None:
            kind, _, message = texts[bad].partition(": ")
            raise (UsageError if kind == "UsageError" else RunError)(f"host {bad} failed: {message or kind}")
    if failed is not None:
        raise failed


def lost_host(error: Exception, kept: str = "") -> LostHostError:
    """Make the error for a host that stopped, of JAX's own; `kept` says what is left of the run."""
    reason = str(error).splitlines()[0][:200]
    return LostHostError(f"a different host has stopped or cannot be reached ({reason}){kept}")


MEETING_SECONDS = 3600  # how much later than the first the last host may have opened and compiled all it needs
_meetings = itertools.count()


def _coordinator() -> Any:
    """The client of JAX's coordination service, None in a single process."""
    from jax._src import distributed  # has no public name

    return distributed.global_state.client


def say(line: str) -> None:
    """Print a line on stderr, from the first host only."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr)


def compiler_options(dtype: Any, *, plain: bool = True) -> dict[str, Any]:
    """XLA options for networks of this dtype on this backend, `plain` or not, for `jax.jit(compiler_options=...)`.

    Empty except on CPU. For plain (XLA) convolutions in float32, they keep XLA from fusing the weight gradient's
    transposition into the preceding backward pass, and from using YNN for convolutions: 1.2 to 1.8 times as fast
    (docs/speed.md). For bfloat16, they disable YNN, which in jax 0.12 returns nan for some networks, such as a 3-stage
    ResNet on 32x32 images.
    """
    if jax.default_backend() != "cpu":
        return {}
    if jnp.dtype(dtype) == jnp.bfloat16:
        return known_options({YNN: ""})
    return known_options({"xla_cpu_opt_preset": "CPU_OPT_PRESET_FAST_COMPILE", YNN: YNN_FOR_FLOAT32}) if plain else {}


def run_once(function: Callable[..., Any], *arguments: Any) -> Any:
    """Compile and call a function that a run calls only once, outside `jax.jit` and other transformations.

    On CPU, XLA optimizes it less: drawing random weights then compiles several times as fast, with the same result.
    """
    optimized = jax.default_backend() == "cpu" and not jax.config.read("jax_disable_most_optimizations")
    options = known_options({"xla_backend_optimization_level": 1}) if optimized else {}
    return jax.jit(function, compiler_options=options or None)(*arguments)


def xla_options(given: tuple[str, ...]) -> dict[str, str | bool]:
    """Parse `--xla` options, each NAME=VALUE, for `jax.jit(compiler_options=...)`."""
    words = {"true": True, "false": False}
    return {name: words.get(value.lower(), value) for name, _, value in (option.partition("=") for option in given)}


YNN = "xla_cpu_experimental_ynn_fusion_type"
YNN_FOR_FLOAT32 = "LIBRARY_FUSION_TYPE_REDUCE,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"


def known_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options if this jaxlib accepts all of them, else {}: jaxlib refuses options that it does not know."""
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except (jax.errors.JaxRuntimeError, ValueError):
        return {}
    return options


def compile_in(
    pool: ThreadPoolExecutor,
    step: Any,
    state: Any,
    batches: Sequence[Any],
    *,
    pmap: bool = False,
    xla: Sequence[str] = (),
) -> Callable[[], tuple[Any, float]]:
    """Trace the step here and compile it in the pool; call the returned function for (program, seconds).

    It is compiled for each of `batches`, which differ in the shape of their images; the program takes any of them.

    Tracing stays in this thread, whose settings (`jax.default_matmul_precision` and the like) are the caller's. A
    pmap step is returned as it is, and compiles when it is first called.
    """
    if pmap:
        return lambda: (step, 0.0)
    began = time.perf_counter()
    lowered = [step.lower(state, batch) for batch in batches]
    traced = time.perf_counter() - began

    def compiled() -> tuple[Any, float]:
        began = time.perf_counter()
        try:
            programs = [one.compile() for one in lowered]
        except jax.errors.JaxRuntimeError as error:
            if xla and "option" in str(error):
                raise UsageError(f"--xla {' '.join(xla)}: {error}") from None
            raise
        seconds = traced + time.perf_counter() - began
        if len(programs) == 1:
            return programs[0], seconds
        by_shape = {batch["image"].shape: program for batch, program in zip(batches, programs, strict=True)}
        return lambda state, batch: by_shape[batch["image"].shape](state, batch), seconds

    return pool.submit(compiled).result
