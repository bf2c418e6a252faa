"""Matching against plain Python, and what the sampler draws."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.detection import match, sample
from tests.reference import detection as plain


@pytest.mark.parametrize("low_quality", [True, False])
def test_equals_plain_python(low_quality):
    rng = np.random.default_rng(low_quality)
    overlaps = (rng.integers(0, 11, (1000, 4, 9)) / 10).astype(np.float32)  # many ties, some at the thresholds
    overlaps *= rng.random((1000, 4, 1)) < 0.8  # truths that touch no box
    valid = rng.random((1000, 4)) < 0.6
    batched = jax.jit(jax.vmap(partial(match, high=0.7, low=0.3, low_quality=low_quality)))
    got = batched(overlaps, valid)
    want = [plain.match(o, v, 0.7, 0.3, low_quality) for o, v in zip(overlaps, valid, strict=True)]
    np.testing.assert_array_equal(got, want)
    assert got.dtype == jnp.int32 and {-2, -1, 0, 1, 2, 3} == {*np.unique(got)}
    np.testing.assert_array_equal(match(overlaps[0], valid[0], 0.7, 0.3, low_quality=low_quality), want[0])


def test_images_without_objects_are_background():
    for truths in (0, 3):
        overlaps = jnp.full((truths, 5), 0.9)
        got = match(overlaps, jnp.zeros(truths, bool), 0.5, 0.5, low_quality=True)
        np.testing.assert_array_equal(got, [-1] * 5)


def test_a_box_claimed_by_one_truth_matches_its_own_best():
    overlaps = jnp.array([[0.2, 0.0, 0.0], [0.6, 0.65, 0.0]])
    got = match(overlaps, jnp.ones(2, bool), 0.7, 0.3, low_quality=True)
    np.testing.assert_array_equal(got, [1, 1, -1])  # box 0 is the best of truth 0, but overlaps truth 1 more


def test_sample_fills_up_to_the_count():
    rng = np.random.default_rng(0)
    kind = rng.choice([-1, 0, 1], (2000, 60)) * (rng.random((2000, 1)) < 0.9)  # some images have neither
    kind = np.where((rng.random((2000, 60)) < rng.random((2000, 1))) & (kind == 1), -1, kind)
    positive, negative = kind == 1, kind == -1
    keys = jax.random.split(jax.random.key(0), 2000)
    drawn = jax.jit(jax.vmap(partial(sample, count=21, fraction=0.25)))(keys, positive, negative)
    assert not (drawn[0] & ~positive).any() and not (drawn[1] & ~negative).any()
    positives = np.minimum(positive.sum(1), 5)
    np.testing.assert_array_equal(drawn[0].sum(1), positives)
    np.testing.assert_array_equal(drawn[1].sum(1), np.minimum(negative.sum(1), 21 - positives))


def test_sample_is_uniform_and_given_by_its_key():
    positive = jnp.array([True] * 5 + [False] * 7)
    draw = jax.jit(jax.vmap(lambda key: sample(key, positive, ~positive, 6, 0.5)))
    keys = jax.random.split(jax.random.key(1), 20000)
    positives, negatives = draw(keys)
    for drawn, count, share in ((positives[:, :5], 3, 3 / 5), (negatives[:, 5:], 3, 3 / 7)):
        assert (drawn.sum(1) == count).all()
        np.testing.assert_allclose(drawn.mean(0), share, atol=4 * (share * (1 - share) / 20000) ** 0.5)
    # Each pair of positives is drawn together equally often: 3 of 10 triples hold a given pair.
    together = jnp.einsum("ki,kj->ij", positives[:, :5] * 1.0, positives[:, :5] * 1.0) / 20000
    np.testing.assert_allclose(together[~np.eye(5, dtype=bool)], 0.3, atol=0.014)
    np.testing.assert_array_equal(draw(keys[:9])[0], positives[:9])


def test_sample_of_fewer_boxes_than_the_count():
    positive = jnp.array([True, False, False])
    drawn = sample(jax.random.key(0), positive, jnp.array([False, True, False]), 256, 0.5)
    np.testing.assert_array_equal(drawn, [[True, False, False], [False, True, False]])
