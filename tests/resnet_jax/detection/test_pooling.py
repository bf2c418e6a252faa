"""ROIAlign against plain Python, its gradient, and levels of a pyramid."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.detection import multilevel_roi_align, roi_align
from tests.reference import detection as plain

STRIDES = (4, 8, 16, 32)


def random_features(seed, height=9, width=12, channels=3):
    return np.random.default_rng(seed).normal(size=(height, width, channels)).astype(np.float32)


def random_boxes(seed, count, extent):
    """Float32 [count, 4], many partly or wholly outside, some without area or inverted."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(-extent / 2, 1.2 * extent, (count, 2))
    sides = rng.uniform(-1, extent, (count, 2)) * rng.choice([0.01, 0.1, 1], (count, 1))
    return np.concatenate([corner, corner + sides], 1).astype(np.float32)


@pytest.mark.parametrize(
    ("size", "sampling", "aligned", "scale", "count"),
    [
        (2, 2, False, 1.0, 1000),
        (2, 2, True, 1.0, 1000),
        (7, 2, False, 0.25, 60),
        (3, 1, False, 0.5, 200),
        (1, 3, True, 0.125, 300),
    ],
)
def test_equals_plain_python(size, sampling, aligned, scale, count):
    features, boxes = random_features(size), random_boxes(count, count, 12 / scale)
    got = jax.jit(partial(roi_align, scale=scale, size=size, sampling=sampling, aligned=aligned))(features, boxes)
    want = plain.roi_align(features, boxes, scale, size, sampling, aligned)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert (np.abs(want) > 0.1).mean() > 0.2  # most boxes see the map


def test_borders():
    """On a map of ones, a sample is 1 up to one cell outside, and 0 beyond."""
    ones = jnp.ones((4, 4, 1))
    x = jnp.array([-1.25, -1, -0.5, 0, 3.5, 4, 4.25])
    boxes = jnp.stack([x - 0.5, jnp.full(7, 1.0), x + 0.5, jnp.full(7, 2.0)], 1)
    pooled = jax.jit(partial(roi_align, size=1, sampling=1))(ones, boxes, 1.0)
    np.testing.assert_array_equal(pooled.ravel(), [0, 1, 1, 1, 1, 1, 0])


def test_eager_jit_and_vmap_agree():
    features = jnp.stack([random_features(0), random_features(1)])
    boxes = jnp.stack([random_boxes(2, 5, 12), random_boxes(3, 5, 12)])
    pool = partial(roi_align, scale=1.0, size=3, sampling=1)
    batched = jax.jit(jax.vmap(pool))(features, boxes)
    for i in range(2):
        np.testing.assert_allclose(batched[i], jax.jit(pool)(features[i], boxes[i]), atol=1e-6)
    np.testing.assert_allclose(batched[0], pool(features[0], boxes[0]), atol=1e-6)


def pyramid(seed):
    return [random_features(seed + i, 64 // s, 96 // s, 2) for i, s in enumerate(STRIDES)]


@pytest.mark.parametrize("pool", ["one level", "pyramid"])
def test_gradient_is_the_transpose(pool):
    """Pooling is linear in the features: direction times gradient is the pooled direction times the cotangent."""
    boxes = jnp.concatenate([random_boxes(0, 40, 100), jnp.zeros((2, 4)), jnp.array([[5.0, 5, 1, 1]])])
    if pool == "one level":
        maps, function = random_features(1), partial(roi_align, scale=0.1, size=3)
        direction = random_features(2)
    else:
        maps, function = pyramid(1), partial(multilevel_roi_align, strides=STRIDES, size=3, canonical_size=40)
        direction = pyramid(9)

    @jax.jit
    def both(maps, direction, boxes):
        pooled, pull = jax.vjp(lambda maps, boxes: function(maps, boxes=boxes), maps, boxes)
        cotangent = jnp.sin(jnp.arange(pooled.size)).reshape(pooled.shape)
        return function(direction, boxes=boxes), cotangent, *pull(cotangent)

    moved, cotangent, gradient, to_boxes = both(maps, direction, boxes)
    products = jax.tree.map(lambda g, d: (g.astype(float) * d).sum(), gradient, direction)
    assert float((moved * cotangent).sum()) == pytest.approx(float(sum(jax.tree.leaves(products))), rel=1e-4, abs=1e-3)
    np.testing.assert_array_equal(to_boxes, 0)


def test_half_precision_features():
    features, boxes = random_features(0).astype(jnp.bfloat16), random_boxes(1, 20, 12)
    pool = partial(roi_align, boxes=boxes, scale=1.0, size=3, sampling=1)

    @jax.jit
    def both(x):
        pooled, pull = jax.vjp(pool, x)
        return pooled, *pull(pooled)

    (pooled, gradient), (want, _) = both(features), both(features.astype(jnp.float32))
    assert pooled.dtype == gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(pooled, want, atol=0.02)


def test_each_box_reads_its_own_level():
    sides = np.array([0, 5, 19, 20, 39, 40, 79, 80, 160, 1000], np.float32)
    level = np.array([0, 0, 0, 0, 0, 1, 1, 2, 3, 3])  # with a canonical size of 80 at stride 16
    boxes = np.stack([sides * 0, sides * 0, sides, sides], 1)
    pool = jax.jit(partial(multilevel_roi_align, strides=STRIDES, size=2, canonical_size=80))
    maps = pyramid(0)
    pooled = pool(maps, boxes)
    for i, stride in enumerate(STRIDES):
        mine = level == i
        want = plain.roi_align(maps[i], boxes[mine], 1 / stride, 2, 2, False)
        np.testing.assert_allclose(pooled[mine], want, atol=1e-5)
        spoilt = [x if j == i else np.full_like(x, np.nan) for j, x in enumerate(maps)]
        np.testing.assert_array_equal(np.isfinite(pool(spoilt, boxes)).all((1, 2, 3)), mine)


def test_strides_must_be_a_pyramid():
    with pytest.raises(ValueError, match=r"successive powers of 2, not \(4, 16\)"):
        multilevel_roi_align(pyramid(0)[:2], jnp.zeros((1, 4)), (4, 16))
