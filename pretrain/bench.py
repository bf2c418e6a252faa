"""`python -m pretrain.bench [--FIELD VALUE ...]`: `train.bench` with one more task, SimCLR's step (`contrastive`)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pretrain import from_config
from pretrain.config import ObjectiveConfig, PretrainConfig, ViewConfig, make_objective
from pretrain.steps import contrastive_step
from pretrain.views import make_views, view
from resnet_jax import augment as aug
from resnet_jax.keys import example_index, step_key
from resnet_jax.parallel import axis_of
from resnet_jax.tree import count
from train.bench import work
from train.bench.__main__ import main
from train.bench.config import BenchConfig
from train.bench.feeding import augmentations
from train.bench.tasks import LARGE, TASKS, Workload, batch_of, image_shape, kernels, sgd, training_parts
from train.cli import start

STEPS = 100_000  # long enough that no schedule moves while it is timed


def contrastive(config: BenchConfig) -> Workload:
    """SimCLR's step (https://arxiv.org/abs/2002.05709): two views, the projector of its recipe, NT-Xent, SGD.

    Images of up to 64 pixels get the recipe for CIFAR-10, larger ones that for ImageNet.
    """
    large, tx = config.image_size > LARGE, sgd()
    run = PretrainConfig(
        model=config.model,
        dtype=config.dtype,
        augment=ViewConfig(blur=(0.5, 0.5) if large else (0.0, 0.0), mean=aug.IMAGENET_MEAN, std=aug.IMAGENET_STD),
        objective=ObjectiveConfig(name="simclr", projector=None if large else (512, 512, 128)),
    )
    objective = make_objective(run.objective)
    plain = from_config.make_network(run, objective)
    network = from_config.make_network(run, objective, axis_of(config.mode), kernels(config)[1])
    views = from_config.make_views(run.augment)
    step = partial(contrastive_step, **from_config.step_options(run, objective, network, tx, views, STEPS, 1))
    state = from_config.make_pretrain_state(run, objective, plain, tx, image_shape(config), config.classes)

    def augmented(state: Any, batch: Any, *, axis_name: str | None = None) -> jax.Array:
        index = example_index(len(batch["label"]), axis_name)
        (images,) = make_views(views, step_key(state.key, state.step), index, batch["image"])
        return images

    # Two views through the network; the loss compares all with all, forward and in a gradient for either factor.
    loss = 3 * 2 * (2 * config.batch) ** 2 * objective.projector[-1] / config.batch
    return Workload(
        step=step,
        state=state,
        batch=batch_of(config, "image", "label"),
        flops=2 * work.training(work.forward(plain, config.image_size)) + loss,
        parameters=count(state.params),
        carried=True,
        parts=training_parts(augmented, step),
    )


def with_views(image_size: int) -> dict[str, aug.Augment]:
    """The augmentations of `train.bench`, and SimCLR's two views of an image."""
    one = view(image_size, blur=0.5 if image_size > LARGE else 0.0)

    def both(key: aug.Key, image: aug.Image) -> aug.Image:
        return jnp.concatenate([one(k, image) for k in jax.random.split(key)])

    return {**augmentations(image_size), "simclr_two_views": both}


def step() -> BenchConfig:
    """One compiled step of SimCLR: start, steady speed, work, memory, and where its time goes.

    Command: python -m pretrain.bench --model resnet18_cifar --batch 64
    Hardware: any; some minutes on two cores.
    """
    return BenchConfig(task="contrastive")


OPTIONS: dict[str, Any] = {
    "program": "python -m pretrain.bench",
    "presets": {"step": step},
    "tasks": {**TASKS, "contrastive": contrastive},
    "augmentations": with_views,
}

if __name__ == "__main__":
    start(partial(main, **OPTIONS))
