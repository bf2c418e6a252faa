"""torchvision's detectors for the parity tests: `python -m tests.reference.make_detector_golden` (needs torchvision).

Writes golden/detectors.npz: of a small Faster R-CNN and a small RetinaNet, samples of the maps, proposals, detections,
losses with everything sampled, and figures of each gradient. Weights are drawn by `calm_weights`, and images and
objects by `examples`, so only the names and shapes of the state dict are stored.
"""

import json
import re
from collections import OrderedDict
from typing import Any

import numpy as np

from tests.reference.make_golden import GOLDEN, weights

DETECTORS = GOLDEN.with_name("detectors.npz")
KINDS = ("faster_rcnn", "retinanet")
CLASSES, WIDTH, FEATURES, HIDDEN = 5, 8, 16, 32
# Proposals before and after suppression in (training, detection), and detections.
BEFORE, AFTER, FOUND = (150, 100), (80, 40), 30
CANONICAL = 64
EVERYTHING = 100_000  # anchors and proposals that are drawn: all of them
STRIDE = 97  # of the samples of maps
# Sides that are multiples of the coarsest strides, which torchvision computes from the sizes of maps.
SIZES = {"faster_rcnn": (64, 128), "retinanet": (64, 64)}


def examples(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images float32 [3, H, W, 3], boxes [3, 4, 4] and labels int32 [3, 4]: 3 objects, 1 and none, -1 is padding."""
    rng = np.random.default_rng(height * width)
    images = rng.normal(size=(3, height, width, 3)).astype(np.float32)
    low = rng.uniform(0, 0.5, (3, 4, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.1, 0.5, low.shape)], 2) * [width, height, width, height]
    labels = rng.integers(0, CLASSES, (3, 4)).astype(np.int32)
    labels[np.arange(4)[None] >= np.array([3, 1, 0])[:, None]] = -1
    return images, np.where(labels[..., None] >= 0, boxes, 0).astype(np.float32), labels


def calm_weights(kind: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A state dict drawn from the detector's name, with outputs of the size that trained ones have."""
    factors = {
        r"\.bn3\.weight": 0.3,  # sums of many branches would grow too large
        r"\.fpn\..*weight": 0.3,
        r"(bbox|box_reg|cls_score).*weight": 0.1,
        r"(bbox|cls).*bias": 0.5,
    }
    drawn = weights(kind, shapes)
    for name, x in drawn.items():
        for pattern, factor in factors.items():
            x *= factor if re.search(pattern, name) else 1
    return drawn


def small(kind: str) -> Any:
    """torchvision's detector on a narrow ResNet with a block in each stage."""
    from torch import nn
    from torchvision.models.detection import FasterRCNN, RetinaNet
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.ops import MultiScaleRoIAlign
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    from tests.reference.torch_twin import TWINS

    twin: Any = TWINS["resnet18"].func((1, 1, 1, 1), *TWINS["resnet18"].args[1:], num_classes=None, width=WIDTH)
    parts = [("conv1", twin.conv1), ("bn1", twin.bn1), ("relu", nn.ReLU()), ("maxpool", twin.maxpool)]
    body = nn.Sequential(OrderedDict([*parts, *((name, getattr(twin, name)) for name in twin.stages)]))
    stages = range(1, 5) if kind == "faster_rcnn" else range(2, 5)
    layers = {f"layer{stage}": str(level) for level, stage in enumerate(stages)}
    channels = [WIDTH * 2 ** (stage - 1) for stage in stages]
    extra = None if kind == "faster_rcnn" else LastLevelP6P7(FEATURES, FEATURES)
    backbone = BackboneWithFPN(body, layers, channels, FEATURES, extra)
    if kind == "retinanet":
        return RetinaNet(backbone, CLASSES, topk_candidates=BEFORE[1], detections_per_img=FOUND)
    return FasterRCNN(
        backbone,
        rpn_pre_nms_top_n_train=BEFORE[0],
        rpn_pre_nms_top_n_test=BEFORE[1],
        rpn_post_nms_top_n_train=AFTER[0],
        rpn_post_nms_top_n_test=AFTER[1],
        box_detections_per_img=FOUND,
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2, canonical_scale=CANONICAL),
        box_head=TwoMLPHead(FEATURES * 49, HIDDEN),
        box_predictor=FastRCNNPredictor(HIDDEN, CLASSES + 1),
    )


