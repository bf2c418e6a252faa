"""Parameter trees: paths, selection by predicate, counts, moving averages."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
Predicate = Callable[[str, jax.Array], bool]
"""`(path, leaf) -> bool`: whether a leaf is selected, where the path is like `stage1_block1/conv1/kernel`."""


def path_string(path: tuple[Any, ...]) -> str:
    """Join a `jax.tree_util` path into a string such as `stage1_block1/conv1/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves(tree: PyTree) -> dict[str, Any]:
    """Return the leaves by path, in tree order."""
    return {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def abbreviate(names: Iterable[str], limit: int = 3) -> str:
    """Format names for a message, count first, at most `limit` of them: `5: a, b, c, ...`."""
    names = list(names)
    return f"{len(names)}: {', '.join(names[:limit])}{', ...' if len(names) > limit else ''}"


def map_with_path(f: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Map `f(path, leaf, *rest)` over a tree, like `jax.tree.map`, with paths as strings."""
    return jax.tree_util.tree_map_with_path(lambda path, *xs: f(path_string(path), *xs), tree, *rest)


def select(tree: PyTree, predicate: Predicate) -> PyTree:
    """Return a tree of Python bools with the structure of `tree`, as `optax.masked` takes it."""
    return map_with_path(lambda path, leaf: bool(predicate(path, leaf)), tree)


def is_kernel(path: str, leaf: jax.Array) -> bool:
    """Select weights of convolutions and dense layers, which are decayed and pruned; not biases and norm scales."""
    return path.rsplit("/", 1)[-1] == "kernel" and leaf.ndim > 1


def is_head(path: str, leaf: jax.Array) -> bool:
    """Select the parameters of the classifier `head`, which stay trainable when the backbone is frozen."""
    return path.split("/", 1)[0] == "head"


def count(tree: PyTree) -> int:
    """Return the number of scalars in all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def ema(average: PyTree, new: PyTree, decay: jax.Array | float) -> PyTree:
    """Update an exponential moving average: `decay * average + (1 - decay) * new`, with `decay` in [0, 1].

    Leaves keep the dtype of `average`.
    """
    return jax.tree.map(lambda a, b: (decay * a + (1 - decay) * b).astype(a.dtype), average, new)


def global_norm(tree: PyTree) -> jax.Array:
    """Return the Euclidean norm over all leaves, a float32 scalar."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))
