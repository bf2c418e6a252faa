"""Configuration of pretraining: one flag per field (`--objective.name byol`). Only entry points import it."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from pretrain.objectives import OBJECTIVES, Objective
from train import config as training
from train.config import DataConfig, ImageConfig, RunConfig, check_run
from train.errors import UsageError, unknown


@dataclass(frozen=True, kw_only=True)
class ViewConfig(ImageConfig):
    """Augmentation of views on the device; see `pretrain.views.view`. `resized_crop` is the side of the large views."""

    views: int = 2
    """Number of large views of each image."""
    min_scale: float = 0.08
    """Smallest fraction of the image's area that a large view keeps."""
    flip: bool = True
    """Mirror each view with probability 0.5."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    """Strengths of the changes of brightness, contrast, saturation and hue."""
    grayscale: float = 0.2
    """Probability that a view is converted to grayscale."""
    blur: tuple[float, float] = (0.0, 0.0)
    """Probabilities of blur, for odd and for even views."""
    solarize: tuple[float, float] = (0.0, 0.0)
    """Probabilities of solarisation, for odd and for even views."""
    small_views: int = 0
    """Number of additional views of a small part of each image (multi-crop)."""
    small_crop: int = 96
    """Side of the small views in pixels."""
    small_scale: tuple[float, float] = (0.05, 0.14)
    """Smallest and largest fraction of the image's area that a small view keeps."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The method; a field that is None takes the method's default for ImageNet (`pretrain.objectives`)."""

    name: str = "simclr"
    """simclr, supcon, mocov2, mocov3, byol, simsiam, barlow, vicreg, nnclr, swav or dino."""
    projector: tuple[int, ...] | None = None
    """Layer sizes of the projector."""
    predictor: tuple[int, ...] | None = None
    """Layer sizes of the predictor, for methods that have one."""
    temperature: float | None = None
    """Temperature of the similarities or scores."""
    teacher_temperature: float | None = None
    """Temperature of DINO's targets."""
    target_momentum: float | None = None
    """Initial momentum of the target network."""
    momentum_schedule: Literal["constant", "cosine"] | None = None
    """Keep that momentum constant, or raise it to 1 along a cosine."""
    queue: int | None = None
    """Number of earlier embeddings to keep, a multiple of the batch."""
    prototypes: int | None = None
    """Number of prototypes (SwAV, DINO)."""
    frozen_prototypes: float = 0.0
    """Number of epochs at the start during which the prototypes do not change."""
    redundancy: float | None = None
    """Weight of the off-diagonal terms of Barlow Twins' loss."""
    scale: float | None = None
    """Factor that multiplies Barlow Twins' loss."""
    invariance: float | None = None
    """Weight of VICReg's invariance term."""
    variance: float | None = None
    """Weight of VICReg's variance term."""
    covariance: float | None = None
    """Weight of VICReg's covariance term."""
    epsilon: float | None = None
    """Entropy regularisation of SwAV's assignment; smaller is sharper."""
    sinkhorn_iterations: int | None = None
    """Sinkhorn-Knopp iterations of SwAV's assignment."""
    center_momentum: float | None = None
    """Momentum of DINO's center."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """A run of self-supervised pretraining."""

    data: DataConfig = field(default_factory=DataConfig)
    augment: ViewConfig = field(default_factory=ViewConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    probe_lr: float = 0.01
    """Peak learning rate of the online probe (Adam, decayed to 0 along a cosine)."""
    neighbours: int = 200
    """Number of neighbours k of the nearest-neighbour classifier."""
    neighbour_temperature: float = 0.1
    """Temperature of the neighbours' votes."""
    neighbour_images: int | None = None
    """Training images to search during training; None searches all of them, as the final evaluation does."""


