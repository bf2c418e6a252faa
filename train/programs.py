"""A run's compiled programs, made in a thread while images are read."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from train.config import RunConfig
from train.errors import UsageError


def compile_in(
    pool: ThreadPoolExecutor, step: Any, state: Any, batch: Any, config: RunConfig
) -> Callable[[], tuple[Any, float]]:
    """Trace the step here and compile it in the pool; call what this returns for (the program, seconds).

    Tracing stays in this thread, whose settings (`jax.default_matmul_precision` and the like) are the caller's. pmap
    compiles when it is called.
    """
    if config.mode == "pmap":
        return lambda: (step, 0.0)
    began = time.perf_counter()
    lowered = step.lower(state, batch)
    traced = time.perf_counter() - began

    def compiled() -> tuple[Any, float]:
        began = time.perf_counter()
        try:
            program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if config.xla and "option" in str(error):
                raise UsageError(f"--xla {' '.join(config.xla)}: {error}") from None
            raise
        return program, traced + time.perf_counter() - began

    return pool.submit(compiled).result
