"""Feature pyramid network: maps of equal width at every resolution, https://arxiv.org/abs/1612.03144."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax import layers

# Uniform in +-sqrt(3 / fan_in), torchvision's `kaiming_uniform_(a=1)`.
kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")


class BiasedConv(nn.Module):
    """A convolution with a bias, for kernels without one of their own, such as those of `resnet_jax.onednn`."""

    features: int
    size: int = 3
    strides: int = 1
    kernel_init: nn.initializers.Initializer = kernel_init
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    conv: layers.ModuleDef = layers.conv
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        options = {"kernel_init": self.kernel_init, "dtype": self.dtype, "name": "conv"}
        y = self.conv(self.features, self.size, self.strides, **options)(x)
        bias = self.param("bias", self.bias_init, (self.features,))
        return y + bias.astype(self.dtype)[None, None, None]


class FeaturePyramid(nn.Module):
    """Merge a backbone's maps, finest first, into maps of equal width: [B, H_l, W_l, C_l] to [B, H_l, W_l, features].

    Each map is projected to `features` channels, the next coarser result is enlarged to its size and added, and a 3x3
    convolution follows the sum.

    Attributes:
      features: channels of every level.
      coarser: additional levels after the last, each half as large: `none`; `pool`, one level that subsamples the last,
        as in Faster R-CNN; `conv`, two levels by convolutions with stride 2, as in RetinaNet.
      conv, dtype: see `resnet_jax.ResNet`.
    """

    features: int = 256
    coarser: Literal["none", "pool", "conv"] = "pool"
    conv: layers.ModuleDef = layers.conv
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array]) -> list[jax.Array]:
        conv = partial(BiasedConv, self.features, conv=self.conv, dtype=self.dtype)
        merged: list[jax.Array] = []
        for level in reversed(range(len(maps))):
            lateral = conv(size=1, name=f"lateral{level + 1}")(maps[level])
            merged.insert(0, lateral + enlarge(merged[0], lateral.shape[1:3]) if merged else lateral)
        pyramid = [conv(name=f"output{level}")(x) for level, x in enumerate(merged, start=1)]

        if self.coarser == "pool":
            pyramid.append(pyramid[-1][:, ::2, ::2])
        elif self.coarser == "conv":
            pyramid.append(conv(strides=2, name="coarser1")(pyramid[-1]))
            pyramid.append(conv(strides=2, name="coarser2")(nn.relu(pyramid[-1])))
        return pyramid


def enlarge(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Enlarge maps [B, H, W, C] to (height, width) by nearest neighbour, as PyTorch's `interpolate` does."""
    for axis, size in enumerate(shape, start=1):
        have = x.shape[axis]
        # Doubling is the usual case, and needs no gather.
        x = x.repeat(2, axis) if size == 2 * have else jnp.take(x, jnp.arange(size) * have // size, axis)
    return x
