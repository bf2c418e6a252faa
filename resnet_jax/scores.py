"""Pruning scores: how important each parameter is; masks keep the largest.

Scores are a float32 tree with the structure of `params`, which may be any tree of float arrays. Scores that use data
take `loss(params, batch)`, which returns per-example losses, float32 [B], and `batches`, a finite iterable of trees of
arrays [B, ...]. All batches have equal weight; each new shape is traced again.

`loss` and `forward` must be pure. Passing the same function object again, also in later calls, reuses its compiled
code, so iterative pruning compiles once; values that such a function closes over must not change between calls.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from resnet_jax.keys import Key
from resnet_jax.parallel import vary_like
from resnet_jax.tree import PyTree, count, map_with_path

Batch = Any
Loss = Callable[[PyTree, Batch], jax.Array]

# Numbers in the per-example gradients that `fisher` holds at once: 512 MiB of float32.
MAX_EXAMPLE_GRADIENTS = 1 << 27

NON_FINITE_SQUARES = "the gradients are not finite, or overflow when squared"


def magnitude(params: PyTree) -> PyTree:
    """Score by the absolute value of each weight, in [0, inf): https://arxiv.org/abs/1506.02626."""
    return jax.tree.map(lambda w: jnp.abs(_float32(w)), params)


def random(params: PyTree, *, key: Key) -> PyTree:
    """Score uniformly at random in [0, 1), a baseline for all other scores; leaf i draws from `fold_in(key, i)`."""
    leaves, structure = jax.tree.flatten(params)
    keys = (jax.random.fold_in(key, i) for i in range(len(leaves)))
    draws = [jax.random.uniform(k, jnp.shape(x), jnp.float32) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, draws)


def norm_scale(params: PyTree) -> PyTree:
    """Score leaves named `scale` by their absolute value, others by 0 (network slimming): https://arxiv.org/abs/1708.06519.

    This is meant for pruning channels, where scores are summed over the leaves that carry a channel.
    """

    def score(path: str, w: jax.Array) -> jax.Array:
        w = _float32(w)
        return jnp.abs(w) if path.rsplit("/", 1)[-1] == "scale" else jnp.zeros_like(w)

    return map_with_path(score, params)


def synflow(params: PyTree, *, forward: Callable[[PyTree], jax.Array]) -> PyTree:
    """Score by synaptic flow, `|w dR/dw|` with `R = sum(forward(|params|))`, in [0, inf): https://arxiv.org/abs/2006.05467.

    `forward(params)` returns the output for an input of ones, with norms that do nothing and without biases. Then the
    scores of each layer that carries the whole signal sum to R. The paper prunes in 100 rounds, since a single round to
    high sparsity can remove a whole layer.

    Raises:
      ValueError: a score is not finite; R grows exponentially with depth.
    """
    hint = "if the network overflows float32, scale its input and its output down, which scales all scores equally"
    return _finite(_synflow(params, forward), "synflow", hint)


def snip(params: PyTree, *, loss: Loss, batches: Iterable[Batch]) -> PyTree:
    """Score by connection sensitivity, `|g w|` of the mean gradient g, normalized to sum to 1 (SNIP).

    https://arxiv.org/abs/1810.02340.

    Raises:
      ValueError: there are no batches, or a score is not finite.
    """
    products = _multiply(params, _mean(_gradient, params, loss, batches))
    sensitivity = jax.tree.map(jnp.abs, products)
    total = sum(jnp.sum(s) for s in jax.tree.leaves(sensitivity))
    scores = jax.tree.map(lambda s: s / total, sensitivity)
    return _finite(scores, "snip", "the gradients are not finite, or all are 0")


def taylor(params: PyTree, *, loss: Loss, batches: Iterable[Batch]) -> PyTree:
    """Score by first-order Taylor expansion, the mean over batches of `(g w)^2`, in [0, inf).

    https://arxiv.org/abs/1906.10771. To first order, `(g w)^2` is the squared change of a batch's mean loss when the
    weight is set to 0.

    Raises:
      ValueError: there are no batches, or a score is not finite.
    """
    return _finite(_mean(_taylor, params, loss, batches), "taylor", NON_FINITE_SQUARES)


