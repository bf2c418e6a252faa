"""The 3x3 max-pool of stride 2 that follows an ImageNet stem."""

from typing import Any

import jax
import jax.numpy as jnp

from resnet_jax.onednn.library import DTYPES, call, workspace


def max_pool(x: jax.Array) -> jax.Array:
    """`layers.max_pool` by oneDNN, [B, H, W, C] to [B, ceil(H / 2), ceil(W / 2), C], float32 or bfloat16.

    Where several values are the largest, the first has the gradient, as in XLA. The gradient has none itself.

    Raises:
      Unavailable: see `library.load`.
      TypeError: another dtype.
      ValueError: no images [B, H, W, C].
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"oneDNN pools float32 or bfloat16, got {x.dtype}")
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"images [B, H, W, C] are pooled, not {x.shape}")
    return _max_pool(x)[0]


@jax.custom_vjp
def _max_pool(x: jax.Array) -> Any:
    n, h, w, c = x.shape
    # Which of the nine was the largest, in a form and size of oneDNN's own choice.
    kept = jax.ShapeDtypeStruct((workspace("max_pool", x),), jnp.uint8)
    return call("max_pool", (jax.ShapeDtypeStruct((n, (h + 1) // 2, (w + 1) // 2, c), x.dtype), kept), x)


def _forward(x: jax.Array) -> Any:
    y, kept = _max_pool(x)
    # Shape and dtype of what is pooled go along as an array of none of it.
    return (y, kept), (kept, jnp.empty((0, *x.shape), x.dtype))


def _backward(saved: Any, cotangents: Any) -> Any:
    kept, like = saved
    return (_gradient(like, kept, cotangents[0]),)


@jax.custom_vjp
def _gradient(like: jax.Array, kept: jax.Array, g: jax.Array) -> jax.Array:
    (x,) = call("max_pool_gradient", (jax.ShapeDtypeStruct(like.shape[1:], like.dtype),), kept, g)
    return x


def _no_second(saved: Any, cotangents: Any) -> Any:
    raise NotImplementedError("oneDNN's max-pool has no second derivative: build the network with the plain kernels")


_max_pool.defvjp(_forward, _backward)
_gradient.defvjp(lambda *operands: (_gradient(*operands), None), _no_second)
