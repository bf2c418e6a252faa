"""What a detector does wrong: kinds of errors, precision by recall, and the images that it does best and worst."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from train.detect.metrics import Detections, Truth, check, overlaps, precision_recall

KINDS = ("correct", "duplicate", "poor localisation", "wrong class", "both", "background", "ignored")
CORRECT, DUPLICATE, LOCALISATION, CLASS, BOTH, BACKGROUND, IGNORED = range(len(KINDS))
MATCH, NEAR = 0.5, 0.1  # IoU of a detection with its object; of one that is meant for it, but misses it


def classify_errors(found: Detections, truth: Truth) -> tuple[np.ndarray, np.ndarray]:
    """Compare the detections of an image with its objects, at IoU 0.5.

    In falling order of score each detection takes the free object of its class with the highest IoU, as in COCO. The
    others are errors, of kinds as in TIDE, https://arxiv.org/abs/2008.08115: poor localisation (IoU of 0.1 to 0.5 with
    an object of the class), wrong class (at least 0.5 with an object of a different class), duplicate (at least 0.5
    with an object that is taken), both (0.1 to 0.5 with an object of a different class), background (less than 0.1
    with all). Those in a crowd of the class are ignored.

    Returns:
      (the kind of each detection as a position in `KINDS`, the object that it found, mistook or missed by little, else
      -1), int [n] each.
    """
    kinds, owners = np.full(len(found.labels), BACKGROUND), np.full(len(found.labels), -1)
    same = found.labels[:, None] == truth.labels[None]
    shared = overlaps(found.boxes, truth.boxes, truth.crowd)
    in_crowd = (shared * (same & truth.crowd)).max(1, initial=0) >= MATCH
    shared = np.where(truth.crowd, 0, shared)  # apart from that, a crowd matches nothing
    free = ~truth.crowd
    for at in np.argsort(-found.scores, kind="stable"):
        own, other, mine = shared[at] * same[at], shared[at] * ~same[at], shared[at] * (same[at] & free)
        best, best_own, best_other = (x.max(initial=0) for x in (mine, own, other))
        if best >= MATCH:
            kinds[at], owners[at] = CORRECT, mine.argmax()
            free[owners[at]] = False
        elif in_crowd[at]:
            kinds[at] = IGNORED
        elif NEAR <= best_own < MATCH:
            kinds[at], owners[at] = LOCALISATION, own.argmax()
        elif best_other >= MATCH:
            kinds[at], owners[at] = CLASS, other.argmax()
        elif best_own >= MATCH:
            kinds[at], owners[at] = DUPLICATE, own.argmax()
        elif best_other >= NEAR:
            kinds[at], owners[at] = BOTH, other.argmax()
    return kinds, owners


def missed(truth: Truth, kinds: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Objects, bool [m], that no detection found, mistook or missed by little, from the result of `classify_errors`."""
    lost = ~truth.crowd
    lost[owners[np.isin(kinds, (CORRECT, LOCALISATION, CLASS))]] = False
    return lost


def count_errors(detections: Sequence[Detections], truths: Sequence[Truth], *, least: float = 0.5) -> dict[str, int]:
    """Count the `KINDS` of detections with scores of at least `least`, without the ignored, and `missed` objects.

    Raises:
      ValueError: there are not as many images in both.
    """
    check(detections, truths)
    counts, lost = np.zeros(len(KINDS), int), 0
    for found, truth in zip(detections, truths, strict=True):
        kinds, owners = classify_errors(found.above(least), truth)
        counts += np.bincount(kinds, minlength=len(KINDS))
        lost += int(missed(truth, kinds, owners).sum())
    return {**dict(zip(KINDS[:IGNORED], counts[:IGNORED].tolist(), strict=True)), "missed": lost}


class Curve(NamedTuple):
    """Recall, precision and score after each detection of a class, in falling order of score, [n] each."""

    recall: np.ndarray
    precision: np.ndarray
    scores: np.ndarray


def curves(detections: Sequence[Detections], truths: Sequence[Truth], classes: Sequence[str]) -> dict[str, Curve]:
    """Precision by recall at IoU 0.5 of each class that has objects.

    Raises:
      ValueError: there are not as many images in both.
    """
    check(detections, truths)
    kinds = [classify_errors(found, truth)[0] for found, truth in zip(detections, truths, strict=True)]
    scores, labels, judged = (
        np.concatenate([np.zeros(0), *values])
        for values in ((x.scores for x in detections), (x.labels for x in detections), kinds)
    )
    totals = sum((np.bincount(x.labels[~x.crowd], minlength=len(classes)) for x in truths), np.zeros(len(classes), int))
    found = {}
    for label, name in enumerate(classes):
        if totals[label]:
            chosen = np.flatnonzero((labels == label) & (judged != IGNORED))
            chosen = chosen[np.argsort(-scores[chosen], kind="stable")]
            found[name] = Curve(*precision_recall(judged[chosen] == CORRECT, int(totals[label])), scores[chosen])
    return found


def image_scores(detections: Sequence[Detections], truths: Sequence[Truth], *, least: float = 0.5) -> np.ndarray:
    """F1 of each image in [0, 1], from detections with scores of at least `least`; 1 without both, float64 [N].

    Raises:
      ValueError: there are not as many images in both.
    """
    check(detections, truths)
    scores = []
    for found, truth in zip(detections, truths, strict=True):
        kinds, _ = classify_errors(found.above(least), truth)
        both = int(np.sum(kinds != IGNORED) + np.sum(~truth.crowd))
        scores.append(2 * int(np.sum(kinds == CORRECT)) / both if both else 1.0)
    return np.array(scores)


def best_and_worst(scores: np.ndarray, truths: Sequence[Truth], count: int) -> tuple[np.ndarray, np.ndarray]:
    """(the best, the worst) images by `image_scores`, at most `count` positions each, none in both.

    Of equal ones those with more objects come first.
    """
    objects = np.array([len(truth.labels) for truth in truths])
    best, worst = np.lexsort((-objects, -scores)), np.lexsort((-objects, scores))
    count = min(count, (len(scores) + 1) // 2)
    return best[:count], worst[~np.isin(worst, best[:count])][:count]
