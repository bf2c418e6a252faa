"""oneDNN for training on x86 CPUs, where it is up to three times as fast as XLA: what `ResNet` computes with.

`MODELS["resnet20"](conv=onednn.Conv, norm=onednn.BatchNorm, max_pool=onednn.max_pool)` has the same variables and, to
rounding, the same outputs, statistics and gradients as the plain network. oneDNN is called through XLA's FFI
(https://uxlfoundation.github.io/oneDNN); the C++ between the two, `handlers.cc`, is compiled once with the headers of
the jaxlib in use. Needs Linux, a C++ compiler and oneDNN 3 with its headers: installed with this project on x86,
elsewhere conda-forge's `onednn` or Debian's `libdnnl-dev`.

`jit`, `grad`, `vmap` (one example after another), `pmap` and `shard_map` work; gradients of gradients do for the
convolution alone. Forward mode (`jax.jvp`, `jax.linearize`) does not and says so, and under `jit` XLA cannot split the
work over several devices: use the plain modules there, and wherever a network is to be exported.
"""

from resnet_jax.onednn.convolution import Conv as Conv
from resnet_jax.onednn.convolution import convolution as convolution
from resnet_jax.onednn.library import Unavailable as Unavailable
from resnet_jax.onednn.library import cache_folder as cache_folder
from resnet_jax.onednn.library import check as check
from resnet_jax.onednn.library import load as load
from resnet_jax.onednn.norm import BatchNorm as BatchNorm
from resnet_jax.onednn.norm import batch_norm as batch_norm
from resnet_jax.onednn.pool import max_pool as max_pool
