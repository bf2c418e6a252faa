"""The tasks that are one compiled step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from resnet_jax import augment as aug
from resnet_jax.contrastive import nt_xent
from resnet_jax.keys import example_index, example_keys, step_key
from resnet_jax.masks import apply_masks
from resnet_jax.parallel import mean_over, vary
from resnet_jax.tree import PyTree, count, global_norm
from train.bench import work
from train.bench.config import BenchConfig
from train.bench.workload import (
    Step,
    Workload,
    batch_of,
    forward_work,
    gradual_pruning,
    init_model,
    make_model,
    sgd,
    simclr_view,
    train_augment,
    train_state,
)
from train.state import TrainState
from train.steps import eval_step, train_step

EMBEDDING = 128  # of SimCLR's projection
UPDATE_EVERY = 100  # steps, of gradual pruning


def train(config: BenchConfig, *, augment: aug.Augment | None = None, prune_every: int | None = None) -> Workload:
    """`train_step` with SGD and the recipe's augmentation, or `augment`.

    `prune_every`: half of each kernel is pruned, and gradual magnitude pruning makes new masks every so many steps.
    """
    model, tx = make_model(config, config.classes, config.mode), sgd()
    augment = augment or train_augment(config.image_size)
    remask = None if prune_every is None else gradual_pruning(prune_every)
    step = partial(train_step, model=model, tx=tx, augment=augment, remask=remask)
    state = train_state(config, model, tx, masked=prune_every is not None)

    def augmented(state: TrainState, batch: Any, *, axis_name: str | None = None) -> jax.Array:
        key = jax.random.split(step_key(state.key, state.step), 3)[0]
        index = example_index(len(batch["label"]), axis_name)
        return aug.augment_batch(augment, example_keys(key, index), batch["image"])

    return Workload(
        step=step,
        state=state,
        batch=batch_of(config, "image", "label"),
        work=work.training(forward_work(config, config.classes)),
        parameters=count(state.params),
        carried=True,
        parts={"augmentation": augmented, **_training_parts(step)},
        part_rows=frozenset({"augmentation"}),
    )


def _training_parts(step: Step) -> dict[str, Step | None]:
    """The step with fewer and fewer results: what is not returned is not computed."""

    def forward(state: TrainState, batch: Any, *, axis_name: str | None = None) -> Any:
        new, metrics = step(state, batch, axis_name=axis_name)
        return new.batch_stats, metrics["loss"]

    def backward(state: TrainState, batch: Any, *, axis_name: str | None = None) -> Any:
        new, metrics = step(state, batch, axis_name=axis_name)
        return new.batch_stats, metrics

    return {"forward": forward, "backward": backward, "optimizer": None}


def prune(config: BenchConfig) -> Workload:
    """The training step with gradual magnitude pruning, beside the dense one and one with new masks in every step."""
    pruned, dense, busy = train(config, prune_every=UPDATE_EVERY), train(config), train(config, prune_every=1)
    return Workload(**{**vars(pruned), "dense": dense, "busy": busy})


def evaluate(config: BenchConfig) -> Workload:
    """`eval_step`: normalise, classify, sum the metrics."""
    model = make_model(config, config.classes, config.mode)
    variables = init_model(config, model)
    return Workload(
        step=partial(eval_step, model=model, preprocess=aug.normalize()),
        state=variables,
        batch=batch_of(config, "image", "label", "valid"),
        work=forward_work(config, config.classes),
        parameters=count(variables["params"]),
        parts={"preprocessing": _preprocess, "forward": None},
        part_rows=frozenset({"preprocessing"}),
    )


def predict(config: BenchConfig) -> Workload:
    """Normalise and classify: uint8 images to logits."""
    model = make_model(config, config.classes, config.mode)
    variables = init_model(config, model)

    def logits(variables: PyTree, batch: Any, *, axis_name: str | None = None) -> Any:
        return model.apply(variables, _preprocess(variables, batch, axis_name=axis_name), train=False)

    return Workload(
        step=logits,
        state=variables,
        batch=batch_of(config, "image"),
        work=forward_work(config, config.classes),
        parameters=count(variables["params"]),
        rows=True,
        parts={"preprocessing": _preprocess, "forward": None},
        part_rows=frozenset({"preprocessing"}),
    )


def _preprocess(variables: PyTree, batch: Any, *, axis_name: str | None = None) -> jax.Array:
    keys = example_keys(jax.random.key(0), jnp.arange(len(batch["image"])))
    return aug.augment_batch(aug.normalize(), keys, batch["image"])


def contrastive(config: BenchConfig) -> Workload:
    """SimCLR's step: two augmented views, a linear projection to 128, NT-Xent over the whole batch, SGD."""
    model, tx = make_model(config, EMBEDDING, config.mode), sgd()
    view = simclr_view(config.image_size)
    step = partial(contrastive_step, model=model, tx=tx, view=view)
    state = train_state(config, model, tx, masked=False)

    def augmented(state: TrainState, batch: Any, *, axis_name: str | None = None) -> jax.Array:
        return jnp.concatenate(two_views(view, state, batch["image"], axis_name))

    once = forward_work(config, EMBEDDING)
    pairs = jax.ShapeDtypeStruct((config.batch, EMBEDDING), jnp.float32)
    loss = work.count(nt_xent, pairs, pairs).scaled(3 / config.batch)  # forward, and a gradient for either factor
    encoder = work.training(once).scaled(2)
    return Workload(
        step=step,
        state=state,
        batch=batch_of(config, "image"),
        work=work.Work(flops=encoder.flops + loss.flops, padding=encoder.padding),
        parameters=count(state.params),
        carried=True,
        parts={"augmentation": augmented, **_training_parts(step)},
        part_rows=frozenset({"augmentation"}),
    )


def two_views(view: aug.Augment, state: TrainState, images: jax.Array, axis_name: str | None) -> list[jax.Array]:
    """Two augmented versions, float32 [B, H, W, C], of images uint8 [B, H, W, C]."""
    keys = jax.random.split(step_key(state.key, state.step), 2)
    index = example_index(len(images), axis_name)
    return [aug.augment_batch(view, example_keys(key, index), images) for key in keys]


def contrastive_step(
    state: TrainState,
    batch: Any,
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    view: aug.Augment,
    temperature: float = 0.5,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of SimCLR, https://arxiv.org/abs/2002.05709, whose projection is the model's head.

    Returns the new state, and float32 scalars `loss` and `grad_norm`.
    """
    images = jnp.concatenate(two_views(view, state, batch["image"], axis_name))

    def objective(params: PyTree, stats: PyTree) -> tuple[jax.Array, PyTree]:
        variables = {"params": params, "batch_stats": stats}
        embeddings, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
        a, b = jnp.split(embeddings, 2)
        loss = nt_xent(a, b, temperature=temperature, axis_name=axis_name).mean()
        return loss, (updated["batch_stats"], loss)

    params, stats = vary((state.params, state.batch_stats), axis_name)
    grads, (stats, loss) = jax.grad(objective, has_aux=True)(params, stats)
    grads, stats, loss = mean_over((grads, stats, loss), axis_name)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = apply_masks(optax.apply_updates(state.params, updates), state.masks)
    state = state.replace(step=state.step + 1, params=params, batch_stats=stats, opt_state=opt_state)
    return state, {"loss": loss, "grad_norm": global_norm(grads)}


TASKS: dict[str, Callable[[BenchConfig], Workload]] = {
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "contrastive": contrastive,
    "prune": prune,
}
