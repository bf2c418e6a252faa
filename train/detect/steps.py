"""The steps of detection: the objective that `train.steps.train_step` minimises, and the evaluation.

For what a batch holds see `train.detect.batches`.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax.detection.augment import BoxAugment, augment_batch, identity
from resnet_jax.keys import Key, example_index, example_keys
from resnet_jax.parallel import all_rows
from resnet_jax.tree import PyTree
from train.state import TrainState, forward
from train.steps import Batch, Metrics, Objective, step_keys


def detection(*, augment: BoxAugment = identity) -> Objective:
    """The objective of detection: the sum of a detector's losses.

    Args:
      augment: maps images in [0, 1] and their boxes to the detector's normalised inputs; each example draws from its
        own key.

    Returns:
      An objective for detectors, modules with the `losses` of `resnet_jax.detection.FasterRCNN`; its metrics are
      these losses.
    """

    def objective(
        variables: PyTree, batch: Batch, *, model: nn.Module, rngs: dict[str, jax.Array], axis_name: str | None = None
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        batch, keys = augmented(augment, rngs["mix"], batch)
        # Crowds are not trained on: their boxes hold several objects.
        labels = jnp.where(batch["crowd"], -1, batch["labels"])
        losses, stats = forward(
            model,
            variables,
            batch["image"],
            train=True,
            rngs=rngs,
            size=batch["size"],
            boxes=batch["boxes"],
            labels=labels,
            keys=keys,
            axis_name=axis_name,
            method="losses",
        )
        return sum(losses.values(), jnp.zeros(())), (stats, losses)

    return objective


def augmented(augment: BoxAugment, key: Key, batch: Batch) -> tuple[Batch, Key]:
    """Augment each example of a batch under its own key; return (the batch, keys for the detector to sample with)."""
    keys = jax.vmap(partial(jax.random.split, num=2))(example_keys(key, batch["index"]))
    return augment_batch(augment, keys[:, 0], batch), keys[:, 1]


def seen_images(state: TrainState, batch: Batch, *, augment: BoxAugment) -> jax.Array:
    """The images, float [B, H, W, 3], that the next `train_step` trains on for the first B examples of its batch.

    Their boxes are outlined, in values that stand for yellow whatever the normalisation: infinite ones. With
    `accumulate`, this only holds for the examples of the first part.
    """
    rows = {**batch, "index": example_index(len(batch["image"]))}
    seen, _ = augmented(augment, jax.random.fold_in(step_keys(state).mix, 0), rows)
    return jax.vmap(outlined)(seen["image"], seen["boxes"], seen["labels"] >= 0)


def outlined(image: jax.Array, boxes: jax.Array, valid: jax.Array, *, width: float = 2) -> jax.Array:
    """Outline boxes [M, 4], where `valid`, on an image [H, W, 3]: see `seen_images`."""
    rows, columns = jnp.arange(image.shape[0])[:, None], jnp.arange(image.shape[1])[None]

    def line(box: jax.Array) -> jax.Array:
        left, top, right, bottom = jnp.round(box)
        edge = jnp.minimum(jnp.minimum(rows - top, bottom - 1 - rows), jnp.minimum(columns - left, right - 1 - columns))
        return (edge >= 0) & (edge < width)

    lines = (jax.vmap(line)(boxes) & valid[:, None, None]).any(0)
    return jnp.where(lines[..., None], jnp.array([jnp.inf, jnp.inf, -jnp.inf], image.dtype), image)


def detect_step(
    variables: PyTree,
    batch: Batch,
    *,
    model: nn.Module,
    preprocess: BoxAugment,
    axis_name: str | None = None,
) -> dict[str, Any]:
    """Detect the objects in a batch.

    Returns:
      Rows of the whole batch: `id` int32 [B], -1 where a row pads the batch; `boxes` float32 [B, D, 4] in pixels of
      the original images, `scores` float32 [B, D] and `labels` int32 [B, D], -1 where there is no object.
    """
    keys = example_keys(jax.random.key(0), batch["id"])
    seen = augment_batch(preprocess, keys, batch)
    found, _ = forward(model, variables, seen["image"], size=seen["size"])
    rows = {
        "id": jnp.where(batch["valid"], batch["id"], -1),
        "boxes": found.boxes / batch["scale"][:, None, None],
        "scores": found.scores,
        "labels": jnp.where(found.valid, found.labels, -1),
    }
    return all_rows(rows, axis_name)
