"""Non-maximum suppression equals the greedy loop on thousands of random sets, and where other code is wrong."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.detection import nms, suppression
from tests.reference.detection import greedy_nms

SUPPRESS = jax.jit(nms)


def random_sets(seed, sets, count, whole):
    """Boxes [sets, count, 4] at -20 to 20 (whole numbers: exact overlaps), scores with ties, groups, valid."""
    rng = np.random.default_rng(seed)
    corner, sides = rng.uniform(-20, 20, (sets, count, 2)), rng.uniform(0, 25, (sets, count, 2))
    boxes = np.concatenate([corner, corner + sides], -1)
    boxes = np.concatenate([np.floor(corner), np.floor(corner) + np.floor(sides)], -1) if whole else boxes
    scores = rng.integers(0, 10, (sets, count)) / 10 if whole else rng.random((sets, count))
    groups, valid = rng.integers(0, 2, (sets, count)), rng.random((sets, count)) < 0.8
    # With whole numbers, fractions such as 1/2 occur, and must not suppress.
    threshold = rng.choice([0, 0.2, 0.25, 0.3, 1 / 3, 0.5, 0.7, 0.75], sets)
    return [x.astype(t) for x, t in ((boxes, "f4"), (scores, "f4"), (threshold, "f4"), (groups, "i4"), (valid, bool))]


@pytest.mark.parametrize("block", [6, 8, 256])  # 24 boxes: four blocks, three, one
@pytest.mark.parametrize("whole", [True, False])
def test_equals_the_greedy_loop(whole, block, monkeypatch):
    monkeypatch.setattr(suppression, "BLOCK", block)
    boxes, scores, threshold, groups, valid = random_sets(block, 800, 23, whole)
    batched = jax.jit(jax.vmap(lambda b, s, t, g, v: nms(b, s, t, groups=g, valid=v)))
    got = batched(boxes, scores, threshold, groups, valid)
    want = [greedy_nms(*case) for case in zip(boxes, scores, threshold, groups, valid, strict=True)]
    np.testing.assert_array_equal(got, want)
    assert 0.2 < got.mean() < 0.8


def test_eager_jit_and_vmap_agree():
    boxes, scores, *_ = random_sets(1, 4, 40, False)
    suppress = partial(nms, threshold=0.4)
    batched, jitted = jax.jit(jax.vmap(suppress))(boxes, scores), jax.jit(suppress)
    for i in range(4):
        np.testing.assert_array_equal(batched[i], jitted(boxes[i], scores[i]))
    np.testing.assert_array_equal(batched[0], suppress(boxes[0], scores[0]))


def test_many_boxes_and_a_long_chain():
    # Each box overlaps only the next one, so every second one stays, and a block takes one round per box.
    start = np.arange(1000, dtype=np.float32)[:, None] * 10
    chain = np.concatenate([start, start * 0, start + 16, start * 0 + 16], 1)
    scores = np.linspace(1, 0, 1000, dtype=np.float32)
    np.testing.assert_array_equal(SUPPRESS(chain, scores, 0.2), np.arange(1000) % 2 == 0)
    boxes, scores, *_ = (x[0] for x in random_sets(2, 1, 1000, False))
    want = greedy_nms(boxes, scores, 0.6, np.zeros(1000), np.ones(1000, bool))
    np.testing.assert_array_equal(SUPPRESS(boxes, scores, 0.6), want)


def test_a_suppressed_box_suppresses_nothing_below_one_half():
    """A overlaps B, and B overlaps C, by 0.45: A and C stay. Three published implementations keep A alone."""
    boxes = jnp.array([[0, 0, 29, 10], [11, 0, 40, 10], [22, 0, 51, 10]], float)
    np.testing.assert_array_equal(SUPPRESS(boxes, jnp.array([0.9, 0.8, 0.7]), 0.3), [True, False, True])


SAME = [[-9, -9, -5, -5]] * 2  # negative coordinates


@pytest.mark.parametrize(
    ("boxes", "scores", "threshold", "groups", "valid", "keep"),
    [
        (SAME, [0.5, 0.5], 0.5, [0, 0], [1, 1], [1, 0]),  # tied scores: the lower index
        (SAME, [0.5, 0.6], 0.5, [0, 0], [1, 1], [0, 1]),
        (SAME, [-np.inf, -np.inf], 0.5, [0, 0], [1, 1], [1, 0]),
        (SAME, [0.5, 0.5], 1.0, [0, 0], [1, 1], [1, 1]),  # an overlap of 1 is not more than 1
        (SAME, [0.5, 0.5], 0.5, [3, -1], [1, 1], [1, 1]),
        (SAME, [0.5, 0.5], 0.5, [0, 0], [0, 1], [0, 1]),
        (SAME, [0.5, 0.5], 0.5, [0, 0], [0, 0], [0, 0]),
        ([[0, 0, 0, 0]] * 2, [0.5, 0.5], 0.0, [0, 0], [1, 1], [1, 1]),  # no area, no overlap
    ],
)
def test_special_cases(boxes, scores, threshold, groups, valid, keep):
    groups, valid = np.array(groups), np.array(valid, bool)
    got = SUPPRESS(np.array(boxes, float), np.array(scores), threshold, groups=groups, valid=valid)
    np.testing.assert_array_equal(got, np.array(keep, bool))


def test_no_boxes():
    assert nms(jnp.zeros((0, 4)), jnp.zeros(0), 0.5).shape == (0,)


def test_gradients_pass_by():
    boxes, scores, *_ = (x[0] for x in random_sets(3, 1, 30, False))
    gradient = jax.jit(jax.grad(lambda b, s: (s * nms(b, s, 0.5)).sum(), argnums=(0, 1)))(boxes, scores)
    np.testing.assert_array_equal(gradient[0], 0)
    np.testing.assert_array_equal(gradient[1], nms(boxes, scores, 0.5))
