"""Tiny detectors and batches of objects that the tests share."""

from functools import partial
from typing import Any

import jax
import numpy as np

from resnet_jax.detection.box_head import BoxHead, BoxRules
from resnet_jax.detection.detector import Detector, FasterRCNN, ProposalNetwork
from resnet_jax.detection.pyramid import FeaturePyramid
from resnet_jax.detection.retinanet import DenseHead, DenseRules, RetinaNet
from resnet_jax.detection.rpn import ProposalRules
from resnet_jax.resnet import MODELS, ResNet

CLASSES, FEATURES = 3, 16
PRIOR_LOGIT = -4.6  # RetinaNet starts with 0.01 for every anchor
PROPOSALS = ProposalRules(before=(40, 30), after=(30, 20), samples=32)
REGIONS = BoxRules(samples=16, candidates=30, detections=10, score=0.0)


def tiny_backbone(**options: Any) -> ResNet:
    """Three stages of one block on a stem without strides."""
    return MODELS["resnet8"](**{"num_classes": None, "width": 8, **options})


def tiny_detector(kind: str = "faster_rcnn", *, backbone: Any = None, **options: Any) -> Detector:
    """A detector on two levels of strides 2 and 4, with few proposals and detections."""
    fields: dict[str, Any] = {
        "backbone": backbone or tiny_backbone(),
        "levels": ("stage2", "stage3"),
        "neck": partial(FeaturePyramid, features=FEATURES),
    }
    if kind == "proposals":
        return ProposalNetwork(**(fields | {"proposals": PROPOSALS} | options))
    fields["classes"] = CLASSES
    if kind == "retinanet":
        fields |= {"neck": partial(FeaturePyramid, features=FEATURES, coarser="none")}
        fields |= {"head": partial(DenseHead, depth=1), "rules": DenseRules(candidates=30, detections=10, score=0.0)}
        return RetinaNet(**(fields | options))
    fields |= {"proposals": PROPOSALS, "regions": REGIONS, "pooled": 3, "pooled_levels": 2, "canonical_size": 32}
    return FasterRCNN(**(fields | {"head": partial(BoxHead, hidden=(32,))} | options))


def tiny_batch(count: int = 8, size: tuple[int, int] = (64, 64), rows: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of `train.detect.batches`: images of noise with bright objects, the first without any."""
    rng = np.random.default_rng(seed)
    height, width = size
    images = rng.integers(0, 128, (count, height, width, 3), dtype=np.uint8)
    boxes, labels = np.zeros((count, rows, 4), np.float32), np.full((count, rows), -1, np.int32)
    sizes = np.stack([rng.integers(height // 2, height + 1, count), rng.integers(width // 2, width + 1, count)], 1)
    for i, (h, w) in enumerate(sizes):
        images[i, h:] = images[i, :, w:] = 0
        for j in range(i % 4):
            x1, y1 = rng.integers(0, w - 12), rng.integers(0, h - 12)
            x2, y2 = min(x1 + rng.integers(8, 32), w), min(y1 + rng.integers(8, 32), h)
            boxes[i, j], labels[i, j] = (x1, y1, x2, y2), rng.integers(CLASSES)
            images[i, y1:y2, x1:x2, labels[i, j]] = 255
    return {
        "image": images,
        "size": sizes.astype(np.int32),
        "boxes": boxes,
        "labels": labels,
        "crowd": np.zeros(labels.shape, bool),
        "id": np.arange(count, dtype=np.int32),
        "scale": np.ones(count, np.float32),
    }


def init(model: Detector, size: tuple[int, int] = (64, 64), seed: int = 0) -> Any:
    """Variables of a detector, with statistics and biases that are not trivial, so that padding would be seen."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, *size, 3), np.float32))
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        name = path[-1].key
        if len(leaf.shape) > 1:
            values = rng.normal(size=leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))
        elif name == "var":
            values = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            values = 0.1 * rng.normal(size=leaf.shape) + (1.0 if name == "scale" else 0.0)
        keys = {key.key for key in path}
        values *= 0.1 if {"deltas", "logits", "objectness"} & keys else 1
        # Without its prior, the focal loss of thousands of anchors is so steep that two steps magnify the last digit.
        if {"dense_head", "logits", "bias"} <= keys:
            values += PRIOR_LOGIT
        return values.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, dict(shapes))
