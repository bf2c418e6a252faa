"""Batch normalisation, with ReLU or without, in one pass each way."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.onednn.library import DTYPES, load, target
from resnet_jax.parallel import varying_axes


class BatchNorm(nn.BatchNorm):
    """`layers.BatchNorm` by oneDNN in training: the same fields, parameters and statistics.

    Running statistics, and statistics over several devices (`axis_name`), are the plain module's business.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, *, relu: bool = False) -> jax.Array:  # type: ignore[override]
        if self.use_running_average or self.axis_name is not None or self.is_initializing():
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
        """What `layers.norm_relu` asks for."""
        return self(x, relu=True)


def batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float = 1e-5, relu: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalise [B, H, W, C] over all but its channels: (y, mean [C], biased variance [C]).

    `x` is float32 or bfloat16, all else float32. The gradient is that of `y`; none flows through mean and variance, and
    it has no gradient itself.

    Raises:
      Unavailable: see `library.load`.
      TypeError: another dtype.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"oneDNN normalises float32 or bfloat16, got {x.dtype}")
    load()
    y, mean, var, _ = _norm((float(epsilon), bool(relu)), x, scale, bias)
    return y, jax.lax.stop_gradient(mean), jax.lax.stop_gradient(var)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(statics: tuple[float, bool], x: jax.Array, scale: jax.Array, bias: jax.Array) -> Any:
    epsilon, relu = statics
    # What oneDNN keeps for the backward pass, which outputs are positive, has a size of its own choice.
    kept = load().norm_workspace(*x.shape, x.dtype == jnp.bfloat16) if relu else 1
    channel = jax.ShapeDtypeStruct(scale.shape, jnp.float32)
    results = (jax.ShapeDtypeStruct(x.shape, x.dtype), channel, channel, jax.ShapeDtypeStruct((kept,), jnp.uint8))
    return _call("norm", results, epsilon, relu, x, scale, bias)


def _forward(statics: tuple[float, bool], x: jax.Array, scale: jax.Array, bias: jax.Array) -> Any:
    y, mean, var, workspace = _norm(statics, x, scale, bias)
    return (y, mean, var, workspace), (x, scale, mean, var, workspace)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradient(statics: tuple[float, bool], *operands: jax.Array) -> Any:
    x, scale = operands[:2]
    results = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, scale, scale))
    return _call("norm_gradient", results, *statics, *operands)


def _no_second(statics: Any, saved: Any, cotangents: Any) -> Any:
    raise NotImplementedError("oneDNN's norm has no second derivative: build the network with the plain primitives")


_norm.defvjp(_forward, lambda statics, saved, cotangents: _gradient(statics, *saved, cotangents[0]))
_gradient.defvjp(lambda statics, *operands: (_gradient(statics, *operands), None), _no_second)


def _call(name: str, results: Any, epsilon: float, relu: bool, *operands: jax.Array) -> Any:
    call = jax.ffi.ffi_call(target(name), results, vmap_method="sequential")
    found = call(*operands, epsilon=np.float32(epsilon), relu=np.bool_(relu))
    axes = frozenset().union(*map(varying_axes, operands))
    return tuple(jax.lax.pcast(y, tuple(axes), to="varying") for y in found) if axes else tuple(found)
