"""The loss around a minimum, along two random directions: https://arxiv.org/abs/1712.09913."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.tree import PyTree, is_kernel, map_with_path


def filter_direction(params: PyTree, key: jax.Array) -> PyTree:
    """Draw a direction in which each filter has the norm that the same filter of `params` has.

    A filter is what makes one output channel of a convolution or of the head. Biases and norms stay as they are, as in
    the paper, and so do pruned weights: the direction is 0 there.
    """

    def draw(number: int, leaf: jax.Array) -> jax.Array:
        noise = jax.random.normal(jax.random.fold_in(key, number), leaf.shape) * (leaf != 0)
        inputs = tuple(range(leaf.ndim - 1))
        norm, wanted = (jnp.sqrt(jnp.sum(jnp.square(x), inputs, keepdims=True)) for x in (noise, leaf))
        return noise * wanted / jnp.maximum(norm, 1e-12)

    numbers = iter(range(10**6))
    return map_with_path(lambda p, x: draw(next(numbers), x) if is_kernel(p, x) else jnp.zeros_like(x), params)


def loss_surface(
    loss: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batches: Iterable[PyTree],
    *,
    key: jax.Array,
    side: int = 11,
    reach: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the loss at `params + a * first + b * second`, for `side` values of a and of b in [-reach, reach].

    Args:
      loss: `loss(params, batch)`, the sum over a batch's examples.
      batches: the examples; each is used for all points before the next is read.
      key: draws the two directions, see `filter_direction`.
      side: odd, so that the middle is the minimum itself.

    Returns:
      (places float32 [side], summed losses float64 [side, side] by a and b).
    """
    first, second = (filter_direction(params, one) for one in jax.random.split(key))

    @jax.jit
    def at(params: PyTree, first: PyTree, second: PyTree, a: jax.Array, b: jax.Array, batch: PyTree) -> jax.Array:
        return loss(jax.tree.map(lambda p, x, y: p + a * x + b * y, params, first, second), batch)

    places = np.linspace(-reach, reach, side, dtype=np.float32)
    total = np.zeros((side, side))
    for batch in batches:
        rows = [[at(params, first, second, a, b, batch) for b in places] for a in places]
        total += np.asarray(jax.device_get(rows), np.float64)
    return places, total
