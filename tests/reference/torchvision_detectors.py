"""torchvision's Faster R-CNN with the sizes of a config of ours, and a process that times it (needs torchvision).

`python -m tests.reference.torchvision_detectors FOLDER THREADS [small]` answers each line on stdin, JSON of [task,
case, calls], with the seconds of these calls; with 0 calls it prepares the task, and describes its first result. The
weights of each case are left in FOLDER/CASE.npz. See results/detection_speed.py.
"""

import json
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.detection.box_head import BoxRules
from resnet_jax.detection.rpn import ProposalRules
from train.config import OptimConfig
from train.detect.config import DetectConfig
from train.detect.presets import PRESETS

OBJECTS = 12  # in each image
POOLED = 7
# The rate is so small that all steps do the same work.
SGD = OptimConfig(name="sgd", lr=1e-8, momentum=0.9, weight_decay=1e-4, schedule="constant")
NMS = {"nms_1000": 1000, "nms_2000": 2000}
NMS_IMAGES, NMS_THRESHOLD = 2, 0.7
ALIGN = ("roi_align", "roi_align_gradient")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A detector and its inputs: a batch of images of one size (height, width), without padding.

    `sharpness` is a factor of the random weights of the classes, so that an image has about the number of candidates
    for detections that ours takes at most.
    """

    config: DetectConfig
    classes: int
    size: tuple[int, int]
    batch: int
    sharpness: float = 3.0


def cases(small: bool) -> dict[str, Case]:
    """The detectors that are timed, of coco_fasterrcnn_r50_fpn_1x and of bccd_fasterrcnn; tiny ones if `small`."""
    r50, bccd = (replace(PRESETS[name](), optim=SGD) for name in ("coco_fasterrcnn_r50_fpn_1x", "bccd_fasterrcnn"))
    if small:
        tiny: dict[str, Any] = {
            "model": "resnet18",
            "features": 16,
            "hidden": (16,),
            "proposals": ProposalRules(before=(40, 30), after=(30, 20), samples=32),
            "regions": BoxRules(samples=16, candidates=60),
        }
        r50, bccd = replace(r50, **tiny), replace(bccd, **tiny)
        return {
            "resnet50": Case(config=r50, classes=3, size=(64, 96), batch=1),
            "bccd": Case(config=bccd, classes=3, size=(64, 64), batch=2),
        }
    return {
        "resnet50": Case(config=r50, classes=80, size=(480, 640), batch=1, sharpness=12.0),
        "bccd": Case(config=bccd, classes=3, size=(192, 256), batch=8),
    }


def inputs(case: Case) -> dict[str, np.ndarray]:
    """A batch of `train.detect.batches`: images of noise, with boxes of all sizes."""
    rng = np.random.default_rng(0)
    count, (height, width) = case.batch, case.size
    extent = np.array([width, height], np.float32)
    low = rng.uniform(0, 0.6, (count, OBJECTS, 2))
    high = low + rng.uniform(0.05, 0.4, low.shape)
    return {
        "image": rng.integers(0, 256, (count, height, width, 3), np.uint8),
        "size": np.tile(np.array(case.size, np.int32), (count, 1)),
        "boxes": np.concatenate([low * extent, high * extent], axis=2).astype(np.float32),
        "labels": rng.integers(0, case.classes, (count, OBJECTS), np.int32),
        "crowd": np.zeros((count, OBJECTS), bool),
        "id": np.arange(count, dtype=np.int32),
        "scale": np.ones(count, np.float32),
        "valid": np.ones(count, bool),
    }


def random_boxes(shape: tuple[int, ...], size: tuple[int, int]) -> np.ndarray:
    """Boxes float32 [*shape, 4] in an image of (height, width), with sides of 0.05 to 0.5 of its shorter one."""
    rng = np.random.default_rng(1)
    sides = min(size) * np.exp(rng.uniform(np.log(0.05), np.log(0.5), (*shape, 2)))
    low = rng.uniform(0, 1, sides.shape) * (np.array(size[::-1]) - sides)
    return np.concatenate([low, low + sides], axis=-1).astype(np.float32)


def nms_inputs(task: str, small: bool) -> tuple[np.ndarray, np.ndarray]:
    """Boxes float32 [images, N, 4] and scores [images, N]."""
    count = NMS[task] // (20 if small else 1)
    scores = np.random.default_rng(2).random((NMS_IMAGES, count), np.float32)
    return random_boxes((NMS_IMAGES, count), (480, 640)), scores


def align_inputs(small: bool) -> tuple[list[np.ndarray], list[int], np.ndarray, np.ndarray]:
    """Maps float32 [H, W, C] of an image's pyramid, their strides, boxes [N, 4], and the gradient of the result."""
    rng, size = np.random.default_rng(3), (64, 96) if small else (480, 640)
    strides, channels, count = [4, 8, 16, 32], 8 if small else 256, 16 if small else 512
    maps = [rng.normal(size=(size[0] // s, size[1] // s, channels)).astype(np.float32) for s in strides]
    gradient = rng.normal(size=(count, POOLED, POOLED, channels)).astype(np.float32)
    return maps, strides, random_boxes((count,), size), gradient


def faster_rcnn(config: DetectConfig, classes: int) -> Any:
    """torchvision's Faster R-CNN as `config` describes it, in training mode; it pads images, but never scales them."""
    from torch import nn
    from torchvision import models
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
    from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

    body = getattr(models, config.model)(norm_layer=FrozenBatchNorm2d if config.frozen_stats else nn.BatchNorm2d)
    frozen = ["conv1", "bn1", *(f"layer{stage}" for stage in range(1, config.freeze))]
    for name in frozen if config.freeze else ():
        getattr(body, name).requires_grad_(False)
    layers = {f"layer{stage}": str(stage - 1) for stage in range(1, 5)}
    channels = [body.inplanes // 2 ** (4 - stage) for stage in range(1, 5)]
    backbone = BackboneWithFPN(body, layers, channels, config.features)

    scale = config.anchor_scale or 8.0
    anchors = AnchorGenerator(tuple((int(stride * scale),) for stride in (4, 8, 16, 32, 64)), ((0.5, 1.0, 2.0),) * 5)
    widths = (config.features * POOLED**2, *config.hidden)
    head: list[tuple[str, nn.Module]] = [("flatten", nn.Flatten())]
    for number in range(len(config.hidden)):
        head += [(f"fc{6 + number}", nn.Linear(*widths[number : number + 2])), (f"relu{6 + number}", nn.ReLU())]
    proposals, regions = config.proposals, config.regions
    net = FasterRCNN(
        backbone,
        rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_train=proposals.before[0],
        rpn_pre_nms_top_n_test=proposals.before[1],
        rpn_post_nms_top_n_train=proposals.after[0],
        rpn_post_nms_top_n_test=proposals.after[1],
        rpn_nms_thresh=proposals.nms,
        rpn_fg_iou_thresh=proposals.high,
        rpn_bg_iou_thresh=proposals.low,
        rpn_batch_size_per_image=proposals.samples,
        rpn_positive_fraction=proposals.fraction,
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], POOLED, 2, canonical_scale=config.canonical_size),
        box_head=nn.Sequential(OrderedDict(head)),
        box_predictor=FastRCNNPredictor(widths[-1], classes + 1),
        box_score_thresh=regions.score,
        box_nms_thresh=regions.nms,
        box_detections_per_img=regions.detections,
        box_fg_iou_thresh=regions.overlap,
        box_bg_iou_thresh=regions.overlap,
        box_batch_size_per_image=regions.samples,
        box_positive_fraction=regions.fraction,
        image_mean=list(config.augment.mean or ()),
        image_std=list(config.augment.std or ()),
    )
    net.transform.resize = lambda image, target=None: (image, target)  # its _skip_resize is for training alone
    return net


# ---- the process ---------------------------------------------------------------------------------------------------

Runner = Callable[[], Any]


def detector_runner(task: str, case: Case, weights: Path) -> tuple[Runner, dict[str, Any]]:
    """(a call that trains one step or predicts one batch, what its first result is)."""
    import torch

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    torch.manual_seed(0)
    net = faster_rcnn(case.config, case.classes)
    with torch.no_grad():
        for name, x in net.state_dict().items():
            # Sums of many random branches would grow too large.
            last = "bn2" if case.config.model in ("resnet18", "resnet34") else "bn3"
            x *= {f"{last}.weight": 0.3, "cls_score.weight": case.sharpness}.get(".".join(name.split(".")[-2:]), 1)
    np.savez(weights, **{name: x.numpy() for name, x in net.state_dict().items()})
    net.to(device)
    given = inputs(case)
    images = torch.from_numpy(given["image"].transpose(0, 3, 1, 2).copy()).to(device)
    targets = [
        {"boxes": torch.from_numpy(boxes).to(device), "labels": torch.from_numpy(labels).long().to(device) + 1}
        for boxes, labels in zip(given["boxes"], given["labels"], strict=True)
    ]

    def apply(*targets: Any) -> Any:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=gpu):
            return net(list(images.float().div_(255)), *targets)

    if task == "predict":
        net.eval()

        def predict() -> Any:
            with torch.inference_mode():
                return apply()

        return predict, {"detections": sum(len(found["boxes"]) for found in predict())}

    optimizer = torch.optim.SGD(
        [x for x in net.parameters() if x.requires_grad],
        lr=SGD.lr,
        momentum=SGD.momentum,
        weight_decay=SGD.weight_decay,
    )

    def step() -> Any:
        losses = apply(targets)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        optimizer.step()
        return losses

    return step, {name: round(x.item(), 4) for name, x in step().items()}


def operator_runner(task: str, small: bool) -> tuple[Runner, dict[str, Any]]:
    """(a call of NMS or ROIAlign alone, what its first result is)."""
    import torch
    from torchvision.ops import MultiScaleRoIAlign, nms

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def there(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(device)

    if task in NMS:
        pairs = [tuple(map(there, pair)) for pair in zip(*nms_inputs(task, small), strict=True)]

        def suppress() -> Any:
            return [nms(boxes, scores, NMS_THRESHOLD) for boxes, scores in pairs]

        return suppress, {"kept": sum(map(len, suppress()))}

    maps, strides, boxes, gradient = align_inputs(small)
    size = maps[0].shape[0] * strides[0], maps[0].shape[1] * strides[0]
    need = task == "roi_align_gradient"
    features = {str(i): there(x.transpose(2, 0, 1)[None]).requires_grad_(need) for i, x in enumerate(maps)}
    regions, back = [there(boxes)], there(gradient.transpose(0, 3, 1, 2))
    pool = MultiScaleRoIAlign([*features], POOLED, 2)

    def align() -> Any:
        pooled = pool(features, regions, [size])
        return (pooled, *torch.autograd.grad(pooled, [*features.values()], back)) if need else pooled

    first = align()
    return align, {"sum_of_squares": round((first[1] if need else first).square().sum().item(), 3)}


def serve(folder: Path, threads: int, small: bool) -> None:
    """Answer the lines on stdin until it ends."""
    import torch

    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    known = cases(small)
    runners: dict[tuple[str, str], Runner] = {}
    for line in sys.stdin:
        task, name, calls = json.loads(line)
        if not calls:
            if name in known:
                runners[task, name], first = detector_runner(task, known[name], folder / f"{name}.npz")
            else:
                runners[task, name], first = operator_runner(task, small)
            print(json.dumps(first), flush=True)
            continue
        seconds = []
        for _ in range(calls):
            began = time.perf_counter()
            runners[task, name]()
            wait()
            seconds.append(time.perf_counter() - began)
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    from train.runtime import keep_memory

    keep_memory()
    serve(Path(sys.argv[1]), int(sys.argv[2]), "small" in sys.argv[3:])