def shapes_of(net: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of a state dict's tensors by name, except counters."""
    return {k: tuple(v.shape) for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}


def answers(net: Any, images: np.ndarray, boxes: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """What a torchvision detector makes of images [B, H, W, 3] and their objects (labels 0..K-1, -1 is padding).

    By name: `map/LEVEL` [B, H, W, C], `proposals/IMAGE`, `boxes/IMAGE`, `scores/IMAGE`, `labels/IMAGE`, `loss/NAME` and
    `grad/TENSOR`, of the sum of all losses with everything sampled.
    """
    import torch
    from torchvision.models.detection.image_list import ImageList

    two_stages, count = hasattr(net, "rpn"), len(images)
    first = int(two_stages)  # class 0 is the background
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    sized = ImageList(x, [images.shape[1:3]] * count)
    targets = [
        {
            "boxes": torch.from_numpy(boxes[i][labels[i] >= 0]),
            "labels": torch.from_numpy(labels[i][labels[i] >= 0]).long() + first,
        }
        for i in range(count)
    ]
    found: dict[str, Any] = {}
    net.eval()
    with torch.no_grad():
        maps = net.backbone(x)
        found |= {f"map/{level}": x.permute(0, 2, 3, 1) for level, x in enumerate(maps.values())}
        if two_stages:
            proposals, _ = net.rpn(sized, maps)
            found |= {f"proposals/{i}": x for i, x in enumerate(proposals)}
            detections, _ = net.roi_heads(maps, proposals, sized.image_sizes)
        else:
            outputs, anchors = net.head([*maps.values()]), net.anchor_generator(sized, [*maps.values()])
            lengths = [x.shape[2] * x.shape[3] * 9 for x in maps.values()]
            split = {name: [*x.split(lengths, 1)] for name, x in outputs.items()}
            levels = [[*x.split(lengths)] for x in anchors]
            detections = net.postprocess_detections(split, levels, sized.image_sizes)
    for i, detected in enumerate(detections):
        found |= {f"{name}/{i}": x for name, x in detected.items()}
        found[f"labels/{i}"] = detected["labels"] - first

    net.train()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    maps = net.backbone(x)
    if two_stages:
        for sampler in (net.rpn.fg_bg_sampler, net.roi_heads.fg_bg_sampler):
            sampler.batch_size_per_image, sampler.positive_fraction = EVERYTHING, 0.5
        proposals, losses = net.rpn(sized, maps, targets)
        losses |= net.roi_heads(maps, proposals, sized.image_sizes, targets)[1]
    else:
        outputs, anchors = net.head([*maps.values()]), net.anchor_generator(sized, [*maps.values()])
        losses = net.compute_loss(targets, outputs, anchors)
    sum(losses.values()).backward()
    found |= {f"loss/{name}": x for name, x in losses.items()}
    found |= {f"grad/{name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {name: x.detach().numpy() for name, x in found.items()}


def figures(gradient: np.ndarray) -> np.ndarray:
    """Norm, sum and largest size of a gradient, which do not depend on its layout."""
    x = np.asarray(gradient, np.float64)
    return np.array([np.linalg.norm(x), x.sum(), np.abs(x).max()])


def summary(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The part that is stored: samples of maps, figures of gradients, and everything else whole."""
    kinds = {"map": lambda x: x.ravel()[::STRIDE], "grad": lambda x: figures(x).astype(np.float32)}
    return {name: kinds.get(name.split("/")[0], np.asarray)(x) for name, x in found.items()}


def main() -> None:
    """Write the golden file."""
    import torch
    import torchvision

    stored = {}
    for kind in KINDS:
        net = small(kind)
        shapes = shapes_of(net)
        net.load_state_dict({k: torch.from_numpy(v) for k, v in calm_weights(kind, shapes).items()}, strict=False)
        stored |= {f"{kind}/{name}": x for name, x in summary(answers(net, *examples(*SIZES[kind]))).items()}
        stored[f"{kind}/shapes"] = np.array(json.dumps(shapes))
    np.savez_compressed(DETECTORS, **stored)
    print(f"{DETECTORS}: {DETECTORS.stat().st_size:,} bytes, torchvision {torchvision.__version__}")


if __name__ == "__main__":
    main()
