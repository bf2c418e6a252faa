"""Detectors: a backbone, a feature pyramid, and heads on its levels."""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax.detection.anchors import anchor_grid
from resnet_jax.detection.box_head import (
    BoxHead,
    BoxRules,
    Detections,
    region_loss,
    sample_regions,
    select_detections,
)
from resnet_jax.detection.losses import mean_of
from resnet_jax.detection.padding import ignore_padding, inside
from resnet_jax.detection.pooling import multilevel_roi_align
from resnet_jax.detection.pyramid import FeaturePyramid
from resnet_jax.detection.rpn import ProposalHead, ProposalRules, Proposals, proposal_loss, propose
from resnet_jax.keys import Key
from resnet_jax.layers import ModuleDef
from resnet_jax.resnet import ResNet, stride_of

Losses = dict[str, jax.Array]


class Levels(NamedTuple):
    """Outputs and anchors of each level of a pyramid: lists of [B, A_l, ...], [B, A_l, 4], [A_l, 4], bool [B, A_l].

    Anchors that are not `present` lie in the padding of their image.
    """

    logits: list[jax.Array]
    deltas: list[jax.Array]
    anchors: list[jax.Array]
    present: list[jax.Array]

    def joined(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """The levels one after the other: [B, A, ...], [B, A, 4], [A, 4] and [B, A]."""
        logits, deltas, present = (jnp.concatenate(x, 1) for x in (self.logits, self.deltas, self.present))
        return logits, deltas, jnp.concatenate(self.anchors), present


class Detector(nn.Module):
    """A backbone with a feature pyramid, on which every detector builds.

    Images are float [B, H, W, C], normalised, with padding on the right and below; H and W are multiples of the
    backbone's largest stride. `size` is int32 [B, 2], each image's (height, width) without its padding; None means that
    there is none. Neither maps nor boxes depend on the padding (see `padding.ignore_padding` for exceptions).

    Attributes:
      backbone: a `ResNet` with `num_classes=None`; the other layers use its `conv` and `dtype`.
      levels: its maps that enter the pyramid, finest first.
      neck: makes the module that turns these maps into the pyramid's, such as a `functools.partial` of
        `FeaturePyramid`.
      frozen_stats: compute with the running statistics of the backbone's norms, also in training; else with those of
        the batch, which need large batches.
      anchor_scale: side of the anchors of a level over its stride; sides are rounded down to whole pixels.
      anchor_sizes: factors of this side, for each of which a cell has an anchor of every ratio.
      ratios: heights of anchors over their widths.
    """

    backbone: ResNet
    levels: Sequence[str] = ("stage1", "stage2", "stage3", "stage4")
    neck: ModuleDef = FeaturePyramid
    frozen_stats: bool = True
    anchor_scale: float = 8.0
    anchor_sizes: Sequence[float] = (1.0,)
    ratios: Sequence[float] = (0.5, 1.0, 2.0)

    def setup(self) -> None:
        self.pyramid = self.neck(conv=self.backbone.conv, dtype=self.backbone.dtype)

    def features(self, images: jax.Array, size: jax.Array | None = None, *, train: bool = False) -> list[jax.Array]:
        """Compute the pyramid's maps [B, H_l, W_l, C], finest first.

        Raises:
          ValueError: the backbone has no such level.
        """
        with ignore_padding(images.shape[1:3], true_size(images, size)):
            maps = self.backbone.maps(images, train=train and not self.frozen_stats)
            if unknown := [level for level in self.levels if level not in maps]:
                raise ValueError(f"the backbone has no level {unknown[0]}; it has {', '.join(maps)}")
            return self.pyramid([maps[level] for level in self.levels])

    def strides(self, maps: Sequence[jax.Array], images: jax.Array) -> list[int]:
        """Strides of the levels of a pyramid over the images."""
        strides: list[int] = []
        for x in maps:
            # A map of a single cell does not show its stride: it may be larger than the images.
            least = 2 * strides[-1] if strides else 1
            strides.append(max(stride_of(x.shape[1:3], images.shape[1:3]), least))
        return strides

    def score(self, head: nn.Module, maps: Sequence[jax.Array], images: jax.Array, size: jax.Array | None) -> Levels:
        """Apply a head to every level, and pair its outputs with their anchors."""
        size = true_size(images, size)
        with ignore_padding(images.shape[1:3], size):
            outputs = [head(x) for x in maps]
        anchors, present = [], []
        for x, stride in zip(maps, self.strides(maps, images), strict=True):
            shape = x.shape[1], x.shape[2]
            sides = [math.floor(stride * self.anchor_scale * factor) for factor in self.anchor_sizes]
            anchors.append(jnp.asarray(anchor_grid(shape, (stride, stride), sides, self.ratios)))
            cells = inside(shape, stride, size).reshape(len(x), -1)
            present.append(cells.repeat(len(self.ratios) * len(sides), axis=1))
        logits, deltas = zip(*outputs, strict=True)
        return Levels(list(logits), list(deltas), anchors, present)


class ProposalNetwork(Detector):
    """Region proposals alone, the first stage of `FasterRCNN`: boxes of objects of any class.

    Attributes:
      proposals: see `ProposalRules`.
    """

    proposals: ProposalRules = ProposalRules()

    def setup(self) -> None:
        super().setup()
        self.rpn = ProposalHead(len(self.ratios) * len(self.anchor_sizes), self.backbone.conv, self.backbone.dtype)

    def __call__(self, images: jax.Array, size: jax.Array | None = None) -> Proposals:
        """Propose boxes [B, N, 4], best first."""
        return self.propose(self.score(self.rpn, self.features(images, size), images, size), images, size)

    def propose(self, levels: Levels, images: jax.Array, size: jax.Array | None, *, train: bool = False) -> Proposals:
        """Select each image's proposals from the scored levels."""
        rules, phase = self.proposals, 0 if train else 1
        select = partial(propose, before=rules.before[phase], after=rules.after[phase], rules=rules)
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
        """Compute the losses of `FasterRCNN.losses` that belong to the proposals."""
        levels = self.score(self.rpn, self.features(images, size, train=True), images, size)
        return self.proposal_losses(levels, boxes, labels, keys, axis_name)

    def proposal_losses(
        self, levels: Levels, boxes: jax.Array, labels: jax.Array, keys: Key, axis_name: str | None
    ) -> Losses:
        """Compute the means of `rpn.proposal_loss` over the anchors that are drawn."""
        loss = jax.vmap(partial(proposal_loss, rules=self.proposals), in_axes=(0, 0, None, 0, 0, 0, 0))
        sums = jax.tree.map(jnp.sum, loss(*levels.joined(), boxes, labels >= 0, keys))
        return {
            "objectness_loss": mean_of(sums.classes, sums.examples, axis_name),
            "proposal_loss": mean_of(sums.boxes, sums.examples, axis_name),
        }


class FasterRCNN(ProposalNetwork):
    """Faster R-CNN with a feature pyramid: https://arxiv.org/abs/1506.01497 and https://arxiv.org/abs/1612.03144.

    Attributes:
      classes: number of classes K; labels are 0..K-1.
      head: makes the module that turns regions [..., S, S, C] into logits and deltas, such as a `functools.partial` of
        `BoxHead`.
      regions: see `BoxRules`.
      pooled, sampling: side S of a region, and samples per side of each of its cells; see `multilevel_roi_align`.
      pooled_levels: number of levels of the pyramid, finest first, that regions are read from.
      canonical_size: side in pixels of the regions that are read from the level of stride 16.
    """

    classes: int = 80
    head: ModuleDef = BoxHead
    regions: BoxRules = BoxRules()
    pooled: int = 7
    sampling: int = 2
    pooled_levels: int = 4
    canonical_size: int = 224

    def setup(self) -> None:
        super().setup()
        self.box_head = self.head(self.classes, dtype=self.backbone.dtype)

    def __call__(  # type: ignore[override]
        self, images: jax.Array, size: jax.Array | None = None
    ) -> Detections:
        """Detect objects: boxes [B, D, 4], best first; see `Detections`."""
        maps = self.features(images, size)
        proposals = self.propose(self.score(self.rpn, maps, images, size), images, size)
        logits, deltas = self.box_head(self.pool(maps, proposals.boxes, images, size))
        select = partial(select_detections, rules=self.regions)
        return jax.vmap(select)(logits, deltas, proposals, true_size(images, size))

    def pool(
        self, maps: Sequence[jax.Array], boxes: jax.Array, images: jax.Array, size: jax.Array | None = None
    ) -> jax.Array:
        """Read the regions [B, N, S, S, C] of boxes [B, N, 4] from the pyramid, each from the level of its size."""
        maps = list(maps[: self.pooled_levels])
        read = partial(
            multilevel_roi_align,
            strides=self.strides(maps, images),
            size=self.pooled,
            sampling=self.sampling,
            canonical_size=self.canonical_size,
        )
        each = jax.vmap(lambda maps, boxes, size: read(maps, boxes, image_size=size))
        return each(maps, boxes, true_size(images, size))

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
        """Compute the losses of a batch, whose sum is minimised.

        Apply it with `mutable=["batch_stats"]` if the statistics are not frozen.

        Args:
          boxes: true boxes float32 [B, M, 4].
          labels: their classes int32 [B, M]; -1 where a row is padding.
          keys: a typed key per image [B], to sample anchors and proposals with.
          axis_name: the axis that the batch is split over under `pmap` and `shard_map`.

        Returns:
          `objectness_loss`, `proposal_loss`, `class_loss` and `box_loss`: float32 scalars that are means over the
          examples that are drawn in the whole batch; under `axis_name`, their means over shards are.
        """
        maps = self.features(images, size, train=True)
        levels = self.score(self.rpn, maps, images, size)
        anchor_keys, region_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        losses = self.proposal_losses(levels, boxes, labels, anchor_keys, axis_name)

        proposals = self.propose(levels, images, size, train=True)
        regions = jax.vmap(partial(sample_regions, rules=self.regions))(proposals, boxes, labels, region_keys)
        logits, deltas = self.box_head(self.pool(maps, regions.boxes, images, size))
        sums = jax.tree.map(jnp.sum, jax.vmap(partial(region_loss, rules=self.regions))(logits, deltas, regions))
        return {
            **losses,
            "class_loss": mean_of(sums.classes, sums.examples, axis_name),
            "box_loss": mean_of(sums.boxes, sums.examples, axis_name),
        }


def true_size(images: jax.Array, size: jax.Array | None) -> jax.Array:
    """The (height, width) of images [B, H, W, C] without their padding: `size`, or all of them if it is None."""
    if size is not None:
        return size
    return jnp.broadcast_to(jnp.asarray(images.shape[1:3], jnp.int32), (len(images), 2))
