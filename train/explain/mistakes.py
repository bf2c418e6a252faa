"""Where a classifier errs: its confusions, its confidence, and its worst mistakes."""

from typing import NamedTuple

import numpy as np

from train.steps import CALIBRATION_BINS


def confusion(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Count the pairs that occur, rows [true class, predicted class, how often], as `train.steps.summarize` does."""
    pairs, times = np.unique(np.stack([labels, predicted], axis=1), axis=0, return_counts=True)
    return np.concatenate([pairs, times[:, None]], axis=1)


class Calibration(NamedTuple):
    """Predictions by confidence, in bins of equal width over [0, 1].

    Attributes:
      counts: predictions in each bin, int64 [bins].
      confidence, accuracy: their means in each bin, float64 [bins]; nan where a bin is empty.
      error: expected calibration error in [0, 1], https://arxiv.org/abs/1706.04599.
    """

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    error: float


def calibration(confidence: np.ndarray, correct: np.ndarray, bins: int = CALIBRATION_BINS) -> Calibration:
    """Compare confidence in [0, 1], [N], with correctness, bool [N]."""
    places = np.clip((confidence * bins).astype(int), 0, bins - 1)
    counts = np.bincount(places, minlength=bins)
    sums = [np.bincount(places, x.astype(np.float64), bins) for x in (confidence, correct)]
    error = float(np.abs(sums[0] - sums[1]).sum() / len(confidence))
    with np.errstate(invalid="ignore"):
        return Calibration(counts, sums[0] / counts, sums[1] / counts, error)


def worst(confidence: np.ndarray, correct: np.ndarray, count: int) -> np.ndarray:
    """Positions of the wrong predictions, most confident first, at most `count`, int [M]."""
    order = np.argsort(-confidence, kind="stable")
    return order[~correct[order]][:count]
