"""What a task hands over to be measured, and what tasks are made of: model, optimizer, batch, augmentation."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from resnet_jax import augment as aug
from resnet_jax.mask_schedules import MaskSchedule, gradual
from resnet_jax.masks import apply_masks, make_masks
from resnet_jax.parallel import Mode, axis_of
from resnet_jax.resnet import MODELS
from resnet_jax.scores import magnitude
from resnet_jax.tree import PyTree, is_kernel, map_with_path
from train import from_config as build
from train import runtime
from train.bench.config import BenchConfig
from train.bench.work import Work, forward
from train.config import AugmentConfig
from train.data.batches import batch_like
from train.optim import make_optimizer, make_schedule
from train.state import TrainState, init_state, init_variables

Step = Callable[..., Any]  # (state, batch, *, axis_name)

LARGE = 64  # pixels: larger images get ImageNet's augmentation


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A step and what it is called with.

    Attributes:
      step: `step(state, batch, *, axis_name)`; returns (new state, metrics) where `carried`.
      state: its first argument, on the host's terms: not yet laid out over devices.
      batch: shapes of its second, for the whole mesh.
      work: by convention, of one image.
      parameters: of the model.
      carried: the state is donated, and the new one goes into the next call.
      rows: the results have the batch's rows, and stay on their devices.
      parts: growing parts of the step by the name of what each adds, not carried; None is the whole step.
      part_rows: which of them return rows.
      dense: for a pruned step the same one without masks.
      busy: for a pruned step the same one with new masks in every step.
    """

    step: Step
    state: PyTree
    batch: dict[str, jax.ShapeDtypeStruct]
    work: Work
    parameters: int
    carried: bool = False
    rows: bool = False
    parts: dict[str, Step | None] = field(default_factory=dict)
    part_rows: frozenset[str] = frozenset()
    dense: "Workload | None" = None
    busy: "Workload | None" = None


def kernels(config: BenchConfig) -> tuple[str, dict[str, Any], str]:
    """(`plain` or `onednn`, the arguments of `MODELS[...]` that make it so, why it is not what `auto` would like)."""
    fields, remark = build.make_kernels(config.kernels, config.mode, build.compute_dtype(config.dtype))
    return "onednn" if fields else "plain", fields, remark


def make_model(config: BenchConfig, outputs: int, mode: Mode) -> nn.Module:
    """The config's model with `outputs` logits, for steps compiled in `mode`."""
    dtype = build.compute_dtype(config.dtype)
    return MODELS[config.model](num_classes=outputs, dtype=dtype, axis_name=axis_of(mode), **kernels(config)[1])


def init_model(config: BenchConfig, model: nn.Module) -> dict[str, PyTree]:
    """Seeded variables of a model."""
    side = config.image_size
    return init_variables(model.clone(axis_name=None), jax.random.key(0), (side, side, 3))


def compiler_options(config: BenchConfig) -> dict[str, Any]:
    """XLA's options: those of the pipelines, and the config's own; pmap takes none."""
    if config.mode == "pmap":
        return {}
    plain = kernels(config)[0] == "plain"
    needed = runtime.compiler_options(build.compute_dtype(config.dtype), plain=plain)
    return {**needed, **runtime.xla_options(config.xla)}


def make_batch(specs: dict[str, jax.ShapeDtypeStruct], classes: int) -> dict[str, np.ndarray]:
    """Seeded noise in a batch's shapes: uint8 images, labels below `classes`, all rows valid."""
    rng = np.random.default_rng(0)
    draw: dict[str, Callable[[tuple[int, ...]], np.ndarray]] = {
        "image": lambda shape: rng.integers(0, 256, shape, np.uint8),
        "label": lambda shape: rng.integers(0, classes, shape, np.int32),
        "valid": lambda shape: np.ones(shape, bool),
    }
    return {name: draw[name](spec.shape) for name, spec in specs.items()}


def train_augment(image_size: int) -> aug.Augment:
    """A recipe's augmentation: pad by 4, crop and flip; above 64 pixels a resized crop and flip; normalised."""
    crop: Any = {"resized_crop": image_size} if image_size > LARGE else {"crop_padding": 4}
    return build.train_augment(AugmentConfig(flip=True, mean=aug.IMAGENET_MEAN, std=aug.IMAGENET_STD, **crop))


def simclr_view(image_size: int) -> aug.Augment:
    """One view of SimCLR, https://arxiv.org/abs/2002.05709 (colour strength 0.5; blurred only above 64 pixels)."""
    blur = [aug.randomly(aug.gaussian_blur())] if image_size > LARGE else []
    return aug.compose(
        aug.random_resized_crop(image_size),
        aug.random_flip(),
        aug.randomly(aug.color_jitter(0.4, 0.4, 0.4, 0.1), 0.8),
        aug.grayscale(0.2),
        *blur,
        aug.normalize(),
    )


def half_masks(params: PyTree) -> PyTree:
    """Masks that prune the smaller half of each kernel."""

    def mask(path: str, leaf: jax.Array) -> jax.Array:
        if not is_kernel(path, leaf):
            return jnp.ones((), bool)
        size = np.abs(np.asarray(leaf))
        return jnp.asarray(size > np.median(size))

    return map_with_path(mask, params)


def batch_of(config: BenchConfig, *names: str) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch's `image`, `label` and `valid`, whichever are named."""
    side = config.image_size
    specs = batch_like(config.batch, (side, side, 3), valid=True)
    return {name: specs[name] for name in names}


def gradual_pruning(every: int) -> MaskSchedule:
    """Magnitude pruning from 50 to 90 % over 100,000 steps, with new masks every so many."""

    def make(params: PyTree, grads: PyTree, masks: PyTree, key: jax.Array, sparsity: jax.Array) -> PyTree:
        return make_masks(magnitude(params), sparsity, masks=masks)

    return gradual(make, initial=0.5, final=0.9, begin_step=0, end_step=100_000, every=every)


def train_state(config: BenchConfig, model: nn.Module, tx: optax.GradientTransformation, *, masked: bool) -> TrainState:
    """The state of training at step 0; `masked`: half of each kernel pruned."""
    variables = init_model(config, model)
    masks = half_masks(variables["params"]) if masked else None
    if masked:
        variables["params"] = apply_masks(variables["params"], masks)
    return init_state(variables, tx, jax.random.key(1), masks=masks)


def sgd() -> optax.GradientTransformation:
    """SGD with Nesterov momentum, weight decay and a schedule, as the recipes have it."""
    # What the rate is has no effect on speed, but numbers that overflow or vanish would.
    schedule = make_schedule("cosine", peak=1e-3, steps=100_000)
    return make_optimizer("sgd", schedule, nesterov=True, weight_decay=5e-4)


def forward_work(config: BenchConfig, outputs: int) -> Work:
    """The work of classifying one image by the config's model with `outputs` logits."""
    # Counted on the plain kernels: the convention does not depend on how a convolution is computed.
    return forward(MODELS[config.model](num_classes=outputs), config.image_size)
