"""The 3x3 max-pool of stride 2 that follows an ImageNet stem."""

from typing import Any

import jax
import jax.numpy as jnp

from resnet_jax.onednn.library import DTYPES, load, target
from resnet_jax.parallel import varying_axes


def max_pool(x: jax.Array) -> jax.Array:
    """`layers.max_pool` by oneDNN, [B, H, W, C] to [B, ceil(H / 2), ceil(W / 2), C], float32 or bfloat16.

    Where several values are the largest, the first has the gradient, as in XLA. The gradient has none itself.

    Raises:
      Unavailable: see `library.load`.
      TypeError: another dtype.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"oneDNN pools float32 or bfloat16, got {x.dtype}")
    load()
    return _max_pool(x)[0]


@jax.custom_vjp
def _max_pool(x: jax.Array) -> Any:
    n, h, w, c = x.shape
    # Which of the nine was the largest, in a form and size of oneDNN's own choice.
    kept = load().max_pool_workspace(n, h, w, c, x.dtype == jnp.bfloat16)
    results = (
        jax.ShapeDtypeStruct((n, (h + 1) // 2, (w + 1) // 2, c), x.dtype),
        jax.ShapeDtypeStruct((kept,), jnp.uint8),
    )
    return _varying(jax.ffi.ffi_call(target("max_pool"), results, vmap_method="sequential")(x), x)


def _forward(x: jax.Array) -> Any:
    y, workspace = _max_pool(x)
    # Shape and dtype of what is pooled go along as an array of none of it.
    return (y, workspace), (workspace, jnp.empty((0, *x.shape), x.dtype))


def _backward(saved: Any, cotangents: Any) -> Any:
    workspace, like = saved
    return (_gradient(like, workspace, cotangents[0]),)


@jax.custom_vjp
def _gradient(like: jax.Array, workspace: jax.Array, g: jax.Array) -> jax.Array:
    result = jax.ShapeDtypeStruct(like.shape[1:], like.dtype)
    (x,) = _varying((jax.ffi.ffi_call(target("max_pool_gradient"), result, vmap_method="sequential")(workspace, g),), g)
    return x


def _no_second(saved: Any, cotangents: Any) -> Any:
    raise NotImplementedError("oneDNN's max-pool has no second derivative: build the network with the plain primitives")


_max_pool.defvjp(_forward, _backward)
_gradient.defvjp(lambda *operands: (_gradient(*operands), None), _no_second)


def _varying(results: Any, x: jax.Array) -> Any:
    """Results that vary over the axes of `shard_map` that `x` varies over, which the call itself does not say."""
    axes = tuple(varying_axes(x))
    return tuple(jax.lax.pcast(y, axes, to="varying") for y in results) if axes else tuple(results)
