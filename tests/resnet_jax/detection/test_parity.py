"""Operators equal torchvision's: as stored by `make_detection_golden`, and run again where it is installed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.detection import (
    anchor_grid,
    clip,
    decode,
    encode,
    generalized_iou,
    iou,
    match,
    multilevel_roi_align,
    nms,
    roi_align,
)
from tests.reference.make_detection_golden import DETECTION, FEW, IMAGE, STRIDES, THRESHOLDS, WEIGHTS, answers, inputs

GIVEN = inputs()
MAPS = [GIVEN[f"map{s}"] for s in STRIDES]


@pytest.fixture(scope="module", params=["stored", "live"])
def theirs(request):
    if request.param == "live":
        pytest.importorskip("torchvision")
        return answers()
    with np.load(DETECTION) as file:
        return dict(file)


def test_overlaps_and_coder(theirs):
    boxes = GIVEN["boxes"]
    ours = jax.jit(
        lambda boxes, deltas: {
            "iou": iou(boxes[:FEW], boxes[:FEW]),
            "generalized_iou": generalized_iou(boxes[:FEW], boxes[:FEW]),
            "clip": clip(boxes, jnp.array(IMAGE)),
            "encode": encode(boxes, boxes[::-1], WEIGHTS),
            "decode": decode(deltas, boxes, WEIGHTS),
        }
    )(boxes, GIVEN["deltas"])
    for name, got in ours.items():
        np.testing.assert_allclose(got, theirs[name], rtol=2e-5, atol=1e-4 if name == "encode" else 1e-5, err_msg=name)


def test_anchors(theirs):
    grids = [anchor_grid((IMAGE[0] // s, IMAGE[1] // s), (s, s), 8 * s) for s in STRIDES]
    np.testing.assert_array_equal(np.concatenate(grids), theirs["anchors"])


def test_suppression(theirs):
    suppress = jax.jit(nms)
    for threshold in THRESHOLDS:
        got = suppress(GIVEN["boxes"], GIVEN["scores"], threshold)
        np.testing.assert_array_equal(got, theirs[f"nms/{threshold}"])
        if threshold in (0.25, 0.5):
            for name, groups in (("tied", GIVEN["groups"] * 0), ("grouped", GIVEN["groups"])):
                got = suppress(GIVEN["whole"], GIVEN["tied"], threshold, groups=groups)
                np.testing.assert_array_equal(got, theirs[f"nms/{name}/{threshold}"])


@pytest.mark.parametrize("low_quality", [False, True])
def test_matching(theirs, low_quality):
    got = match(GIVEN["overlaps"], jnp.ones(9, bool), 0.7, 0.3, low_quality=low_quality)
    np.testing.assert_array_equal(got, theirs[f"match/{low_quality}"])


@pytest.mark.parametrize("aligned", [False, True])
def test_roi_align(theirs, aligned):
    boxes = np.concatenate([GIVEN["rois"], GIVEN["boxes"][:FEW]])
    for sampling in (1, 2):
        pool = jax.jit(partial(roi_align, scale=0.25, size=3, sampling=sampling, aligned=aligned))
        np.testing.assert_allclose(pool(MAPS[0], boxes), theirs[f"roi_align/{aligned}/{sampling}"], atol=3e-5)


@pytest.mark.parametrize("canonical", [32, 224])
def test_pyramid_and_its_gradient(theirs, canonical):
    pool = partial(multilevel_roi_align, strides=STRIDES, size=3, canonical_size=canonical)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient(maps):
        pooled = pool(maps, GIVEN["rois"])
        return jnp.square(pooled).sum(), pooled

    gradients, pooled = gradient(MAPS)
    np.testing.assert_allclose(pooled, theirs[f"pyramid/{canonical}"], atol=1e-5)
    for stride, got in zip(STRIDES, gradients, strict=True):
        np.testing.assert_allclose(got, theirs[f"pyramid/{canonical}/map{stride}"], atol=1e-4)
