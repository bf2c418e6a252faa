"""3x3 max-pool with stride 2, as in an ImageNet stem."""

from typing import Any

import jax
import jax.numpy as jnp

from resnet_jax.onednn.library import DTYPES, call, workspace


def max_pool(x: jax.Array) -> jax.Array:
    """Max-pool 3x3 with stride 2, [B, H, W, C] to [B, ceil(H / 2), ceil(W / 2), C], float32 or bfloat16.

    Equals `layers.max_pool`. Ties pass the gradient to the first maximum, as in XLA.

    Raises:
      Unavailable: see `library.load`.
      TypeError: the dtype is unsupported.
      ValueError: these are not images [B, H, W, C], or there are none.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"oneDNN pools float32 or bfloat16, got {x.dtype}")
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"max_pool takes images [B, H, W, C], got {x.shape}")
    return _max_pool(x)[0]


@jax.custom_vjp
def _max_pool(x: jax.Array) -> Any:
    n, h, w, c = x.shape
    # oneDNN stores which of the nine values was the largest, in a buffer whose form and size it chooses.
    kept = jax.ShapeDtypeStruct((workspace("max_pool", x),), jnp.uint8)
    return call("max_pool", (jax.ShapeDtypeStruct((n, (h + 1) // 2, (w + 1) // 2, c), x.dtype), kept), x)


def _forward(x: jax.Array) -> Any:
    y, kept = _max_pool(x)
    # Pass shape and dtype of the input to the backward pass as an empty array.
    return (y, kept), (kept, jnp.empty((0, *x.shape), x.dtype))


def _backward(saved: Any, cotangents: Any) -> Any:
    kept, like = saved
    return tuple(call("max_pool_gradient", [jax.ShapeDtypeStruct(like.shape[1:], like.dtype)], kept, cotangents[0]))


_max_pool.defvjp(_forward, _backward)
