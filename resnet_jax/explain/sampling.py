"""Sums over samples, a few at a time: what many perturbed copies of a batch need in memory is that of a few."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from resnet_jax.parallel import vary_like
from resnet_jax.tree import PyTree


def total(f: Callable[[Any], PyTree], xs: PyTree, chunk: int) -> PyTree:
    """Return the sum of `f(x)` over the leading axis of `xs`, computing and keeping at most `chunk` terms at once."""
    count = len(jax.tree.leaves(xs)[0])
    chunk = max(1, min(chunk, count))
    whole = count // chunk * chunk

    def part(xs: PyTree) -> PyTree:
        return jax.tree.map(lambda y: y.sum(0), jax.vmap(f)(xs))

    def add(sums: PyTree, xs: PyTree) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, sums, part(xs)), None

    chunks = jax.tree.map(lambda x: x[:whole].reshape(-1, chunk, *x.shape[1:]), xs)
    first = jax.tree.map(lambda x: x[:chunk], xs)
    zeros = jax.tree.map(lambda y: vary_like(jnp.zeros(y.shape, y.dtype), y), jax.eval_shape(part, first))
    sums, _ = jax.lax.scan(add, zeros, chunks)
    return sums if whole == count else add(sums, jax.tree.map(lambda x: x[whole:], xs))[0]
