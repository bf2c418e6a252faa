"""Which pixels made a box? The class scores of fixed boxes as a network of images, for `resnet_jax.explain`.

network = region_network(model, variables, found.boxes[:, 0], size)  # the best box of each image
heat = METHODS["saliency"](network, images, class_score(found.labels[:, 0]))  # float32 [B, H, W]
"""

import re
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax.detection.detector import FasterRCNN, true_size
from resnet_jax.detection.pooling import region_levels
from resnet_jax.explain.network import Network
from resnet_jax.tree import PyTree


class RegionClassifier(nn.Module):
    """Classify one fixed box per image: images [B, H, W, C] to logits [B, K + 1], with the background's last.

    So label k is output k, and the softmax over all outputs is the detector's score. The boxes are inputs of the second
    stage: where one is a detection's final box, its score differs a little from the detection's, which comes from the
    proposal that was shifted to it.

    The collection `regions` of its variables holds `boxes` float32 [B, 4] and `size` int32 [B, 2], each image's
    (height, width) without its padding; without it, boxes are whole images. See `region_network`.
    """

    detector: FasterRCNN
    first_center: ClassVar[float] = 0.0  # as in its backbone, see `Network`

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        size = true_size(images, self.get_variable("regions", "size"))
        boxes = self.get_variable("regions", "boxes", jnp.pad(size[:, ::-1], ((0, 0), (2, 0))).astype(jnp.float32))
        if self.is_initializing():
            self.detector(images, size)  # so that the first stage has its parameters too
        maps = self.detector.features(images, size)
        logits, _ = self.detector.box_head(self.detector.pool(maps, boxes[:, None], images, size))
        return jnp.roll(logits[:, 0], -1, axis=-1)


def region_network(detector: FasterRCNN, variables: PyTree, boxes: jax.Array, size: jax.Array | None = None) -> Network:
    """Make the network whose outputs are the class logits [B, K + 1] of one box per image, float [B, 4].

    Every method of `resnet_jax.explain` takes it with `class_score(labels)`. Different boxes do not compile again. A
    method for detectors of any kind, which hides parts of images and looks at all boxes, is
    https://arxiv.org/abs/2006.03204; gradients of one box's score are used in https://arxiv.org/abs/2304.06354.

    Args:
      variables: the detector's own.
      size: int32 [B, 2], each image's (height, width) without its padding, to which no method gives any gradient.
    """
    regions = {"boxes": jnp.asarray(boxes, jnp.float32)} | ({} if size is None else {"size": jnp.asarray(size)})
    inner = {kind: {"detector": tree} for kind, tree in variables.items()}
    return Network(RegionClassifier(detector), {**inner, "regions": regions})


def region_layers(network: Network, images: jax.Array) -> list[str]:
    """Return the layer that each box is read from, a map of the `FeaturePyramid`: the `layer` of CAM methods.

    The other levels do not change the box's score.
    """
    detector: Any = network.model.detector  # type: ignore[union-attr]
    found = {name: y for name, y in network.layers(images).items() if re.fullmatch(r".*/pyramid/output\d+", name)}
    names = list(found)[: detector.pooled_levels]
    strides = detector.strides([found[name] for name in names], images)
    levels = region_levels(network.variables["regions"]["boxes"], strides, canonical_size=detector.canonical_size)
    return [names[level] for level in levels.tolist()]
