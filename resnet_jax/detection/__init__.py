"""Object detection as pure functions with static shapes: the operators on one image, and detectors built of them.

`jax.vmap` maps the operators over a batch. Boxes are float32 [..., 4]: (x1, y1, x2, y2) in pixels of the padded image,
continuous. Sizes are (height, width). Augmentations of images with boxes are in `resnet_jax.detection.augment`.

    backbone = MODELS["resnet50"](num_classes=None)
    model = FasterRCNN(backbone, classes=20)
    variables = model.init(key, images)  # float [B, H, W, 3], H and W multiples of 32
    found = model.apply(variables, images, size)  # Detections: boxes [B, 100, 4], scores, labels, valid
    losses = model.apply(variables, images, size, boxes, labels, keys, method="losses")
"""

# fmt: off
from resnet_jax.detection.anchors import anchor_grid
from resnet_jax.detection.box_head import (
    BoxHead,
    BoxRules,
    Detections,
    Regions,
    best_detections,
    region_loss,
    sample_regions,
    select_detections,
)
from resnet_jax.detection.boxes import area, clip, decode, encode, generalized_iou, iou
from resnet_jax.detection.detector import Detector, FasterRCNN, Levels, ProposalNetwork
from resnet_jax.detection.losses import binary_cross_entropy, focal, mean_of, smooth_l1
from resnet_jax.detection.matching import BACKGROUND, NEITHER, match, sample
from resnet_jax.detection.padding import ignore_padding, inside
from resnet_jax.detection.pooling import multilevel_roi_align, region_levels, roi_align
from resnet_jax.detection.pyramid import FeaturePyramid
from resnet_jax.detection.regions import RegionClassifier, region_layers, region_network
from resnet_jax.detection.retinanet import DenseHead, DenseRules, RetinaNet, dense_loss, select_dense
from resnet_jax.detection.rpn import ProposalHead, ProposalRules, Proposals, proposal_loss, propose
from resnet_jax.detection.suppression import nms
from resnet_jax.detection.torch_weights import from_torchvision

__all__ = [
    "BACKGROUND",
    "NEITHER",
    "BoxHead",
    "BoxRules",
    "DenseHead",
    "DenseRules",
    "Detections",
    "Detector",
    "FasterRCNN",
    "FeaturePyramid",
    "Levels",
    "ProposalHead",
    "ProposalNetwork",
    "ProposalRules",
    "Proposals",
    "RegionClassifier",
    "Regions",
    "RetinaNet",
    "anchor_grid",
    "area",
    "best_detections",
    "binary_cross_entropy",
    "clip",
    "decode",
    "dense_loss",
    "encode",
    "focal",
    "from_torchvision",
    "generalized_iou",
    "ignore_padding",
    "inside",
    "iou",
    "match",
    "mean_of",
    "multilevel_roi_align",
    "nms",
    "proposal_loss",
    "propose",
    "region_layers",
    "region_levels",
    "region_loss",
    "region_network",
    "roi_align",
    "sample",
    "sample_regions",
    "select_dense",
    "select_detections",
    "smooth_l1",
]
# fmt: on
