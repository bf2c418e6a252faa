"""Image sets: their content, where they are read from, and how they are split.

`load(name)` returns a `Dataset` with three splits. A split has `len(source)` and
`source[i] -> {"image": uint8 [H, W, C], "label": int32}`, which is also what Grain reads from. Small sets are decoded
once into `Arrays`; large ones stay encoded and are decoded by `train.data.batches` while training runs.
"""

import hashlib
import math
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
from PIL import Image

from train.data import decoded, folder
from train.data.decode import channels_first, silence_pillow
from train.data.prepared import open_prepared
from train.data.sources import (
    Arrays,
    Encoded,
    decode_readable,
    differ_in_size,
    image_shape,
    report_broken,
    shortened,
    stacked,
)
from train.errors import UsageError
from train.paths import local_path

MEMORY_LIMIT = 2 << 30  # bytes: sets that decode to no more than this live in memory

MANY_FILES = 100_000  # files of a folder; with more, `broken="refuse"` finds broken ones when they are decoded


class ImageSet(Protocol):
    """A set of any pipeline, as far as a run folder describes it: a `Dataset`, or `train.detect.sets.ObjectSet`."""

    @property
    def name(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def passed_over(self) -> tuple[str, ...]: ...
    @property
    def images(self) -> dict[str, dict[str, Any]]: ...
    @property
    def image_shape(self) -> tuple[int, int, int]: ...


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Three splits of one set. `test` is evaluated once, at the end; decisions are made on `validation`.

    `passed_over` has a line for each file that was left out: its path and the reason. `images` says which images the
    splits hold, {split: {"count", "digest"}}, so that a run can tell if others are there when it is resumed; empty if
    that is not known.
    """

    name: str
    classes: tuple[str, ...]
    train: Arrays | Encoded
    validation: Arrays | Encoded
    test: Arrays | Encoded
    passed_over: tuple[str, ...] = ()
    images: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        source = self.train
        # With a size, no image is decoded: a broken one is to be named with all the others.
        height, width, channels = image_shape(source) if isinstance(source, Encoded) else source.images.shape[1:]
        return height, width, channels

    @property
    def splits(self) -> dict[str, Arrays | Encoded]:
        return {"train": self.train, "validation": self.validation, "test": self.test}


# ---- loading ------------------------------------------------------------------------------------------------------


def load(
    name: str,
    *,
    dir: str | Path | None = None,
    image_size: int | None = None,
    validation: float = 0.1,
    split_seed: int = 0,
    fraction: float = 1.0,
    random_crop: bool = False,
    broken: Literal["refuse", "skip"] = "refuse",
    memory_limit: int = MEMORY_LIMIT,
    cache: Path | None = None,
) -> Dataset:
    """Load an image set by name, split three ways, into memory if it decodes to at most `memory_limit` bytes.

    Args:
      name: `digits`, `synthetic`, `folder:DIR` (class = subfolder, with or without train/validation/test above), or a
        TFDS set prepared as ArrayRecord in `dir`: `NAME`, `NAME/VERSION` or `NAME/CONFIG/VERSION`.
      dir: the TFDS data_dir; None is TFDS's default, `TFDS_DATA_DIR` or a folder in the user's home.
      image_size: side in pixels of the square that images are resized and cropped to; None keeps their size, which must
        then be the same for all.
      validation: fraction of the training split held back where the set has no validation split, in (0, 1); also
        the fraction held back for test where there is no test split either.
      split_seed: seed of that split; not the run's seed, so that all runs hold back the same examples.
      fraction: fraction of the training split to keep, in (0, 1], sampled per class with `split_seed`; a smaller
        fraction is a subset of any larger one.
      random_crop: see `Encoded`; the training split is then decoded again in every epoch.
      broken: `refuse` or `skip` images that cannot be decoded. Of a folder with more than `MANY_FILES` that does not
        fit in memory, `refuse` finds them only when it decodes them; `skip` looks at all files first.
      memory_limit: see `in_memory`; 0 leaves everything encoded, for `in_memory` to read and check later.
      cache: see `in_memory`.

    Raises:
      UsageError: no such set, an empty or broken one, labels out of range.
    """
    if not 0 < validation < 1:
        raise UsageError(f"the validation fraction must lie between 0 and 1, got {validation}")
    if not 0 < fraction <= 1:
        raise UsageError(f"the fraction of the training split must lie above 0 and be at most 1, got {fraction}")
    if image_size is not None and image_size < 1:
        raise UsageError(f"the size of images must be at least 1, got {image_size}")
    silence_pillow()
    passed_over: tuple[str, ...] = ()
    if name == "synthetic":
        classes, splits = _synthetic(image_size or 32)
    elif name.startswith("folder:"):
        classes, splits, passed_over = folder.read(name.removeprefix("folder:"), size=image_size)
        count = sum(map(len, splits.values()))
        decoded_once = image_size is not None and count * 3 * image_size**2 <= MEMORY_LIMIT and not random_crop
        # What is decoded once is checked by that, and opening millions of files takes many minutes.
        checked = broken != "skip" and image_size is not None and (decoded_once or count > MANY_FILES)
        if not checked and cache and not random_crop:
            # If the decoded set is kept with all of these images, they were checked when it was decoded.
            checked = decoded.exists(cache, name, _divided(splits, validation, split_seed, fraction))
        if not checked:
            whole = splits
            splits, lines = folder.check(name, whole, skip_broken=broken == "skip")
            _check_classes_left(classes, whole, splits)
            passed_over += tuple(lines)
    else:
        classes, splits = _tfds(name, local_path(dir) if dir else None, image_size)
    splits = _divided(splits, validation, split_seed, fraction)
    if random_crop:
        if image_size is None:
            raise UsageError("--data.random-crop needs --data.image-size, the side that boxes are resized to")
        if not isinstance(splits["train"], Encoded):
            raise UsageError(
                f"{name} is not decoded, so nothing can be cropped while decoding: drop --data.random-crop"
            )
        splits["train"] = replace(splits["train"], random_crop=True)
    images = {split: _fingerprint(source) for split, source in splits.items()}
    dataset = _checked(Dataset(name=name, classes=classes, passed_over=passed_over, images=images, **splits))
    if memory_limit == 0:
        return dataset
    return in_memory(dataset, skip_broken=broken == "skip", limit=memory_limit, cache=cache)


def in_memory(
    dataset: Dataset, *, skip_broken: bool = False, limit: int = MEMORY_LIMIT, cache: Path | None = None
) -> Dataset:
    """Decode a set's encoded splits into memory, if they take at most `limit` bytes together, else leave them.

    Splits with random crops stay encoded: they are decoded again in every epoch. `cache` is a folder that keeps what
    was decoded, so that the next call maps a file into memory instead; its arrays are read-only. None keeps nothing.

    Raises:
      UsageError: images that cannot be decoded (unless they are skipped), or that differ in size.
    """
    encoded = _decoded_once(dataset)
    shapes = {image_shape(source) for source in encoded.values()}
    if len({shape for shape in shapes if any(shape)}) > 1:
        raise differ_in_size(f"the splits of {dataset.name}")
    if (size := _decoded_bytes(encoded)) > limit:
        return dataset
    file = decoded.file_for(cache, dataset.name, encoded) if cache and size >= decoded.SMALLEST else None
    kept = decoded.read(file, dataset.name) if file else None
    if kept is not None:
        arrays, broken = kept
        report_broken(broken, sum(map(len, encoded.values())), skip_broken)
    else:
        # Decode all splits before broken images are reported: the error names those of all.
        read = {split: decode_readable(source) for split, source in encoded.items()}
        broken = sorted(line for _, lines in read.values() for line in lines)
        report_broken(broken, sum(map(len, encoded.values())), skip_broken)
        arrays = {split: stacked(read.pop(split)[0]) for split in encoded}
        if file:
            decoded.write(file, arrays, broken)
    if broken:
        _check_classes_left(dataset.classes, encoded, arrays)
    return _checked(replace(dataset, passed_over=(*dataset.passed_over, *broken), **cast(Any, arrays)))


def _check_classes_left(
    classes: Sequence[str], before: Mapping[str, Encoded], after: Mapping[str, Arrays | Encoded]
) -> None:
    """Check that skipping broken images has left some of every class.

    Raises:
      UsageError: none of a class can be read.
    """

    def labels(splits: Mapping[str, Arrays | Encoded]) -> set[int]:
        return {label for source in splits.values() for label in np.unique(known_labels(source)).tolist()}

    if all(source.labels is not None for source in before.values()) and (lost := labels(before) - labels(after)):
        raise UsageError(f"no image of {shortened([classes[label] for label in sorted(lost)])} can be read")


def fits_in_memory(dataset: Dataset) -> bool:
    """Whether the training images are in memory, or `in_memory` will decode them into it."""
    encoded = _decoded_once(dataset)
    return isinstance(dataset.train, Arrays) or ("train" in encoded and _decoded_bytes(encoded) <= MEMORY_LIMIT)


def _decoded_once(dataset: Dataset) -> dict[str, Encoded]:
    """The encoded splits without random crops, which are decoded in every epoch."""
    return {s: x for s, x in dataset.splits.items() if isinstance(x, Encoded) and not x.random_crop}


def _decoded_bytes(encoded: dict[str, Encoded]) -> int:
    return sum(len(source) * math.prod(image_shape(source)) for source in encoded.values())


def _fingerprint(source: Arrays | Encoded) -> dict[str, Any]:
    """Describe which images a split holds: their `count`, and a `digest` of their names, without folders, and labels.

    Labels that can only be read with the images are left out.
    """
    if isinstance(source, Arrays):
        names, labels = [], source.labels
    else:
        names = [os.path.basename(source.name(position)) for position in source.indices.tolist()]
        labels = np.zeros(0) if source.labels is None else source.labels[source.indices]
    return {"count": len(source), "digest": digest_of([*names, *map(str, labels.tolist())])}


def digest_of(lines: Sequence[str]) -> str:
    """Sixteen hex digits that stand for these lines, whatever the Unicode form of names."""
    text = unicodedata.normalize("NFC", "\n".join(lines))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _checked(dataset: Dataset) -> Dataset:
    """Check that splits hold images, and labels in memory lie in 0..classes-1; encoded ones are checked when read."""
    for split, source in dataset.splits.items():
        if len(source) == 0:
            raise UsageError(f"{dataset.name} {split} holds no images")
        if isinstance(source, Arrays):
            low, high, classes = source.labels.min(), source.labels.max(), len(dataset.classes)
            if low < 0 or high >= classes:
                span = f"there are {classes} classes (0 to {classes - 1})"
                raise UsageError(f"{dataset.name} {split}: labels run from {low} to {high}, but {span}")
    return dataset


def from_arrays(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    classes: Sequence[str] | None = None,
    test: tuple[np.ndarray, np.ndarray] | None = None,
    validation: float = 0.1,
    split_seed: int = 0,
) -> Dataset:
    """Make a `Dataset` of arrays in memory, images uint8 [N, H, W, C] and integer labels [N].

    `test` holds the test split's images and labels; without it a second fraction `validation` is held back for test.

    Raises:
      UsageError: arrays of a different kind, labels out of range, too few images.
    """
    images, labels, *held = map(np.asarray, (images, labels, *(test or ())))
    if images.ndim == 4 and channels_first(images.shape):
        raise UsageError(f"images must be [N, H, W, C], not {images.shape}: np.moveaxis(images, 1, -1) converts them")
    splits: dict[str, Arrays | Encoded] = {"train": Arrays(images=images, labels=labels)}
    if held:
        splits["test"] = Arrays(images=held[0], labels=held[1])
    names = tuple(classes) if classes else tuple(str(c) for c in range(int(labels.max(initial=-1)) + 1))
    parts: dict[str, Any] = complete(splits, validation, split_seed)
    known = {split: _fingerprint(source) for split, source in parts.items()}
    return _checked(Dataset(name="arrays", classes=names, images=known, **parts))


def split_indices(count: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw sorted indices (kept, held back): `round(count * fraction)` are held back, at least one, but never all."""
    order = np.random.default_rng(seed).permutation(count)
    held = min(max(round(count * fraction), 1), count - 1)
    return np.sort(order[held:]), np.sort(order[:held])


def split_by_class(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """As `split_indices`, but drawn within each class, so that each class of two or more examples appears in both."""
    parts = []
    for label, members in _by_class(labels):
        parts.append(members[split_indices(len(members), fraction, seed + label)[1]])
    held = np.sort(np.concatenate(parts))
    return np.setdiff1d(np.arange(len(labels)), held), held


def share_of(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draw sorted indices of `fraction` of each class, at least one example per class."""
    parts = []
    for label, members in _by_class(labels):
        order = np.random.default_rng([seed, label]).permutation(members)
        parts.append(order[: max(round(len(members) * fraction), 1)])
    return np.sort(np.concatenate(parts))


def _by_class(labels: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(label, sorted indices of its examples) for each label that occurs, sorting once instead of searching each."""
    present, starts = np.unique(np.sort(labels), return_index=True)
    members = np.split(np.argsort(labels, kind="stable"), starts[1:])
    return list(zip(present.tolist(), members, strict=True))


def known_labels(source: Arrays | Encoded) -> np.ndarray:
    """Read the labels of a split in order, int [N], without decoding its images."""
    if isinstance(source, Arrays):
        return source.labels
    if source.labels is not None:
        return source.labels[source.indices]
    positions = source.indices.tolist()
    read_many = source.read_many or (lambda some: list(map(source.read, some)))
    chunks = (positions[i : i + 1024] for i in range(0, len(positions), 1024))
    return np.array([label for chunk in chunks for _, label in read_many(chunk)])


def _divided(splits: dict[str, Any], validation: float, seed: int, fraction: float) -> dict[str, Any]:
    """Make train, validation and test splits from those that a set has, with a fraction of the training images."""
    splits = complete(splits, validation, seed)
    if fraction < 1:
        splits["train"] = splits["train"].subset(share_of(known_labels(splits["train"]), fraction, seed))
    return splits


def complete(splits: dict[str, Any], fraction: float, seed: int) -> dict[str, Any]:
    """Make train, validation and test splits from those that a set has, which have `len` and `subset(indices)`."""
    splits = dict(splits)
    if "test" not in splits and "validation" in splits:
        # A lone held-out split (ImageNet's "validation") is what results are reported on: the test split.
        splits["test"] = splits.pop("validation")
    for missing in ("test", "validation"):
        if missing not in splits:
            train = splits["train"]
            if len(train) < 3:
                raise UsageError(f"{len(train)} images are too few to hold some back for {missing}")
            if isinstance(train, Encoded) and train.labels is not None:
                kept, held = split_by_class(train.labels[train.indices], fraction, seed)
            else:
                kept, held = split_indices(len(train), fraction, seed)
            if len(held) == 0:
                raise UsageError(f"a class needs two images or more to hold some back for {missing}")
            splits["train"], splits[missing] = train.subset(kept), train.subset(held)
    return splits


def _synthetic(size: int) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Make seeded noise over one smooth pattern per class, for trials and speed measurements, not for accuracy."""
    classes, rng = 10, np.random.default_rng(0)
    coarse = rng.integers(64, 192, (classes, 4, 4, 3), dtype=np.uint8)
    patterns = np.stack([np.asarray(Image.fromarray(c).resize((size, size))) for c in coarse]).astype(np.int16)

    def split(n: int) -> Arrays:
        labels = rng.integers(0, classes, n, dtype=np.int32)
        noise = rng.integers(-64, 64, (n, size, size, 3), dtype=np.int16)
        return Arrays(images=(patterns[labels] + noise).clip(0, 255).astype(np.uint8), labels=labels)

    return tuple(map(str, range(classes))), {"train": split(2048), "test": split(512)}


def _tfds(name: str, data_dir: Path | None, size: int | None) -> tuple[tuple[str, ...], dict[str, Any]]:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.proto import tf_example_pb2

    opened = open_prepared(name, data_dir)
    folder, sources = opened.folder, opened.records
    image_key, image = _feature(opened.features, tfds.features.Image, name)
    label_key, label = _feature(opened.features, tfds.features.ClassLabel, name)
    if None in image.shape[:2] and size is None:
        raise differ_in_size(f"the images of {name}")

    def parsed(record: bytes) -> tuple[bytes, int]:
        values = tf_example_pb2.Example.FromString(bytes(record)).features.feature
        return values[image_key].bytes_list.value[0], values[label_key].int64_list.value[0]

    if "test" in sources and len(sources["test"]) and parsed(sources["test"][0])[1] == -1:
        del sources["test"]  # ImageNet's test split has no labels, so it cannot be evaluated

    def encoded(split: str, records: Any) -> Encoded:
        def content(position: int, record: bytes) -> tuple[bytes, int]:
            data, number = parsed(record)
            if not 0 <= number < label.num_classes:
                raise UsageError(f"label {number} of image {position} of {name} {split} is out of range")
            return data, number

        return Encoded(
            read=lambda position: content(position, records[position]),
            read_many=lambda positions: list(map(content, positions, records.__getitems__(positions))),
            name=lambda position: f"{position} of {name} {split}",
            indices=np.arange(len(records)),
            size=size,
            channels=1 if image.shape[-1] == 1 else 3,
            files=[*opened.files[split], *described],
        )

    described = [str(folder / name) for name in ("dataset_info.json", "features.json")]
    return tuple(label.names), {split: encoded(split, records) for split, records in sources.items()}


def _feature(features: Any, kind: type, name: str) -> tuple[str, Any]:
    for key, feature in features.items():
        if isinstance(feature, kind):
            return key, feature
    raise UsageError(f"{name} is not a classification set: it has no {kind.__name__} feature")
