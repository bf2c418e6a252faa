"""Which layers can be pruned: what accuracy is left when one layer alone is."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.tree import PyTree, leaves, map_with_path


def sensitivity(
    evaluate: Callable[[PyTree], float], params: PyTree, paths: Sequence[str], sparsities: Sequence[float]
) -> dict[str, list[float]]:
    """Accuracy by path, at each sparsity in [0, 1], with that leaf alone pruned by magnitude and not trained again.

    As in https://arxiv.org/abs/1608.08710 section 3.2, with single weights. `evaluate(params)` is called
    len(paths) * len(sparsities) times, with shapes and dtypes that never change: compile it once.

    Raises:
      ValueError: a path that is not in `params`, a sparsity outside of [0, 1].
    """
    kernels = leaves(params)
    if missing := [path for path in paths if path not in kernels]:
        raise ValueError(f"no parameters at {', '.join(missing)}; there are {', '.join(kernels)}")
    return {
        path: [float(evaluate(_with(params, path, prune_smallest(kernels[path], share)))) for share in sparsities]
        for path in paths
    }


def prune_smallest(kernel: jax.Array, sparsity: float) -> jax.Array:
    """The kernel with exactly round(sparsity * size) of its weights zero: the smallest, and of equal ones the later.

    Raises:
      ValueError: a sparsity outside of [0, 1].
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be in [0, 1], got {sparsity}")
    values = np.array(kernel)
    kept = values.size - round(sparsity * values.size)
    largest_first = np.argsort(-np.abs(values), axis=None, kind="stable")
    values.reshape(-1)[largest_first[kept:]] = 0
    return jnp.asarray(values)


def _with(params: PyTree, path: str, leaf: jax.Array) -> PyTree:
    """`params` with another leaf at a path."""
    return map_with_path(lambda at, old: leaf if at == path else old, params)
