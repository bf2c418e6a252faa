"""Convolution and its gradients."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.layers import kernel_init
from resnet_jax.onednn.library import DTYPES, call, load


class Conv(nn.Module):
    """oneDNN version of `layers.conv`, with the same fields and the same parameter `kernel`."""

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


def convolution(images: jax.Array, kernel: jax.Array, *, strides: int = 1, groups: int = 1) -> jax.Array:
    """Convolve images [B, H, W, C] with a kernel [h, w, C / groups, K].

    The result is [B, ceil(H / strides), ceil(W / strides), K] for odd h, w. Padding is (h - 1) // 2 and (w - 1) // 2 on
    both sides, as in `layers.conv`. Both operands are float32, or both bfloat16.

    Raises:
      Unavailable: see `library.load`.
      TypeError: the operands have different dtypes, or an unsupported one.
      ValueError: a shape does not fit, `groups` does not divide the channels, or there are no images.
    """
    load()
    if images.ndim != 4 or kernel.ndim != 4 or 0 in images.shape:
        raise ValueError(f"cannot convolve images of shape {images.shape} with a kernel of shape {kernel.shape}")
    if images.dtype != kernel.dtype or images.dtype not in DTYPES:
        raise TypeError(f"oneDNN convolves float32 or bfloat16, got {images.dtype} images and a {kernel.dtype} kernel")
    channels, (*_, inputs, outputs) = images.shape[3], kernel.shape
    if channels != inputs * groups or outputs % groups:
        raise ValueError(f"{channels} channels in {groups} groups do not fit a kernel {kernel.shape}")
    return _convolution(images, kernel, strides, groups)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolution(images: jax.Array, kernel: jax.Array, strides: int, groups: int) -> jax.Array:
    rows, columns = (
        (size + 2 * ((window - 1) // 2) - window) // strides + 1
        for size, window in zip(images.shape[1:3], kernel.shape[:2], strict=True)
    )
    shape = (images.shape[0], rows, columns, kernel.shape[3])
    return _call("convolution", shape, images, kernel, strides, groups)


def _forward(images: jax.Array, kernel: jax.Array, strides: int, groups: int) -> Any:
    return _convolution(images, kernel, strides, groups), (images, kernel)


def _backward(strides: int, groups: int, saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> Any:
    images, kernel = saved
    return (
        _call("input_gradient", images.shape, kernel, gradient, strides, groups),
        _call("weight_gradient", kernel.shape, images, gradient, strides, groups),
    )


_convolution.defvjp(_forward, _backward)


def _call(name: str, shape: tuple[int, ...], a: jax.Array, b: jax.Array, strides: int, groups: int) -> jax.Array:
    result = jax.ShapeDtypeStruct(shape, a.dtype)
    return call(name, [result], a, b, stride=np.int64(strides), groups=np.int64(groups))[0]
