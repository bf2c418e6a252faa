"""How good detections are: COCO's metrics by pycocotools, and VOC's average precision."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from train.detect.objects import Objects

STATS = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large"),
)


class Detections(NamedTuple):
    """What was found in an image.

    Attributes:
      boxes: x1, y1, x2, y2 in pixels of the original image, float32 [n, 4].
      scores: confidence, float32 [n].
      labels: classes, int32 [n].
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    @classmethod
    def unpadded(cls, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, scale: float = 1.0) -> Self:
        """Leave out rows with label -1, and divide boxes by `scale`, the pixels per pixel of the original image."""
        real = np.asarray(labels) >= 0
        return cls(np.asarray(boxes)[real] / scale, np.asarray(scores)[real], np.asarray(labels)[real])

    def above(self, least: float) -> Self:
        """Only those whose score is at least `least`."""
        kept = self.scores >= least
        return self._replace(boxes=self.boxes[kept], scores=self.scores[kept], labels=self.labels[kept])


class Truth(NamedTuple):
    """The objects of an image.

    Attributes:
      boxes: x1, y1, x2, y2 in pixels of the original image, float32 [m, 4].
      labels: classes, int32 [m].
      crowd: COCO's iscrowd or VOC's difficult: need not be found, and may be, bool [m].
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray


def truths_of(source: Objects) -> list[Truth]:
    """The objects of each image of a split, in pixels of the original."""
    return [Truth(one.boxes, one.labels, one.crowd) for one in source.examples]


def overlaps(boxes: np.ndarray, others: np.ndarray, crowd: np.ndarray | None = None) -> np.ndarray:
    """IoU of boxes [n, 4] with others [m, 4], float64 [n, m].

    Where `crowd`, bool [m], is given and true, it is the share of the box that lies in the other one, as in COCO.
    """
    a, b = (np.asarray(x, np.float64).reshape(-1, 4) for x in (boxes, others))
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    common = np.prod(np.maximum(sides, 0), axis=-1)
    areas, other_areas = (np.prod(x[:, 2:] - x[:, :2], axis=-1) for x in (a, b))
    union = areas[:, None] + other_areas - common
    if crowd is not None:
        union = np.where(crowd, areas[:, None], union)
    return common / np.maximum(union, 1e-12)


def coco_metrics(detections: Sequence[Detections], truths: Sequence[Truth], classes: Sequence[str]) -> dict[str, Any]:
    """COCO's metrics, https://cocodataset.org/#detection-eval, in [0, 1], from the detections of each image.

    Sizes (small below 32², large from 96² pixels) are areas of boxes; COCO's own files measure some by their masks.

    Returns:
      `ap` (mean over IoU 0.50 to 0.95), `ap50`, `ap75`, `ap_small`, `ap_medium`, `ap_large`; `ar_1`, `ar_10`, `ar_100`
      (recall with this number of detections an image), `ar_small`, `ar_medium`, `ar_large`; and `per_class`, `ap` and
      `ap50` by name. None where there are no such objects.

    Raises:
      ValueError: there are not as many images in both.
    """
    from pycocotools.cocoeval import COCOeval

    check(detections, truths)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        evaluation = COCOeval(_dataset(truths, len(classes)), _dataset(detections, len(classes)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, class]
    by_class = {
        name: {"ap": _known(precision[..., at].mean()), "ap50": _known(precision[0, :, at].mean())}
        for at, name in enumerate(classes)
    }
    return {**dict(zip(STATS, map(_known, evaluation.stats), strict=True)), "per_class": by_class}


def _known(value: float) -> float | None:
    """pycocotools writes -1 where there are no objects."""
    return None if value < 0 else float(value)


def _dataset(images: Sequence[Detections | Truth], classes: int) -> Any:
    """The objects of all images as pycocotools holds them."""
    from pycocotools.coco import COCO

    rows: list[dict[str, Any]] = []
    for image, found in enumerate(images):
        scores = found.scores if isinstance(found, Detections) else np.ones(len(found.labels))
        crowd = found.crowd if isinstance(found, Truth) else np.zeros(len(found.labels), bool)
        boxes = np.asarray(found.boxes, np.float64).reshape(-1, 4)
        sides = boxes[:, 2:] - boxes[:, :2]
        for box, side, label, score, many in zip(boxes, sides, found.labels, scores, crowd, strict=True):
            rows.append(
                {
                    "id": len(rows) + 1,  # 0 would not count as matched
                    "image_id": image,
                    "category_id": int(label),
                    "bbox": [*box[:2].tolist(), *side.tolist()],
                    "area": float(side.prod()),
                    "score": float(score),
                    "iscrowd": int(many),
                }
            )
    dataset = COCO()
    dataset.dataset = {
        "images": [{"id": image} for image in range(len(images))],
        "categories": [{"id": label} for label in range(classes)],
        "annotations": rows,
    }
    dataset.createIndex()
    return dataset


def voc_ap(
    detections: Sequence[Detections], truths: Sequence[Truth], classes: Sequence[str], *, threshold: float = 0.5
) -> dict[str, Any]:
    """Average precision of PASCAL VOC, http://host.robots.ox.ac.uk/pascal/VOC/, in [0, 1]; `crowd` means difficult.

    A detection belongs to the object of its class with the highest IoU, at least `threshold`; a second one of the same
    object is wrong. Boxes are continuous, where VOC's own tool adds one pixel to their sides.

    Returns:
      `all_points` (the area below the curve, VOC 2010 and later) and `eleven_points` (at recalls 0, 0.1 ... 1, VOC
      2007), means over the classes that have objects; and `per_class`, both by name. None without objects.

    Raises:
      ValueError: there are not as many images in both.
    """
    check(detections, truths)
    by_class: dict[str, dict[str, float | None]] = {}
    for label, name in enumerate(classes):
        scores, right, total = [np.zeros(0)], [np.zeros(0, bool)], 0
        for found, truth in zip(detections, truths, strict=True):
            own, mine = found.labels == label, truth.labels == label
            correct, counted = _voc_match(found.boxes[own], found.scores[own], truth, mine, threshold)
            scores.append(found.scores[own][counted])
            right.append(correct[counted])
            total += int(np.sum(mine & ~truth.crowd))
        order = np.argsort(-np.concatenate(scores), kind="stable")
        recall, precision = precision_recall(np.concatenate(right)[order], total)
        known = total > 0
        by_class[name] = {
            "all_points": area_below(recall, precision) if known else None,
            "eleven_points": float(np.mean(at_recalls(recall, precision, np.linspace(0, 1, 11)))) if known else None,
        }
    means: dict[str, Any] = {}
    for kind in ("all_points", "eleven_points"):
        values = [value for one in by_class.values() if (value := one[kind]) is not None]
        means[kind] = float(np.mean(values)) if values else None
    return {**means, "per_class": by_class}


def _voc_match(
    boxes: np.ndarray, scores: np.ndarray, truth: Truth, mine: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """(whether each of the boxes [n, 4] of a class is right, whether it counts), bool [n] each."""
    correct, counted = np.zeros(len(boxes), bool), np.ones(len(boxes), bool)
    if not mine.any():
        return correct, counted
    shared, difficult = overlaps(boxes, truth.boxes[mine]), truth.crowd[mine]
    taken = np.zeros(len(difficult), bool)
    for at in np.argsort(-scores, kind="stable"):
        nearest = shared[at].argmax()
        if shared[at, nearest] >= threshold:
            counted[at] = not difficult[nearest]
            correct[at] = counted[at] and not taken[nearest]
            taken[nearest] = True
    return correct, counted


def precision_recall(correct: np.ndarray, total: int) -> tuple[np.ndarray, np.ndarray]:
    """(recall, precision) [n] after each detection, from whether each is right, bool [n], in falling order of score."""
    found = np.cumsum(correct)
    return found / max(total, 1), found / np.arange(1, len(correct) + 1)


def at_recalls(recall: np.ndarray, precision: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """Highest precision at each of `recalls` or beyond it; 0 where that recall is not reached."""
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)
    # The recall after some detections must not miss its own value by rounding.
    return envelope[np.searchsorted(recall, recalls - 1e-12)]


def area_below(recall: np.ndarray, precision: np.ndarray) -> float:
    """Area below the curve of the highest precision at each recall or beyond it."""
    return float(np.sum(np.diff(recall, prepend=0) * at_recalls(recall, precision, recall)))


def check(detections: Sequence[Detections], truths: Sequence[Truth]) -> None:
    """Raise ValueError if the images of both cannot be the same."""
    if len(detections) != len(truths):
        raise ValueError(f"detections of {len(detections)} images, and truths of {len(truths)}")
