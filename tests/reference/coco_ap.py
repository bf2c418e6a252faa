"""COCO's average precision in plain NumPy, from its definition, to compare pycocotools' answers with."""

import numpy as np


def iou(a, b, crowd):
    """IoU of two boxes; with a crowd, the share of `a` in it."""
    sides = [min(a[k + 2], b[k + 2]) - max(a[k], b[k]) for k in (0, 1)]
    common = max(sides[0], 0) * max(sides[1], 0)
    area, other = ((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b))
    return common / (area if crowd else area + other - common)


def area_of(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def average_precision(detections, truths, label, threshold, low=0.0, high=1e10):
    """AP of a class at one IoU, over objects with areas from `low` to `high`; None without objects."""
    rows, total = [], 0
    for found, truth in zip(detections, truths, strict=True):
        objects = [(box, c) for box, c, own in zip(truth.boxes, truth.crowd, truth.labels, strict=True) if own == label]
        outside = [bool(c) or not low <= area_of(box) <= high for box, c in objects]
        total += outside.count(False)
        taken = set()
        order = [at for at in np.argsort(-found.scores, kind="stable") if found.labels[at] == label][:100]
        for at in order:
            box = found.boxes[at]
            shares = [iou(box, other, crowd) for other, crowd in objects]
            # Objects that count come first, whatever the IoU of the others.
            for ignored in (False, True):
                open_ = [
                    m
                    for m, share in enumerate(shares)
                    if outside[m] == ignored and share >= threshold and (m not in taken or objects[m][1])
                ]
                if open_:
                    best = max(open_, key=lambda m: shares[m])
                    taken.add(best)
                    if not ignored:
                        rows.append((found.scores[at], True))
                    break
            else:
                if low <= area_of(box) <= high:
                    rows.append((found.scores[at], False))
    if not total:
        return None
    rows.sort(key=lambda row: -row[0])
    right = np.cumsum([hit for _, hit in rows])
    recall, precision = right / total, right / np.arange(1, len(rows) + 1)
    return float(np.mean([precision[recall >= r].max(initial=0) for r in np.round(np.linspace(0, 1, 101), 2)]))


def mean_ap(detections, truths, classes, thresholds, **sizes):
    """Mean over classes with objects and over thresholds; None without objects."""
    values = [average_precision(detections, truths, c, t, **sizes) for c in range(classes) for t in thresholds]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
