"""RetinaNet: objects in one stage, by scoring every anchor for every class, https://arxiv.org/abs/1708.02002."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax import layers
from resnet_jax.detection.box_head import Detections, best_detections
from resnet_jax.detection.boxes import clip, decode, encode, iou
from resnet_jax.detection.detector import Detector, Losses, true_size
from resnet_jax.detection.losses import focal, smooth_l1
from resnet_jax.detection.matching import NEITHER, match, matched_rows
from resnet_jax.detection.pyramid import BiasedConv, FeaturePyramid
from resnet_jax.detection.rpn import normal_init
from resnet_jax.keys import Key
from resnet_jax.layers import ModuleDef

PRIOR = 0.01  # probability of an object at the start, so that the many background anchors do not swamp the loss


@dataclass(frozen=True, kw_only=True)
class DenseRules:
    """Which anchors are trained on, and how detections are selected; the defaults are torchvision's.

    Attributes:
      high, low: IoU with a truth from which anchors are positive, and below which they are background.
      beta: of the smooth L1 loss of boxes; 0 is the L1 loss.
      score: detections must have a larger one.
      nms: IoU above which detections of one class suppress each other.
      candidates: most detections per level before suppression.
      detections: most detections per image.
    """

    high: float = 0.5
    low: float = 0.4
    beta: float = 0.0
    score: float = 0.05
    nms: float = 0.5
    candidates: int = 1000
    detections: int = 300


class DenseHead(nn.Module):
    """Score K classes at A anchors per cell: a map [B, H, W, C] to logits [B, H * W * A, K] and deltas [..., 4].

    Attributes:
      depth: number of convolutions before each of the two outputs.
    """

    classes: int
    anchors: int = 9
    depth: int = 4
    conv: layers.ModuleDef = layers.conv
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        conv = partial(BiasedConv, kernel_init=normal_init, conv=self.conv, dtype=self.dtype)
        prior = nn.initializers.constant(-math.log((1 - PRIOR) / PRIOR))

        def tower(name: str) -> jax.Array:
            y = x
            for number in range(1, self.depth + 1):
                y = nn.relu(conv(x.shape[-1], name=f"{name}{number}")(y))
            return y

        logits = conv(self.anchors * self.classes, bias_init=prior, name="logits")(tower("class"))
        deltas = conv(self.anchors * 4, name="deltas")(tower("box"))
        logits, deltas = (y.astype(jnp.float32) for y in (logits, deltas))
        return logits.reshape(len(x), -1, self.classes), deltas.reshape(len(x), -1, 4)


class RetinaNet(Detector):
    """RetinaNet on the pyramid of `FasterRCNN`, with the same methods.

    Attributes:
      classes: number of classes K; labels are 0..K-1.
      head: makes the module that turns a map into logits and deltas, such as a `functools.partial` of `DenseHead`.
      rules: see `DenseRules`.
    """

    levels: Sequence[str] = ("stage2", "stage3", "stage4")
    neck: ModuleDef = partial(FeaturePyramid, coarser="conv")
    anchor_scale: float = 4.0
    anchor_sizes: Sequence[float] = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
    classes: int = 80
    head: ModuleDef = DenseHead
    rules: DenseRules = DenseRules()

    def setup(self) -> None:
        super().setup()
        anchors = len(self.ratios) * len(self.anchor_sizes)
        self.dense_head = self.head(self.classes, anchors, conv=self.backbone.conv, dtype=self.backbone.dtype)

    def __call__(self, images: jax.Array, size: jax.Array | None = None) -> Detections:
        """Detect objects: boxes [B, D, 4], best first; see `Detections`."""
        levels = self.score(self.dense_head, self.features(images, size), images, size)
        select = partial(select_dense, rules=self.rules)
        return jax.vmap(select, in_axes=(0, 0, None, 0, 0))(*levels, true_size(images, size))

    def losses(
        self,
        images: jax.Array,
        size: jax.Array | None,
        boxes: jax.Array,
        labels: jax.Array,
        keys: Key,
        *,
        axis_name: str | None = None,
    ) -> Losses:
        """Compute `class_loss` and `box_loss`, float32 scalars; see `FasterRCNN.losses`.

        Every image counts the same, whatever the number of its objects; nothing is drawn, so `keys` are not used.
        """
        levels = self.score(self.dense_head, self.features(images, size, train=True), images, size)
        loss = jax.vmap(partial(dense_loss, rules=self.rules), in_axes=(0, 0, None, 0, 0, 0))
        classes, shifts = loss(*levels.joined(), boxes, labels)
        return {"class_loss": classes.mean(), "box_loss": shifts.mean()}


def dense_loss(
    logits: jax.Array,
    deltas: jax.Array,
    anchors: jax.Array,
    present: jax.Array,
    truth: jax.Array,
    labels: jax.Array,
    *,
    rules: DenseRules,
) -> tuple[jax.Array, jax.Array]:
    """Compute the focal loss and the box loss of one image, over the number of its positive anchors.

    Args:
      logits, deltas, anchors, present: of all levels [A, K], [A, 4], [A, 4] and bool [A]; see `Levels`.
      truth, labels: boxes [M, 4], and classes int32 [M], -1 where a row is padding.
    """
    # Anchors in the padding must not be the best ones of a truth.
    overlaps = iou(truth, anchors) * present[None]
    matched = match(overlaps, labels >= 0, rules.high, rules.low, low_quality=True)
    positive = present & (matched >= 0)
    label = jnp.where(positive, matched_rows(labels, matched), -1)
    classes = focal(logits, jax.nn.one_hot(label, logits.shape[-1])).sum(1)
    errors = smooth_l1(deltas - encode(matched_rows(truth, matched), anchors), rules.beta).sum(1)
    count = jnp.maximum(positive.sum(), 1)
    counted = present & (matched != NEITHER)
    return jnp.where(counted, classes, 0).sum() / count, jnp.where(positive, errors, 0).sum() / count


def select_dense(
    logits: Sequence[jax.Array],
    deltas: Sequence[jax.Array],
    anchors: Sequence[jax.Array],
    present: Sequence[jax.Array],
    size: jax.Array,
    *,
    rules: DenseRules,
) -> Detections:
    """Select the detections of one image of `size` (height, width) from its levels; see `Levels`."""
    found = []
    for scores, shifts, level, there in zip(logits, deltas, anchors, present, strict=True):
        classes = scores.shape[-1]
        scores = jnp.where(there[:, None], jax.nn.sigmoid(scores), 0).ravel()
        scores, best = jax.lax.top_k(scores, min(rules.candidates, len(scores)))
        rows = best // classes
        found.append((clip(decode(shifts[rows], level[rows]), size), scores, best % classes, scores > rules.score))
    boxes, scores, labels, valid = (jnp.concatenate(x) for x in zip(*found, strict=True))
    return best_detections(
        boxes,
        scores,
        labels,
        valid,
        nms_threshold=rules.nms,
        candidates=len(scores),
        detections=rules.detections,
    )
