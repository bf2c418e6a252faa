"""`shapes`: rendered discs, squares, triangles and stars on cluttered backgrounds, an object set without any file.

It is drawn in a second or two from fixed seeds, so it is the same for everybody, and needs no download.
"""

import math
from functools import lru_cache, partial

import numpy as np
from PIL import Image, ImageDraw

from train.detect.objects import Annotated

CLASSES = ("disc", "square", "triangle", "star")
SIZES = ((96, 128), (128, 96))
COUNTS = {"train": 480, "validation": 120, "test": 120}
EMPTY = 0.05  # share of images without objects
MOST = 6
HIDDEN = 0.35  # share of an object that others may hide
SCALE = 4  # shapes are drawn larger, and averaged


@lru_cache(maxsize=1)
def read() -> tuple[tuple[str, ...], dict[str, list[Annotated]]]:
    """Draw (classes, {split: its images}); the example at a position depends on nothing but the split and position."""
    splits = {}
    for number, (split, count) in enumerate(COUNTS.items()):
        splits[split] = [_example(f"{i} of shapes {split}", np.random.default_rng([number, i])) for i in range(count)]
    return CLASSES, splits


def _example(name: str, rng: np.random.Generator) -> Annotated:
    image, boxes, labels = draw(rng, SIZES[int(rng.integers(len(SIZES)))])
    crowd = np.zeros(len(labels), bool)
    size = image.shape[:2]
    return Annotated(name=name, read=partial(np.asarray, image), size=size, boxes=boxes, labels=labels, crowd=crowd)


def draw(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one image: (uint8 [H, W, 3], boxes float32 [n, 4] of its objects, their labels int32 [n]).

    A shape may hide up to `HIDDEN` of another's area; boxes are those of whole shapes, cut at the image's edges.
    """
    image = _background(rng, *size)
    count = 0 if rng.random() < EMPTY else int(rng.integers(1, MOST + 1))
    boxes, labels = [], []
    covers: list[tuple[np.ndarray, np.ndarray]] = []  # pixels of each shape, and those that others hide
    for _ in range(count):
        label = int(rng.integers(len(CLASSES)))
        for _ in range(10):
            outline = _outline(rng, label, *size)
            alpha, window = _alpha(outline, *size)
            cover = np.zeros(size, bool)
            cover[window] = alpha >= 0.5
            hidden = [below | (cover & other) for other, below in covers]
            if all(np.sum(h) <= HIDDEN * np.sum(other) for h, (other, _) in zip(hidden, covers, strict=True)):
                break
        else:
            continue  # there is no room
        covers = [(other, h) for (other, _), h in zip(covers, hidden, strict=True)] + [(cover, np.zeros(size, bool))]
        under = image[window]
        under += alpha[..., None] * (_colour(rng, under[alpha >= 0.5].mean(axis=0)) - under)
        boxes.append([*outline.min(axis=0), *outline.max(axis=0)])
        labels.append(label)
    noise = 6 * rng.standard_normal(image.shape, np.float32)
    image = np.rint((image + noise).clip(0, 255)).astype(np.uint8)
    height, width = size
    corners = np.array(boxes, np.float32).reshape(-1, 4).clip(0, [width, height, width, height])
    return image, corners.astype(np.float32), np.array(labels, np.int32)


def _outline(rng: np.random.Generator, label: int, height: int, width: int) -> np.ndarray:
    """Points (x, y) of a shape's outline, float [P, 2]: its centre is inside the image, its size and turn random."""
    radius = float(np.exp(rng.uniform(np.log(8), np.log(30))))
    centre = rng.uniform(0.6 * radius, np.array([width, height]) - 0.6 * radius)
    corners = {"disc": 48, "square": 4, "triangle": 3, "star": 10}[CLASSES[label]]
    angles = rng.uniform(0, 2 * math.pi) + np.arange(corners) * (2 * math.pi / corners)
    lengths = np.where(np.arange(corners) % 2, 0.45, 1.0) if CLASSES[label] == "star" else np.ones(corners)
    return centre + radius * lengths[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _alpha(outline: np.ndarray, height: int, width: int) -> tuple[np.ndarray, tuple[slice, slice]]:
    """Share of each pixel that is inside the outline, float32 [h, w], in a window (rows, columns) of the image."""
    left, top = np.floor(outline.min(axis=0).clip(0)).astype(int).tolist()
    right, bottom = np.ceil(outline.max(axis=0).clip(0, [width, height])).astype(int).tolist()
    large = Image.new("L", ((right - left) * SCALE, (bottom - top) * SCALE))
    # Pillow fills the pixels at coordinates, whose centres are half a pixel off.
    points = (outline - [left, top]) * SCALE - 0.5
    ImageDraw.Draw(large).polygon(points.ravel().tolist(), fill=255)
    return np.asarray(large.reduce(SCALE), np.float32) / 255, (slice(top, bottom), slice(left, right))


def _colour(rng: np.random.Generator, under: np.ndarray) -> np.ndarray:
    """Draw a colour that differs from what it covers, float32 [3]."""
    while True:
        colour = rng.uniform(0, 256, 3).astype(np.float32)
        if np.abs(colour - under).max() > 70:
            return colour


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth colours with thin lines and blotches in front, float32 [H, W, 3] in 0..255."""
    coarse = rng.integers(40, 216, (3, 4, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(4, 12))):
        x1, y1, x2, y2 = (float(v) for v in rng.uniform(0, 1, 4) * [width, height, width, height])
        pen.line((x1, y1, x2, y2), fill=tuple(rng.integers(0, 256, 3).tolist()), width=int(rng.integers(1, 3)))
    for _ in range(int(rng.integers(8, 24))):
        x, y, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.7, 2.5)
        pen.ellipse((x - r, y - r, x + r, y + r), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return np.asarray(picture).astype(np.float32)
