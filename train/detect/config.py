"""Configuration of detection: one flag per field (`--data.min-size 480`). Only entry points import it."""

import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from resnet_jax.augment import IMAGENET_MEAN, IMAGENET_STD
from resnet_jax.detection.box_head import BoxRules
from resnet_jax.detection.retinanet import DenseRules
from resnet_jax.detection.rpn import ProposalRules
from train.config import NormalizeConfig, RunConfig, SetConfig, check_run
from train.config import unused as unused_in_runs
from train.detect.layout import Size
from train.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ObjectDataConfig(SetConfig):
    """The object set, how it is split, and to which sizes its images are scaled; see `train.detect.sets.load`."""

    name: str = "shapes"
    """`shapes`, `coco:PATH`, `voc:DIR`, `yolo:DIR`, or a prepared TFDS set with boxes, such as `voc/2007`."""
    min_size: int | None = None
    """Pixels that the short side of an image is scaled to; None keeps its size."""
    max_size: int | None = None
    """Most pixels of its long side; where this binds, the short side becomes shorter."""
    buckets: tuple[str, ...] = ()
    """HEIGHTxWIDTH that images are padded to, multiples of 32; without any, at most three are chosen."""


@dataclass(frozen=True, kw_only=True)
class BoxAugmentConfig(NormalizeConfig):
    """Augmentation of training images and their boxes on the device."""

    mean: tuple[float, ...] | None = IMAGENET_MEAN
    """Channel means to subtract, in [0, 1]."""
    std: tuple[float, ...] | None = IMAGENET_STD
    """Channel standard deviations to divide by."""
    flip: bool = True
    """Flip each image horizontally with probability 0.5."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Rescale each image by a random factor between these, then crop or pad it (large scale jitter)."""
    color_jitter: float = 0.0
    """Strength of brightness, contrast and saturation changes, 0 to 1; hue changes by a quarter of it."""


@dataclass(frozen=True, kw_only=True)
class DetectConfig(RunConfig):
    """A run of object detection; `model` is the backbone."""

    metric: ClassVar[str] = "validation_ap"

    data: ObjectDataConfig = field(default_factory=ObjectDataConfig)
    augment: BoxAugmentConfig = field(default_factory=BoxAugmentConfig)
    detector: Literal["faster_rcnn", "retinanet"] = "faster_rcnn"
    """Two stages, or one."""
    model: str = "resnet50"
    """The backbone: a name in `resnet_jax.MODELS`."""
    levels: tuple[str, ...] = ()
    """The backbone's maps that enter the pyramid, finest first: by default all stages; for RetinaNet not the first."""
    features: int = 256
    """Channels of the pyramid."""
    hidden: tuple[int, ...] = (1024, 1024)
    """Widths of the fully connected layers of the second stage."""
    shared_boxes: bool = False
    """Predict one box for all classes of a region, instead of one for each."""
    anchor_scale: float | None = None
    """Side of a level's anchors over its stride; None is the paper's, 8, or 4 for RetinaNet."""
    canonical_size: int = 224
    """Side in pixels of the regions that the second stage reads from the level of stride 16."""
    frozen_stats: bool = True
    """Keep the running statistics, scales and biases of the backbone's norms; for pretrained backbones."""
    freeze: int = 0
    """Number of parts of the backbone that are not trained: 1 is the stem, 2 the stem and the first stage."""
    proposals: ProposalRules = field(default_factory=ProposalRules)
    regions: BoxRules = field(default_factory=BoxRules)
    one_stage: DenseRules = field(default_factory=DenseRules)
    batch: int = 16
    """Global batch size."""
    eval_batch: int = 8
    """Largest batch of evaluations."""
    accumulate: int = 1
    """Gradient accumulation: number of parts that each device splits its share of a batch into."""
    ema: float | None = None
    """Decay of a moving average of the parameters; if set, the average is evaluated and used in their place."""
    init: str | None = None
    """Weights of the backbone: a run folder, PyTorch weights, or a name on the Hugging Face hub; see --init of `python
    -m train`."""
    dense: bool = False
    """Let the pruned weights of a sparse `--init` grow back; otherwise they stay pruned."""
    sparsity: float | None = None
    """Share of all kernels but the stem's and the outputs' to prune by magnitude, step by step from a quarter to three
    quarters of the run; the rest of it trains what is left."""
    select: Literal["last", "best"] = "last"
    """Parameters to evaluate on the test split: the last, or those with the best AP on validation."""
    keep_best: int = 1
    """Number of checkpoints to keep with the best AP on validation."""


