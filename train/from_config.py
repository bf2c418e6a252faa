"""Build the pieces of a run from a config: for entry points, and for scripts that want a preset's pieces."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from resnet_jax import augment as aug
from resnet_jax import auto_augment, onednn
from resnet_jax.losses import LOSSES
from resnet_jax.masks import no_masks
from resnet_jax.mix import mix
from resnet_jax.parallel import Mode
from resnet_jax.resnet import MODELS, ResNet
from resnet_jax.tree import Predicate, PyTree, abbreviate
from train.config import AugmentConfig, ImageConfig, OptimConfig, RunConfig, TrainConfig
from train.data.sets import Dataset, fits_in_memory, in_memory, load
from train.data.sources import Arrays
from train.errors import UsageError, unknown
from train.optim import Schedule, make_optimizer, make_schedule
from train.runtime import decoded_folder, run_once, say
from train.state import TrainState, init_state, init_variables
from train.steps import Objective, classify
from train.weights import classes_of, load_masks, load_weights

Run = TypeVar("Run", bound=RunConfig)

STEPS_PER_CALL = 8  # enough that the time between two calls is short even for the smallest networks

# Of the fields of `ResNet`: a kernel only replaces one of these, never a layer of the user's own.
DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(ResNet)}


def open_data(config: RunConfig) -> Dataset:
    """Open the config's `Dataset`, images encoded as stored; `read_data` decodes what fits in memory."""
    fields = dataclasses.asdict(config.data)
    return load(fields.pop("name"), **fields, memory_limit=0, cache=decoded_folder(config.cache))


def read_data(config: RunConfig, dataset: Dataset) -> Dataset:
    """Read an opened `Dataset` into memory, if it is small enough."""
    skip = config.data.broken == "skip"
    return in_memory(dataset, skip_broken=skip, cache=decoded_folder(config.cache))


def load_data(config: RunConfig) -> Dataset:
    """Load the config's `Dataset`, into memory if it is small enough."""
    return read_data(config, open_data(config))


