"""Building blocks of a ResNet: convolution, norm, stems, shortcuts, attention, stochastic depth.

Pass a class (or a `functools.partial` of one) to `ResNet` to choose it; no class has flags that select a variant.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax.keys import example_index, example_keys

ModuleDef = Callable[..., Any]

# He et al. 2015, https://arxiv.org/abs/1502.01852, in torchvision's fan-out form.
kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

# Uniform in +-1/sqrt(fan_in), like torch.nn.Linear.
dense_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

BatchNorm = partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)
"""`flax.linen.BatchNorm` with PyTorch's epsilon and momentum (0.9 here is 0.1 in PyTorch)."""


def conv(features: int, kernel_size: int = 3, strides: int = 1, groups: int = 1, **kwargs: Any) -> nn.Conv:
    """Build a square convolution without bias, padded like torchvision (XLA's "SAME" differs where `strides` > 1)."""
    options: dict[str, Any] = {"use_bias": False, "kernel_init": kernel_init, "feature_group_count": groups} | kwargs
    padding = ((kernel_size - 1) // 2,) * 2
    return nn.Conv(features, (kernel_size,) * 2, strides=(strides,) * 2, padding=(padding, padding), **options)


def standardize(x: jax.Array, axes: tuple[int, ...], epsilon: float) -> jax.Array:
    """Subtract the mean over `axes` and divide by the standard deviation, `epsilon` added to the variance."""
    x = x - x.mean(axes, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(axes, keepdims=True) + epsilon)


class StandardizedConv(nn.Module):
    """`conv` whose kernel is standardised over its inputs, https://arxiv.org/abs/1903.10520; epsilon as in BiT."""

    features: int
    kernel_size: int = 3
    strides: int = 1
    groups: int = 1
    kernel_init: nn.initializers.Initializer = kernel_init
    epsilon: float = 1e-8
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        kernel = standardize(kernel, (0, 1, 2), self.epsilon)
        padding = ((self.kernel_size - 1) // 2,) * 2
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.strides, self.strides),
            (padding, padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )


class GroupNorm(nn.Module):
    """Normalise each example in groups of channels, https://arxiv.org/abs/1803.08494.

    Without running statistics, training and evaluation are the same. Where `groups` does not divide the channels, the
    number of groups is the largest that divides both.
    """

    groups: int = 32
    epsilon: float = 1e-5
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    dtype: Any = jnp.float32
    use_running_average: bool | None = None  # unused, like `axis_name`: `ResNet` passes both to every norm
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        scale = self.param("scale", self.scale_init, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], math.gcd(self.groups, channels), -1)
        normal = standardize(grouped, (1, 2, 4), self.epsilon).reshape(x.shape)
        return (normal * scale[None, None, None] + bias[None, None, None]).astype(self.dtype)


def max_pool(x: jax.Array) -> jax.Array:
    """Max-pool 3x3 with stride 2 and padding 1, [B, H, W, C] to [B, ceil(H / 2), ceil(W / 2), C]."""
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


def zero_padded_max_pool(x: jax.Array) -> jax.Array:
    """`max_pool` with zeros as padding, as in BiT; it differs where all values of a window at the edge are negative."""
    return nn.max_pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), strides=(2, 2))


def caffe_max_pool(x: jax.Array) -> jax.Array:
    """Max-pool 3x3 with stride 2 and padding only after the last row and column, as Caffe does."""
    padding = tuple((0, max(0, 3 - size, (size - 3) % 2)) for size in x.shape[1:3])
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=padding)


def norm_relu(norm: nn.Module, x: jax.Array) -> jax.Array:
    """Apply a norm, then ReLU; fused if the norm provides `with_relu`, as oneDNN's does."""
    fused = getattr(norm, "with_relu", None)
    return nn.relu(norm(x)) if fused is None else fused(x)


class NormAct(nn.Module):
    """Norm and ReLU, which end the trunk of a pre-activation network."""

    norm: ModuleDef

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return norm_relu(self.norm(name="norm"), x)


class Stem(nn.Module):
    """Convolution (7x7 with stride 2 as in He et al. 2015), norm, ReLU and, if `pool`, max-pool."""

    features: int
    conv: ModuleDef
    norm: ModuleDef
    max_pool: ModuleDef = max_pool
    kernel_size: int = 7
    strides: int = 2
    pool: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.activate(self.conv(self.features, self.kernel_size, self.strides, name="conv")(x))
        return self.max_pool(x) if self.pool else x

    def activate(self, x: jax.Array) -> jax.Array:
        return norm_relu(self.norm(name="norm"), x)


