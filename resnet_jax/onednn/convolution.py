"""Convolution and its gradients, which are differentiable any number of times."""

from functools import partial
from typing import Any, NamedTuple

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


class Geometry(NamedTuple):
    """Geometry of a convolution that the shapes of its operands do not determine."""

    size: tuple[int, int]
    kernel_size: tuple[int, int]
    strides: int
    groups: int


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
    return _call("convolution", geometry, images, kernel, (images.shape[0], rows, columns, kernel.shape[3]))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _input_gradient(geometry: Geometry, kernel: jax.Array, gradient: jax.Array) -> jax.Array:
    shape = (gradient.shape[0], *geometry.size, kernel.shape[2] * geometry.groups)
    return _call("input_gradient", geometry, kernel, gradient, shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weight_gradient(geometry: Geometry, images: jax.Array, gradient: jax.Array) -> jax.Array:
    shape = (*geometry.kernel_size, images.shape[3] // geometry.groups, gradient.shape[3])
    return _call("weight_gradient", geometry, images, gradient, shape)


def _call(name: str, geometry: Geometry, a: jax.Array, b: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    numbers = {"stride": np.int64(geometry.strides), "groups": np.int64(geometry.groups)}
    (y,) = call(name, (jax.ShapeDtypeStruct(shape, a.dtype),), a, b, **numbers)
    return y


# A convolution is linear in each operand, so the gradients of these three functions are again among the three.
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
