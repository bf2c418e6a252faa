"""Features of whole splits from a frozen encoder, and the evaluations that train no network."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from pretrain.knn import knn_accuracy
from pretrain.linear import linear_probe, probe_accuracy
from resnet_jax.parallel import Mode
from train.data.batches import EvalBatches, valid_rows
from train.data.sets import Dataset
from train.data.sources import Arrays, Encoded


class Features(NamedTuple):
    """Pooled features float32 [N, F] of a split's images, without augmentation, and their labels int32 [N]."""

    features: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Extractor:
    """Extract the features of a split: `extractor(variables, extractor.batches(source))`; keep batches for later calls.

    Attributes:
      step: a compiled `pretrain.steps.feature_step`, or a similar step that returns more arrays.
      batch, mesh, mode: those that the step was compiled for.
    """

    step: Callable[[Any, Any], dict[str, Any]]
    batch: int
    mesh: Mesh
    mode: Mode

    def batches(self, source: Arrays | Encoded) -> EvalBatches:
        """The batches of a split."""
        return EvalBatches(source, batch=self.batch, mesh=self.mesh, mode=self.mode)

    def __call__(self, variables: Any, batches: EvalBatches) -> Features:
        arrays = self.arrays(variables, batches)
        return Features(arrays["features"], arrays["label"])

    def splits(self, variables: Any, dataset: Dataset) -> list[Features]:
        """Extract the features of the training, validation and test splits."""
        return [self(variables, self.batches(dataset.splits[name])) for name in ("train", "validation", "test")]

    def arrays(self, variables: Any, batches: EvalBatches) -> dict[str, np.ndarray]:
        """Arrays that the step returns, by name, with every example exactly once and in order."""
        return valid_rows(self.step(variables, batch) for batch in batches)


class FrozenAccuracy(NamedTuple):
    """Accuracies of frozen features, in [0, 1]: on test, and the `validation_` ones, for decisions."""

    knn: float
    linear: float
    validation_knn: float
    validation_linear: float
    learning_rate: float


def frozen_accuracy(
    train: Features,
    validation: Features,
    test: Features,
    *,
    classes: int,
    neighbours: int = 200,
    temperature: float = 0.1,
    seed: int = 0,
) -> FrozenAccuracy:
    """Evaluate weighted nearest neighbours among the training features, and an offline linear probe trained on them.

    The probe's learning rate is the best one on `validation`; the test features are used once, with that rate.
    """
    votes: dict[str, Any] = {"classes": classes, "k": neighbours, "temperature": temperature}
    probe = linear_probe(train, validation, classes=classes, seed=seed)
    return FrozenAccuracy(
        knn=knn_accuracy(test.features, test.labels, train.features, train.labels, **votes),
        linear=probe_accuracy(probe, test.features, test.labels),
        validation_knn=knn_accuracy(validation.features, validation.labels, train.features, train.labels, **votes),
        validation_linear=probe.validation_accuracy,
        learning_rate=probe.learning_rate,
    )
