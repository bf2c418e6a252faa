"""A tiny run of detection that several tests share."""

from resnet_jax.detection.box_head import BoxRules
from resnet_jax.detection.rpn import ProposalRules
from train.detect.config import DetectConfig, ObjectDataConfig

# Two levels with strides 8 and 16 on one bucket of the rendered shapes.
CONFIG = DetectConfig(
    model="resnet18",
    width=8,
    levels=("stage2", "stage3"),
    features=16,
    hidden=(32,),
    anchor_scale=4.0,
    canonical_size=64,
    frozen_stats=False,
    kernels="plain",
    data=ObjectDataConfig(max_size=64, buckets=("64x64",)),
    proposals=ProposalRules(before=(60, 40), after=(40, 20), samples=32),
    regions=BoxRules(samples=16, candidates=40, detections=10),
    steps=6,
    batch=8,
    eval_batch=40,
    log_every=2,
    eval_every=100,
)
QUICK = (
    "--model resnet18 --width 8 --levels stage2 stage3 --features 16 --hidden 32 --canonical-size 64 --kernels plain"
)
QUICK += " --init None --freeze 0 --no-frozen-stats --data.max-size 64 --data.buckets 64x64"
QUICK += " --proposals.before 60 40 --proposals.after 40 20 --proposals.samples 32"
QUICK += " --regions.samples 16 --regions.candidates 40 --regions.detections 10"
QUICK += " --steps 6 --batch 8 --eval-batch 40 --log-every 2 --eval-every 100"


def quick(out, *more):
    """The arguments of `python -m train.detect` for `CONFIG`."""
    return [*QUICK.split(), "--out", str(out), *more]