RANGES = {
    "[1, inf)": "features hidden canonical_size proposals.before proposals.after proposals.samples regions.samples "
    "regions.candidates regions.detections one_stage.candidates one_stage.detections",
    "[1, 65536]": "data.min_size data.max_size",
    "(0, inf)": "anchor_scale augment.scale regions.weights",
    "[0, inf)": "freeze proposals.beta regions.beta one_stage.beta proposals.min_side regions.min_side",
    "[0, 1)": "ema sparsity",
    "[0, 1]": "proposals.nms proposals.high proposals.low proposals.fraction regions.overlap regions.fraction "
    "regions.score regions.nms one_stage.high one_stage.low one_stage.score one_stage.nms",
}


def check(config: DetectConfig) -> None:
    """Refuse a config that cannot work, before anything is loaded.

    Raises:
      UsageError: an unknown name, or a number out of range.
    """
    check_run(config, RANGES)
    parse_buckets(config.data.buckets)
    for name in ("mean", "std"):
        if len(getattr(config.augment, name) or ()) != 3:
            raise UsageError(f"--augment.{name} needs 3 values, one for each channel")
    low, high = config.augment.scale
    if low > high:
        raise UsageError(f"--augment.scale needs the smaller factor first, got {low} {high}")
    for name in ("proposals", "one_stage"):
        rules, flag = getattr(config, name), name.replace("_", "-")
        if rules.low > rules.high:
            raise UsageError(f"--{flag}.low {rules.low} is above --{flag}.high {rules.high}")
    if config.init is None and config.freeze:
        raise UsageError(f"--freeze {config.freeze} needs a pretrained backbone: pass --init, or --freeze 0")
    if config.init is None and config.dense:
        raise UsageError("--dense frees the pruned weights of a sparse run: pass that run with --init")
    if config.sparsity is not None and config.select == "best":
        raise UsageError("--select best may choose a checkpoint from before the pruning: drop it, or --sparsity")
    if config.select == "best" and config.keep_best == 0:
        raise UsageError("--select best needs --keep-best 1 or more")
    if config.steps_per_call not in (None, 1):
        raise UsageError("--steps-per-call needs images of one size, and detection has buckets of several")


def parse_buckets(buckets: tuple[str, ...]) -> tuple[Size, ...]:
    """Parse `800x1344` to (height, width).

    Raises:
      UsageError: a text of a different form.
    """
    for text in buckets:
        if not re.fullmatch(r"\d+x\d+", text):
            raise UsageError(f"--data.buckets {text!r} is not of the form HEIGHTxWIDTH, such as 800x1344")
    sizes = [text.split("x") for text in buckets]
    return tuple((int(height), int(width)) for height, width in sizes)


def unused(config: DetectConfig) -> dict[str, str]:
    """Fields that other settings leave without effect, each with the reason."""
    two_stages = config.detector == "faster_rcnn"
    reason = f"with --detector {config.detector}"
    first = [f"proposals.{name}" for name in vars(config.proposals)] + [
        f"regions.{name}" for name in vars(config.regions)
    ]
    first += ["hidden", "shared_boxes", "canonical_size"]
    dense = [f"one_stage.{name}" for name in vars(config.one_stage)]
    reasons = unused_in_runs(config) | dict.fromkeys(dense if two_stages else first, reason)
    if config.data.name == "shapes":
        reasons["data.dir"] = "with --data.name shapes: it is for prepared sets"
    if config.init is not None:
        reasons["zero_init"] = "with --init, which sets all weights of the backbone"
    return reasons
