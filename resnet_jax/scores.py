"""Pruning scores: how much each parameter matters, larger is more important; masks keep the largest.

Scores are a tree shaped like `params`, any pytree of float arrays, and float32 whatever its dtypes. Those that look at
data take

- `loss(params, batch)`, the per-example losses, float32 [B];
- `batches`, a finite iterable of pytrees of arrays [B, ...]. Batches weigh the same; one of another shape is traced
  anew.

`loss` and `forward` are pure and are traced once for as long as the same function is handed over, in later calls too:
pruning in rounds compiles once, and what such a function closes over must not change between them.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from resnet_jax.keys import Key
from resnet_jax.tree import PyTree, count, map_with_path

Batch = Any
Loss = Callable[[PyTree, Batch], jax.Array]

# Per-example gradients that are held at once by `fisher`: 512 MiB of float32.
MAX_EXAMPLE_GRADIENTS = 1 << 27

NON_FINITE_SQUARES = "the gradients are not finite, or overflow when squared"


# --- without data -----------------------------------------------------------------------------------------------------


def magnitude(params: PyTree) -> PyTree:
    """The absolute value of each weight, in [0, inf): https://arxiv.org/abs/1506.02626."""
    return jax.tree.map(lambda w: jnp.abs(_float32(w)), params)


def random(params: PyTree, *, key: Key) -> PyTree:
    """Uniform in [0, 1), the control that any other score has to beat; each leaf draws by its place in the tree."""
    leaves, structure = jax.tree.flatten(params)
    draws = [jax.random.uniform(jax.random.fold_in(key, i), jnp.shape(leaf)) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, draws)


def norm_scale(params: PyTree) -> PyTree:
    """Network slimming: the absolute value of leaves named `scale`, 0 elsewhere: https://arxiv.org/abs/1708.06519.

    For pruning channels, where the scores of all that belongs to one are summed.
    """

    def score(path: str, w: jax.Array) -> jax.Array:
        w = _float32(w)
        return jnp.abs(w) if path.rsplit("/", 1)[-1] == "scale" else jnp.zeros_like(w)

    return map_with_path(score, params)


def synflow(params: PyTree, *, forward: Callable[[PyTree], jax.Array]) -> PyTree:
    """Synaptic flow, `|w dR/dw|` with `R = sum(forward(|params|))`, in [0, inf): https://arxiv.org/abs/2006.05467.

    `forward(params)` is the network's output for an input of ones, with norms that do nothing and without biases: then
    the scores of every layer that all of the signal passes sum to R. The paper prunes in 100 rounds, as one round to a
    high sparsity can empty a layer.

    Raises:
      ValueError: a score is not finite: R grows exponentially with depth.
    """
    hint = "if the network overflows float32, scale its input and its output down, which scales all scores alike"
    return _finite(_synflow(params, forward), "synflow", hint)


# --- by gradients -----------------------------------------------------------------------------------------------------


def snip(params: PyTree, *, loss: Loss, batches: Iterable[Batch]) -> PyTree:
    """SNIP's connection sensitivity, `|g w|` of the mean gradient g, as parts of 1: https://arxiv.org/abs/1810.02340.

    Raises:
      ValueError: there are no batches, or a score is not finite.
    """
    products = _multiply(params, _mean(_gradient, params, loss, batches))
    sensitivity = jax.tree.map(jnp.abs, products)
    total = sum(jnp.sum(s) for s in jax.tree.leaves(sensitivity))
    scores = jax.tree.map(lambda s: s / total, sensitivity)
    return _finite(scores, "snip", "the gradients are not finite, or all are 0")


def taylor(params: PyTree, *, loss: Loss, batches: Iterable[Batch]) -> PyTree:
    """First-order Taylor expansion: the mean over batches of `(g w)^2`, in [0, inf): https://arxiv.org/abs/1906.10771.

    The square of how a batch's mean loss would change if the weight were 0, to first order.

    Raises:
      ValueError: there are no batches, or a score is not finite.
    """
    return _finite(_mean(_taylor, params, loss, batches), "taylor", NON_FINITE_SQUARES)


def fisher(params: PyTree, *, loss: Loss, batches: Iterable[Batch]) -> PyTree:
    """Fisher pruning: `w^2` times the diagonal of the empirical Fisher, in [0, inf): https://arxiv.org/abs/1801.05787.

    That is the mean over examples of the squared gradient of each one's own loss; the paper's factor of 1/2 is left
    out. Examples meet one at a time, so `loss` must not mix them.

    Raises:
      ValueError: there are no batches, or a score is not finite.
    """
    return _finite(_mean(_fisher, params, loss, batches), "fisher", NON_FINITE_SQUARES)


SCORES: dict[str, Callable[..., PyTree]] = {
    "magnitude": magnitude,
    "random": random,
    "snip": snip,
    "taylor": taylor,
    "fisher": fisher,
    "norm_scale": norm_scale,
    "synflow": synflow,
}
"""The scores by name: `(params, ...) -> scores`; see each for what it takes besides."""


def _float32(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def _multiply(params: PyTree, gradient: PyTree) -> PyTree:
    return jax.tree.map(lambda w, g: _float32(w) * g, params, gradient)


def _gradient(params: PyTree, batch: Batch, loss: Loss) -> PyTree:
    """Gradient of the batch's mean loss, float32."""
    return jax.tree.map(_float32, jax.grad(lambda p: loss(p, batch).mean())(params))


def _taylor(params: PyTree, batch: Batch, loss: Loss) -> PyTree:
    return jax.tree.map(jnp.square, _multiply(params, _gradient(params, batch, loss)))


def _fisher(params: PyTree, batch: Batch, loss: Loss) -> PyTree:
    """The mean over examples of what `_taylor` is for a batch of one: w^2 g^2 is (g w)^2."""

    def score(example: Batch) -> PyTree:
        return _taylor(params, jax.tree.map(lambda x: x[None], example), loss)

    def add(total: PyTree, block: Batch) -> tuple[PyTree, None]:
        return jax.tree.map(lambda t, s: t + s.sum(0), total, jax.vmap(score)(block)), None

    size = jax.tree.leaves(batch)[0].shape[0]
    limit = max(1, min(size, MAX_EXAMPLE_GRADIENTS // count(params)))
    block = next(n for n in range(limit, 0, -1) if size % n == 0)
    blocks = jax.tree.map(lambda x: x.reshape(size // block, block, *x.shape[1:]), batch)
    # A sum in a scan, and no `lax.map`: that would return every example's scores, and so hold them all.
    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), params)
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
    """The mean over batches of `f(params, batch, loss)`, a tree shaped like `params`."""
    total, number = None, 0
    for batch in batches:
        # Added outside of the compiled function: the first batch's sum would be of another sharding than the others'.
        batch_score = _batch_score(f, params, batch, loss)
        total = batch_score if total is None else jax.tree.map(jnp.add, total, batch_score)
        number += 1
    if total is None:
        raise ValueError("no batches: scores by gradients need at least one")
    return jax.tree.map(lambda t: t / number, total)


def _finite(scores: PyTree, name: str, cause: str) -> PyTree:
    """The scores as they are; a NaN among them would be sorted like any number, and the masks be of chance."""
    if not jax.tree.all(jax.tree.map(lambda s: jnp.isfinite(s).all(), scores)):
        raise ValueError(f"{name}: scores are not finite: {cause}")
    return scores
