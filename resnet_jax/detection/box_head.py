"""Second stage: the class of each proposal and its exact box, https://arxiv.org/abs/1504.08083."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax.detection.boxes import clip, decode, encode, iou
from resnet_jax.detection.losses import smooth_l1
from resnet_jax.detection.matching import match, matched_rows, sample
from resnet_jax.detection.rpn import Proposals, Sums
from resnet_jax.detection.suppression import nms
from resnet_jax.keys import Key
from resnet_jax.layers import dense_init
from resnet_jax.losses import softmax_cross_entropy


class Detections(NamedTuple):
    """Detected objects of one image (or of a batch, with one more axis), best first.

    boxes float32 [D, 4], scores float32 [D] in [0, 1], labels int32 [D], and valid bool [D]: which rows hold an object.
    """

    boxes: jax.Array
    scores: jax.Array
    labels: jax.Array
    valid: jax.Array


class Regions(NamedTuple):
    """Boxes of one image to train on: boxes [N, 4], labels int32 [N] (-1 is background), the truths that they
    match [N, 4], and which rows hold a region, bool [N]."""

    boxes: jax.Array
    labels: jax.Array
    truth: jax.Array
    valid: jax.Array


@dataclass(frozen=True, kw_only=True)
class BoxRules:
    """Which proposals are trained on, and how detections are selected; the defaults are torchvision's.

    Attributes:
      overlap: IoU with a truth from which proposals are positive, and below which they are background.
      samples, fraction: proposals per image to train on, and the largest part of them that is positive.
      weights: of the box coder's four targets.
      beta: of the smooth L1 loss of boxes.
      score: detections must have a larger one.
      nms: IoU above which detections of one class suppress each other.
      min_side: sides in pixels below which detections are dropped.
      candidates: most detections before suppression; where more exceed `score`, the lowest are dropped.
      detections: most detections per image.
    """

    overlap: float = 0.5
    samples: int = 512
    fraction: float = 0.25
    weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    beta: float = 1 / 9
    score: float = 0.05
    nms: float = 0.5
    min_side: float = 1e-2
    candidates: int = 2000
    detections: int = 100


class BoxHead(nn.Module):
    """Classify regions and shift their boxes: [..., S, S, C] to logits [..., K + 1] and deltas [..., K or 1, 4].

    The first logit is the background's.

    Attributes:
      classes: number of classes K.
      hidden: widths of the fully connected layers.
      shared_boxes: predict one box for all classes of a region instead of one for each.
    """

    classes: int
    hidden: Sequence[int] = (1024, 1024)
    shared_boxes: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, regions: jax.Array) -> tuple[jax.Array, jax.Array]:
        dense = partial(nn.Dense, kernel_init=dense_init)
        x = regions.reshape(*regions.shape[:-3], -1).astype(self.dtype)
        for number, width in enumerate(self.hidden, start=1):
            x = nn.relu(dense(width, dtype=self.dtype, name=f"hidden{number}")(x))
        x = x.astype(jnp.float32)
        logits = dense(self.classes + 1, name="logits")(x)
        boxes = 1 if self.shared_boxes else self.classes
        deltas = dense(4 * boxes, name="deltas")(x)
        return logits, deltas.reshape(*x.shape[:-1], boxes, 4)


def sample_regions(proposals: Proposals, truth: jax.Array, labels: jax.Array, key: Key, *, rules: BoxRules) -> Regions:
    """Draw the regions of one image to train on from its proposals and its truths, boxes [M, 4] and labels [M].

    Rows whose label is -1 are padding.
    """
    exists = labels >= 0
    # The truths themselves are proposals too: early in training nothing else is positive.
    boxes, valid = jnp.concatenate([proposals.boxes, truth]), jnp.concatenate([proposals.valid, exists])
    matched = match(iou(truth, boxes), exists, rules.overlap, rules.overlap)
    positive, negative = sample(key, valid & (matched >= 0), valid & (matched < 0), rules.samples, rules.fraction)
    drawn = positive | negative
    _, rows = jax.lax.top_k(drawn.astype(jnp.float32), min(rules.samples, len(boxes)))
    label = jnp.where(positive, matched_rows(labels, matched), -1)
    return Regions(boxes[rows], label[rows], matched_rows(truth, matched)[rows], drawn[rows])


def region_loss(logits: jax.Array, deltas: jax.Array, regions: Regions, *, rules: BoxRules) -> Sums:
    """Sum the losses of one image's regions: logits [N, K + 1] and deltas [N, K or 1, 4] of a `BoxHead`."""
    classes = softmax_cross_entropy(logits, jax.nn.one_hot(regions.labels + 1, logits.shape[-1]))
    positive = regions.valid & (regions.labels >= 0)
    own = regions.labels.clip(0) if deltas.shape[1] > 1 else jnp.zeros_like(regions.labels)
    predicted = jnp.take_along_axis(deltas, own[:, None, None], axis=1)[:, 0]
    errors = smooth_l1(predicted - encode(regions.truth, regions.boxes, rules.weights), rules.beta).sum(1)
    count = regions.valid.sum().astype(jnp.float32)
    return Sums(jnp.where(regions.valid, classes, 0).sum(), jnp.where(positive, errors, 0).sum(), count)


def select_detections(
    logits: jax.Array, deltas: jax.Array, proposals: Proposals, size: jax.Array, *, rules: BoxRules
) -> Detections:
    """Select the detections of one image of `size` (height, width) from the head's outputs for its proposals."""
    scores = jax.nn.softmax(logits)[:, 1:]
    boxes = clip(decode(deltas, proposals.boxes[:, None], rules.weights), size)
    boxes = jnp.broadcast_to(boxes, (*scores.shape, 4))
    labels = jnp.broadcast_to(jnp.arange(scores.shape[1])[None], scores.shape)
    valid = proposals.valid[:, None] & (scores > rules.score)
    return best_detections(
        *(x.reshape(-1, *x.shape[2:]) for x in (boxes, scores, labels, valid)),
        nms_threshold=rules.nms,
        min_side=rules.min_side,
        candidates=rules.candidates,
        detections=rules.detections,
    )


def best_detections(
    boxes: jax.Array,
    scores: jax.Array,
    labels: jax.Array,
    valid: jax.Array,
    *,
    nms_threshold: float,
    min_side: float = 0.0,
    candidates: int,
    detections: int,
) -> Detections:
    """Suppress overlapping boxes of one class, and keep the best: from N boxes to `detections` rows."""
    sides = boxes[:, 2:] - boxes[:, :2]
    valid &= (sides >= min_side).all(1)
    scores, best = jax.lax.top_k(jnp.where(valid, scores, -jnp.inf), min(candidates, len(scores)))
    boxes, labels = boxes[best], labels[best]
    kept = nms(boxes, scores, nms_threshold, groups=labels, valid=jnp.isfinite(scores))
    scores, best = jax.lax.top_k(jnp.where(kept, scores, -jnp.inf), min(detections, len(scores)))
    valid = jnp.isfinite(scores)
    return Detections(boxes[best], jnp.where(valid, scores, 0), labels[best].astype(jnp.int32), valid)
