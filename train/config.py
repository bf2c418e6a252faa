"""Run configuration: frozen dataclasses, one flag per field (`--optim.lr 0.1`). Only entry points import it."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from resnet_jax.losses import LOSSES
from resnet_jax.parallel import Mode
from resnet_jax.resnet import MODELS
from train.errors import UsageError, unknown
from train.optim import OPTIMIZERS, make_optimizer, make_schedule
from train.paths import FOLDERS
from train.ranges import check_ranges
from train.tracing import traced_steps
from train.trackers import check_trackers


@dataclass(frozen=True, kw_only=True)
class SetConfig:
    """A set of images and how it is split, for any pipeline."""

    name: str
    """The set."""
    dir: str | None = None
    """The TFDS data_dir that prepared sets are in."""
    validation: float = 0.1
    """Fraction of the training split held back where the set has no validation split."""
    split_seed: int = 0
    """Seed of that split, independent of the run's `seed`."""
    fraction: float = 1.0
    """Fraction of the training split to use, in (0, 1], sampled per class with `split_seed`."""
    broken: Literal["refuse", "skip"] = "refuse"
    """Refuse a set with images that cannot be decoded, or skip those images (listed in the run's skipped.txt)."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(SetConfig):
    """The image set and how it is split; see `train.data.sets.load`."""

    name: str = "digits"
    """`digits`, `synthetic`, `folder:DIR`, or a prepared TFDS set."""
    image_size: int | None = None
    """Side in pixels of the square that images are resized and cropped to when they are decoded."""
    random_crop: bool = False
    """Crop a different random box from the full image in every epoch while decoding; for large photographs."""


@dataclass(frozen=True, kw_only=True)
class NormalizeConfig:
    """Normalisation of every image, in training and in evaluation."""

    mean: tuple[float, ...] | None = None
    """Channel means to subtract, in [0, 1]; None measures them on the training split."""
    std: tuple[float, ...] | None = None
    """Channel standard deviations to divide by; None measures them on the training split."""


@dataclass(frozen=True, kw_only=True)
class ImageConfig(NormalizeConfig):
    """Preprocessing of every image, in training and in evaluation."""

    resized_crop: int | None = None
    """Side in pixels of a random resized crop; evaluation crops the centre to the same side."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(ImageConfig):
    """Augmentation of training images on the device: crops, flips, colours, normalisation, erasing, mixing.

    0 or None disables a part.
    """

    crop_padding: int = 0
    """Pixels of padding on each side before a random crop back to the image's size."""
    crop_mode: Literal["constant", "reflect"] = "constant"
    """Fill the padding with zeros (`constant`) or with reflected pixels."""
    min_scale: float = 0.08
    """Smallest fraction of the image's area that a resized crop covers."""
    flip: bool = False
    """Flip each image horizontally with probability 0.5."""
    rand_augment: int = 0
    """RandAugment with two operations of this magnitude, 1 to 30."""
    trivial_augment: bool = False
    """TrivialAugmentWide: one random operation of random strength."""
    color_jitter: float = 0.0
    """Strength of brightness, contrast and saturation changes, 0 to 1; hue changes by a quarter of it."""
    cutout: int = 0
    """Side in pixels of a random square that is set to the mean."""
    erasing: float = 0.0
    """Probability of random erasing."""
    mixup: float = 0.0
    """Alpha of mixup; if cutmix is enabled too, each batch uses one of the two."""
    cutmix: float = 0.0
    """Alpha of cutmix."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and schedule; see `train.optim`."""

    name: str = "sgd"
    """`sgd`, `adamw`, `lars`, `lamb`, or `optax.NAME`, which keeps its own momentum."""
    lr: float = 0.1
    """Peak learning rate."""
    momentum: float = 0.9
    """Momentum of sgd and lars, and the first beta of adamw and lamb."""
    nesterov: bool = False
    """Nesterov's variant of the momentum of sgd, lars and adamw."""
    weight_decay: float = 0.0
    """Applies only to kernels, never to norms or biases."""
    schedule: str = "cosine"
    """`cosine`, `linear`, `step`, `one_cycle` or `constant`."""
    warmup_epochs: float = 0.0
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Fractions (not epochs) of all steps at which `step` multiplies the rate by `factor`."""
    factor: float = 0.1
    clip_norm: float | None = None
    """Clip the gradient to this global norm; None does not clip."""
    trust_coefficient: float = 0.001
    """Only for LARS: norm of a layer's step relative to that of its weights, before the learning rate applies."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Fields shared by the runs of all pipelines.

    Attributes:
      metric: the validation figure that tells which checkpoints are the best: the higher, the better.
    """

    metric: ClassVar[str] = "validation_accuracy"

    out: str | None = None
    """Run folder; passing the same one again resumes the run. Default: runs/PRESET-seedN."""
    model: str = "resnet8"
    """A name in `resnet_jax.MODELS`."""
    width: int | None = None
    """Channels of the first stage; None uses the model's default."""
    widths: tuple[int, ...] = ()
    """Output channels of each convolution (stem, then block by block), for networks with pruned channels."""
    zero_init: bool = False
    """Initialise residual branches to zero."""
    data: SetConfig = field(default_factory=DataConfig)
    augment: NormalizeConfig = field(default_factory=ImageConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    epochs: float = 30
    steps: int | None = None
    """Number of updates, instead of epochs."""
    batch: int = 128
    """Global batch size."""
    eval_batch: int = 500
    """Largest batch of evaluations; smaller splits are not padded to it."""
    seed: int = 0
    mode: Mode = "jit"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of convolutions and activations; auto is bfloat16 on GPU and TPU, float32 on CPU."""
    kernels: Literal["auto", "plain", "onednn"] = "auto"
    """Compute kernels of the model: XLA (plain), or oneDNN on CPU; auto is oneDNN where it can be used."""
    xla: tuple[str, ...] = ()
    """XLA compiler options for the train step, each as NAME=VALUE (not in mode pmap)."""
    steps_per_call: int | None = None
    """Most steps in one compiled call, for images in memory (not in mode pmap). By default 8, but 1 for XLA's
    convolutions on CPU, which are slow in loops. A run keeps its number: others round differently."""
    cache: str = "auto"
    """Folder to keep compiled programs and decoded sets in; auto is ~/.cache/resnet-jax, `none` keeps nothing."""
    sync_bn: bool = True
    """Compute batch statistics over all devices; False (not in mode jit) computes them per device."""
    distributed: str | None = None
    """Join the other hosts first: `auto` on SLURM, Kubernetes and TPU pods, elsewhere COORDINATOR:PORT,COUNT,INDEX."""
    eval_every: float = 1.0
    """Epochs between evaluations on the validation split; each also saves a checkpoint."""
    save_steps: int | None = None
    """Steps between additional checkpoints; None saves no additional ones."""
    keep_last: int = 2
    """Number of newest checkpoints to keep."""
    log_every: int = 50
    """Steps between rows of metrics.jsonl."""
    log: tuple[str, ...] = ()
    """Trackers to write to, in addition to metrics.jsonl: `tensorboard`, `wandb` (offline), `mlflow` (local)."""
    profile: str | None = None
    """FROM:TO, the steps of the run (from 1) whose profiler trace is written to `profile/` in the run folder."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """A supervised run."""

    data: DataConfig = field(default_factory=DataConfig)
    drop_path: float = 0.0
    """Stochastic depth: drop probability of the last block."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    accumulate: int = 1
    """Gradient accumulation: number of parts that each device splits its share of a batch into."""
    loss: str = "softmax"
    """`softmax` or `sigmoid` (binary cross entropy)."""
    label_smoothing: float = 0.0
    ema: float | None = None
    """Decay of a moving average of the parameters; if set, the average is evaluated and used in their place."""
    init: str | None = None
    """Start from a run folder, PyTorch weights (.pth, .safetensors), a model that comes with this project
    (cifar10_resnet20) or one on the Hugging Face hub (hf:timm/resnet50.a1_in1k); a head of a different size is
    reinitialised."""
    freeze: bool = False
    """Train only the head."""
    dense: bool = False
    """Let the pruned weights of a sparse `--init` grow back; otherwise they stay pruned."""
    select: Literal["last", "best"] = "last"
    """Parameters to evaluate on the test split: the last, or the best on validation."""
    keep_best: int = 1
    """Number of checkpoints to keep with the best validation accuracy."""


def pipeline(kind: type) -> str:
    """The program that a kind of config belongs to: `train` (with pruning), `pretrain`, `train.detect`."""
    return "train" if issubclass(kind, TrainConfig) else kind.__module__.rpartition(".")[0]


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a config, or a dict of its fields, to {flag's name: value}, nested fields as `optim.lr`."""
    fields: dict[str, Any] = {}
    for name, value in (config if isinstance(config, dict) else vars(config)).items():
        nested = isinstance(value, dict) or dataclasses.is_dataclass(value)
        fields |= flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return fields


def from_dict(kind: type, values: dict[str, Any]) -> Any:
    """Rebuild a config of this kind from `dataclasses.asdict` after a JSON round trip; unknown names are ignored."""
    fields = {f.name: f for f in dataclasses.fields(kind)}

    def value(name: str, v: Any) -> Any:
        nested: Any = fields[name].default_factory
        if nested is not dataclasses.MISSING:
            return from_dict(nested, v)
        return tuple(v) if isinstance(v, list) else v

    return kind(**{name: value(name, v) for name, v in values.items() if name in fields})


def check_xla(options: tuple[str, ...], mode: Mode) -> None:
    """Check that compiler options have the form NAME=VALUE, and that the mode supports them.

    Raises:
      UsageError: an option is malformed, or the mode does not support options.
    """
    if mode == "pmap" and options:
        raise UsageError("pmap takes no compiler options: --xla needs --mode jit or shard_map")
    for option in options:
        if not all(option.partition("=")):
            raise UsageError(f"--xla {option!r} is not of the form NAME=VALUE")


def check_images(config: TrainConfig, shape: tuple[int, int, int]) -> None:
    """Check a config against the shape (H, W, C) of a set's images.

    Raises:
      UsageError: a crop larger than the images.
    """
    crop = config.augment.resized_crop
    if crop and crop > min(shape[:2]):
        raise UsageError(f"--augment.resized-crop {crop} is larger than the images, {shape[0]}x{shape[1]}")


SEEDS = "[0, 4294967296)"  # 32 bits reach the random keys
# Ranges of the numbers of a run; see `check_ranges`.
RANGES = {
    "(0, inf)": "optim.clip_norm optim.trust_coefficient",
    "(0, 1000000000]": "epochs eval_every",
    "[0, 1000000000]": "optim.warmup_epochs",
    "[0, inf)": "optim.lr optim.weight_decay keep_best augment.mixup augment.cutmix",
    "[1, inf)": "steps batch steps_per_call eval_batch save_steps keep_last log_every accumulate",
    "[1, 65536]": "width widths data.image_size",
    "[0, 65536]": "augment.resized_crop augment.crop_padding augment.cutout",
    "[0, 1)": "optim.momentum drop_path label_smoothing ema",
    "[0, 1]": "augment.color_jitter augment.erasing",
    "[0, 1] for pixels scaled to [0, 1]": "augment.mean",
    "(0, 1] for pixels scaled to [0, 1]": "augment.std",
    "(0, 1)": "data.validation",
    "(0, 1) (fractions of all steps)": "optim.milestones",
    "(0, 1]": "data.fraction augment.min_scale optim.factor",
    "[0, 30]": "augment.rand_augment",
    SEEDS: "seed data.split_seed",
}


def check_run(config: RunConfig, *ranges: Mapping[str, str]) -> None:
    """Check the numbers of `RANGES` and of a pipeline's additional tables, and the names of a config.

    Raises:
      UsageError: an unknown name, or a number out of range.
    """
    if config.model not in MODELS:
        raise unknown("model", config.model, MODELS)
    for table in (RANGES, *ranges):
        check_ranges(flat(config), table)
    check_optim(config.optim)
    if not config.sync_bn and config.mode == "jit":
        raise UsageError(
            "--no-sync-bn needs --mode shard_map or pmap: jit computes batch statistics over the whole batch"
        )
    if config.distributed not in (None, "auto") and not re.fullmatch(r".+:\d+,\d+,\d+", config.distributed):
        raise UsageError(f"--distributed {config.distributed} is neither auto nor COORDINATOR:PORT,COUNT,INDEX")
    if config.distributed not in (None, "auto"):
        count, index = map(int, config.distributed.split(",")[-2:])
        if index >= count:
            raise UsageError(f"--distributed {config.distributed}: INDEX counts the hosts from 0 to COUNT - 1")
    check_xla(config.xla, config.mode)
    check_trackers(config.log)
    traced_steps(config.profile)
    if config.mode == "pmap" and (config.steps_per_call or 1) > 1:
        raise UsageError("--steps-per-call needs --mode jit or shard_map: pmap compiles single steps")


def check_optim(optim: OptimConfig) -> None:
    """Check the names of the optimizer and the schedule, and that the optimizer fits the train step.

    Raises:
      UsageError: an unknown name, or an optimizer that needs more than gradients and parameters.
    """
    make_optimizer(optim.name, make_schedule(optim.schedule, peak=optim.lr, steps=1), weight_decay=optim.weight_decay)


def check(config: TrainConfig, *ranges: Mapping[str, str]) -> None:
    """Refuse a config that cannot work, before anything is loaded; `ranges`: see `check_run`.

    Raises:
      UsageError: an unknown name, or a number out of range.
    """
    if config.loss not in LOSSES:
        raise unknown("loss", config.loss, LOSSES)
    check_run(config, *ranges)
    if config.init is None and config.freeze:
        raise UsageError("--freeze trains only the head and needs a pretrained backbone: pass --init")
    if config.init is None and config.dense:
        raise UsageError("--dense frees the pruned weights of a sparse run: pass that run with --init")
    if config.select == "best" and config.keep_best == 0:
        raise UsageError("--select best needs --keep-best 1 or more")


def unused(config: RunConfig) -> dict[str, str]:
    """Fields that other settings leave without effect, each with the reason: {"optim.factor": "with ..."}."""
    optim, augment = config.optim, config.augment
    optimizer, schedule = f"with --optim.name {optim.name}", f"with --optim.schedule {optim.schedule}"
    generated = config.data.name == "synthetic" or config.data.name.startswith(FOLDERS)
    reasons = {
        "epochs": config.steps is not None and "with --steps",
        "optim.momentum": optim.name not in OPTIMIZERS and optimizer,
        "optim.nesterov": optim.name not in ("sgd", "adamw", "lars") and optimizer,
        "optim.trust_coefficient": optim.name != "lars" and f"{optimizer}: it applies only to lars",
        "optim.milestones": optim.schedule != "step" and schedule,
        "optim.factor": optim.schedule != "step" and schedule,
        "data.dir": generated and f"with --data.name {config.data.name}: it is for prepared sets",
    }
    if isinstance(augment, AugmentConfig):
        reasons["augment.crop_mode"] = not augment.crop_padding and "without --augment.crop-padding"
        reasons["augment.min_scale"] = not augment.resized_crop and "without --augment.resized-crop"
    if isinstance(config, TrainConfig):
        reasons["drop_path"] = config.freeze and "with --freeze"
        reasons["zero_init"] = config.init is not None and "with --init, which sets all weights but the head's"
    return {name: reason for name, reason in reasons.items() if reason}


def check_changes(config: Any, default: Any, reasons: Callable[[Any], Mapping[str, str]] = unused) -> None:
    """Refuse fields that differ from the preset's, `default`, and are `unused`.

    Raises:
      UsageError: there is such a field; the message names it, with the reason.
    """
    changed, usual = flat(config), flat(default)
    for name, reason in reasons(config).items():
        if changed[name] != usual[name]:
            raise UsageError(f"--{name.replace('_', '-')} has no effect {reason}")
