"""Convolutions by oneDNN on x86 CPUs, where XLA's own reach half of its speed: a `conv` for `ResNet`.

`MODELS["resnet20"](conv=onednn.conv)` has the same variables and, to rounding, the same outputs and gradients as the
plain network. oneDNN (https://uxlfoundation.github.io/oneDNN) is called through XLA's FFI; the 100 lines of C++ between
the two, `onednn.cc`, are compiled once with the headers of the jaxlib in use. Needs Linux, a C++ compiler and oneDNN 3
with its headers: installed with this project on x86, elsewhere conda-forge's `onednn` or Debian's `libdnnl-dev`.

`jit`, `grad` to any order, `vmap` (one example after another), `pmap` and `shard_map` work. Forward mode (`jax.jvp`,
`jax.linearize`) does not and says so, and under `jit` XLA cannot split the work over several devices: use the plain
convolution there, and wherever a network is to be exported.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.layers import kernel_init
from resnet_jax.parallel import varying_axes

SOURCE = Path(__file__).with_suffix(".cc")
HANDLERS = ("forward", "input_gradient", "weight_gradient")
DTYPES = (jnp.float32, jnp.bfloat16)


class Unavailable(RuntimeError):
    """oneDNN cannot be used here; the message says what is missing."""


# ---- convolution and its gradients ----------------------------------------------------------------------------------


class Geometry(NamedTuple):
    """What a convolution's arrays do not say by their own shapes."""

    size: tuple[int, int]
    kernel_size: tuple[int, int]
    strides: int
    groups: int


def convolution(images: jax.Array, kernel: jax.Array, *, strides: int = 1, groups: int = 1) -> jax.Array:
    """[B, H, W, C] and [h, w, C / groups, K] to [B, ceil(H / strides), ceil(W / strides), K] for odd h, w.

    Padding is (h - 1) // 2 and (w - 1) // 2 on both sides, as in `layers.conv`. Both are float32, or both bfloat16.

    Raises:
      Unavailable: see `load`.
      TypeError: another dtype, or two.
      ValueError: channels that do not match, or that `groups` does not divide.
    """
    load()
    if images.dtype != kernel.dtype or images.dtype not in DTYPES:
        raise TypeError(f"oneDNN convolves float32 or bfloat16, got {images.dtype} images and a {kernel.dtype} kernel")
    (_, rows, columns, channels), (height, width, inputs, outputs) = images.shape, kernel.shape
    if channels != inputs * groups or outputs % groups:
        raise ValueError(f"{channels} channels in {groups} groups do not fit a kernel {kernel.shape}")
    return _convolution(Geometry((rows, columns), (height, width), strides, groups), images, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolution(geometry: Geometry, images: jax.Array, kernel: jax.Array) -> jax.Array:
    rows, columns = (
        (size + 2 * ((window - 1) // 2) - window) // geometry.strides + 1
        for size, window in zip(geometry.size, geometry.kernel_size, strict=True)
    )
    return _call("forward", geometry, images, kernel, (images.shape[0], rows, columns, kernel.shape[3]))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _input_gradient(geometry: Geometry, kernel: jax.Array, gradient: jax.Array) -> jax.Array:
    shape = (gradient.shape[0], *geometry.size, kernel.shape[2] * geometry.groups)
    return _call("input_gradient", geometry, kernel, gradient, shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weight_gradient(geometry: Geometry, images: jax.Array, gradient: jax.Array) -> jax.Array:
    shape = (*geometry.kernel_size, images.shape[3] // geometry.groups, gradient.shape[3])
    return _call("weight_gradient", geometry, images, gradient, shape)


def _call(name: str, geometry: Geometry, a: jax.Array, b: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    result = jax.ShapeDtypeStruct(shape, a.dtype)
    call = jax.ffi.ffi_call(_target(name), result, vmap_method="sequential")
    y = call(a, b, stride=np.int64(geometry.strides), groups=np.int64(geometry.groups))
    call = jax.ffi.ffi_call(_target(name), jax.ShapeDtypeStruct(shape, a.dtype), vmap_method="sequential")
    y = call(a, b, stride=np.int64(geometry.strides), groups=np.int64(geometry.groups))
    # Under shard_map the result varies over whatever an operand varies over, which the call itself does not say.
    missing = (varying_axes(a) | varying_axes(b)) - varying_axes(y)
    return jax.lax.pcast(y, tuple(missing), to="varying") if missing else y


def _target(name: str) -> str:
    return f"resnet_jax_onednn_{name}"


# A convolution is linear in each of its operands, so the gradients of the three are again among the three.
_convolution.defvjp(
    lambda geometry, images, kernel: (_convolution(geometry, images, kernel), (images, kernel)),
    lambda geometry, saved, ct: (_input_gradient(geometry, saved[1], ct), _weight_gradient(geometry, saved[0], ct)),
)
_input_gradient.defvjp(
    lambda geometry, kernel, gradient: (_input_gradient(geometry, kernel, gradient), (kernel, gradient)),
    lambda geometry, saved, ct: (_weight_gradient(geometry, ct, saved[1]), _convolution(geometry, ct, saved[0])),
)
_weight_gradient.defvjp(
    lambda geometry, images, gradient: (_weight_gradient(geometry, images, gradient), (images, gradient)),
    lambda geometry, saved, ct: (_input_gradient(geometry, ct, saved[1]), _convolution(geometry, saved[0], ct)),
)


# ---- the module -----------------------------------------------------------------------------------------------------


class Conv(nn.Module):
    """`layers.conv` by oneDNN: the same fields, the same parameter `kernel`."""

    features: int
    kernel_size: int = 3
    strides: int = 1
    groups: int = 1
    kernel_init: nn.initializers.Initializer = kernel_init
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = (self.kernel_size, self.kernel_size)
        kernel = self.param("kernel", self.kernel_init, (*size, x.shape[-1] // self.groups, self.features))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        return convolution(x, kernel, strides=self.strides, groups=self.groups)


conv = Conv


# ---- the library ----------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where this project keeps what it can make again: XDG_CACHE_HOME, or ~/.cache, and in it resnet-jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "resnet-jax"


@cache
def load() -> None:
    """Compile `onednn.cc` unless that is done, and tell XLA of its handlers; called by `convolution` where needed.

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
        raise Unavailable(f"the compiled onednn.cc cannot be loaded: {error}") from None
    for name in HANDLERS:
        jax.ffi.register_ffi_target(_target(name), jax.ffi.pycapsule(getattr(handlers, name)), platform="cpu")


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
    said = [SOURCE.read_text(), metadata.version("jaxlib"), headers, str(include), str(library), str(library.stat())]
    name = f"onednn-{hashlib.sha256(repr(said).encode()).hexdigest()[:16]}.so"
    target = cache_folder() / name
    if target.exists():
        return target
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    if compiler is None:
        raise Unavailable("compiling onednn.cc needs a C++ compiler: install g++, or name one in CXX")
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
        raise Unavailable(f"cannot keep the compiled onednn.cc: {error}") from None
    return target
