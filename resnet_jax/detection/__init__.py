"""Object detection as pure functions on one image with static shapes: `jax.vmap` them over a batch.

Boxes are float32 [..., 4]: (x1, y1, x2, y2) in pixels of the padded image, continuous. Sizes are (height, width).
"""

# fmt: off
from resnet_jax.detection.anchors import anchor_grid
from resnet_jax.detection.boxes import area, clip, decode, encode, generalized_iou, iou
from resnet_jax.detection.matching import BACKGROUND, NEITHER, match, sample
from resnet_jax.detection.pooling import multilevel_roi_align, roi_align
from resnet_jax.detection.suppression import nms

__all__ = [
    "BACKGROUND",
    "NEITHER",
    "anchor_grid",
    "area",
    "clip",
    "decode",
    "encode",
    "generalized_iou",
    "iou",
    "match",
    "multilevel_roi_align",
    "nms",
    "roi_align",
    "sample",
]
# fmt: on
