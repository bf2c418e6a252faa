"""Annotations of the user's own images: what the readers of each format share."""

from dataclasses import dataclass

import numpy as np

from train.data.folder import PassedOver

SMALLEST = 0.1  # pixels: boxes with a shorter side have no area


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """Objects of one image: `boxes` float [n, 4] (x1, y1, x2, y2) in pixels, `labels` int [n], `crowd` bool [n]."""

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray


def cleaned(name: str, found: Boxes, size: tuple[int, int], passed: PassedOver) -> Boxes:
    """Clip boxes to an image of this (height, width), and leave out those of which nothing is left, into `passed`."""
    corners = np.asarray(found.boxes, np.float64).reshape(-1, 4)
    height, width = size
    finite = np.all(np.isfinite(corners), axis=1)
    corners = np.where(finite[:, None], corners, 0)
    extent = np.min(corners[:, 2:] - corners[:, :2], axis=1, initial=np.inf)
    clipped = corners.clip(0, [width, height, width, height])
    left = np.min(clipped[:, 2:] - clipped[:, :2], axis=1, initial=np.inf)
    reasons = {
        "a box that is not finite": ~finite,
        "a box without area": finite & (extent < SMALLEST),
        "a box outside of the image": (extent >= SMALLEST) & (left < SMALLEST),
    }
    for reason, wrong in reasons.items():
        passed += [(name, reason)] * int(wrong.sum())
    keep = left >= SMALLEST
    return Boxes(
        boxes=clipped[keep].astype(np.float32),
        labels=np.asarray(found.labels, np.int32)[keep],
        crowd=np.asarray(found.crowd, bool)[keep],
    )