class PreActStem(Stem):
    """Convolution and, if `pool`, max-pool; norm and ReLU belong to the first pre-activation block."""

    def activate(self, x: jax.Array) -> jax.Array:
        return x


class DeepStem(nn.Module):
    """Three 3x3 convolutions, then max-pool: the stem of ResNet-C and -D, https://arxiv.org/abs/1812.01187."""

    features: int
    conv: ModuleDef
    norm: ModuleDef
    max_pool: ModuleDef = max_pool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        half = self.features // 2
        for i, (features, strides) in enumerate([(half, 2), (half, 1), (self.features, 1)], start=1):
            x = self.conv(features, 3, strides, name=f"conv{i}")(x)
            x = norm_relu(self.norm(name=f"norm{i}"), x)
        return self.max_pool(x)


ImageNetStem = Stem
"""Stem for ImageNet: 7x7 convolution with stride 2, norm, ReLU, max-pool."""
CifarStem = partial(Stem, kernel_size=3, strides=1, pool=False)
"""Stem for 32x32 images: 3x3 convolution with stride 1, norm, ReLU."""
CifarPreActStem = partial(PreActStem, kernel_size=3, strides=1, pool=False)
"""Stem of pre-activation networks for 32x32 images: 3x3 convolution with stride 1."""


class Projection(nn.Module):
    """1x1 convolution and norm: shortcut B of https://arxiv.org/abs/1512.03385."""

    features: int
    strides: int
    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv(self.features, 1, self.strides, name="conv")(x)
        return self.norm(name="norm")(x)


class PooledProjection(Projection):
    """Average-pool, then 1x1 convolution with stride 1 and norm: shortcut of ResNet-D, https://arxiv.org/abs/1812.01187."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.strides > 1:
            window = (self.strides, self.strides)
            # At an odd edge, average over the pixels that exist, like PyTorch's ceil_mode.
            padding = tuple((0, -size % self.strides) for size in x.shape[1:3])
            x = nn.avg_pool(x, window, strides=window, padding=padding, count_include_pad=False)
        x = self.conv(self.features, 1, 1, name="conv")(x)
        return self.norm(name="norm")(x)


class PlainProjection(Projection):
    """1x1 convolution without norm: shortcut of pre-activation blocks, https://arxiv.org/abs/1603.05027."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(self.features, 1, self.strides, name="conv")(x)


class ZeroPad(Projection):
    """Subsample and zero-pad the channels, without parameters: shortcut A of https://arxiv.org/abs/1512.03385."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        missing = self.features - x.shape[-1]
        x = x[:, :: self.strides, :: self.strides]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))


class SqueezeExcite(nn.Module):
    """Scale channels by a gate computed from their means, [B, H, W, C]: https://arxiv.org/abs/1709.01507.

    The gate has `C // reduction` hidden units, at least one, or those of the parameters that it is applied with:
    published weights do not agree on their number where C is small.
    """

    reduction: int = 16
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        gate = x.mean((1, 2), dtype=jnp.float32).astype(self.dtype)
        units = max(channels // self.reduction, 1)
        if self.has_variable("params", "fc1"):
            units = self.get_variable("params", "fc1")["kernel"].shape[1]
        gate = nn.relu(nn.Dense(units, dtype=self.dtype, name="fc1")(gate))
        gate = nn.sigmoid(nn.Dense(channels, dtype=self.dtype, name="fc2")(gate))
        return x * gate[:, None, None, :]


class DropPath(nn.Module):
    """Stochastic depth: drop a residual branch per example with probability `rate`, https://arxiv.org/abs/1603.09382.

    Branches that are kept are divided by the probability of keeping them. Draws come from the `drop_path` key and the
    global example index, so they are the same on one device or many.
    """

    rate: float
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        if not train or self.rate == 0:
            return x
        keys = example_keys(self.make_rng("drop_path"), example_index(x.shape[0], self.axis_name))
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate))(keys)
        return x * (keep / (1 - self.rate)).astype(x.dtype)[:, None, None, None]