def with_statistics(config: Run, dataset: Dataset) -> Run:
    """Fill in missing channel means and deviations: measured on a training split in memory, else ImageNet's."""
    channels = dataset.image_shape[-1]
    given = config.augment.mean, config.augment.std
    if given == (None, None):
        if not isinstance(dataset.train, Arrays):
            given = aug.IMAGENET_MEAN, aug.IMAGENET_STD
        else:
            pixels = dataset.train.images.reshape(-1, channels)
            # A fixed stride of pixels is enough, and deterministic.
            sample = pixels[:: max(len(pixels) // 4_000_000, 1)].astype(np.float64) / 255
            given = tuple(sample.mean(0).round(4).tolist()), tuple(sample.std(0).clip(1e-3).round(4).tolist())
    if None in given or any(len(values or ()) != channels for values in given):
        raise UsageError(f"--augment.mean and --augment.std need {channels} values each for images of {dataset.name}")
    return dataclasses.replace(config, augment=dataclasses.replace(config.augment, mean=given[0], std=given[1]))


def open_measured(config: Run) -> tuple[Run, Dataset]:
    """Open (the config with channel statistics filled in, its `Dataset`); read images only if compilation needs them.

    It does when statistics must be measured, or when the number of readable images is not known yet.
    """
    dataset = open_data(config)
    if None in (config.augment.mean, config.augment.std) or config.data.broken == "skip":
        dataset = read_data(config, dataset)
    return with_statistics(config, dataset), dataset


def train_augment(config: AugmentConfig) -> aug.Augment:
    """Build the training augmentation, from uint8 scaled to [0, 1] to normalised images."""
    scale, strength = (config.min_scale, 1.0), config.color_jitter
    parts = [
        config.resized_crop and aug.random_resized_crop(config.resized_crop, scale=scale),
        config.crop_padding and aug.random_crop(config.crop_padding, mode=config.crop_mode),
        config.flip and aug.random_flip(),
        config.rand_augment and auto_augment.rand_augment(magnitude=config.rand_augment),
        config.trivial_augment and auto_augment.trivial_augment(),
        strength and aug.color_jitter(strength, strength, strength, strength / 4),
        _normalize(config),
        # Cutout comes after normalisation, so that its fill of 0 is the mean.
        config.cutout and aug.cutout(config.cutout),
        config.erasing and aug.random_erasing(p=config.erasing),
    ]
    return aug.compose(*(part for part in parts if callable(part)))


def eval_augment(config: ImageConfig) -> aug.Augment:
    """Build the preprocessing for evaluation and prediction: centre crop if training crops, then normalise."""
    crop = [aug.center_crop(config.resized_crop)] if config.resized_crop else []
    return aug.compose(*crop, _normalize(config))


def _normalize(config: ImageConfig) -> aug.Augment:
    assert config.mean is not None and config.std is not None, "with_statistics fills them in"
    return aug.normalize(config.mean, config.std)


def make_model(
    config: RunConfig,
    num_classes: int | None,
    axis_name: str | None = None,
    kernels: dict[str, Any] | None = None,
    *,
    drop_path: float = 0.0,
) -> nn.Module:
    """Build the config's model for the axis that its steps are compiled with; for `kernels` see `make_kernels`.

    `drop_path` only matters in training.

    Raises:
      UsageError: an unknown model, as in the config of a run by a newer version.
    """
    if config.model not in MODELS:
        raise unknown("model", config.model, MODELS)
    sizes = {"width": config.width, "widths": config.widths}
    model = MODELS[config.model](
        num_classes=num_classes,
        drop_path=drop_path,
        zero_init=config.zero_init,
        dtype=compute_dtype(config.dtype),
        axis_name=axis_name,
        sync_bn=config.sync_bn,
        **{name: size for name, size in sizes.items() if size},
    )
    return with_kernels(model, kernels or {})


def with_kernels(model: ResNet, kernels: dict[str, Any]) -> ResNet:
    """Set the compute kernels of a model, except where it has layers of its own, such as group norm."""
    return model.clone(**{name: kernel for name, kernel in kernels.items() if getattr(model, name) is DEFAULTS[name]})


def make_kernels(name: str, mode: Mode = "jit", dtype: Any = jnp.float32) -> tuple[dict[str, Any], str]:
    """Choose the kernels of a model's convolutions, norms and max-pool: (fields of the model, remark).

    `plain` is XLA, which supports every transformation; `onednn` is faster on x86 CPUs; `auto` is oneDNN where it can
    be used. The remark says why it cannot, or is empty. Variables are the same for both.

    Raises:
      UsageError: `onednn` where it cannot be used.
    """
    backend, reason = jax.default_backend(), ""
    if name == "plain" or (name == "auto" and backend != "cpu"):
        return {}, ""
    if backend != "cpu":
        reason = f"oneDNN runs only on CPU (got {backend})"
    elif mode == "jit" and jax.device_count() > 1:
        reason = f"under jit XLA cannot split oneDNN's work over {jax.device_count()} devices: use mode shard_map"
    else:
        try:
            onednn.check(dtype)
        except onednn.Unavailable as error:
            reason = str(error)
    if reason and name == "onednn":
        raise UsageError(f"--kernels onednn: {reason}")
    fields = {"conv": onednn.Conv, "norm": onednn.BatchNorm, "max_pool": onednn.max_pool}
    return ({}, reason) if reason else (fields, "")


def steps_per_call(config: RunConfig, dataset: Dataset, kernels: dict[str, Any]) -> int:
    """Choose how many steps one call computes at most; see `train.chunks`. `kernels` are those of `make_kernels`.

    Raises:
      UsageError: the config asks for several, and the training images are decoded while training.
    """
    fits = fits_in_memory(dataset)
    if config.steps_per_call is None:
        # XLA computes the gradients of convolutions many times slower in a loop on CPU (jax-ml/jax issue 12868).
        slow = jax.default_backend() == "cpu" and not kernels
        return 1 if slow or not fits or config.mode == "pmap" else STEPS_PER_CALL
    if config.steps_per_call > 1 and not fits:
        raise UsageError(f"--steps-per-call {config.steps_per_call}: the images of {dataset.name} are not in memory")
    return config.steps_per_call


def compute_dtype(name: str) -> Any:
    """Resolve a dtype's name: `auto` is float32 on CPU, else bfloat16; parameters and losses are always float32."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name).type


def make_tx(
    optim: OptimConfig, steps: int, epoch_steps: float, *, trainable: Predicate | None = None
) -> tuple[optax.GradientTransformation, Schedule]:
    """Build the config's (optimizer, schedule) over `steps`; for `trainable` see `train.optim.make_optimizer`.

    Raises:
      UsageError: more steps than the state counts.
    """
    if steps >= 2**31:
        raise UsageError(f"the run would have {steps:,} steps, and can count at most {2**31 - 1:,}: lower --epochs")
    warmup = round(optim.warmup_epochs * epoch_steps)
    if warmup >= steps > 1:
        say(f"note: the warm-up of {warmup} steps is cut to {steps - 1}, because the run has only {steps}")
    warmup = min(warmup, steps - 1)
    options = {"milestones": optim.milestones, "factor": optim.factor} if optim.schedule == "step" else {}
    schedule = make_schedule(optim.schedule, peak=optim.lr, steps=steps, warmup=warmup, **options)
    own: dict[str, Any] = {"trust_coefficient": optim.trust_coefficient} if optim.name == "lars" else {}
    tx = make_optimizer(
        optim.name,
        schedule,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        weight_decay=optim.weight_decay,
        clip_norm=optim.clip_norm,
        trainable=trainable,
        **own,
    )
    return tx, schedule


def network_shape(config: Any, image_shape: Sequence[int]) -> tuple[int, int, int]:
    """Shape of the network's inputs, for images (H, W, C) that are augmented as a config says."""
    crop, (height, width, channels) = getattr(config.augment, "resized_crop", None), image_shape
    return crop or height, crop or width, channels


def draw_variables(
    config: RunConfig, model: nn.Module, key: jax.Array, image_shape: Sequence[int]
) -> dict[str, PyTree]:
    """Draw a model's random variables for images (H, W, C), see `train.state.init_variables`.

    Raises:
      UsageError: a model that is too narrow, or `widths` that do not fit it.
    """
    widths = f"--widths {' '.join(map(str, config.widths))}"
    narrow = f"{config.model} is too narrow with {f'--width {config.width}' if config.width else widths}"
    too_narrow = UsageError(f"{narrow}: a layer would have no channels")
    try:
        shape = network_shape(config, image_shape)
        variables = run_once(partial(init_variables, model, image_shape=shape), key)
    except ZeroDivisionError:  # an initializer's scale for a layer without channels, on some versions of JAX
        raise too_narrow from None
    except ValueError as error:
        if not config.widths:
            raise
        raise UsageError(f"{widths}: {error}") from None
    if any(leaf.size == 0 for leaf in jax.tree.leaves(variables)):
        raise too_narrow
    return variables


def make_state(
    config: TrainConfig,
    model: nn.Module,
    tx: optax.GradientTransformation,
    image_shape: Sequence[int],
    source: str | Path | None = None,
    masks: Callable[[PyTree, PyTree | None], PyTree | None] = lambda params, given: given,
    classes: Sequence[str] = (),
) -> TrainState:
    """Make the state at step 0: random, or from `source`, whose pruned weights stay pruned unless `dense` is set.

    If `source` is a run with other classes than `classes`, the head stays random.

    `masks(params, given)` makes the masks of the parameters; `given` are those of `source`, if it is pruned.

    Raises:
      UsageError: a model that is too narrow, or weights or masks that cannot be read or do not fit it.
    """
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    variables, given = draw_variables(config, model, init_key, image_shape), None
    if source is not None:
        loaded = load_weights(source, variables)
        given = None if config.dense else load_masks(source, variables["params"])
        theirs = classes_of(source)
        if "head" in variables["params"] and classes and theirs and theirs != list(classes):
            say(f"{source} has other classes ({abbreviate(theirs)}): the head starts from random weights")
            loaded["params"] = {**loaded["params"], "head": variables["params"]["head"]}
            given = given and {**given, "head": no_masks(given["head"])}
        variables = loaded
    masks_at_start = masks(variables["params"], given)
    return init_state(variables, tx, run_key, masks=masks_at_start, ema=config.ema is not None)


def make_objective(config: TrainConfig, classes: int) -> Objective:
    """Build the config's classification objective."""
    mixing = config.augment.mixup or config.augment.cutmix
    return classify(
        loss=LOSSES[config.loss],
        label_smoothing=config.label_smoothing,
        mix=partial(mix, mixup_alpha=config.augment.mixup, cutmix_alpha=config.augment.cutmix) if mixing else None,
        classes=classes,
        frozen_stats=config.freeze,
    )
