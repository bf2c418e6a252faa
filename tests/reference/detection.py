"""Operators of object detection in plain Python and NumPy, as one would write them on a blackboard."""

import math

import numpy as np


def iou(a, b):
    """Intersection over union of two boxes; 0 if they have no area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return intersection / union if union > 0 else 0.0


def iou_matrix(a, b):
    """`iou` of each pair of boxes float [N, 4] and [M, 4] in NumPy."""
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    intersection = np.maximum(sides, 0).prod(-1)
    areas = [(x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b)]
    union = areas[0][:, None] + areas[1][None] - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def greedy_nms(boxes, scores, threshold, groups, valid):
    """Bool [N]: take boxes by score, and drop those that overlap one that was kept."""
    overlaps = iou_matrix(boxes, boxes) > np.float32(threshold)
    keep = np.zeros(len(boxes), bool)
    for i in np.argsort(-scores, kind="stable"):
        keep[i] = valid[i] and not (keep & overlaps[i] & (groups == groups[i])).any()
    return keep


def roi_align(features, boxes, scale, size, sampling, aligned):
    """Float64 [N, size, size, C]: the mean of the samples of each bin, one after the other."""
    result = np.zeros((len(boxes), size, size, features.shape[-1]))
    for n, box in enumerate(boxes.astype(float)):
        x1, y1, x2, y2 = box * scale - (0.5 if aligned else 0)
        width, height = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1), max(y2 - y1, 1))
        for i, j in np.ndindex(size, size):
            for a, b in np.ndindex(sampling, sampling):
                y = y1 + (i + (a + 0.5) / sampling) * height / size
                x = x1 + (j + (b + 0.5) / sampling) * width / size
                result[n, i, j] += bilinear(features, y, x) / sampling**2
    return result


def bilinear(features, y, x):
    """Value [C] at a point: 0 beyond one cell outside the map, the border's value up to there."""
    height, width, _ = features.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return np.zeros(features.shape[-1])
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    value = 0
    for row in {math.floor(y), math.ceil(y)}:
        for column in {math.floor(x), math.ceil(x)}:
            value = value + (1 - abs(y - row)) * (1 - abs(x - column)) * features[row, column].astype(float)
    return value


def match(overlaps, valid, high, low, low_quality):
    """Index of the truth that each box matches, -1 for background, -2 for neither."""
    truths, boxes = np.flatnonzero(valid), range(overlaps.shape[1])
    matches = []
    for box in boxes:
        best = max(truths, key=lambda g: (overlaps[g, box], -g), default=None)
        overlap = -1 if best is None else overlaps[best, box]
        claimed = any(0 < overlaps[g, box] == overlaps[g].max() for g in truths)
        if overlap >= np.float32(high) or (low_quality and claimed):
            matches.append(best)
        else:
            matches.append(-1 if overlap < np.float32(low) else -2)
    return np.array(matches)
