"""Networks that do not see the padding of a batch: an image gives the same maps in a bucket of any size."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.resnet import stride_of


def inside(shape: tuple[int, ...], stride: int, size: jax.Array) -> jax.Array:
    """Whether the cells of a map (h, w) of this stride lie in an image of `size` int [..., 2]: bool [..., h, w]."""
    rows, columns = (jnp.arange(n).reshape((1,) * (size.ndim - 1) + (n,)) * stride for n in shape)
    height, width = size[..., :1], size[..., 1:]
    return (rows < height)[..., :, None] & (columns < width)[..., None, :]


def fill(x: jax.Array, image_shape: tuple[int, ...], size: jax.Array) -> jax.Array:
    """Set the cells of maps [B, H, W, C] that lie in the padding to 0."""
    shape = x.shape[1], x.shape[2]
    return jnp.where(inside(shape, stride_of(shape, image_shape), size)[..., None], x, jnp.zeros((), x.dtype))


def ignore_padding(image_shape: tuple[int, ...], size: jax.Array) -> AbstractContextManager[None]:
    """A context in which every convolution sees zeros in the padding, as it does beyond the borders of its input.

    Without it, biases and norms make the padding differ from zero after the first layer, and the maps near the right
    and lower borders depend on the bucket. With it, cells inside the image are the same in every bucket, except for
    layers that average over whole maps, padding included: batch norm with the statistics of the batch, group norm
    and squeeze-excite.

    Compared with the same image without any padding, two more layers differ in the last row and column, where these
    have an odd number of cells: max-pools without a ReLU before them, as in stems of pre-activation networks, see zeros
    instead of nothing, and average-pools of shortcuts include one cell of padding.

    Args:
      image_shape: (height, width) of the padded images, multiples of the network's largest stride.
      size: int32 [B, 2], true (height, width) of each image.
    """

    def interceptor(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        # Only convolutions have it, of whatever kernels, and stems, which begin with one.
        window = getattr(context.module, "kernel_size", 1)
        if context.method_name == "__call__" and np.max(window) > 1:
            args = (fill(args[0], image_shape, size), *args[1:])
        result = call(*args, **kwargs)
        # A max-pool may follow the norms of a stem: after their ReLU, zeros are neutral to it.
        if context.method_name in ("__call__", "with_relu") and context.module.path[-2:-1] == ("stem",):
            result = fill(result, image_shape, size)
        return result

    return nn.intercept_methods(interceptor)
