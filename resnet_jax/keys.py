"""Random keys, derived from the run's key, the step and the example; never written back to the state."""

import jax
import jax.numpy as jnp

Key = jax.Array  # a typed key, `jax.random.key(seed)`


def step_key(key: Key, step: jax.Array) -> Key:
    """Return the key of one step; it depends on the step alone, so a resumed run draws the same numbers."""
    return jax.random.fold_in(key, step)


def example_index(count: int, axis_name: str | None = None) -> jax.Array:
    """Return the global indices, int32 [count], of the `count` examples of the batch on this shard.

    Without `axis_name` the batch is whole and the indices are 0..count-1. Under `pmap` or `shard_map`, those of shard
    `d` start at `d * count`.
    """
    start = 0 if axis_name is None else jax.lax.axis_index(axis_name) * count
    return start + jnp.arange(count, dtype=jnp.int32)


def example_keys(key: Key, index: jax.Array) -> Key:
    """Return one key per global example index, [B]; keys are the same on one device or many.

    They are of JAX's default implementation: `vmap` over `rbg` keys draws all numbers by the first key alone.
    """
    if str(jax.random.key_impl(key)) in ("rbg", "unsafe_rbg"):  # two threefry keys, of which one is enough
        key = jax.random.wrap_key_data(jax.random.key_data(key)[:2], impl="threefry2x32")
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
