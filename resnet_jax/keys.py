"""Random keys: derived from the run's key, the step and the example, never stored back."""

import jax
import jax.numpy as jnp

Key = jax.Array  # a typed key, `jax.random.key(seed)`


def step_key(key: Key, step: jax.Array) -> Key:
    """The key of one step: the same whatever ran before it, so that a resumed run draws what the first would have."""
    return jax.random.fold_in(key, step)


def example_index(count: int, axis_name: str | None = None) -> jax.Array:
    """Global indices, int32 [count], of the `count` examples of a batch that this shard holds.

    Without `axis_name` the batch is whole, so they are 0..count-1. Under `pmap` or `shard_map` shard `d` holds
    `d * count` and the `count - 1` that follow.
    """
    start = 0 if axis_name is None else jax.lax.axis_index(axis_name) * count
    return start + jnp.arange(count, dtype=jnp.int32)


def example_keys(key: Key, index: jax.Array) -> Key:
    """One key for each global example index: [B] keys, equal on one device and on eight."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
