"""Find oneDNN, compile its handlers once, and register them with XLA."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from resnet_jax.parallel import vary_like

DTYPES = (jnp.float32, jnp.bfloat16)
SOURCE = Path(__file__).with_name("handlers.cc")
FORWARD = ("convolution", "norm", "max_pool")
BACKWARD = ("input_gradient", "weight_gradient", "norm_gradient", "max_pool_gradient")
TARGET = "resnet_jax_onednn_{}"  # the name of a handler in XLA


class Unavailable(RuntimeError):
    """oneDNN cannot be used here; the message says what is missing."""


def call(name: str, results: Sequence[Any], *operands: jax.Array, **numbers: Any) -> Sequence[jax.Array]:
    """Call a handler; `results` are the shapes of its results, `numbers` its attributes as NumPy scalars."""
    outputs = jax.ffi.ffi_call(TARGET.format(name), tuple(results), vmap_method="sequential")(*operands, **numbers)
    # Under shard_map, results vary over all axes of the operands, which the FFI call does not declare.
    return vary_like(outputs, operands)


def workspace(name: str, x: jax.Array | jax.ShapeDtypeStruct) -> int:
    """Return the bytes that oneDNN stores for the backward pass of `norm` or `max_pool` over images [B, H, W, C].

    Raises:
      Unavailable: oneDNN does not support their dtype on this processor.
    """
    size = getattr(load(), f"{name}_workspace")(*x.shape, x.dtype == jnp.bfloat16)
    if size < 0:
        raise Unavailable(f"oneDNN cannot compute {x.dtype} on this processor")
    return size


def cache_folder() -> Path:
    """Return the folder for files that can be rebuilt: resnet-jax in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "resnet-jax"


def load() -> ctypes.CDLL:
    """Compile `handlers.cc` if necessary and register its handlers with XLA; the kernels call this themselves.

    The compiled file, 150 KB, is kept in `cache_folder()`.

    Raises:
      Unavailable: this is not Linux, the compiler or oneDNN is missing, or they are incompatible.
    """
    if isinstance(result := _load(), Unavailable):
        raise Unavailable(*result.args)
    return result


def check(dtype: Any) -> None:
    """Check that oneDNN can be used for arrays of this dtype.

    Raises:
      Unavailable: it cannot.
    """
    workspace("norm", jax.ShapeDtypeStruct((1, 1, 1, 16), dtype))


@cache
def _load() -> ctypes.CDLL | Unavailable:
    """Return the handlers, or the error; failures are cached too."""
    if sys.platform != "linux":
        return Unavailable("the oneDNN kernels need Linux")
    try:
        handlers = ctypes.CDLL(str(_compiled_library(*_find_library())))
    except Unavailable as error:
        return error
    except OSError as error:
        return Unavailable(f"cannot load the compiled handlers.cc: {error}")
    for name in FORWARD + BACKWARD:
        jax.ffi.register_ffi_target(TARGET.format(name), jax.ffi.pycapsule(getattr(handlers, name)), platform="cpu")
    for size in (handlers.norm_workspace, handlers.max_pool_workspace):
        size.argtypes, size.restype = [*[ctypes.c_int64] * 4, ctypes.c_bool], ctypes.c_int64
    return handlers


def _find_library() -> tuple[Path, Path]:
    """Return (folder of oneDNN's headers, its library) from this Python's environment or the system."""
    for root in map(Path, (sysconfig.get_path("data"), sys.prefix, "/usr/local", "/usr")):
        include = root / "include"
        if not (include / "oneapi" / "dnnl" / "dnnl.hpp").is_file():
            continue
        for folder in ("lib", f"lib/{os.uname().machine}-linux-gnu", "lib64"):
            library = root / folder / "libdnnl.so.3"
            if library.is_file():
                return include, library
    hint = "pip install onednn-cpu-gomp onednn-devel-cpu-gomp" if os.uname().machine == "x86_64" else "see conda-forge"
    raise Unavailable(f"oneDNN 3 and its headers are not installed: {hint}")


def _compiled_library(include: Path, library: Path) -> Path:
    """Return the compiled `handlers.cc`, whose name depends on everything that it was compiled from."""
    stat = library.stat()
    paths = (jax.ffi.include_dir(), str(include), str(library))
    inputs = (SOURCE.read_text(), metadata.version("jaxlib"), *paths, stat.st_size, stat.st_mtime_ns)
    name = f"onednn-{hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]}.so"
    try:
        target = cache_folder() / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                output = Path(scratch) / name
                _compile(output, include, library)
                os.replace(output, target)  # atomic: two processes may compile at the same time
    except Unavailable:
        raise
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        raise Unavailable(f"cannot store the compiled handlers.cc: {error}") from None
    return target


def _compile(output: Path, include: Path, library: Path) -> None:
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    if compiler is None:
        raise Unavailable("compiling handlers.cc needs a C++ compiler: install g++, or set CXX")
    flags = ["-std=c++17", "-O2", "-w", "-shared", "-fPIC", f"-I{include}", f"-I{jax.ffi.include_dir()}"]
    link = [str(library), f"-Wl,-rpath,{library.parent}"]
    command = [compiler, *flags, str(SOURCE), *link, "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = next((line for line in result.stderr.splitlines() if "error" in line), "unknown error")
        raise Unavailable(f"{compiler} cannot compile {SOURCE}: {reason}")
