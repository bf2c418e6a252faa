"""oneDNN kernels for a `ResNet` on x86 CPUs, where they train up to three times as fast as XLA's.

`MODELS["resnet20"](conv=onednn.Conv, norm=onednn.BatchNorm, max_pool=onednn.max_pool)` has the same variables and, up
to rounding, the same outputs, statistics and gradients as the plain network. oneDNN is called through XLA's FFI
(https://uxlfoundation.github.io/oneDNN); `handlers.cc`, the C++ in between, is compiled on first use with the headers
of the installed jaxlib. This needs Linux, a C++ compiler, and oneDNN 3 with its headers, which are installed with this
project on x86; elsewhere use conda-forge's `onednn` or Debian's `libdnnl-dev`.

`jit`, `grad`, `vmap` (sequential over examples), `pmap` and `shard_map` work. Second derivatives and forward mode
(`jax.jvp`, `jax.linearize`) raise an error, and under `jit` XLA cannot partition the work over several devices; use the
plain modules in these cases and for a network that is to be exported.
"""

from resnet_jax.onednn.convolution import Conv, convolution
from resnet_jax.onednn.library import Unavailable, cache_folder, check, load
from resnet_jax.onednn.norm import BatchNorm, batch_norm
from resnet_jax.onednn.pool import max_pool

__all__ = ["BatchNorm", "Conv", "Unavailable", "batch_norm", "cache_folder", "check", "convolution", "load", "max_pool"]
