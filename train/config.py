"""Run configuration: frozen dataclasses, one flag per field (`--optim.lr 0.1`). Only entry points import it."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from resnet_jax.losses import LOSSES
from resnet_jax.parallel import Mode
from resnet_jax.resnet import MODELS
from train.errors import UsageError, unknown
from train.optim import OPTIMIZERS, SCHEDULES


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The image set and how it is split; see `train.data.sets.load`."""

    name: str = "digits"
    """`digits`, `synthetic`, `folder:DIR`, or a prepared TFDS set."""
    dir: str | None = None
    """The TFDS data_dir that prepared sets are in."""
    image_size: int | None = None
    """Side of the square that images are brought to when they are decoded."""
    validation: float = 0.1
    """Fraction of the training split held back where the set has no validation split."""
    split_seed: int = 0
    """Seed of that draw, the same for every run."""
    fraction: float = 1.0
    """Share of the training split that is used, drawn evenly from each class by `split_seed`."""
    random_crop: bool = False
    """Cut a different random box out of the whole image in every epoch, while decoding: for large photographs."""
    broken: Literal["refuse", "skip"] = "refuse"
    """Refuse a set with images that cannot be decoded, or skip them."""


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """Preprocessing of every image, in training and afterwards."""

    resized_crop: int | None = None
    """Random resized crop to this side; evaluation takes the centre of this side."""
    mean: tuple[float, ...] | None = None
    """Channel means to subtract, in [0, 1]; None measures them on the training split."""
    std: tuple[float, ...] | None = None
    """Channel deviations to divide by; None measures them."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(ImageConfig):
    """Augmentation of training images on the device: crops, flips, colours, normalisation, erasing, mixing.

    0 or None leaves a part out.
    """

    crop_padding: int = 0
    """Pixels of padding around the image that a random crop is taken from."""
    crop_mode: Literal["constant", "reflect"] = "constant"
    """Content of the padding."""
    min_scale: float = 0.08
    """Smallest share of the area that a resized crop keeps."""
    flip: bool = False
    """Mirror half of the images."""
    rand_augment: int = 0
    """RandAugment with two operations of this magnitude, 1 to 30."""
    trivial_augment: bool = False
    """TrivialAugmentWide: one random operation of random strength."""
    color_jitter: float = 0.0
    """Strength of brightness, contrast and saturation changes; a quarter of it for hue."""
    cutout: int = 0
    """Side of a square set to the mean."""
    erasing: float = 0.0
    """Probability of random erasing."""
    mixup: float = 0.0
    """Alpha of mixup; with cutmix as well, each batch takes one of the two."""
    cutmix: float = 0.0
    """Alpha of cutmix."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and schedule; see `train.optim`."""

    name: str = "sgd"
    """`sgd`, `adamw`, `lars`, `lamb`, or `optax.NAME`."""
    lr: float = 0.1
    """Peak learning rate."""
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    """Applies only to kernels, never to norms and biases."""
    schedule: str = "cosine"
    """`cosine`, `linear`, `step`, `one_cycle` or `constant`."""
    warmup_epochs: float = 0.0
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Fractions of all steps at which `step` multiplies the rate by `factor`."""
    factor: float = 0.1
    clip_norm: float | None = None
    """Largest global norm of the gradient."""
    trust_coefficient: float = 0.001
    """Only for LARS: length of the step relative to the weights, before the learning rate."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Fields that every pipeline's run has."""

    out: str | None = None
    """The run's folder; the same one again resumes. Default: runs/PRESET-seedN."""
    model: str = "resnet8"
    """A name in `resnet_jax.MODELS`."""
    width: int | None = None
    """Channels of the first stage, where it is not to be the model's own."""
    widths: tuple[int, ...] = ()
    """Output channels of each convolution in turn (stem, then block by block), where channels were pruned."""
    zero_init: bool = False
    """Start residual branches at zero."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: ImageConfig = field(default_factory=ImageConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    epochs: float = 30
    steps: int | None = None
    """Number of updates, instead of epochs."""
    batch: int = 128
    """Global batch size."""
    eval_batch: int = 500
    seed: int = 0
    mode: Mode = "jit"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of convolutions and activations; auto is bfloat16 on GPU and TPU, float32 on CPU."""
    kernels: Literal["auto", "plain", "onednn"] = "auto"
    """Compute kernels of the model: XLA (plain), or oneDNN on CPU; auto is oneDNN where it can be used."""
    xla: tuple[str, ...] = ()
    """XLA compiler options for the train step, NAME=VALUE each (not in mode pmap)."""
    cache: str = "auto"
    """Folder of compiled programs for the next start; auto is ~/.cache/resnet-jax/compiled, `none` keeps none."""
    sync_bn: bool = True
    """Batch statistics over all devices; False (not in mode jit): over each device's own part."""
    distributed: str | None = None
    """Join the other hosts first: `auto` on SLURM, Kubernetes and TPU pods, elsewhere COORDINATOR:PORT,COUNT,INDEX."""
    eval_every: float = 1.0
    """Epochs between evaluations on validation, each with a checkpoint."""
    save_steps: int | None = None
    """Steps between further checkpoints."""
    keep_last: int = 2
    """How many of the newest checkpoints to keep."""
    log_every: int = 50
    """Steps between rows of metrics.jsonl."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """A supervised run."""

    drop_path: float = 0.0
    """Stochastic depth of the last block."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    accumulate: int = 1
    """Parts that a device's share of a batch is computed in."""
    loss: str = "softmax"
    """`softmax` or `sigmoid` (binary cross entropy)."""
    label_smoothing: float = 0.0
    ema: float | None = None
    """Decay of a moving average of the parameters, which is then what is evaluated and used."""
    init: str | None = None
    """Start from a run's folder or PyTorch weights (.pth, .safetensors); a head of a different size starts afresh."""
    freeze: bool = False
    """Train only the head."""
    dense: bool = False
    """Let the pruned weights of a sparse `--init` grow back; they stay pruned otherwise."""
    select: Literal["last", "best"] = "last"
    """Which parameters the test split is shown: the last, or the best on validation."""
    keep_best: int = 1
    """How many of the checkpoints best on validation to keep."""


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Fields by their flag's name: `optim.lr` and so on."""
    fields: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        fields |= flat(value, f"{prefix}{f.name}.") if dataclasses.is_dataclass(value) else {prefix + f.name: value}
    return fields


