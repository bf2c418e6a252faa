"""Annotations of the user's own images: what the readers of each format return, and how it becomes `Annotated`.

A reader is a function `(where, passed, faults) -> (classes, {split: [Found, ...]})`. It adds what it passes over to
`passed`, as (path, reason), and a line for each file that cannot be used to `faults`.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.data.folder import SPLITS, PassedOver
from train.data.sources import shortened
from train.detect.layout import Size
from train.detect.objects import Annotated, read_header
from train.errors import UsageError
from train.paths import local_path

SMALLEST = 0.1  # pixels: boxes with a shorter side have no area


@dataclass(frozen=True, kw_only=True)
class Found:
    """An image file and its annotated objects, as they are on file.

    Attributes:
      image: path of the image.
      boxes: (x1, y1, x2, y2) of each object, in pixels, or if `relative`, in widths and heights of the image.
      labels: name of each object's class.
      crowd: whether each object is neither trained on nor counted against a detector.
      size: (height, width) that the annotation gives, if any.
    """

    image: str
    boxes: Sequence[Sequence[float]]
    labels: Sequence[str]
    crowd: Sequence[bool]
    size: Size | None = None
    relative: bool = False


Splits = dict[str, list[Found]]
Reader = Callable[[str, PassedOver, list[str]], tuple[tuple[str, ...], Splits]]


def annotated(
    classes: Sequence[str], splits: Splits, passed: PassedOver, faults: list[str]
) -> dict[str, list[Annotated]]:
    """Look at all image files and clean their boxes: {split: its images}, without those that go into `faults`.

    Raises:
      UsageError: labels that are not in `classes`.
    """
    known = {name: label for label, name in enumerate(classes)}
    result = {}
    for split, found in splits.items():
        if unknown := sorted({label for one in found for label in one.labels} - known.keys()):
            raise UsageError(
                f"{split} has objects of {shortened(unknown)}, which the training split does not have "
                f"({shortened(classes)})"
            )
        with ThreadPoolExecutor() as pool:
            seen = list(pool.map(lambda one: read_header(one.image), found))
        images = [_annotated(one, header, known, passed) for one, header in zip(found, seen, strict=True)]
        faults += [image for image in images if isinstance(image, str)]
        result[split] = [image for image in images if not isinstance(image, str)]
    return result


def _annotated(
    found: Found, header: tuple[Size, bool] | str, known: dict[str, int], passed: PassedOver
) -> Annotated | str:
    """Make the image of what was found and its header, or say what is wrong with it."""
    if isinstance(header, str):
        return f"{found.image}: {header}"
    stored, swapped = header
    size = stored[::-1] if swapped else stored
    turned = True
    # Some tools annotate images as they are stored, and some as they are shown.
    if found.size is not None and min(found.size) > 0 and found.size != size:
        if found.size != stored:
            annotation, image = (f"{width}x{height}" for height, width in (found.size, size))
            return f"{found.image}: annotated as {annotation} pixels, but it has {image}"
        size, turned = stored, False
    units = [size[1], size[0]] * 2 if found.relative else [1, 1, 1, 1]
    boxes = np.asarray(found.boxes, np.float64).reshape(-1, 4) * units
    labels = np.array([known[label] for label in found.labels], np.int32)
    boxes, keep = cleaned(found.image, boxes, size, passed)
    return Annotated(
        name=found.image,
        read=lambda: Path(found.image).read_bytes(),
        size=size,
        boxes=boxes,
        labels=labels[keep],
        crowd=np.asarray(found.crowd, bool)[keep],
        turned=turned,
    )


def cleaned(name: str, boxes: np.ndarray, size: Size, passed: PassedOver) -> tuple[np.ndarray, np.ndarray]:
    """Clip boxes [n, 4] to an image of this (height, width): (those of which something is left, float32, and which).

    The others go into `passed` with a reason.
    """
    height, width = size
    finite = np.all(np.isfinite(boxes), axis=1)
    boxes = np.where(finite[:, None], boxes, 0)
    extent = np.min(boxes[:, 2:] - boxes[:, :2], axis=1, initial=math.inf)
    clipped = boxes.clip(0, [width, height, width, height])
    left = np.min(clipped[:, 2:] - clipped[:, :2], axis=1, initial=math.inf)
    reasons = {
        "a box that is not finite": ~finite,
        "a box without area": finite & (extent < SMALLEST),
        "a box outside of the image": (extent >= SMALLEST) & (left < SMALLEST),
    }
    for reason, wrong in reasons.items():
        passed += [(name, reason)] * int(wrong.sum())
    keep = left >= SMALLEST
    return clipped[keep].astype(np.float32), keep


# ---- what readers share --------------------------------------------------------------------------------------------


def existing(where: str, prefix: str) -> Path:
    """The folder or file that a user named after a prefix such as `coco:`.

    Raises:
      UsageError: there is none.
    """
    if not where:
        raise UsageError(f"{prefix} needs the path of a folder, as in {prefix}photos")
    root = local_path(where)
    if not root.exists():
        raise UsageError(f"there is no folder {root}")
    return root


def split_named(text: str) -> str | None:
    """The split that a name such as `instances_val2017.json` or `valid` speaks of, if any."""
    words = re.split(r"[^a-z]+", text.lower().replace("trainval", "train"))
    return next((split for split, names in SPLITS.items() if set(names) & set(words)), None)


def split_folders(folders: Iterable[Path]) -> dict[str, Path]:
    """{split: its folder} of the folders that are named after a split.

    Raises:
      UsageError: two are named after the same one.
    """
    found: dict[str, Path] = {}
    for path in folders:
        split = split_named(path.name)
        if split in found:
            names = f"{found[split].name} and {path.name}"
            raise UsageError(f"{path.parent} holds {names}: merge them, both are for {split}")
        if split is not None:
            found[split] = path
    return found


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank, without the spaces around them.

    Raises:
      UsageError: it cannot be read, or is not text in UTF-8.
    """
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None


def check_names(names: Sequence[str], where: Path) -> tuple[str, ...]:
    """Check that there are class names, and none twice.

    Raises:
      UsageError: there are none, or a name is there twice.
    """
    if not names:
        raise UsageError(f"{where} names no classes")
    if twice := sorted({name for name in names if list(names).count(name) > 1}):
        raise UsageError(f"{where} names the class {shortened(twice)} twice")
    return tuple(names)
