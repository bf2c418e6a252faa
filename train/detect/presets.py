"""Presets of detection: complete recipes by name. A preset's docstring says what it is and what to expect."""

from collections.abc import Callable
from dataclasses import replace

from resnet_jax.detection.box_head import BoxRules
from resnet_jax.detection.rpn import ProposalRules
from train.config import OptimConfig
from train.detect.config import BoxAugmentConfig, DetectConfig, ObjectDataConfig


def shapes_fasterrcnn() -> DetectConfig:
    """Rendered shapes, on any machine, offline.

    Command: python -m train.detect
    Hardware: 2 CPU cores.
    """
    return DetectConfig(
        model="resnet18",
        width=16,
        features=64,
        hidden=(128,),
        canonical_size=112,
        anchor_scale=4.0,
        frozen_stats=False,
        data=ObjectDataConfig(name="shapes"),
        augment=BoxAugmentConfig(flip=True),
        proposals=ProposalRules(before=(200, 100), after=(200, 50), samples=128),
        regions=BoxRules(samples=64, candidates=200, detections=30),
        optim=OptimConfig(name="adamw", lr=2e-3, weight_decay=1e-2, warmup_epochs=1, clip_norm=10.0),
        epochs=20,
        batch=16,
        eval_batch=16,
        log_every=10,
        eval_every=5,
    )


PRESETS: dict[str, Callable[[], DetectConfig]] = {"shapes_fasterrcnn": shapes_fasterrcnn}
"""Presets of detection by name."""
_ = replace
