"""Pytrees of parameters: paths, selection by predicate, counts, moving averages."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
Predicate = Callable[[str, jax.Array], bool]
"""Whether a leaf is selected, by its path (`stage1_block1/conv1/kernel`) and its array."""


def path_string(path: tuple[Any, ...]) -> str:
    """`stage1_block1/conv1/kernel` for a path as `jax.tree_util` gives it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves by their path, in the tree's order."""
    return {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def abbreviate(names: Iterable[str], limit: int = 3) -> str:
    """Names for a message: their number and the first `limit`, `5: a, b, c, ...`."""
    names = list(names)
    return f"{len(names)}: {', '.join(names[:limit])}{', ...' if len(names) > limit else ''}"


def map_with_path(f: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """`jax.tree.map` of `f(path, leaf, *rest)` with paths as strings."""
    return jax.tree_util.tree_map_with_path(lambda path, *xs: f(path_string(path), *xs), tree, *rest)


def select(tree: PyTree, predicate: Predicate) -> PyTree:
    """A tree of Python bools shaped like `tree`: the form that `optax.masked` takes."""
    return map_with_path(lambda path, leaf: bool(predicate(path, leaf)), tree)


def is_kernel(path: str, leaf: jax.Array) -> bool:
    """Weights of convolutions and dense layers: what is decayed and pruned. Biases and norm scales are not."""
    return path.rsplit("/", 1)[-1] == "kernel" and leaf.ndim > 1


def is_head(path: str, leaf: jax.Array) -> bool:
    """The classifier's own parameters: what a frozen backbone leaves to train."""
    return path.split("/", 1)[0] == "head"


def count(tree: PyTree) -> int:
    """Number of scalars in all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def ema(average: PyTree, new: PyTree, decay: jax.Array | float) -> PyTree:
    """One step of an exponential moving average: `decay * average + (1 - decay) * new`, `decay` in [0, 1]."""
    return jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, average, new)


def global_norm(tree: PyTree) -> jax.Array:
    """Euclidean norm over all leaves, float32 scalar."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))
