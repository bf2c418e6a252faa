"""The tasks: each describes one step, the state and batch that it is called with, and its parts."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import optax

from resnet_jax import augment as aug
from resnet_jax.mask_schedules import gradual
from resnet_jax.masks import apply_masks, make_masks
from resnet_jax.parallel import axis_of
from resnet_jax.resnet import MODELS
from resnet_jax.scores import magnitude
from resnet_jax.tree import PyTree, count
from train import from_config
from train.bench import work
from train.bench.config import BenchConfig
from train.config import AugmentConfig
from train.data.batches import batch_like
from train.optim import make_optimizer, make_schedule
from train.runtime import run_once
from train.state import TrainState, init_state, init_variables
from train.steps import augmented_images, eval_step, train_step

Step = Callable[..., Any]  # (state, batch, *, axis_name)
Parts = dict[str, Step | None]

LARGE = 64  # pixels: larger images get ImageNet's augmentation
UPDATE_EVERY = 100  # steps between new masks, in gradual pruning


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A step and the arguments that it is called with.

    Attributes:
      step: `step(state, batch, *, axis_name)`; returns (new state, metrics) where `carried`.
      state: its first argument, not yet laid out over devices.
      batch: shapes of its second argument, for the whole mesh.
      flops: operations for one image, by convention; see `work`.
      parameters: of the model.
      carried: the state is donated, and the new one goes into the next call.
      rows: the results have the batch's rows, and stay on their devices.
      parts: growing parts of the step by the name of what each adds, none of them `carried`. The first prepares the
        images and returns rows; the last, None, is the whole step.
      variants: other steps to time next to this one, by name.
    """

    step: Step
    state: PyTree
    batch: dict[str, jax.ShapeDtypeStruct]
    flops: float
    parameters: int
    carried: bool = False
    rows: bool = False
    parts: Parts
    variants: dict[str, "Workload"] = field(default_factory=dict)


# --- what tasks are made of -------------------------------------------------------------------------------------------


def kernels(config: BenchConfig) -> tuple[str, dict[str, Any], str]:
    """(`plain` or `onednn`, the model's fields for it, why `auto` did not choose oneDNN where it would have)."""
    fields, remark = from_config.make_kernels(config.kernels, config.mode, from_config.compute_dtype(config.dtype))
    return "onednn" if fields else "plain", fields, remark


def make_model(config: BenchConfig) -> nn.Module:
    """The config's classifier, for steps compiled in its mode."""
    dtype, axis_name = from_config.compute_dtype(config.dtype), axis_of(config.mode)
    model = MODELS[config.model](num_classes=config.classes, dtype=dtype, axis_name=axis_name)
    return from_config.with_kernels(model, kernels(config)[1])


def image_shape(config: BenchConfig) -> tuple[int, int, int]:
    """(H, W, C) of the config's images."""
    return config.image_size, config.image_size, 3


def forward_work(config: BenchConfig) -> work.Work:
    """The work of classifying one image."""
    # Counted on the plain kernels: the convention does not depend on how a convolution is computed.
    return work.forward(MODELS[config.model](num_classes=config.classes), config.image_size)


def batch_of(config: BenchConfig, *names: str) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch's `image`, `label` and `valid`, whichever are named."""
    specs = batch_like(config.batch, image_shape(config), valid=True)
    return {name: specs[name] for name in names}


def train_augment(image_size: int) -> aug.Augment:
    """A recipe's augmentation: pad by 4, crop and flip; above 64 pixels a resized crop and flip; normalised."""
    crop: Any = {"resized_crop": image_size} if image_size > LARGE else {"crop_padding": 4}
    return from_config.train_augment(AugmentConfig(flip=True, mean=aug.IMAGENET_MEAN, std=aug.IMAGENET_STD, **crop))


def sgd() -> optax.GradientTransformation:
    """SGD with Nesterov momentum, weight decay and a schedule, as the recipes have it."""
    # The rate has no effect on speed, but numbers that overflow or vanish would.
    schedule = make_schedule("cosine", peak=1e-3, steps=100_000)
    return make_optimizer("sgd", schedule, nesterov=True, weight_decay=5e-4)


