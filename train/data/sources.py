"""Sources: splits of an image set, in memory or decoded on access, and decoding whole splits into memory."""

import contextlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from train.data.decode import Record, Unreadable, decode_image, decode_many, fault
from train.errors import UsageError

Example = dict[str, Any]

SMALL_IMAGE = 96 * 96  # pixels
CHUNK = 256  # images that are decoded as one task
MANY_IMAGES = 8192  # small images: with fewer, starting processes takes as long as they save


class BrokenImage(UsageError):
    """An image that cannot be decoded; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Arrays:
    """A split in memory: `images` uint8 [N, H, W, C], `labels` int32 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != np.uint8 or images.ndim != 4:
            raise UsageError(f"images must be uint8 [N, H, W, C], not {images.dtype} {images.shape}")
        if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise UsageError(f"labels must be integers [{len(images)}], not {labels.dtype} {labels.shape}")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return {"image": self.images[index], "label": np.int32(self.labels[index])}

    def subset(self, indices: np.ndarray) -> "Arrays":
        return Arrays(images=self.images[indices], labels=self.labels[indices])


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A split that is decoded on access.

    Attributes:
      read: position -> (encoded image, label).
      name: position -> name of the image for error messages.
      indices: positions in this split.
      size: side of the square that images are resized and cropped to; None keeps images as they are.
      channels: 1 or 3.
      random_crop: whether training crops a random box from the full image while decoding, instead of the centre.
      read_many: `read` for many positions at once, if that is faster than one by one.
      labels: label of each position, if known without reading.
      files: paths of the files that hold the images, if known; their times and sizes tell whether the split changed.
    """

    read: Callable[[int], tuple[bytes, int]]
    name: Callable[[int], str]
    indices: np.ndarray
    size: int | None
    channels: int
    random_crop: bool = False
    read_many: Callable[[Sequence[int]], Sequence[tuple[bytes, int]]] | None = None
    labels: np.ndarray | None = None
    files: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.example(index, None)

    def example(self, index: int, rng: np.random.Generator | None) -> Example:
        """Decode example `index`; `rng` draws the box if `random_crop` is set."""
        position = int(self.indices[index])
        box = rng if self.random_crop else None
        try:
            data, label = self.read(position)
            return {"image": decode_image(data, self.size, self.channels, rng=box), "label": np.int32(label)}
        except (OSError, Unreadable) as error:
            raise BrokenImage(self.broken_line(position, fault(error))) from None

    def broken_line(self, position: int, reason: str) -> str:
        """Say which image cannot be read, and why."""
        return f"cannot read image {self.name(position)}: {reason}"

    def subset(self, indices: np.ndarray) -> "Encoded":
        return replace(self, indices=self.indices[indices])


def sample(source: Arrays | Encoded, most: int | None) -> Arrays | Encoded:
    """At most `most` random images of a split (None: all), always the same, because splits may be ordered by class."""
    if most is None or len(source) <= most:
        return source
    return source.subset(np.sort(np.random.default_rng(0).permutation(len(source))[:most]))


def decode_all(source: Encoded) -> Arrays:
    """Decode a split into memory, in threads; one error names the broken images.

    Raises:
      UsageError: images that cannot be read, or that differ in size while `source.size` is None.
    """
    examples, broken = decode_readable(source)
    report_broken(broken, len(source), skip=False)
    return stacked(examples)


def decode_readable(source: Encoded) -> tuple[list[Example], list[str]]:
    """Decode a split on all cores to (its readable examples, a line for each broken image)."""

    def read(positions: list[int]) -> Sequence[Record]:
        if source.read_many is not None:
            return source.read_many(positions)
        return [_record(source, position) for position in positions]

    chunks = [chunk.tolist() for chunk in np.split(source.indices, range(CHUNK, len(source), CHUNK))]
    decode = partial(decode_many, size=source.size, channels=source.channels)
    threads = decode_threads(image_shape(source))
    if threads == 1 and len(source) >= MANY_IMAGES and (os.cpu_count() or 1) > 1:
        parts = _in_processes(decode, chunks, read)
    else:
        with ThreadPoolExecutor(threads) as pool:
            parts = list(pool.map(lambda chunk: decode(read(chunk)), chunks))
    examples, broken = [], []
    for position, (pixels, label) in zip(source.indices.tolist(), chain.from_iterable(parts), strict=True):
        if isinstance(pixels, str):
            broken.append(source.broken_line(position, pixels))
        else:
            examples.append({"image": pixels, "label": np.int32(label)})
    return examples, broken


def _record(source: Encoded, position: int) -> Record:
    """Read an encoded image and its label, or the reason why it cannot be read."""
    try:
        return source.read(position)
    except OSError as error:
        return fault(error), -1


def _in_processes(
    decode: Callable[[Sequence[Record]], Any],
    chunks: Sequence[list[int]],
    read: Callable[[list[int]], Sequence[Record]],
) -> list[Any]:
    """Map `decode` over what `read` returns for each chunk: read here, a few chunks ahead, decoded in processes."""
    # Unlike multiprocessing's, these processes do not import the user's script.
    from joblib.externals.loky import ProcessPoolExecutor

    count = os.cpu_count() or 1
    parts: list[Any] = []
    try:
        with ProcessPoolExecutor(count) as pool:
            for number, chunk in enumerate(chunks):
                parts.append(pool.submit(decode, read(chunk)))
                if number >= 3 * count:
                    parts[number - 3 * count] = parts[number - 3 * count].result()
            return [part.result() if isinstance(part, Future) else part for part in parts]
    except (BrokenExecutor, OSError):  # one was killed, as when memory runs out, or the system allows none
        return [decode(read(chunk)) for chunk in chunks]


def collate(examples: Sequence[Example]) -> Example:
    """Stack examples into a batch: each array by its name, with a leading axis."""
    return {name: np.stack([e[name] for e in examples]) for name in examples[0]}


def stacked(examples: Sequence[Example]) -> Arrays:
    """Stack decoded examples.

    Raises:
      UsageError: there are none, or they differ in size.
    """
    if not examples:
        raise UsageError("no image of this set can be read")
    if len({e["image"].shape for e in examples}) > 1:
        raise differ_in_size("the images of this set")
    rows = collate(examples)
    return Arrays(images=rows["image"], labels=rows["label"])


def decode_threads(shape: tuple[int, ...]) -> int:
    """Number of threads that decode images of this shape: one per core, or a single one for small images.

    Decoding a small image is mostly Python, which one thread runs at a time: a second thread loses a quarter of the
    speed at 32 pixels, and gains half at 224 (docs/speed.md).
    """
    return (os.cpu_count() or 1) if math.prod(shape[:2]) > SMALL_IMAGE else 1


def image_shape(source: Encoded) -> tuple[int, ...]:
    """Shape of decoded images: if no size is set, of the first that can be read; zeros if none can."""
    if source.size is not None:
        return (source.size, source.size, source.channels)
    for index in range(len(source)):
        with contextlib.suppress(BrokenImage):
            return source[index]["image"].shape
    return (0, 0, 0)


def differ_in_size(what: str) -> UsageError:
    """Make the error for images that cannot be stacked, as their sizes differ."""
    return UsageError(f"{what} differ in size: pass --data.image-size")


def shortened(names: Sequence[str], most: int = 4, separator: str = ", ") -> str:
    """List the first names, and the number of the others."""
    return separator.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def report_broken(broken: Sequence[str], of: int, skip: bool, what: str = "images cannot be decoded") -> None:
    """Refuse a set with broken images, or with `skip` warn about them: their number, and the first three by name."""
    if not broken:
        return
    line = f"{len(broken)} of {of} {what}: {shortened(broken, 3, '; ')}"
    if not skip:
        more = ", which lists all of them in the run's skipped.txt" if len(broken) > 3 else ""
        raise UsageError(f"{line}. Repair or remove them, or pass --data.broken skip{more}")
    print(f"warning: {line}; skipping them", file=sys.stderr)