def from_dict(kind: type, values: dict[str, Any]) -> Any:
    """The inverse of `dataclasses.asdict` after a trip through JSON."""
    fields = {f.name: f for f in dataclasses.fields(kind)}

    def value(name: str, v: Any) -> Any:
        if isinstance(v, dict):
            nested: Any = fields[name].default_factory
            return from_dict(nested, v)
        return tuple(v) if isinstance(v, list) else v

    return kind(**{name: value(name, v) for name, v in values.items() if name in fields})


def check_xla(options: tuple[str, ...], mode: Mode) -> None:
    """Refuse compiler options that are not NAME=VALUE, or that the mode does not take.

    Raises:
      UsageError: that.
    """
    if mode == "pmap" and options:
        raise UsageError("pmap takes no compiler options: --xla needs --mode jit or shard_map")
    for option in options:
        if not all(option.partition("=")):
            raise UsageError(f"--xla {option!r} is not of the form NAME=VALUE")


def check_images(config: TrainConfig, shape: tuple[int, int, int], devices: int) -> None:
    """Refuse what does not fit the images (H, W, C) of a set, or this many devices.

    Raises:
      UsageError: a crop larger than the images, parts that do not divide a device's share of the batch.
    """
    crop, share = config.augment.resized_crop, config.batch // devices
    if crop and crop > min(shape[:2]):
        raise UsageError(f"--augment.resized-crop {crop} is larger than the images, {shape[0]}x{shape[1]}")
    if share % config.accumulate:
        raise UsageError(f"--accumulate {config.accumulate} does not divide a device's {share} images of a batch")


