"""From sums over examples to the figures of a report."""

from typing import Any

import numpy as np


def summarize(sums: dict[str, np.ndarray]) -> dict[str, Any]:
    """Divide the sums of `eval_step`, added over batches, once.

    Returns:
      `accuracy`, `top5_accuracy`, `loss` (nats) and `calibration_error` (expected calibration error over equal-width
      bins of confidence, https://arxiv.org/abs/1706.04599) as floats; `count`; `per_class_accuracy` [K] (nan for a
      class without examples); `confusion` [K][K] counts, true class by row.
    """
    count = float(sums["count"])
    if count == 0:
        raise ValueError("no examples were evaluated")
    confusion = np.asarray(sums["confusion"], np.float64)
    binned, confidence, correct = np.asarray(sums["calibration"], np.float64)
    totals = confusion.sum(1)
    with np.errstate(invalid="ignore"):
        per_class = np.diag(confusion) / totals
    return {
        "count": int(count),
        "accuracy": float(sums["correct"]) / count,
        "top5_accuracy": float(sums["top5"]) / count,
        "loss": float(sums["loss"]) / count,
        "calibration_error": float(np.abs(confidence - correct).sum() / binned.sum()),
        "per_class_accuracy": per_class,
        "confusion": np.rint(confusion).astype(np.int64),
    }
