"""The operators' loops run under `shard_map`, as one of the compile modes needs, with the results of `vmap` alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from resnet_jax.detection import iou, match, multilevel_roi_align, nms, sample


def test_operators_on_two_devices():
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 50, (4, 20, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(1, 40, corner.shape)], -1).astype(np.float32)
    scores = rng.random((4, 20)).astype(np.float32)
    maps = [rng.normal(size=(4, size, size, 2)).astype(np.float32) for size in (16, 8)]

    def one(maps, boxes, scores, seed):
        keep = nms(boxes, scores, 0.5)
        matches = match(iou(boxes[:3], boxes), jnp.ones(3, bool), 0.7, 0.3, low_quality=True)
        drawn = sample(jax.random.key(seed), matches >= 0, matches == -1, 8, 0.5)
        pooled = multilevel_roi_align(maps, boxes, (4, 8), size=2, sampling=1)
        return jnp.square(pooled).sum(), (keep, matches, drawn)

    @partial(jax.grad, has_aux=True)
    def batch(maps, *rest):
        losses, others = jax.vmap(one)(maps, *rest)
        return losses.sum(), others

    given = (maps, boxes, scores, np.arange(4))
    split = PartitionSpec("data")
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    sharded = jax.jit(jax.shard_map(batch, mesh=mesh, in_specs=split, out_specs=split))(*given)
    for got, want in zip(jax.tree.leaves(sharded), jax.tree.leaves(jax.jit(batch)(*given)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