def check_run(config: RunConfig, ranges: dict[str, bool]) -> None:
    """Refuse what no pipeline's run can work with, and whatever of a pipeline's own `ranges` (by flag) is False.

    Raises:
      UsageError: a name in no table, or a number out of its range.
    """
    if config.model not in MODELS:
        raise unknown("model", config.model, MODELS)
    if config.optim.name not in OPTIMIZERS and not config.optim.name.startswith("optax."):
        raise unknown("optimizer", config.optim.name, [*OPTIMIZERS, "optax.NAME"])
    if config.optim.schedule not in [*SCHEDULES, "one_cycle"]:
        raise unknown("schedule", config.optim.schedule, [*SCHEDULES, "one_cycle"])
    ranges = ranges | {
        "data.fraction": 0 < config.data.fraction <= 1,
        "epochs": config.epochs > 0,
        "steps": config.steps is None or config.steps > 0,
        "batch": config.batch >= 1,
        "eval_batch": config.eval_batch >= 1,
        "eval_every": config.eval_every > 0,
        "save_steps": config.save_steps is None or config.save_steps > 0,
        "keep_last": config.keep_last >= 1,
        "log_every": config.log_every >= 1,
        "width": config.width is None or config.width >= 1,
        "widths": all(width >= 1 for width in config.widths),
        "optim.lr": config.optim.lr >= 0,
        "optim.momentum": 0 <= config.optim.momentum < 1,
        "optim.weight_decay": config.optim.weight_decay >= 0,
        "optim.warmup_epochs": config.optim.warmup_epochs >= 0,
        "optim.clip_norm": config.optim.clip_norm is None or config.optim.clip_norm > 0,
        "optim.trust_coefficient": config.optim.trust_coefficient > 0,
    }
    values = flat(config)
    for name, fits in ranges.items():
        if not fits:
            raise UsageError(f"--{name.replace('_', '-')} {values[name]} is out of range")
    if config.optim.name != "lars" and config.optim.trust_coefficient != OptimConfig().trust_coefficient:
        raise UsageError(f"--optim.trust-coefficient applies only to lars (got {config.optim.name})")
    if not config.sync_bn and config.mode == "jit":
        raise UsageError("jit's statistics are those of the whole batch: --no-sync-bn needs --mode shard_map or pmap")
    if config.distributed not in (None, "auto") and not re.fullmatch(r".+:\d+,\d+,\d+", config.distributed):
        raise UsageError(f"--distributed {config.distributed} is neither auto nor COORDINATOR:PORT,COUNT,INDEX")
    check_xla(config.xla, config.mode)


def check(config: TrainConfig) -> None:
    """Refuse in one line what cannot work, before anything is loaded.

    Raises:
      UsageError: a name in no table, or a number out of its range.
    """
    if config.loss not in LOSSES:
        raise unknown("loss", config.loss, LOSSES)
    ranges = {
        "drop_path": 0 <= config.drop_path < 1,
        "label_smoothing": 0 <= config.label_smoothing < 1,
        "ema": config.ema is None or 0 <= config.ema < 1,
        "accumulate": config.accumulate >= 1,
        "keep_best": config.keep_best >= 0,
        "augment.crop_padding": config.augment.crop_padding >= 0,
        "augment.min_scale": 0 < config.augment.min_scale <= 1,
        "augment.rand_augment": 0 <= config.augment.rand_augment <= 30,
        "augment.color_jitter": 0 <= config.augment.color_jitter <= 1,
        "augment.erasing": 0 <= config.augment.erasing <= 1,
        "augment.mixup": config.augment.mixup >= 0,
        "augment.cutmix": config.augment.cutmix >= 0,
    }
    check_run(config, ranges)
    if config.freeze and config.init is None:
        raise UsageError("--freeze trains a head on a given backbone: name it with --init")
    if config.dense and config.init is None:
        raise UsageError("--dense frees the pruned weights of a sparse run: name it with --init")
    if config.select == "best" and config.keep_best == 0:
        raise UsageError("--select best needs --keep-best 1 or more")
