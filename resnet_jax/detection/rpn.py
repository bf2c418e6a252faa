"""Region proposal network: which anchors hold an object of any class, https://arxiv.org/abs/1506.01497."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax import layers
from resnet_jax.detection.boxes import clip, decode, encode, iou
from resnet_jax.detection.losses import binary_cross_entropy, smooth_l1
from resnet_jax.detection.matching import match, matched_rows, sample
from resnet_jax.detection.pyramid import BiasedConv
from resnet_jax.detection.suppression import nms
from resnet_jax.keys import Key

normal_init = nn.initializers.normal(0.01)


class Proposals(NamedTuple):
    """Proposed boxes of one image, best first: float32 [N, 4], their logits [N], and which rows hold one, bool [N]."""

    boxes: jax.Array
    logits: jax.Array
    valid: jax.Array


class Sums(NamedTuple):
    """Sums of an image's losses and the number of examples in each, float32 scalars; see `losses.mean_of`."""

    classes: jax.Array
    boxes: jax.Array
    examples: jax.Array


@dataclass(frozen=True, kw_only=True)
class ProposalRules:
    """How proposals are selected, and which anchors are trained on; the defaults are torchvision's.

    Attributes:
      before: proposals per level before suppression, in (training, detection).
      after: proposals per image after it.
      nms: IoU above which proposals of one level suppress each other.
      min_side: sides in pixels below which proposals are dropped.
      high, low: IoU with a truth from which anchors are positive, and below which they are negative.
      samples, fraction: anchors per image to train on, and the largest part of them that is positive.
      beta: of the smooth L1 loss of boxes.
    """

    before: tuple[int, int] = (2000, 1000)
    after: tuple[int, int] = (2000, 1000)
    nms: float = 0.7
    min_side: float = 1e-3
    high: float = 0.7
    low: float = 0.3
    samples: int = 256
    fraction: float = 0.5
    beta: float = 1 / 9


class ProposalHead(nn.Module):
    """Score and shift A anchors per cell: a map [B, H, W, C] to logits [B, H * W * A] and deltas [B, H * W * A, 4]."""

    anchors: int = 3
    conv: layers.ModuleDef = layers.conv
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        conv = partial(BiasedConv, kernel_init=normal_init, conv=self.conv, dtype=self.dtype)
        y = nn.relu(conv(x.shape[-1], name="hidden")(x))
        logits = conv(self.anchors, size=1, name="objectness")(y)
        deltas = conv(4 * self.anchors, size=1, name="deltas")(y)
        count = len(x)
        return logits.reshape(count, -1).astype(jnp.float32), deltas.reshape(count, -1, 4).astype(jnp.float32)


def propose(
    logits: Sequence[jax.Array],
    deltas: Sequence[jax.Array],
    anchors: Sequence[jax.Array],
    present: Sequence[jax.Array],
    size: jax.Array,
    *,
    before: int,
    after: int,
    rules: ProposalRules,
) -> Proposals:
    """Select the proposals of one image from its levels.

    No gradient flows through them.

    Args:
      logits, deltas, anchors, present: of each level [A_l], [A_l, 4], [A_l, 4] and bool [A_l]; anchors that are not
        present lie in the padding.
      size: (height, width) of the image.
      before, after: number of proposals per level, and of all levels.
    """
    found = []
    for scores, shifts, level, there in zip(logits, deltas, anchors, present, strict=True):
        scores, best = jax.lax.top_k(jnp.where(there, scores, -jnp.inf), min(before, len(scores)))
        boxes = clip(decode(shifts[best], level[best]), size)
        sides = boxes[:, 2:] - boxes[:, :2]
        valid = jnp.isfinite(scores) & (sides >= rules.min_side).all(1)
        # Levels do not suppress each other, so each is its own problem.
        found.append(Proposals(boxes, scores, nms(boxes, scores, rules.nms, valid=valid)))
    boxes, scores, kept = jax.lax.stop_gradient(jax.tree.map(lambda *x: jnp.concatenate(x), *found))
    scores, best = jax.lax.top_k(jnp.where(kept, scores, -jnp.inf), min(after, len(scores)))
    return Proposals(boxes[best], scores, jnp.isfinite(scores))


def proposal_loss(
    logits: jax.Array,
    deltas: jax.Array,
    anchors: jax.Array,
    present: jax.Array,
    truth: jax.Array,
    exists: jax.Array,
    key: Key,
    *,
    rules: ProposalRules,
) -> Sums:
    """Sum the losses of one image over a random sample of its anchors.

    Args:
      logits, deltas, anchors, present: of all levels [A], [A, 4], [A, 4] and bool [A]; see `propose`.
      truth, exists: boxes [M, 4], and which rows hold one, bool [M].
    """
    # Anchors in the padding must not be the best ones of a truth.
    overlaps = iou(truth, anchors) * present[None]
    matched = match(overlaps, exists, rules.high, rules.low, low_quality=True)
    positive, negative = sample(key, present & (matched >= 0), present & (matched == -1), rules.samples, rules.fraction)
    targets = encode(matched_rows(truth, matched), anchors)
    errors = smooth_l1(deltas - targets, rules.beta).sum(1)
    objectness = binary_cross_entropy(logits, positive.astype(jnp.float32))
    drawn = positive | negative
    return Sums(
        jnp.where(drawn, objectness, 0).sum(), jnp.where(positive, errors, 0).sum(), drawn.sum().astype(jnp.float32)
    )
