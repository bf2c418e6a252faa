"""Overlaps, the box coder and anchors against formulas, round trips and special cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.detection import anchor_grid, area, clip, decode, encode, generalized_iou, iou
from tests.reference import detection as plain

OVERLAPS = jax.jit(lambda a, b: (iou(a, b), generalized_iou(a, b)))
SLOPES = jax.jit(jax.grad(lambda a, b: iou(a, b).sum() + 2 * generalized_iou(a, b).sum()))


def random_boxes(seed, count, low=-100.0, high=100.0):
    """Float32 [count, 4], sides from 1 to 100."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(low, high, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(1, 100, (count, 2))], 1).astype(np.float32)


def test_iou_is_the_plain_formula():
    a, b = random_boxes(0, 40), random_boxes(1, 50)
    want = [[plain.iou(x, y) for y in b.astype(float)] for x in a.astype(float)]
    np.testing.assert_allclose(jax.jit(iou)(a, b), want, atol=1e-6)
    np.testing.assert_allclose(plain.iou_matrix(a, b), want, atol=1e-6)
    np.testing.assert_allclose(iou(a, b), iou(b, a).T, atol=1e-7)
    np.testing.assert_allclose(jnp.diag(iou(a, a)), 1)


@pytest.mark.parametrize(
    ("a", "b", "overlap", "generalized"),
    [
        ([0, 0, 2, 2], [1, 0, 3, 2], 1 / 3, 1 / 3),
        ([0, 0, 1, 1], [2, 0, 3, 1], 0, -1 / 3),  # a gap as wide as each box
        ([-4, -4, -2, -2], [-3, -4, -1, -2], 1 / 3, 1 / 3),
        ([0, 0, 1, 1], [1, 0, 2, 1], 0, 0),  # they touch
        ([0, 0, 2, 2], [1, 1, 1, 1], 0, 0),  # one has no area
        ([1, 1, 1, 1], [1, 1, 1, 1], 0, 0),
    ],
)
def test_overlaps_known_by_hand(a, b, overlap, generalized):
    a, b = np.array([a], float), np.array([b], float)
    np.testing.assert_allclose(np.ravel(OVERLAPS(a, b)), [overlap, generalized], atol=1e-6)
    assert np.isfinite(SLOPES(a, b)).all()


def test_generalized_iou_is_at_most_the_iou():
    a, b = random_boxes(2, 60), random_boxes(3, 60)
    overlap, generalized = OVERLAPS(a, b)
    assert (generalized <= overlap + 1e-6).all() and (generalized >= -1).all()


def test_clipping_and_area():
    boxes = jnp.array([[-5, -5, 50, 60], [1, 2, 3, 5], [90, 90, 95, 95]], float)
    clipped = clip(boxes, jnp.array([40, 30]))
    np.testing.assert_array_equal(clipped, [[0, 0, 30, 40], [1, 2, 3, 5], [30, 40, 30, 40]])
    np.testing.assert_array_equal(area(clipped), [1200, 6, 0])


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (10, 10, 5, 5)])
def test_decode_inverts_encode(weights):
    boxes, anchors = random_boxes(4, 5000), random_boxes(5, 5000)
    deltas = jax.jit(encode, static_argnums=2)(boxes, anchors, weights)
    decoded = jax.jit(decode, static_argnums=2)(deltas, anchors, weights)
    # Sides that grow by more than 1000/16 are clipped.
    grown = (boxes[:, 2:] - boxes[:, :2]) / (anchors[:, 2:] - anchors[:, :2])
    inside = (grown < 1000 / 16).all(1)
    assert inside.mean() > 0.9
    np.testing.assert_allclose(decoded[inside], boxes[inside], atol=2e-3)
    np.testing.assert_allclose(encode(decoded[inside], anchors[inside], weights), deltas[inside], atol=2e-3)


def test_coder_stays_finite():
    boxes = jnp.array([[0, 0, 0, 0], [5, 5, 5, 9], [3, 3, 1, 1], [0, 0, 10, 10]], float)
    encoded = jax.jit(jax.value_and_grad(lambda b, a: encode(b, a).sum()))
    for anchors in (boxes, boxes[::-1]):
        assert all(np.isfinite(x).all() for x in encoded(boxes, anchors))
    decoded = jax.jit(jax.value_and_grad(lambda d: decode(d, boxes).sum()))(jnp.full((4, 4), 1e4))
    assert all(np.isfinite(x).all() for x in decoded)
    assert area(decode(jnp.array([[0, 0, 99, 99]], float), boxes[3:])) == pytest.approx(625**2, rel=1e-5)


def test_decoding_broadcasts_over_classes():
    deltas, anchors = jnp.ones((7, 3, 4)), random_boxes(6, 7)
    np.testing.assert_allclose(decode(deltas, anchors[:, None])[:, 1], decode(deltas[:, 1], anchors), rtol=1e-6)


def test_anchors_lie_on_the_grid():
    anchors = anchor_grid((2, 3), (8, 16), 32)
    assert anchors.shape == (18, 4) and anchors.dtype == np.float32
    np.testing.assert_array_equal(anchors[:3], [[-23, -11, 23, 11], [-16, -16, 16, 16], [-11, -23, 11, 23]])
    grid = anchors.reshape(2, 3, 3, 4)  # row, column, ratio
    np.testing.assert_array_equal(grid[1, 2] - grid[0, 0], np.tile([[32, 8, 32, 8]], (3, 1)))
    assert anchor_grid((1, 1), (4, 4), 32, ratios=(1,)).tolist() == [[-16, -16, 16, 16]]
