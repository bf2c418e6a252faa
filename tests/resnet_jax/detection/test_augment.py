"""Augmentation of images with boxes: boxes follow the pixels, and the padding stays zero and changes nothing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.augment import normalize
from resnet_jax.detection import augment as aug
from resnet_jax.detection.padding import inside

BUCKET = (48, 64)
SIZE = (40, 50)
COLORS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)


def example(bucket=BUCKET, rows=5, seed=0):
    """A black image with rectangles, each in one color, and their boxes; the last rows are padding."""
    rng = np.random.default_rng(seed)
    image = np.zeros((*bucket, 3), np.float32)
    boxes, labels = np.zeros((rows, 4), np.float32), np.full(rows, -1, np.int32)
    for label, left in enumerate([1, 18, 35]):
        x1, y1 = left + rng.integers(0, 4), rng.integers(1, 14)
        x2, y2 = x1 + rng.integers(6, 11), y1 + rng.integers(8, 24)
        image[y1:y2, x1:x2] = COLORS[label]
        boxes[label], labels[label] = (x1, y1, x2, y2), label
    return tuple(map(jnp.asarray, (image, np.array(SIZE, np.int32), boxes, labels)))


def noisy(bucket=BUCKET):
    image, size, boxes, labels = example(bucket)
    noise = np.zeros(image.shape, np.float32)
    noise[: SIZE[0], : SIZE[1]] = np.random.default_rng(1).uniform(0, 1, (*SIZE, 3))
    return jnp.asarray(noise), size, boxes, labels


def found(image, label):
    """The box of the pixels in this label's color, counting partly covered pixels in part; None if there are none."""
    share = np.asarray(image)[..., label]
    if share.max() < 0.5:
        return None
    rows, columns = share.max(axis=1), share.max(axis=0)

    def ends(line):
        covered = np.flatnonzero(line >= 0.5)
        return covered[0], covered[-1] + 1

    (y1, y2), (x1, x2) = ends(rows), ends(columns)
    return np.array([x1, y1, x2, y2])


def padding_is_zero(image, size):
    outside = np.asarray(~inside(image.shape[:2], 1, jnp.asarray(size)))
    return not np.asarray(image)[outside].any()


def test_flip_twice_is_the_identity():
    key = jax.random.key(0)
    once = aug.flip(key, *noisy())
    for value, twice in zip(noisy(), aug.flip(key, *once), strict=True):
        np.testing.assert_array_equal(value, twice)
    assert padding_is_zero(*once[:2])
    np.testing.assert_array_equal(once[0][:, : SIZE[1]], noisy()[0][:, SIZE[1] - 1 :: -1])


def test_flipped_boxes_follow_their_pixels():
    image, _, boxes, labels = aug.flip(jax.random.key(0), *example())
    for label in range(3):
        np.testing.assert_array_equal(found(image, label), boxes[label])
    np.testing.assert_array_equal(labels, [0, 1, 2, -1, -1])
    assert not boxes[3:].any()


@pytest.fixture(scope="module")
def jittered():
    """Forty draws of scale jitter."""
    keys = jax.random.split(jax.random.key(3), 40)
    draw = jax.jit(jax.vmap(lambda key: aug.scale_jitter((0.3, 2.5))(key, *example())))
    return list(zip(*map(np.asarray, draw(keys)), strict=True))


def test_scaled_boxes_follow_their_pixels(jittered):
    seen = 0
    for image, size, boxes, labels in jittered:
        assert padding_is_zero(image, size) and (size <= BUCKET).all() and image.max() <= 1 + 1e-5
        for label, box in enumerate(boxes[:3]):
            if labels[label] < 0:
                assert not box.any()
                continue
            assert labels[label] == label
            if (box[2:] - box[:2]).min() >= 3:  # of thinner ones no pixel need be covered by half
                np.testing.assert_allclose(found(image, label), box, atol=1.01)
                seen += 1
    assert seen > 40


def test_scales_shrink_grow_and_lose_boxes(jittered):
    sizes = np.array([size for _, size, _, _ in jittered])
    assert (sizes < SIZE).all(axis=1).any() and (sizes == BUCKET).all(axis=1).any()
    kept = np.array([(labels >= 0).sum() for *_, labels in jittered])
    assert (kept[(sizes < SIZE).all(axis=1)] == 3).all() and kept.min() < 3


def test_scale_one_changes_nothing_and_half_averages():
    same = aug.scale_jitter((1.0, 1.0))(jax.random.key(0), *noisy())
    for value, other in zip(noisy(), same, strict=True):
        np.testing.assert_allclose(value, other, atol=1e-6)
    image, size, boxes, _ = aug.scale_jitter((0.5, 0.5))(jax.random.key(0), *noisy())
    assert size.tolist() == [20, 25]
    np.testing.assert_allclose(boxes, noisy()[2] / 2)
    assert np.asarray(image[:20, :25]).std() < 0.8 * np.asarray(noisy()[0][:40, :50]).std()


ALL = {
    "flip": aug.flip,
    "random_flip": aug.random_flip(0.5),
    "color_jitter": aug.color_jitter(),
    "normalize": aug.on_pixels(normalize()),
    "down": aug.scale_jitter((0.4, 0.9)),
    "compose": aug.compose(aug.random_flip(), aug.scale_jitter((0.4, 0.9)), aug.on_pixels(normalize())),
}


@pytest.mark.parametrize("name", ALL)
def test_padding_changes_nothing(name):
    """The same example in a larger bucket becomes the same image, size, boxes and labels."""
    height, width = BUCKET
    small, large = (
        jax.jit(jax.vmap(partial(lambda key, e: ALL[name](key, *e), e=e)))(jax.random.split(jax.random.key(5), 4))
        for e in (noisy(), noisy((64, 96)))
    )
    for a, b in zip(small[1:], large[1:], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(small[0], large[0][:, :height, :width], atol=2e-6)
    assert all(padding_is_zero(image, size) for image, size in zip(*large[:2], strict=True))


def test_batch_keeps_its_other_arrays():
    image, size, boxes, labels = (jnp.stack([x, x]) for x in noisy())
    batch = {"image": jnp.rint(image * 255).astype(jnp.uint8), "size": size, "boxes": boxes, "labels": labels}
    batch["crowd"] = labels > 0
    result = aug.augment_batch(aug.random_flip(), jax.random.split(jax.random.key(0)), batch)
    assert result["image"].dtype == jnp.float32 and result["image"].max() <= 1
    np.testing.assert_array_equal(result["crowd"], batch["crowd"])
    kept = aug.augment_batch(aug.identity, jax.random.split(jax.random.key(0)), batch)
    np.testing.assert_allclose(kept["image"] * 255, batch["image"], rtol=1e-6)
    with pytest.raises(TypeError, match="int32"):
        aug.augment_batch(aug.identity, jax.random.split(jax.random.key(0)), {**batch, "image": labels})


def test_order_of_draws_does_not_depend_on_what_follows():
    key = jax.random.key(1)
    first = aug.compose(aug.scale_jitter())(key, *noisy())
    both = aug.compose(aug.scale_jitter(), aug.identity)(key, *noisy())
    np.testing.assert_array_equal(first[0], both[0])
