"""torchvision's operators of object detection: `python -m tests.reference.make_detection_golden` (needs torchvision).

Writes golden/detection.npz: the results; the inputs are drawn again by `inputs`. Arrays are in this project's layout.
"""

from collections import OrderedDict

import numpy as np

from tests.reference.make_golden import GOLDEN

DETECTION = GOLDEN.with_name("detection.npz")
THRESHOLDS = (0.25, 0.3, 0.5, 0.7)
STRIDES = (4, 8, 16, 32)
FEW = 30  # of the 200 boxes, for results that would be large
IMAGE = (64, 96)
WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def inputs() -> dict[str, np.ndarray]:
    """Draw boxes [N, 4], their scores and groups, whole numbers with ties, and feature maps [H, W, C] of one image."""
    rng = np.random.default_rng(0)
    corner, sides = rng.uniform(-50, 150, (200, 2)), rng.uniform(0, 100, (200, 2))
    boxes = np.concatenate([corner, corner + sides], 1)
    whole = np.floor(rng.uniform(0, 20, (200, 4)))
    whole[:, 2:] = whole[:, :2] + np.floor(whole[:, 2:] / 2)  # some without area
    inside = rng.uniform(0, 1, (FEW, 2, 2)) * IMAGE[::-1]
    given = {
        "boxes": boxes,
        "scores": rng.random(200),
        "whole": whole,
        "tied": rng.integers(0, 10, 200) / 10,
        "rois": np.concatenate([inside.min(1), inside.max(1)], 1),
        "deltas": rng.normal(0, 4, (200, 4)),
        "overlaps": rng.integers(0, 101, (9, 300)) / 100,
    }
    given |= {f"map{s}": rng.normal(size=(IMAGE[0] // s, IMAGE[1] // s, 3)) for s in STRIDES}
    return {"groups": rng.integers(0, 3, 200)} | {k: v.astype(np.float32) for k, v in given.items()}


def answers() -> dict[str, np.ndarray]:
    """Return what torchvision makes of the inputs."""
    import torch
    from torchvision import ops
    from torchvision.models.detection._utils import BoxCoder, Matcher
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.image_list import ImageList

    given = {k: torch.from_numpy(v) for k, v in inputs().items()}
    maps = {f"map{s}": given[f"map{s}"].permute(2, 0, 1)[None].contiguous().requires_grad_() for s in STRIDES}
    few = given["boxes"][:FEW]
    results = {
        "iou": ops.box_iou(few, few),
        "generalized_iou": ops.generalized_box_iou(few, few),
        "clip": ops.clip_boxes_to_image(given["boxes"], IMAGE),
    }

    def mask(kept: torch.Tensor) -> torch.Tensor:
        return torch.zeros(200, dtype=torch.bool).index_fill(0, kept, True)

    for threshold in THRESHOLDS:
        results[f"nms/{threshold}"] = mask(ops.nms(given["boxes"], given["scores"], threshold))
        if threshold in (0.25, 0.5):  # others are not exact in float32, in which torchvision does not compare
            results[f"nms/tied/{threshold}"] = mask(ops.nms(given["whole"], given["tied"], threshold))
            kept = ops.batched_nms(given["whole"], given["tied"], given["groups"], threshold)
            results[f"nms/grouped/{threshold}"] = mask(kept)

    coder = BoxCoder(WEIGHTS)
    results["encode"] = coder.encode_single(given["boxes"], given["boxes"].flip(0))
    results["decode"] = coder.decode_single(given["deltas"], given["boxes"])
    for low_quality in (False, True):
        results[f"match/{low_quality}"] = Matcher(0.7, 0.3, low_quality)(given["overlaps"])
    images = ImageList(torch.zeros(1, 3, *IMAGE), [IMAGE])
    sizes = tuple((8 * s,) for s in STRIDES)
    generator = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(STRIDES))
    results["anchors"] = generator(images, list(maps.values()))[0]

    rois = torch.cat([torch.zeros(2 * FEW, 1), torch.cat([given["rois"], few])], 1)
    for aligned in (False, True):
        for sampling in (1, 2):
            pooled = ops.roi_align(maps["map4"], rois, 3, 0.25, sampling, aligned)
            results[f"roi_align/{aligned}/{sampling}"] = pooled.permute(0, 2, 3, 1)
    for canonical in (32, 224):
        pool = ops.MultiScaleRoIAlign(list(maps), 3, 2, canonical_scale=canonical)
        pooled = pool(OrderedDict(maps), [given["rois"]], [IMAGE])
        results[f"pyramid/{canonical}"] = pooled.permute(0, 2, 3, 1)
        gradients = torch.autograd.grad(pooled.square().sum(), list(maps.values()), allow_unused=True)
        for name, gradient in zip(maps, gradients, strict=True):
            gradient = torch.zeros_like(maps[name]) if gradient is None else gradient
            results[f"pyramid/{canonical}/{name}"] = gradient[0].permute(1, 2, 0)
    return {k: v.detach().numpy() for k, v in results.items()}


def main() -> None:
    """Write the golden file."""
    np.savez_compressed(DETECTION, **answers())
    print(f"{DETECTION}: {DETECTION.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
