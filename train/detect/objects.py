"""Annotated images, and splits of them: scaled when they are decoded, and padded to a bucket when they are read."""

import contextlib
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from train.data.decode import Unreadable, fault, orientation, to_mode, upright
from train.data.sources import BrokenImage, Example
from train.detect.layout import Layout, Size, fit


@dataclass(frozen=True, kw_only=True)
class Annotated:
    """One image and the objects in it.

    Attributes:
      name: of the image, for messages: a path, or a position in a set.
      read: returns the encoded image, or its pixels uint8 [H, W, 3].
      size: original (height, width), after the EXIF orientation where `turned`.
      boxes: float32 [n, 4] (x1, y1, x2, y2) in original pixels, inside the image.
      labels: int32 [n], classes 0..K-1.
      crowd: bool [n], objects that are neither trained on nor counted against a detector.
      turned: whether the EXIF orientation is applied, which the boxes then refer to.
    """

    name: str
    read: Callable[[], bytes | np.ndarray]
    size: Size
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    turned: bool = True

    def decode(self, min_size: int | None, max_size: int | None) -> np.ndarray:
        """Decode and scale the image to uint8 [h, w, 3], with the size of `fit`.

        Raises:
          BrokenImage: it cannot be read or decoded.
        """
        size, scale = fit(self.size, min_size, max_size)
        try:
            data = self.read()
            return decode_scaled(data, self.size, size, scale, self.turned)
        except (OSError, Unreadable) as error:
            raise BrokenImage(f"cannot read image {self.name}: {fault(error)}") from None


@dataclass(frozen=True, kw_only=True)
class Objects:
    """A split of an object set: `source[i]` is an example of `train.detect.batches`, padded to its bucket.

    `pixels` are the scaled images where they are in memory; without, each is decoded on access.
    """

    examples: tuple[Annotated, ...]
    layout: Layout
    pixels: tuple[np.ndarray, ...] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.examples)

    def subset(self, indices: np.ndarray) -> "Objects":
        """Make a split of the examples at these positions."""
        pick = indices.tolist()
        pixels = None if self.pixels is None else tuple(self.pixels[i] for i in pick)
        return replace(self, examples=tuple(self.examples[i] for i in pick), pixels=pixels)

    @cached_property
    def bucket(self) -> np.ndarray:
        """Index of each example's bucket, int32 [N]."""
        return np.array([self.layout.bucket_of(example.size) for example in self.examples], np.int32)

    def __getitem__(self, index: int) -> Example:
        one, layout = self.examples[index], self.layout
        pixels = self.pixels[index] if self.pixels is not None else one.decode(layout.min_size, layout.max_size)
        (height, width), scale = fit(one.size, layout.min_size, layout.max_size)
        image = np.zeros((*layout.buckets[self.bucket[index]], 3), np.uint8)
        image[:height, :width] = pixels
        # Less than a pixel of the image, and hardly ever a whole box, may be cut off at the right and below.
        corners = np.minimum(one.boxes * np.float32(scale), np.array([width, height] * 2, np.float32))
        kept = np.all(corners[:, :2] < corners[:, 2:], axis=1)
        count = int(np.sum(kept))
        boxes, crowd = np.zeros((layout.rows, 4), np.float32), np.zeros(layout.rows, bool)
        labels = np.full(layout.rows, -1, np.int32)
        boxes[:count], labels[:count], crowd[:count] = corners[kept], one.labels[kept], one.crowd[kept]
        return {
            "image": image,
            "size": np.array([height, width], np.int32),
            "boxes": boxes,
            "labels": labels,
            "crowd": crowd,
            "id": np.int32(index),
            "scale": np.float32(scale),
        }


def decode_scaled(data: Any, original: Size, size: Size, scale: float, turned: bool) -> np.ndarray:
    """Decode an image (or take its pixels) of `original` size, and resample it to uint8 [h, w, 3] of `size`.

    Raises:
      Unreadable: it is damaged, or its size is not `original`.
    """
    # Pillow's readers raise exceptions of any type for malformed files.
    try:
        with Image.fromarray(data) if isinstance(data, np.ndarray) else Image.open(io.BytesIO(data)) as file:
            width = file.width
            file.draft(None, (max(size), max(size)))  # JPEG can decode directly at 1/2, 1/4 ... of its size
            reduced = next(n for n in (1, 2, 4, 8) if -(-width // n) == file.width)
            image = to_mode(upright(file) if turned else file, "RGB")
            if tuple(-(-side // reduced) for side in original) != image.size[::-1]:
                raise ValueError(f"its size has changed from {original[0]}x{original[1]}")
            if image.size != size[::-1] or scale != 1:
                right, bottom = (min(s / scale / reduced, e) for s, e in zip(size[::-1], image.size, strict=True))
                image = image.resize(size[::-1], Image.Resampling.BILINEAR, box=(0, 0, right, bottom))
            return np.asarray(image)
    except Exception as error:
        raise Unreadable(fault(error, b"" if isinstance(data, np.ndarray) else data[:100])) from None


def read_header(data: bytes | str) -> tuple[Size, bool] | str:
    """Read an image's header, from bytes or a path: (stored size, whether EXIF swaps its sides), or what is wrong."""
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            return (image.height, image.width), orientation(image) >= 5
    except Exception as error:  # as for decoding
        if isinstance(data, bytes):
            return fault(error, data[:100])
        with contextlib.suppress(OSError, ValueError), open(data, "rb") as file:
            return fault(error, file.read(100))
        return fault(error)


def decode_together(splits: Sequence[Objects]) -> tuple[list[Objects], list[str]]:
    """Decode splits into memory on all cores: (the splits without broken images, a line for each of those)."""

    def pixels(one: Annotated, layout: Layout) -> np.ndarray | str:
        try:
            return one.decode(layout.min_size, layout.max_size)
        except BrokenImage as error:
            return str(error)

    decoded, broken = [], []
    images: list[np.ndarray | str]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for split in splits:
            images = list(pool.map(lambda one, layout=split.layout: pixels(one, layout), split.examples))
            broken += [line for line in images if isinstance(line, str)]
            good = np.array([i for i, image in enumerate(images) if not isinstance(image, str)], int)
            whole = tuple(image for image in images if not isinstance(image, str))
            decoded.append(replace(split.subset(good), pixels=whole))
    return decoded, broken
