"""oneDNN itself: where it is installed, its handlers compiled once and told to XLA."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp

DTYPES = (jnp.float32, jnp.bfloat16)
SOURCE = Path(__file__).with_name("handlers.cc")
HANDLERS = (
    "convolution",
    "input_gradient",
    "weight_gradient",
    "norm",
    "norm_gradient",
    "max_pool",
    "max_pool_gradient",
)


class Unavailable(RuntimeError):
    """oneDNN cannot be used here; the message says what is missing."""


def target(name: str) -> str:
    """The name that XLA knows a handler by."""
    return f"resnet_jax_onednn_{name}"


def cache_folder() -> Path:
    """Where this project keeps what it can make again: XDG_CACHE_HOME, or ~/.cache, and in it resnet-jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "resnet-jax"


@cache
def load() -> ctypes.CDLL:
    """Compile `handlers.cc` unless that is done, and tell XLA of its handlers; the primitives call it where needed.

    The compiled file, 150 KB, is kept in `cache_folder()`.

    Raises:
      Unavailable: not Linux, no compiler, no oneDNN, or they do not fit together.
    """
    if sys.platform != "linux":
        raise Unavailable("oneDNN convolutions need Linux")
    include, library = _find()
    try:
        handlers = ctypes.CDLL(str(_compiled(include, library)))
    except OSError as error:
        raise Unavailable(f"the compiled handlers.cc cannot be loaded: {error}") from None
    for name in HANDLERS:
        jax.ffi.register_ffi_target(target(name), jax.ffi.pycapsule(getattr(handlers, name)), platform="cpu")
    for size in (handlers.norm_workspace, handlers.max_pool_workspace):
        size.argtypes, size.restype = [*[ctypes.c_int64] * 4, ctypes.c_bool], ctypes.c_int64
    return handlers


def _find() -> tuple[Path, Path]:
    """(folder of oneDNN's headers, its library): beside this Python, else the system's."""
    for root in map(Path, (sysconfig.get_path("data"), sys.prefix, "/usr/local", "/usr")):
        include = root / "include"
        if not (include / "oneapi" / "dnnl" / "dnnl.hpp").is_file():
            continue
        for folder in ("lib", f"lib/{os.uname().machine}-linux-gnu", "lib64"):
            library = root / folder / "libdnnl.so.3"
            if library.is_file():
                return include, library
    raise Unavailable("oneDNN 3 and its headers are not installed: pip install onednn-cpu-gomp onednn-devel-cpu-gomp")


def _compiled(include: Path, library: Path) -> Path:
    headers = jax.ffi.include_dir()
    said = [
        SOURCE.read_text(),
        metadata.version("jaxlib"),
        headers,
        str(include),
        str(library),
        library.stat().st_size,
        library.stat().st_mtime_ns,
    ]
    name = f"onednn-{hashlib.sha256(repr(said).encode()).hexdigest()[:16]}.so"
    target = cache_folder() / name
    if target.exists():
        return target
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    if compiler is None:
        raise Unavailable("compiling handlers.cc needs a C++ compiler: install g++, or name one in CXX")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / name
            flags = ["-std=c++17", "-O2", "-w", "-shared", "-fPIC", f"-I{include}", f"-I{headers}"]
            link = [str(library), f"-Wl,-rpath,{library.parent}"]
            done = subprocess.run(
                [compiler, *flags, str(SOURCE), *link, "-o", str(made)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                said = (done.stderr.strip().splitlines() or ["no reason given"])[:1]
                raise Unavailable(f"{compiler} cannot compile {SOURCE}: {said[0]}")
            os.replace(made, target)  # in one piece: two processes may both be at it
    except OSError as error:
        raise Unavailable(f"cannot keep the compiled handlers.cc: {error}") from None
    return target
