"""Scores of heat maps whose values are known."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from resnet_jax.explain import (
    METHODS,
    Network,
    area,
    cascade,
    class_score,
    deletion,
    grad_cam,
    impute,
    infidelity,
    insertion,
    randomization,
    rank_correlation,
    road,
    ssim,
)
from tests.resnet_jax.explain.nets import IMAGES, KEY, corner_network, linear, linear_network

ONE = class_score(0)


def sums(images=IMAGES):
    """Contributions [B, H, W] of the pixels to a linear function, and the function."""
    network = linear_network()
    return np.asarray((network.variables[None] * images).sum(-1)), network


def test_curves_of_a_linear_function():
    """Entry i is the sum over what remains, so the areas are known; the right order beats all others."""
    contribution, network = sums()
    perfect = np.sort(contribution.reshape(8, -1), axis=1)[:, ::-1]
    remaining = np.concatenate([perfect[:, ::-1].cumsum(1)[:, ::-1], np.zeros((8, 1))], axis=1)
    removed = deletion(network, IMAGES, ONE, jnp.asarray(contribution), steps=16, chunk=5)
    np.testing.assert_allclose(removed, remaining[:, ::4], rtol=1e-4, atol=1e-3)
    inserted = insertion(network, IMAGES, ONE, jnp.asarray(contribution), steps=16, baseline=0.0)
    np.testing.assert_allclose(inserted, remaining[:, :1] - remaining[:, ::4], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(area(removed), np.trapezoid(remaining[:, ::4], dx=1 / 16), rtol=1e-4, atol=1e-3)
    random = METHODS["random"](network, IMAGES, ONE, key=KEY)
    assert (area(removed) < area(deletion(network, IMAGES, ONE, random, steps=16))).all()
    assert (area(inserted) > area(insertion(network, IMAGES, ONE, random, steps=16, baseline=0.0))).all()


def test_deletion_and_insertion_prefer_a_map_of_the_quadrant():
    """Insertion starts from the blurred images; both start and end at the scores of whole images."""
    network = corner_network()
    target = class_score(2)
    good, random = grad_cam(network, IMAGES, target), METHODS["random"](network, IMAGES, target, key=KEY)
    deleted, inserted = (jax.jit(f)(network, IMAGES, target, good) for f in (deletion, insertion))
    whole = target(network.outputs(IMAGES))
    np.testing.assert_allclose(deleted[:, 0], whole, rtol=1e-5)
    np.testing.assert_allclose(inserted[:, -1], whole, rtol=1e-5)
    assert (area(deleted) < area(deletion(network, IMAGES, target, random))).all()
    assert (area(inserted) > area(insertion(network, IMAGES, target, random))).mean() > 0.5


def test_imputed_pixels_solve_the_linear_system():
    """Each is the weighted mean of its neighbours inside the image; kept pixels stay."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 6, 5, 3)).astype(np.float32)
    removed = rng.uniform(size=(2, 6, 5)) < 0.6
    filled = np.asarray(jax.jit(impute)(images, removed))
    np.testing.assert_array_equal(filled[~removed], images[~removed])
    padded = np.pad(filled, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=np.nan)
    offsets = [(i, j) for i in (0, 1, 2) for j in (0, 1, 2) if (i, j) != (1, 1)]
    near = np.stack([padded[:, i : i + 6, j : j + 5] for i, j in offsets])
    weights = np.asarray([1 if i != 1 and j != 1 else 2 for i, j in offsets])[:, None, None, None, None]
    mean = np.nansum(near * weights, 0) / (np.isfinite(near) * weights).sum(0)
    np.testing.assert_allclose(filled[removed], mean[removed], atol=1e-4)


def test_road_orders_maps():
    """The true contributions score above a random map, and their opposite below 0 by as much."""
    images = IMAGES + jnp.asarray(np.random.default_rng(0).normal(size=IMAGES.shape), jnp.float32)
    contribution, network = sums(images)
    compiled = jax.jit(road)
    random = METHODS["random"](network, images, ONE, key=KEY)
    heats = (contribution, random, -contribution)
    good, chance, bad = (np.asarray(compiled(network, images, ONE, heat, key=KEY).combined()) for heat in heats)
    assert (good > chance).all() and (chance > bad).all()
    np.testing.assert_allclose(good, -bad, atol=0.05 * np.abs(good).max())