def make_objective(config: ObjectiveConfig) -> Objective:
    """Make the config's objective, with its options bound.

    Raises:
      UsageError: an unknown name, or an option that this method does not take.
    """
    if config.name not in OBJECTIVES:
        raise unknown("objective", config.name, OBJECTIVES)
    objective = OBJECTIVES[config.name]
    parts = {
        "projector": True,
        "predictor": objective.predictor,
        "queue": objective.queue,
        "prototypes": objective.prototypes,
        "target_momentum": objective.target is not None,
        "momentum_schedule": objective.target is not None,
    }
    fields = {name: value for name, value in vars(config).items() if name not in ("name", "frozen_prototypes")}
    takes = [name for name in fields if parts.get(name, name in objective.options)]
    given = {name: value for name, value in fields.items() if value is not None}
    for name in given:
        if name not in takes:
            flag, flags = name.replace("_", "-"), ", ".join(takes).replace("_", "-")
            raise UsageError(f"{config.name} does not take --objective.{flag}; it takes {flags}")
    if config.frozen_prototypes and not objective.prototypes:
        raise UsageError(f"--objective.frozen-prototypes: {config.name} has no prototypes")
    changes = {"target" if n == "target_momentum" else n: value for n, value in given.items() if n in parts}
    options = {name: value for name, value in given.items() if name not in parts}
    return dataclasses.replace(objective, **changes).bind(**options)


RANGES = {
    "(0, inf)": "objective.temperature objective.teacher_temperature objective.epsilon objective.scale "
    "neighbour_temperature",
    "[0, inf)": "objective.redundancy objective.invariance objective.variance objective.covariance "
    "probe_lr augment.small_views augment.jitter",
    "[0, 1000000000]": "objective.frozen_prototypes",
    "[1, inf)": "objective.queue objective.sinkhorn_iterations neighbours neighbour_images augment.views",
    "[1, 65536]": "objective.projector objective.predictor augment.small_crop",
    "[2, inf)": "objective.prototypes",
    "[0, 1]": "objective.target_momentum objective.center_momentum augment.grayscale augment.blur augment.solarize",
    "(0, 1]": "augment.small_scale",
}


def check(config: PretrainConfig) -> None:
    """Refuse settings that cannot work, in one line and before anything is loaded.

    Raises:
      UsageError: an unknown name, a number out of range, more views than the objective takes, a queue that is not a
        multiple of the batch.
    """
    o, a = config.objective, config.augment
    objective = make_objective(o)
    check_run(config, RANGES)
    if not objective.projector:
        raise UsageError("--objective.projector needs the size of at least one layer")
    if a.jitter[3] > 0.5:
        raise UsageError(f"--augment.jitter: the last strength, of hue, must be at most 0.5, got {a.jitter[3]}")
    if a.small_scale[0] > a.small_scale[1]:
        raise UsageError(f"--augment.small-scale {a.small_scale[0]} {a.small_scale[1]}: the smaller one comes first")
    if config.data.random_crop:
        raise UsageError("--data.random-crop cuts one box for all views of an image, which must differ: leave it out")
    if config.batch < 2:
        raise UsageError("a batch of one has no other image to compare with: choose --batch 2 or more")
    if a.views < 2 or (a.views > 2 and not objective.many_views):
        raise UsageError(f"{o.name} takes {'two or more' if objective.many_views else 'two'} views, not {a.views}")
    if a.small_views and not objective.small_views:
        raise UsageError(f"{o.name} does not take small views: leave out --augment.small-views")
    if objective.predictor and objective.predictor[-1] != objective.projector[-1]:
        raise UsageError(
            f"--objective.predictor ends in {objective.predictor[-1]} but the projector in {objective.projector[-1]}: "
            "the last sizes must be equal"
        )
    if objective.queue and objective.queue % config.batch:
        raise UsageError(f"--objective.queue {objective.queue} is not a multiple of --batch {config.batch}")


def check_images(config: PretrainConfig, shape: tuple[int, int, int]) -> None:
    """Refuse views that do not fit a data set's images of shape (H, W, C).

    Raises:
      UsageError: a crop larger than the images, or small views that are not smaller than the large ones.
    """
    a, side = config.augment, min(shape[:2])
    large = a.resized_crop or side
    for name, crop in {"resized-crop": large, "small-crop": a.small_crop if a.small_views else 0}.items():
        if crop > side:
            raise UsageError(f"--augment.{name} {crop} is larger than the images, {shape[0]}x{shape[1]}")
    if a.small_views and a.small_crop >= large:
        raise UsageError(f"--augment.small-crop {a.small_crop} is not smaller than the large views, {large}")


def unused(config: PretrainConfig) -> dict[str, str]:
    """Fields that other settings leave without effect, see `train.config.unused`."""
    reasons = training.unused(config)
    if not config.augment.small_views:
        reasons |= dict.fromkeys(("augment.small_crop", "augment.small_scale"), "without --augment.small-views")
    return reasons
