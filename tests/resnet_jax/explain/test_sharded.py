"""Explanations and their scores under `shard_map`, with images split over devices and weights on all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from resnet_jax.explain import METHODS, class_score, deletion, infidelity, road
from tests.resnet_jax.explain.nets import IMAGES, KEY, corner_network

TARGET = class_score(2)
DRAWS_BY_BATCH = ("random", "smooth_grad")  # noise of the shard's own batch
FUNCTIONS = {name: method for name, method in METHODS.items() if name not in DRAWS_BY_BATCH}
CALLS = {
    "deletion": lambda network, images, heat: deletion(network, images, TARGET, heat, steps=4),
    "road": lambda network, images, heat: road(network, images, TARGET, heat, key=KEY, noise=0.0),
    "infidelity": lambda network, images, heat: infidelity(
        network, images, TARGET, heat, key=KEY, samples=4, perturb=lambda key, x: (jnp.ones(x.shape[:3]), 0.5 * x)
    ),
}


@pytest.mark.parametrize("name", [*FUNCTIONS, *CALLS])
def test_two_devices_equal_one(name):
    heat = jnp.square(IMAGES).sum(-1)

    def explained(network, images, heat):
        if name in CALLS:
            return CALLS[name](network, images, heat)
        return FUNCTIONS[name](network, images, TARGET, key=KEY)

    split, whole = PartitionSpec("data"), PartitionSpec()
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    sharded = jax.shard_map(explained, mesh=mesh, in_specs=(whole, split, split), out_specs=split)
    got, want = (jax.jit(f)(corner_network(), IMAGES, heat) for f in (sharded, explained))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.parametrize("name", DRAWS_BY_BATCH)
def test_noise_is_drawn_on_each_shard(name):
    split, whole = PartitionSpec("data"), PartitionSpec()
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    method = lambda network, images: METHODS[name](network, images, TARGET, key=KEY)  # noqa: E731
    sharded = jax.jit(jax.shard_map(method, mesh=mesh, in_specs=(whole, split), out_specs=split))
    heat, half = sharded(corner_network(), IMAGES), len(IMAGES) // 2
    np.testing.assert_allclose(heat[:half], method(corner_network(), IMAGES[:half]), atol=1e-5)
