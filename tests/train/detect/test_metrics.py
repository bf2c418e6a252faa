"""Metrics against values counted by hand and against COCO's AP in plain NumPy; kinds of errors."""

import numpy as np
import pytest

from tests.reference.coco_ap import mean_ap
from train.detect import mistakes
from train.detect.metrics import Detections, Truth, coco_metrics, overlaps, voc_ap
from train.detect.mistakes import KINDS, best_and_worst, classify_errors, count_errors, curves, image_scores

BOXES = np.array([[0, 0, 10, 10], [20, 20, 60, 60], [100, 100, 250, 250]], np.float32)  # small, medium, large


def truth(boxes=BOXES, labels=None, crowd=None):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    labels = np.zeros(len(boxes), int) if labels is None else np.array(labels, int)
    return Truth(boxes, labels, np.zeros(len(boxes), bool) if crowd is None else np.array(crowd, bool))


def found(boxes=BOXES, scores=None, labels=None):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    labels = np.zeros(len(boxes), int) if labels is None else np.array(labels, int)
    scores = np.linspace(0.9, 0.6, len(boxes)) if scores is None else np.array(scores)
    return Detections(boxes, scores.astype(np.float32), labels)


def random_images(seed, count=12, classes=3):
    """Images with detections near the objects, of wrong classes, duplicate and elsewhere; some with crowds."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        objects = rng.integers(0, 7)
        corner, sides = rng.uniform(0, 150, (objects, 2)), rng.uniform(8, 140, (objects, 2))
        boxes, labels = np.concatenate([corner, corner + sides], 1), rng.integers(0, classes, objects)
        chosen = rng.integers(0, objects, rng.integers(0, 14)) if objects else np.zeros(0, int)
        near = boxes[chosen] + rng.normal(0, 5, (len(chosen), 4))
        far = rng.uniform(0, 100, (rng.integers(0, 4), 4)) + np.array([0, 0, 100, 100])
        seen = np.concatenate([near, far])
        seen[:, 2:] = np.maximum(seen[:, 2:], seen[:, :2] + 1)
        guesses = np.where(rng.random(len(chosen)) < 0.8, labels[chosen], rng.integers(0, classes, len(chosen)))
        guesses = np.concatenate([guesses, rng.integers(0, classes, len(far))]).astype(int)
        crowd = rng.random(objects) < 0.15
        pairs.append((found(seen, rng.random(len(seen)), guesses), truth(boxes, labels, crowd)))
    return [list(side) for side in zip(*pairs, strict=True)]


def test_perfect_detections_have_ap_1_and_none_where_nothing_is(capsys):
    metrics = coco_metrics([found()], [truth()], ["cell", "other"])
    assert [metrics[name] for name in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")] == pytest.approx(
        [1] * 6
    )
    assert metrics["ar_1"] == pytest.approx(1 / 3) and metrics["ar_10"] == metrics["ar_100"] == 1
    assert metrics["per_class"] == {
        "cell": {"ap": pytest.approx(1), "ap50": pytest.approx(1)},
        "other": {"ap": None, "ap50": None},
    }
    some = coco_metrics([found(BOXES[:1])], [truth(BOXES[:1])], ["cell"])
    assert some["ap_small"] == pytest.approx(1) and some["ap_medium"] is some["ap_large"] is some["ar_large"] is None
    assert capsys.readouterr().out == ""


# (detections, objects) -> (AP50, VOC AP by all points, by eleven points), counted by hand.
CASES = {
    # Recall 1/2 is reached with precision 1: recalls 0 to 0.50 are 51 of 101, 0 to 0.5 are 6 of 11.
    "one of two": (found(BOXES[:1]), truth(BOXES[:2]), (51 / 101, 0.5, 6 / 11)),
    # Precisions 1, 1/2, 2/3: the duplicate costs precision beyond recall 1/2.
    "duplicate": (
        found(BOXES[[0, 0, 1]]),
        truth(BOXES[:2]),
        ((51 + 50 * 2 / 3) / 101, (1 + 2 / 3) / 2, (6 + 5 * 2 / 3) / 11),
    ),
    "found in a crowd": (found(BOXES), truth(BOXES, crowd=[False, False, True]), (1, 1, 1)),
    "crowd not found": (found(BOXES[:2]), truth(BOXES, crowd=[False, False, True]), (1, 1, 1)),
    # The best detection has the wrong class; the second class has no objects, so only recall is lost.
    "wrong class": (found(BOXES[:2], labels=[1, 0]), truth(BOXES[:2]), (51 / 101, 0.5, 6 / 11)),
    "background first": (
        found([[300, 300, 320, 320], *BOXES[:2].tolist()]), truth(BOXES[:2]), (2 / 3, 2 / 3, 2 / 3),
    ),
    "nothing found": (found([]), truth(), (0, 0, 0)),
    "no objects": (found(), truth([]), (None, None, None)),
    "no objects and nothing found": (found([]), truth([]), (None, None, None)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_average_precision_counted_by_hand(name):
    seen, objects, expected = CASES[name]
    # A second image without objects changes nothing.
    images = [seen, found([])], [objects, truth([])]
    coco, voc = coco_metrics(*images, ["a", "b"]), voc_ap(*images, ["a", "b"])
    assert (coco["ap50"], voc["all_points"], voc["eleven_points"]) == pytest.approx(expected)
    assert coco["per_class"]["a"]["ap50"] == pytest.approx(expected[0])
    assert voc["per_class"]["b"] == {"all_points": None, "eleven_points": None}


def test_voc_ap_of_several_images():
    """Five objects, seven detections: right, wrong, right, right, wrong, right, wrong in the order of scores."""
    images = [truth(BOXES), truth(BOXES[:2])]
    elsewhere = [400, 400, 440, 440]
    seen = [
        found([BOXES[0], elsewhere, BOXES[1], elsewhere], [0.95, 0.9, 0.8, 0.5]),
        found([BOXES[0], BOXES[1], elsewhere], [0.7, 0.4, 0.3]),
    ]
    # Recalls 0.2, 0.4, 0.6, 0.8 are reached with precisions 1, 2/3, 3/4, 4/6; from the right 1, 3/4, 3/4, 2/3.
    voc = voc_ap(seen, images, ["cell"])
    assert voc["all_points"] == pytest.approx(0.2 * (1 + 3 / 4 + 3 / 4 + 2 / 3))
    assert voc["eleven_points"] == pytest.approx((3 * 1 + 4 * 3 / 4 + 2 * 2 / 3) / 11)
    assert voc_ap(seen, images, ["cell"], threshold=1.01)["all_points"] == 0


def test_voc_counts_the_nearest_object_coco_the_nearest_free_one():
    """Two detections between two objects that overlap: both are nearest to the first."""
    objects = truth([[0, 0, 10, 10], [0, 2, 10, 12]])
    seen = found([[0, 0, 10, 10], [0, 0.5, 10, 10.5]])
    assert coco_metrics([seen], [objects], ["a"])["ap50"] == pytest.approx(1)
    assert voc_ap([seen], [objects], ["a"])["all_points"] == 0.5


@pytest.mark.parametrize("seed", range(3))
def test_coco_metrics_equal_plain_numpy(seed):
    detections, truths = random_images(seed)
    metrics, thresholds = coco_metrics(detections, truths, "abc"), np.arange(10) * 0.05 + 0.5
    sizes = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
    every = (detections, truths, 3, thresholds)
    expected = {f"ap_{name}": mean_ap(*every, low=low, high=high) for name, (low, high) in sizes.items()}
    expected |= {
        "ap": mean_ap(*every),
        "ap50": mean_ap(detections, truths, 3, [0.5]),
        "ap75": mean_ap(detections, truths, 3, [0.75]),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    assert 0.05 < metrics["ap"] < metrics["ap50"] < 0.95
    # The curves are those whose area AP50 is.
    for name, (recall, precision, scores) in curves(detections, truths, "abc").items():
        area = np.mean([precision[recall >= r].max(initial=0) for r in np.round(np.linspace(0, 1, 101), 2)])
        assert area == pytest.approx(metrics["per_class"][name]["ap50"], abs=1e-9)
        assert (np.diff(recall) >= 0).all() and (np.diff(scores) <= 0).all() and len(scores) == len(precision)


def test_errors_have_the_kinds_that_were_made():
    objects = truth(
        [[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10], [80, 0, 90, 10], [100, 0, 200, 100]],
        labels=[0, 0, 0, 0, 0, 0],
        crowd=[False] * 5 + [True],
    )
    boxes, labels, kinds, owners = zip(
        ([0, 0, 10, 10], 0, "correct", 0),
        ([0, 1, 10, 10], 0, "duplicate", 0),
        ([20, 0, 24, 10], 0, "poor localisation", 1),
        ([40, 0, 50, 10], 1, "wrong class", 2),
        ([60, 0, 64, 10], 1, "both", 3),
        ([300, 0, 310, 10], 0, "background", -1),
        ([110, 10, 120, 20], 0, "ignored", -1),
        ([110, 10, 120, 20], 1, "background", -1),
        strict=True,
    )
    seen = found(boxes, labels=labels)
    judged, owned = classify_errors(seen, objects)
    assert tuple(KINDS[kind] for kind in judged) == kinds and tuple(owned) == owners
    # Objects 3 and 4 were not even nearly found.
    assert mistakes.missed(objects, judged, owned).tolist() == [False, False, False, True, True, False]
    counts = count_errors([seen, found([])], [objects, truth([])], least=0)
    assert counts == {
        "correct": 1, "duplicate": 1, "poor localisation": 1, "wrong class": 1, "both": 1, "background": 2, "missed": 2,
    }  # fmt: skip
    assert count_errors([seen], [objects], least=0.95)["missed"] == 5
    assert image_scores([seen, found([]), found()], [objects, truth([]), truth([])], least=0) == pytest.approx(
        [2 / (7 + 5), 1, 0]
    )


def test_best_and_worst_images_are_different_ones():
    truths = [truth(BOXES[:n]) for n in (1, 3, 2, 1, 0)]
    best, worst = best_and_worst(np.array([1, 1, 0.2, 0.5, 1]), truths, 2)
    assert best.tolist() == [1, 0] and worst.tolist() == [2, 3]
    best, worst = best_and_worst(np.array([0.3]), truths[:1], 4)
    assert best.tolist() == [0] and not len(worst)


def test_padding_is_left_out_and_boxes_return_to_the_original():
    boxes, labels = np.array([[0, 0, 20, 10], [0, 0, 0, 0]], np.float32), np.array([1, -1])
    seen = Detections.unpadded(boxes, np.array([0.5, 0]), labels, scale=2)
    assert seen.boxes.tolist() == [[0, 0, 10, 5]] and seen.scores.tolist() == [0.5] and seen.labels.tolist() == [1]
    with pytest.raises(ValueError, match="detections of 1 images, and truths of 0"):
        coco_metrics([seen], [], ["a", "b"])


def test_overlaps():
    shared = overlaps(BOXES[:2], [[0, 0, 10, 5], [20, 20, 100, 100]])
    np.testing.assert_allclose(shared, [[0.5, 0], [0, 1600 / 6400]])
    assert overlaps(BOXES[:1], [[0, 0, 100, 100]], np.array([True])).tolist() == [[1.0]]
    assert overlaps(np.zeros((0, 4)), BOXES).shape == (0, 3)
    assert overlaps(np.zeros((1, 4)), np.zeros((1, 4))).tolist() == [[0.0]]  # of no area
