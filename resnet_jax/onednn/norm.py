"""Batch normalization with optional ReLU, as one kernel forward and one backward."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.onednn.library import DTYPES, call, load, workspace


class BatchNorm(nn.BatchNorm):
    """oneDNN version of `layers.BatchNorm` in training, with the same parameters and statistics.

    Everything else falls back to the plain module: running statistics, statistics over several devices, and unusual
    fields of `flax.linen.BatchNorm`.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, *, relu: bool = False) -> jax.Array:  # type: ignore[override]
        ordinary = self.use_scale and self.use_bias and self.axis == -1 and self.param_dtype == jnp.float32
        if self.use_running_average is not False or self.axis_name or self.is_initializing() or not ordinary:
            y = super().__call__(x)
            return nn.relu(y) if relu else y
        channels = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        var = self.variable("batch_stats", "var", jnp.ones, channels)
        scale = self.param("scale", self.scale_init, channels)
        bias = self.param("bias", self.bias_init, channels)
        x = x if self.dtype is None else x.astype(self.dtype)
        y, batch_mean, batch_var = batch_norm(x, scale, bias, epsilon=self.epsilon, relu=relu)
        mean.value = self.momentum * mean.value + (1 - self.momentum) * batch_mean
        var.value = self.momentum * var.value + (1 - self.momentum) * batch_var
        return y

    def with_relu(self, x: jax.Array) -> jax.Array:
        """Apply the norm, then ReLU, in one kernel; `layers.norm_relu` calls this."""
        return self(x, relu=True)


def batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float = 1e-5, relu: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalize [B, H, W, C] over all axes except channels; return (y, mean [C], biased variance [C]).

    `x` is float32 or bfloat16; everything else is float32. Gradients flow through `y` only.

    Raises:
      Unavailable: see `library.load`.
      TypeError: the dtype is unsupported.
      ValueError: the shapes do not fit, or there are no images.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"oneDNN normalizes float32 or bfloat16, got {x.dtype}")
    if x.ndim != 4 or 0 in x.shape or not scale.shape == bias.shape == x.shape[-1:]:
        raise ValueError(f"scale {scale.shape} and bias {bias.shape} do not fit images {x.shape}")
    load()
    scale, bias = scale.astype(jnp.float32), bias.astype(jnp.float32)
    y, mean, var, _ = _norm((float(epsilon), bool(relu)), x, scale, bias)
    return y, jax.lax.stop_gradient(mean), jax.lax.stop_gradient(var)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(statics: tuple[float, bool], x: jax.Array, scale: jax.Array, bias: jax.Array) -> Any:
    epsilon, relu = statics
    # For the backward pass oneDNN stores which outputs are positive, in a buffer whose size it chooses.
    kept = workspace("norm", x) if relu else 1
    channel = jax.ShapeDtypeStruct(scale.shape, jnp.float32)
    results = (jax.ShapeDtypeStruct(x.shape, x.dtype), channel, channel, jax.ShapeDtypeStruct((kept,), jnp.uint8))
    return call("norm", results, x, scale, bias, epsilon=np.float32(epsilon), relu=np.bool_(relu))


def _forward(statics: tuple[float, bool], x: jax.Array, scale: jax.Array, bias: jax.Array) -> Any:
    y, mean, var, kept = _norm(statics, x, scale, bias)
    return (y, mean, var, kept), (x, scale, mean, var, kept)


def _backward(statics: tuple[float, bool], saved: tuple[jax.Array, ...], cotangents: Any) -> Any:
    (epsilon, relu), (x, scale) = statics, saved[:2]
    results = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, scale, scale)]
    gradients = call("norm_gradient", results, *saved, cotangents[0], epsilon=np.float32(epsilon), relu=np.bool_(relu))
    return tuple(gradients)


_norm.defvjp(_forward, _backward)