def training_parts(augmented: Step, step: Step) -> Parts:
    """Parts of a training step: images, then the step with fewer results; what is not returned is not computed."""

    def forward(state: TrainState, batch: Any, *, axis_name: str | None = None) -> Any:
        new, metrics = step(state, batch, axis_name=axis_name)
        return new.batch_stats, metrics["loss"]

    def backward(state: TrainState, batch: Any, *, axis_name: str | None = None) -> Any:
        new, metrics = step(state, batch, axis_name=axis_name)
        return new.batch_stats, metrics

    return {"augmentation": augmented, "forward": forward, "backward": backward, "optimizer": None}


# --- the tasks --------------------------------------------------------------------------------------------------------


def train(config: BenchConfig, *, augment: aug.Augment | None = None, prune_every: int | None = None) -> Workload:
    """`train_step` with SGD and the recipe's augmentation, or `augment`.

    `prune_every`: start with half of the weights pruned, and make new masks by gradual magnitude pruning, from 50 to
    90 % over 100,000 steps, every `prune_every` steps.
    """
    model, tx = make_model(config), sgd()
    augment = augment or train_augment(config.image_size)
    variables = run_once(partial(init_variables, model, image_shape=image_shape(config)), jax.random.key(0))
    masks, remask = None, None
    if prune_every is not None:

        def new_masks(params: PyTree, grads: PyTree, masks: PyTree, key: jax.Array, sparsity: jax.Array) -> PyTree:
            return make_masks(magnitude(params), sparsity, masks=masks)

        remask = gradual(new_masks, initial=0.5, final=0.9, begin_step=0, end_step=100_000, every=prune_every)
        masks = jax.jit(lambda params: make_masks(magnitude(params), 0.5))(variables["params"])
        variables["params"] = apply_masks(variables["params"], masks)
    step = partial(train_step, model=model, tx=tx, augment=augment, remask=remask)
    return Workload(
        step=step,
        state=init_state(variables, tx, jax.random.key(1), masks=masks),
        batch=batch_of(config, "image", "label"),
        flops=work.training(forward_work(config)),
        parameters=count(variables["params"]),
        carried=True,
        parts=training_parts(partial(augmented_images, augment=augment), step),
    )


def prune(config: BenchConfig) -> Workload:
    """The training step with gradual pruning; variants: `dense`, and new masks in `every` step."""
    variants = {"dense": train(config), "every": train(config, prune_every=1)}
    return replace(train(config, prune_every=UPDATE_EVERY), variants=variants)


def evaluate(config: BenchConfig) -> Workload:
    """`eval_step`: normalise, classify, sum the metrics."""
    model = make_model(config)
    step = partial(eval_step, model=model, preprocess=aug.normalize())
    return inference(config, model, step, batch_of(config, "image", "label", "valid"))


def predict(config: BenchConfig) -> Workload:
    """Normalise and classify: uint8 images to logits."""
    model = make_model(config)

    def logits(variables: PyTree, batch: Any, *, axis_name: str | None = None) -> Any:
        return model.apply(variables, normalized(variables, batch), train=False)

    return inference(config, model, logits, batch_of(config, "image"), rows=True)


def inference(
    config: BenchConfig, model: nn.Module, step: Step, batch: dict[str, jax.ShapeDtypeStruct], *, rows: bool = False
) -> Workload:
    """The workload of a forward pass."""
    variables = run_once(partial(init_variables, model, image_shape=image_shape(config)), jax.random.key(0))
    return Workload(
        step=step,
        state=variables,
        batch=batch,
        flops=forward_work(config).flops,
        parameters=count(variables["params"]),
        rows=rows,
        parts={"preprocessing": normalized, "forward": None},
    )


def normalized(variables: PyTree, batch: Any, *, axis_name: str | None = None) -> jax.Array:
    """The first part of a forward pass: normalised images."""
    return aug.preprocess_batch(aug.normalize(), batch["image"])


Tasks = dict[str, Callable[[BenchConfig], Workload]]

TASKS: Tasks = {"train": train, "eval": evaluate, "predict": predict, "prune": prune}
