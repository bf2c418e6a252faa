"""Presets of detection: complete recipes by name. A preset's docstring says what it is and what to expect.

Figures marked "measured" have their runs in results/; the others come from the cited sources, not yet reproduced here.
"""

from collections.abc import Callable
from typing import Any

from resnet_jax.detection.box_head import BoxRules
from resnet_jax.detection.rpn import ProposalRules
from train.config import OptimConfig
from train.detect.config import BoxAugmentConfig, DetectConfig, ObjectDataConfig


def shapes_fasterrcnn() -> DetectConfig:
    """Faster R-CNN on rendered shapes, from the ResNet-20 that comes with the project: on any machine, offline.

    Command: python -m train.detect
    Hardware: 2 CPU cores, about three minutes. Measured: 88.1 % AP50 on test.
    """
    return DetectConfig(
        model="resnet20",
        init="cifar10_resnet20",
        freeze=2,
        levels=("stage3",),  # of stride 4, as shapes of 12 pixels need; the pyramid adds stride 8
        features=64,
        hidden=(128,),
        anchor_scale=4.0,
        data=ObjectDataConfig(name="shapes", max_size=96),
        augment=BoxAugmentConfig(scale=(0.7, 1.4), color_jitter=0.3),
        proposals=ProposalRules(before=(200, 100), after=(200, 50), samples=128),
        regions=BoxRules(samples=64, candidates=200, detections=30),
        optim=OptimConfig(name="adamw", lr=2e-3, weight_decay=1e-2, warmup_epochs=1, clip_norm=10.0),
        epochs=6,
        batch=16,
        eval_batch=16,
        log_every=10,
        eval_every=3,
    )


def small_set(name: str, **changes: Any) -> DetectConfig:
    """The recipe that presets of small sets share: a ResNet-18 with a narrow pyramid on small images, for a CPU."""
    fields: dict[str, Any] = {
        "model": "resnet18",
        "features": 64,
        "hidden": (256,),
        "frozen_stats": False,
        "proposals": ProposalRules(before=(500, 300), after=(500, 200), samples=128),
        "regions": BoxRules(samples=128, candidates=1000),
        "augment": BoxAugmentConfig(flip=True, scale=(0.7, 1.4)),
        "optim": OptimConfig(name="adamw", lr=5e-4, weight_decay=1e-2, warmup_epochs=1, clip_norm=10.0),
        "epochs": 24,
        "batch": 8,
        "log_every": 10,
        "eval_every": 4,
        "select": "best",
    }
    return DetectConfig(data=ObjectDataConfig(name=name, min_size=192, max_size=288), **(fields | changes))


def raccoon_fasterrcnn() -> DetectConfig:
    """Raccoons in 200 photographs; start from a pretrained backbone, as so few images teach none.

    Command: python -m train.detect raccoon_fasterrcnn --data.dir DIR --init RUN
    Hardware: 2 CPU cores, about 20 minutes. Measured: 86.8 % AP50 on test.
    """
    return small_set("raccoon", epochs=20)


def bccd_fasterrcnn() -> DetectConfig:
    """Blood cells of three kinds in 364 microscope images, some twelve objects in each.

    Command: python -m train.detect bccd_fasterrcnn --data.dir DIR --init RUN
    Hardware: 2 CPU cores, about half an hour. Measured: 93.1 % AP50 on test.
    """
    # Cells have no upright side and hardly differ in size.
    return small_set("bccd", augment=BoxAugmentConfig(flip=True, scale=(0.9, 1.1)), anchor_scale=4.0)


def voc07_fasterrcnn_r50() -> DetectConfig:
    """ResNet-50 with a feature pyramid on the 5,011 training images of PASCAL VOC 2007, with frozen norms.

    Command: python -m train.data prepare voc/2007 && python -m train.detect voc07_fasterrcnn_r50 --init RESNET50
    Hardware: one GPU. MMDetection reports 80.4 % AP50 with VOC 2007 and 2012 together; not measured here.
    """
    return DetectConfig(
        data=ObjectDataConfig(name="voc/2007", min_size=600, max_size=1000),
        freeze=2,
        optim=OptimConfig(lr=0.01, weight_decay=1e-4, schedule="step", milestones=(0.75,), warmup_epochs=0.3),
        epochs=12,
        batch=16,
    )


def coco_fasterrcnn_r50_fpn_1x() -> DetectConfig:
    """ResNet-50 with a feature pyramid on COCO, 12 epochs: the "1x" of https://github.com/facebookresearch/detectron2.

    Command: python -m train.data prepare coco/2017 && python -m train.detect coco_fasterrcnn_r50_fpn_1x --init RESNET50
    Hardware: one large GPU, a day or so. Detectron2 reports 37.9 % box AP on the validation images; not measured here.
    """
    return DetectConfig(
        data=ObjectDataConfig(name="coco/2017", min_size=800, max_size=1333, validation=0.01),
        freeze=2,
        optim=OptimConfig(
            lr=0.02, weight_decay=1e-4, schedule="step", milestones=(2 / 3, 8 / 9), warmup_epochs=1000 * 16 / 118_000
        ),
        epochs=12,
        batch=16,
    )


PRESETS: dict[str, Callable[[], DetectConfig]] = {
    preset.__name__: preset
    for preset in (
        shapes_fasterrcnn,
        raccoon_fasterrcnn,
        bccd_fasterrcnn,
        voc07_fasterrcnn_r50,
        coco_fasterrcnn_r50_fpn_1x,
    )
}
"""Presets of detection by name."""
