"""The steps of detection: the objective that `train.steps.train_step` minimises, and the evaluation.

For what a batch holds see `train.detect.batches`.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax.detection.augment import BoxAugment, augment_batch, identity
from resnet_jax.keys import example_keys
from resnet_jax.parallel import all_rows
from resnet_jax.tree import PyTree
from train.state import forward
from train.steps import Batch, Metrics, Objective


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
        keys = jax.vmap(partial(jax.random.split, num=2))(example_keys(rngs["mix"], batch["index"]))
        batch = augment_batch(augment, keys[:, 0], batch)
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
            keys=keys[:, 1],
            axis_name=axis_name,
            method="losses",
        )
        return sum(losses.values(), jnp.zeros(())), (stats, losses)

    return objective


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
