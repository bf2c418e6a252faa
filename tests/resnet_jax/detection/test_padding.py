"""An image gives the same maps, proposals, detections and losses in a bucket of any size."""

from contextlib import nullcontext
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax import onednn
from resnet_jax.detection.detector import FasterRCNN
from resnet_jax.detection.padding import ignore_padding, inside
from resnet_jax.detection.pyramid import FeaturePyramid, enlarge
from resnet_jax.detection.rpn import ProposalRules
from resnet_jax.resnet import MODELS, stride_of
from tests.reference.detectors import init, tiny_detector

SIZE = (64, 54)  # as high as the smaller bucket; its width is not a multiple of any stride, its cells are odd in number
SMALL, LARGE = (64, 64), (96, 128)


def in_bucket(image, bucket):
    """A batch of one image float [h, w, 3], and its size."""
    height, width = image.shape[:2]
    padded = np.zeros((1, *bucket, 3), np.float32)
    padded[0, :height, :width] = image
    return jnp.asarray(padded), jnp.array([[height, width]], jnp.int32)


IMAGE = np.random.default_rng(0).normal(size=(*SIZE, 3)).astype(np.float32)


@pytest.mark.parametrize("size", [(1, 1), (41, 54), (64, 64)])
def test_cells_inside(size):
    for stride in (1, 2, 8, 64):
        got = inside((64 // stride, 64 // stride), stride, jnp.array(size))
        assert got.sum(0).max() == -(-size[0] // stride) and got.sum(1).max() == -(-size[1] // stride)
    batch = inside((4, 4), 16, jnp.array([size, (64, 64)]))
    assert batch.shape == (2, 4, 4) and batch[1].all()


def test_stride_of_maps_that_are_rounded_up():
    assert [stride_of(shape, (96, 160)) for shape in ((96, 160), (3, 5), (2, 3), (1, 2))] == [1, 32, 64, 128]


def test_a_level_of_one_cell_keeps_its_stride():
    """Anchors do not depend on the bucket, although a map of a single cell does not show its stride."""
    model = tiny_detector(backbone=backbone("imagenet"), neck=partial(FeaturePyramid, coarser="conv"))
    maps = [jnp.zeros((1, side, side, 1)) for side in (8, 4, 2, 1)]
    assert model.strides(maps, jnp.zeros((1, 64, 64, 3))) == [8, 16, 32, 64]
    maps = [jnp.zeros((1, side, side, 1)) for side in (4, 2, 1, 1)]
    assert model.strides(maps, jnp.zeros((1, 32, 32, 3))) == [8, 16, 32, 64]


@pytest.mark.parametrize("shape", [(6, 8), (5, 7), (3, 9)])
def test_enlarging_repeats_the_nearest_cell(shape):
    x = jnp.arange(12.0).reshape(1, 3, 4, 1)
    got = enlarge(x, shape)[0, :, :, 0]
    rows, columns = (np.arange(n) * have // n for n, have in zip(shape, (3, 4), strict=True))
    np.testing.assert_array_equal(got, np.asarray(x)[0, rows][:, columns, 0])


# ---- backbones ------------------------------------------------------------------------------------------------------

BACKBONES = {
    "cifar": MODELS["resnet8"],
    "preact_cifar": MODELS["preact_resnet8"],
    "imagenet": partial(MODELS["resnet18"], width=8),
    "bottleneck": partial(MODELS["resnet50"], width=8),
    "deep_stem": partial(MODELS["resnet50c"], width=8),
    "preact": partial(MODELS["preact_resnet18"], width=8),
    "average_pool": partial(MODELS["resnet18d"], width=8),
    "group_norm": partial(MODELS["resnet50_gn"], width=8),
    "squeeze_excite": partial(MODELS["seresnet18"], width=16),
}
DEPENDENT = {"group_norm", "squeeze_excite"}


def backbone(name):
    model = BACKBONES[name](num_classes=None)
    return model.clone(stage_sizes=(1,) * len(model.stage_sizes))


def cut(x, stride):
    """The cells of maps [1, H, W, C] inside the image."""
    return np.asarray(x)[0, : -(-SIZE[0] // stride), : -(-SIZE[1] // stride)]


@pytest.mark.parametrize(
    "name", [n if n in ("cifar", "imagenet") else pytest.param(n, marks=pytest.mark.slow) for n in BACKBONES]
)
def test_maps_do_not_depend_on_the_bucket(name):
    """Except those that `ignore_padding` names: this shows that the test would see it."""
    model = backbone(name)
    variables = init(model)

    @jax.jit
    def maps(images, size):
        with ignore_padding(images.shape[1:3], size):
            return model.apply(variables, images, method="maps")

    small, large = maps(*in_bucket(IMAGE, SMALL)), maps(*in_bucket(IMAGE, LARGE))
    worst = 0.0
    for level, x in small.items():
        if level.startswith("stage"):
            stride = stride_of(x.shape[1:3], SMALL)
            one, other = cut(x, stride), cut(large[level], stride)
            worst = max(worst, float(np.abs(one - other).max() / np.abs(one).max()))
    if name in DEPENDENT:
        assert worst > 1e-3
    else:
        assert worst < 1e-5


@pytest.mark.parametrize("ignored", [True, False])
def test_maps_are_those_of_the_image_without_padding(ignored):
    """Only if it is ignored."""
    model, image = backbone("cifar"), IMAGE[:40, :52]

    @jax.jit
    def maps(images, size):
        with ignore_padding(images.shape[1:3], size) if ignored else nullcontext():
            return model.apply(init(model), images, method="maps")["stage3"]

    want = maps(jnp.asarray(image[None]), jnp.array([image.shape[:2]]))
    got = maps(*in_bucket(image, SMALL))[:, :10, :13]
    assert (np.abs(got - want).max() < 1e-4) == ignored


@pytest.mark.slow
def test_convolutions_by_onednn_ignore_padding_too():
    try:
        onednn.check(jnp.float32)
    except onednn.Unavailable as error:
        pytest.skip(str(error))
    plain = backbone("imagenet")
    fast = plain.clone(conv=onednn.Conv, norm=onednn.BatchNorm, max_pool=onednn.max_pool)
    variables = init(plain)
    images, size = in_bucket(IMAGE, LARGE)
    with ignore_padding(LARGE, size):
        want = plain.apply(variables, images, method="maps")
    with ignore_padding(LARGE, size):
        got = jax.jit(partial(fast.apply, method="maps"))(variables, images)
    np.testing.assert_allclose(cut(got["stage4"], 32), cut(want["stage4"], 32), rtol=1e-3, atol=1e-4)


# ---- detectors ------------------------------------------------------------------------------------------------------


@cache
def outputs(kind):
    """(maps, levels, proposals if any, detections) of the image in each of two buckets, by one set of variables."""
    model = tiny_detector(kind)
    variables = init(model)

    def compute(m, images, size):
        maps = m.features(images, size)
        head = m.dense_head if kind == "retinanet" else m.rpn
        levels = m.score(head, maps, images, size)
        proposals = m.propose(levels, images, size) if isinstance(m, FasterRCNN) else None
        return maps, levels, proposals, m(images, size)

    run = jax.jit(partial(model.apply, variables, method=compute))
    return model, [jax.device_get(run(*in_bucket(IMAGE, bucket))) for bucket in (SMALL, LARGE)]


@pytest.mark.parametrize("kind", [pytest.param("faster_rcnn", marks=pytest.mark.slow), "retinanet"])
def test_detectors_do_not_depend_on_the_bucket(kind):
    """Maps and scored anchors are equal, cell by cell, and so are proposals and objects."""
    _, (small, large) = outputs(kind)
    for stride, one, other in zip((2, 4, 8), small[0], large[0], strict=False):
        np.testing.assert_allclose(cut(one, stride), cut(other, stride), rtol=1e-4, atol=1e-5)
    for scores, others, present, there in zip(
        small[1].logits, large[1].logits, small[1].present, large[1].present, strict=True
    ):
        assert present.sum() == there.sum() > 0
        np.testing.assert_allclose(scores[present], others[there], rtol=1e-4, atol=1e-5)
    for anchors, others, present, there in zip(
        small[1].anchors, large[1].anchors, small[1].present, large[1].present, strict=True
    ):
        np.testing.assert_array_equal(anchors[present[0]], others[there[0]])

    for found, other in zip(small[2:], large[2:], strict=True):
        if found is not None:
            assert found.valid.sum() == other.valid.sum() > 5
            np.testing.assert_allclose(found.boxes[found.valid], other.boxes[other.valid], rtol=1e-4, atol=1e-3)
            assert (found.boxes[found.valid].max(0) <= [SIZE[1], SIZE[0]] * 2).all()
    np.testing.assert_allclose(small[3].scores, large[3].scores, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(small[3].labels, large[3].labels)


def test_the_anchors_of_the_padding_are_not_the_best_of_an_object():
    """The losses, over all anchors, are equal in a bucket that ends before the anchor that would overlap it most."""
    neck = partial(FeaturePyramid, features=16, coarser="none")
    rules = ProposalRules(before=(40, 30), after=(30, 20), samples=100_000)
    model = tiny_detector("proposals", levels=("stage3",), neck=neck, proposals=rules, anchor_scale=1.0)
    variables, image = init(model), np.concatenate([IMAGE, IMAGE[:, -1:]], 1)
    # Anchors are 4 pixels wide: the last one inside ends at 54, the first one outside begins there.
    boxes, labels = jnp.array([[[53.5, 30.0, 55.0, 34.0], [0, 0, 0, 0]]]), jnp.array([[0, -1]])
    keys = jax.random.split(jax.random.key(0), 1)

    @jax.jit
    def losses(images, size):
        return model.apply(variables, images, size, boxes, labels, keys, method="losses")

    small, large = losses(*in_bucket(image, (64, 56))), losses(*in_bucket(image, LARGE))
    assert small["proposal_loss"] > 0
    for name, value in small.items():
        np.testing.assert_allclose(value, large[name], rtol=1e-4, err_msg=name)


def test_regions_do_not_depend_on_the_bucket():
    """Neither do those at the right and lower borders of the image, whose samples lie next to the padding."""
    model, ((small, *_), (large, *_)) = outputs("faster_rcnn")
    boxes = jnp.array([[[0.0, 0, 54, 64], [30, 20, 54, 64], [10, 10, 20, 20]]])
    pool = jax.jit(lambda maps, images, size: model.pool(maps, boxes, images, size))
    one, other = (pool(maps, *in_bucket(IMAGE, bucket)) for maps, bucket in ((small, SMALL), (large, LARGE)))
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
