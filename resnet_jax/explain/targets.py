"""What is explained: functions of outputs [B, D] to one score per image [B].

A target is a `jax.tree_util.Partial`, so `jax.jit` takes it as an argument and traces its labels: other labels do not
compile again.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike

Target = Callable[[jax.Array], jax.Array]
"""`outputs [B, D] -> scores [B]`; a `jax.tree_util.Partial` where it is an argument of a compiled function."""


def class_score(index: ArrayLike) -> Target:
    """Score an image by the output of class `index`, one int or [B].

    Raises:
      ValueError: when applied, if an index that is not traced is out of range; the score of a traced one is NaN.
    """
    return Partial(_class_score, index)


def class_difference(a: ArrayLike, b: ArrayLike) -> Target:
    """Score an image by the output of class `a` minus that of class `b`: why one rather than the other.

    Raises:
      ValueError: as `class_score`.
    """
    return Partial(_class_difference, a, b)


def class_probability(index: ArrayLike) -> Target:
    """Score an image by the softmax probability of class `index`, one int or [B]; deletion and insertion use it.

    Raises:
      ValueError: as `class_score`.
    """
    return Partial(_class_probability, index)


def similarity(embedding: jax.Array) -> Target:
    """Score an image by the cosine of its outputs and an embedding, [D] or [B, D], in [-1, 1]: for encoders."""
    return Partial(_similarity, embedding)


def _class_score(index: ArrayLike, outputs: jax.Array) -> jax.Array:
    size = outputs.shape[-1]
    if not isinstance(index, jax.core.Tracer) and not np.all((np.asarray(index) >= 0) & (np.asarray(index) < size)):
        raise ValueError(f"class {index} is out of range: there are {size} classes, from 0")
    columns = jnp.broadcast_to(jnp.asarray(index, jnp.int32), outputs.shape[:1])[:, None]
    return jnp.take_along_axis(outputs, columns, axis=1, mode="fill")[:, 0]


def _class_difference(a: ArrayLike, b: ArrayLike, outputs: jax.Array) -> jax.Array:
    return _class_score(a, outputs) - _class_score(b, outputs)


def _class_probability(index: ArrayLike, outputs: jax.Array) -> jax.Array:
    return _class_score(index, jax.nn.softmax(outputs))


def _similarity(embedding: jax.Array, outputs: jax.Array) -> jax.Array:
    embedding = jnp.broadcast_to(embedding, outputs.shape).astype(jnp.float32)
    product = (embedding * outputs).sum(-1)
    return product * jax.lax.rsqrt(jnp.square(embedding).sum(-1) * jnp.square(outputs).sum(-1) + 1e-12)
