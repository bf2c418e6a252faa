"""Paths, predicates, averages and keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.keys import example_index, example_keys, step_key
from resnet_jax.tree import count, ema, global_norm, is_head, is_kernel, leaves, select
from tests.reference.nets import tiny

PARAMS = jax.eval_shape(tiny().init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]


def test_paths_and_predicates_cover_every_leaf():
    assert leaves(PARAMS)["head/bias"].shape == (4,)
    kernels = {path for path, chosen in leaves(select(PARAMS, is_kernel)).items() if chosen}
    assert "stage1_block1/conv1/kernel" in kernels
    assert all(path.endswith("/kernel") for path in kernels)
    rest = leaves(PARAMS).keys() - kernels
    assert {path.rsplit("/", 1)[1] for path in rest} == {"bias", "scale"}
    assert {path for path, chosen in leaves(select(PARAMS, is_head)).items() if chosen} == {"head/kernel", "head/bias"}


def test_count_and_norm():
    tree = {"a": jnp.full((2, 3), 2.0), "b": jnp.ones(())}
    assert count(tree) == 7
    assert float(global_norm(tree)) == pytest.approx(5.0)


@pytest.mark.parametrize("decay", [0.0, 0.25, 1.0])
def test_ema(decay):
    np.testing.assert_allclose(ema({"a": jnp.asarray(4.0)}, {"a": jnp.asarray(8.0)}, decay)["a"], 8 - 4 * decay)


def test_ema_keeps_the_dtype_of_the_average():
    """A decay that is an array, as in a schedule, does not promote: the average can be the carry of a scan."""
    average, decays = {"a": jnp.asarray(4.0, jnp.bfloat16)}, jnp.asarray([0.5, 0.5])
    average, _ = jax.lax.scan(lambda a, decay: (ema(a, {"a": jnp.asarray(8.0)}, decay), None), average, decays)
    assert average["a"].dtype == jnp.bfloat16 and float(average["a"]) == 7


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_draws_by_example_keys_do_not_depend_on_the_batch(implementation):
    keys = example_keys(jax.random.key(0, impl=implementation), example_index(6))
    draws = jax.vmap(jax.random.normal)(keys)
    np.testing.assert_array_equal(draws, [jax.random.normal(key) for key in keys])
    assert len(np.unique(draws)) == 6


def test_example_keys_are_the_same_in_any_split():
    key = step_key(jax.random.key(0), jnp.asarray(3))
    whole = example_keys(key, example_index(8))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    parts = jax.jit(
        jax.shard_map(
            lambda x: example_keys(key, example_index(x.shape[0], "data")), mesh=mesh, in_specs=spec, out_specs=spec
        )
    )(jnp.zeros(8))
    np.testing.assert_array_equal(jax.random.key_data(whole), jax.random.key_data(parts))
    assert len(np.unique(jax.random.key_data(whole), axis=0)) == 8


def test_step_keys_differ():
    keys = jax.vmap(lambda step: step_key(jax.random.key(0), step))(jnp.arange(4))
    assert len(np.unique(jax.random.key_data(keys), axis=0)) == 4