def fisher(params: PyTree, *, loss: Loss, batches: Iterable[Batch]) -> PyTree:
    """Score by `w^2` times the diagonal of the empirical Fisher information, in [0, inf): https://arxiv.org/abs/1801.05787.

    The diagonal is the mean over examples of squared per-example gradients; the paper's factor of 1/2 is omitted.
    `loss` is called with one example at a time, so it must not mix examples.

    Raises:
      ValueError: there are no batches, or a score is not finite.
    """
    return _finite(_mean(_fisher, params, loss, batches), "fisher", NON_FINITE_SQUARES)


SCORES: dict[str, Callable[..., PyTree]] = {
    score.__name__: score for score in (magnitude, random, snip, taylor, fisher, norm_scale, synflow)
}
"""Scores by name: `(params, ...) -> scores`; each documents its further arguments."""


def _float32(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def _multiply(params: PyTree, gradient: PyTree) -> PyTree:
    return jax.tree.map(lambda w, g: _float32(w) * g, params, gradient)


def _gradient(params: PyTree, batch: Batch, loss: Loss) -> PyTree:
    """Return the gradient of the batch's mean loss, float32; under `shard_map`, of the shard's batch alone."""
    return jax.tree.map(_float32, jax.grad(lambda p: loss(p, batch).mean())(vary_like(params, batch)))


def _taylor(params: PyTree, batch: Batch, loss: Loss) -> PyTree:
    return jax.tree.map(jnp.square, _multiply(params, _gradient(params, batch, loss)))


def _fisher(params: PyTree, batch: Batch, loss: Loss) -> PyTree:
    """Average over examples the `_taylor` score of a batch of one, since w^2 g^2 is (g w)^2."""

    def score(example: Batch) -> PyTree:
        return _taylor(params, jax.tree.map(lambda x: x[None], example), loss)

    def add(total: PyTree, block: Batch) -> tuple[PyTree, None]:
        return jax.tree.map(lambda t, s: t + s.sum(0), total, jax.vmap(score)(block)), None

    size = jax.tree.leaves(batch)[0].shape[0]
    limit = max(1, min(size, MAX_EXAMPLE_GRADIENTS // count(params)))
    block = next(n for n in range(limit, 0, -1) if size % n == 0)
    blocks = jax.tree.map(lambda x: x.reshape(size // block, block, *x.shape[1:]), batch)
    # Sum inside a scan: `lax.map` would return, and so hold, the scores of all examples.
    zeros = vary_like(jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), params), (params, batch))
    total, _ = jax.lax.scan(add, zeros, blocks)
    return jax.tree.map(lambda t: t / size, total)


@partial(jax.jit, static_argnums=1)
def _synflow(params: PyTree, forward: Callable[[PyTree], jax.Array]) -> PyTree:
    positive = jax.tree.map(jnp.abs, params)
    gradient = jax.grad(lambda p: forward(p).sum(dtype=jnp.float32))(positive)
    return jax.tree.map(lambda w, g: jnp.abs(_float32(w) * _float32(g)), positive, gradient)


@partial(jax.jit, static_argnums=(0, 3))
def _batch_score(f: Callable[..., PyTree], params: PyTree, batch: Batch, loss: Loss) -> PyTree:
    return f(params, batch, loss)


def _mean(f: Callable[..., PyTree], params: PyTree, loss: Loss, batches: Iterable[Batch]) -> PyTree:
    """Average `f(params, batch, loss)` over batches; the result has the structure of `params`."""
    total, number = None, 0
    for batch in batches:
        # Add outside the compiled function: inside, the first batch's sum would have a different sharding.
        batch_score = _batch_score(f, params, batch, loss)
        total = batch_score if total is None else jax.tree.map(jnp.add, total, batch_score)
        number += 1
    if total is None:
        raise ValueError("no batches: gradient-based scores need at least one")
    return jax.tree.map(lambda t: t / number, total)


def _finite(scores: PyTree, name: str, cause: str) -> PyTree:
    """Return the scores unchanged if all are finite: a NaN would be ranked like a number, which makes masks random.

    Traced scores cannot be checked.
    """
    finite = jnp.stack([jnp.isfinite(s).all() for s in jax.tree.leaves(scores)]).all()
    if not isinstance(finite, jax.core.Tracer) and not finite:
        raise ValueError(f"{name}: scores are not finite: {cause}")
    return scores
