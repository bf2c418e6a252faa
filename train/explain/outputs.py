"""What a network returns for the images of a split, computed in batches."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.augment import Augment, preprocess_batch
from resnet_jax.parallel import all_rows, compile_step, make_mesh, place, replicated
from resnet_jax.tree import PyTree
from train.data.batches import Batch, eval_batches, valid_rows
from train.data.sources import Arrays, Encoded
from train.runtime import compiler_options
from train.trained import Trained


class Outputs(NamedTuple):
    """A network's outputs for N images.

    Attributes:
      features: pooled features, float32 [N, F].
      labels: int32 [N].
      predicted: most probable class, int32 [N]; empty for a network without classes.
      confidence: its probability, float32 [N]; empty for a network without classes.
    """

    features: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """Whether each prediction is right, bool [N]."""
        return self.labels == self.predicted


def output_step(
    variables: PyTree, batch: Batch, *, model: nn.Module, preprocess: Augment, axis_name: str | None = None
) -> dict[str, jax.Array]:
    """Compute the outputs of a batch, [B] or [B, F] each, with `label` and `valid` (False where a row is padding)."""
    levels: Any = model.apply(variables, preprocess_batch(preprocess, batch["image"]), method="maps")
    rows = {"features": levels["pooled"], "label": batch["label"], "valid": batch["valid"]}
    if "logits" in levels:
        probabilities = jax.nn.softmax(levels["logits"].astype(jnp.float32))
        rows |= {"predicted": probabilities.argmax(-1), "confidence": probabilities.max(-1)}
    return all_rows(rows, axis_name)


def make_outputs(trained: Trained, batch: int) -> Callable[[Arrays | Encoded], Outputs]:
    """Make a function from a split to its `Outputs`, which computes `batch` images at a time on all devices."""
    mesh = make_mesh()
    variables = place(trained.variables, replicated(mesh))
    step = compile_step(
        partial(output_step, model=trained.model, preprocess=trained.preprocess),
        mesh=mesh,
        donate=False,
        compiler_options=compiler_options(trained.dtype),
    )

    def outputs(source: Arrays | Encoded) -> Outputs:
        batches = eval_batches(source, batch=min(batch, len(source)), mesh=mesh)
        whole = valid_rows(step(variables, part) for part in batches)
        predictions = [whole.get(name, np.zeros(0, np.float32)) for name in ("predicted", "confidence")]
        return Outputs(whole["features"], whole["label"], *predictions)

    return outputs