def test_infidelity_of_a_linear_function():
    """0 for its contributions, in any unit if scaled, and positive for a random map."""
    contribution, network = sums()
    random = METHODS["random"](network, IMAGES, ONE, key=KEY)
    compiled = jax.jit(partial(infidelity, samples=20, chunk=7), static_argnames="scaled")
    exact = compiled(network, IMAGES, ONE, contribution, key=KEY, scaled=False)
    scaled = compiled(network, IMAGES, ONE, 30 * contribution, key=KEY)
    np.testing.assert_allclose(exact, 0, atol=0.01)
    np.testing.assert_allclose(scaled, 0, atol=0.01)
    chance = compiled(network, IMAGES, ONE, random, key=KEY)
    assert (chance > 1).all()
    zero = compiled(network, IMAGES, ONE, 0 * random, key=KEY)
    assert (zero >= chance - 1e-3).all() and np.isfinite(zero).all()


def test_cascade_initialises_from_the_top():
    """The head first, then the convolution too; a map of the network changes, a fixed one does not."""
    network = corner_network()
    names, networks = zip(*cascade(network, IMAGES, key=KEY), strict=True)
    assert names == ("head", "conv")
    before, head, both = (n.variables["params"] for n in (network, *networks))
    assert (head["conv"]["kernel"] == before["conv"]["kernel"]).all()
    assert (head["head"]["kernel"] == both["head"]["kernel"]).all()
    assert (head["head"]["kernel"] != before["head"]["kernel"]).any()
    other = [*cascade(network, IMAGES, key=jax.random.key(5))][-1][1].variables["params"]
    assert (other["conv"]["kernel"] != before["conv"]["kernel"]).any()

    traces = []

    @jax.jit
    def method(network):
        traces.append(1)
        return grad_cam(network, IMAGES, class_score(0))

    found = randomization(method, network, IMAGES, key=jax.random.key(5))
    assert list(found) == ["head", "conv"] and len(traces) == 1
    assert found["conv"].shape == (8,) and np.mean(found["conv"]) < 0.9
    same = randomization(lambda network: IMAGES[..., 0], network, IMAGES, key=KEY, compare=ssim)
    np.testing.assert_allclose(same["conv"], 1, rtol=1e-3)
    with pytest.raises(ValueError, match="a function has no layers"):
        next(cascade(Network(linear, IMAGES[0]), IMAGES, key=KEY))


def test_similarities_of_maps():
    """Spearman's correlation as SciPy's, with ties; SSIM by its definition."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, (2, 3, 9, 8)).astype(np.float32)
    expected = [spearmanr(x.ravel(), y.ravel()).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(rank_correlation(a, b), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(rank_correlation(a, 0 * b), 0, atol=1e-6)
    a, b = rng.uniform(size=(2, 1, 9, 8))
    values = []
    for i in range(3):
        for j in range(2):
            x, y = a[0, i : i + 7, j : j + 7].ravel(), b[0, i : i + 7, j : j + 7].ravel()
            (xx, xy), (_, yy) = np.cov(x, y)
            contrast = (2 * xy + 9e-4) / (xx + yy + 9e-4)
            values.append((2 * x.mean() * y.mean() + 1e-4) / (x.mean() ** 2 + y.mean() ** 2 + 1e-4) * contrast)
    np.testing.assert_allclose(ssim(a.astype(np.float32), b.astype(np.float32)), [np.mean(values)], rtol=1e-4)
    with pytest.raises(ValueError, match="smaller than a window of 9 pixels"):
        ssim(a, b, window=9)


COMPILED = jax.jit(lambda network, heat: deletion(network, IMAGES, ONE, heat, steps=8))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.5, 20), st.floats(-3, 3))
def test_only_the_order_of_a_map_matters(seed, scale, shift):
    """A map in another unit has the same deletion curve; it is the most similar to itself by rank."""
    heat = np.random.default_rng(seed).normal(size=IMAGES.shape[:3]).round(3).astype(np.float32)
    other = np.float32(scale) * heat + np.float32(shift)
    network = linear_network()
    if (np.argsort(heat.reshape(8, -1), 1, "stable") == np.argsort(other.reshape(8, -1), 1, "stable")).all():
        np.testing.assert_allclose(COMPILED(network, heat), COMPILED(network, other), rtol=1e-5, atol=1e-4)
    correlation = rank_correlation(jnp.asarray(heat), jnp.asarray(other))
    assert (np.abs(correlation) <= 1 + 1e-5).all() and (correlation > 0.99).all()
