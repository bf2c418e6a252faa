"""Masks over parameters: boolean trees shaped like them, with a 0-d True where a leaf is never pruned."""

import jax
import jax.numpy as jnp

from resnet_jax.tree import PyTree


def no_masks(params: PyTree) -> PyTree:
    """Masks that keep everything: 0-d True for every leaf, which costs nothing to hold or to apply."""
    return jax.tree.map(lambda _: jnp.ones((), bool), params)


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    """Zero where a mask is False; shapes and dtypes stay."""
    return jax.tree.map(lambda p, m: jnp.where(m, p, jnp.zeros((), p.dtype)), params, masks)
