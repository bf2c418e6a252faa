"""Object sets: images with boxes, where they are read from, how they are split, scaled and padded.

`load(name)` returns an `ObjectSet` with three splits, each `Objects`. What a batch holds is in `train.detect.batches`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from train.data.decode import silence_pillow
from train.data.folder import PassedOver, note_passed
from train.data.prepared import open_prepared
from train.data.sets import MEMORY_LIMIT, complete, digest_of, share_of
from train.data.sources import report_broken
from train.detect import coco, shapes, voc, yolo
from train.detect.annotations import Reader, annotated, cleaned
from train.detect.layout import Layout, Size, check_buckets, check_fits, choose_buckets, fit
from train.detect.objects import Annotated, Objects, decode_together, read_header
from train.errors import UsageError
from train.paths import local_path, split_prefix

READERS: dict[str, Reader] = {"coco:": coco.read, "voc:": voc.read, "yolo:": yolo.read}
ROWS = 4  # rows for boxes are a multiple of this


@dataclass(frozen=True, kw_only=True)
class ObjectSet:
    """Three splits of one object set. `test` is evaluated once, at the end; decisions are made on `validation`.

    `passed_over` has a line for each box, annotation or image that was left out. `images` says which images and boxes
    the splits hold, {split: {"count", "digest"}}, so that a run can tell if others are there when it is resumed.
    """

    name: str
    classes: tuple[str, ...]
    train: Objects
    validation: Objects
    test: Objects
    passed_over: tuple[str, ...] = ()
    images: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def splits(self) -> dict[str, Objects]:
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of the images of the largest bucket."""
        return (*self.layout.buckets[-1], 3)

    @property
    def layout(self) -> Layout:
        """Bucket sizes and rows for boxes, the same in all splits."""
        return self.train.layout


def load(
    name: str,
    *,
    dir: str | Path | None = None,
    min_size: int | None = None,
    max_size: int | None = None,
    buckets: Sequence[Size] = (),
    validation: float = 0.1,
    split_seed: int = 0,
    fraction: float = 1.0,
    broken: Literal["refuse", "skip"] = "refuse",
    memory_limit: int = MEMORY_LIMIT,
) -> ObjectSet:
    """Load an object set by name, split three ways, into memory if its scaled images take at most `memory_limit` bytes.

    Args:
      name: `shapes`, `coco:FOLDER` or `coco:FILE.json`, `voc:DIR`, `yolo:DIR` (see the modules of these names), or an
        `objects` set of TFDS prepared as ArrayRecord in `dir`: `NAME`, `NAME/VERSION` or `NAME/CONFIG/VERSION`.
      dir: the TFDS data_dir; None is TFDS's default, `TFDS_DATA_DIR` or a folder in the user's home.
      min_size, max_size: pixels of the short side that images are scaled to, and the most of the long side; see `fit`.
      buckets: (height, width) that images are padded to, multiples of 32; () chooses at most three from their sizes.
      validation: fraction of the training split held back where the set has no validation split, in (0, 1); also
        the fraction held back for test where there is no test split either.
      split_seed: seed of that split; not the run's seed, so that all runs hold back the same images.
      fraction: fraction of the training split to keep, in (0, 1]; a smaller one is a subset of any larger one.
      broken: `refuse` or `skip` images that cannot be decoded, and those whose annotations cannot be read.

    Raises:
      UsageError: no such set, an empty or broken one, labels out of range, images larger than every bucket.
    """
    if not 0 < validation < 1:
        raise UsageError(f"the validation fraction must lie between 0 and 1, got {validation}")
    if not 0 < fraction <= 1:
        raise UsageError(f"the fraction of the training split must lie above 0 and be at most 1, got {fraction}")
    if min(size for size in (min_size, max_size, 1) if size is not None) < 1:
        raise UsageError(f"the sizes of images must be at least 1, got {min_size} and {max_size}")
    silence_pillow()
    passed: PassedOver = []
    lines: list[str] = []
    kind, where = split_prefix(name)
    if name == "shapes":
        classes, found = shapes.read()
    elif kind in READERS:
        classes, on_file = READERS[kind](where, passed, lines)
        found = annotated(classes, on_file, passed, lines)
    else:
        classes, found = _tfds(name, local_path(dir) if dir else None, passed, lines)
    note_passed(name, passed)
    count = sum(map(len, found.values())) + len(lines)
    report_broken(lines, count, broken == "skip", "images or their annotations cannot be read")

    # Split, then lay out: the sizes of all images, and their largest number of boxes, decide on the buckets.
    whole = Layout(min_size=min_size, max_size=max_size, buckets=(), rows=0)
    splits = complete({s: Objects(examples=tuple(x), layout=whole) for s, x in found.items()}, validation, split_seed)
    if fraction < 1:
        train = splits["train"]
        splits["train"] = train.subset(share_of(np.zeros(len(train), int), fraction, split_seed))
    _check(name, splits)
    layout = _layout(splits, whole, buckets)
    splits = {split: replace(source, layout=layout) for split, source in splits.items()}
    if sum(decoded_bytes(source) for source in splits.values()) <= memory_limit:
        count = sum(map(len, splits.values()))
        decoded, unread = decode_together(list(splits.values()))
        report_broken(unread, count, broken == "skip")
        splits = dict(zip(splits, decoded, strict=True))
        _check(name, splits)
        lines += unread
    over = (*(f"{where}: {reason}" for where, reason in passed), *lines)
    images = {split: _fingerprint(source) for split, source in splits.items()}
    return ObjectSet(name=name, classes=classes, passed_over=over, images=images, **splits)


def _layout(splits: dict[str, Objects], whole: Layout, buckets: Sequence[Size]) -> Layout:
    examples = [one for source in splits.values() for one in source.examples]
    sizes = [one.size for one in examples]
    if buckets:
        chosen = check_buckets(buckets)
    else:
        chosen = choose_buckets([fit(size, whole.min_size, whole.max_size)[0] for size in sizes])
    most = max(len(one.labels) for one in examples)
    layout = replace(whole, buckets=chosen, rows=max(-(-most // ROWS), 1) * ROWS)
    check_fits([one.name for one in examples], sizes, layout)
    return layout


def decoded_bytes(source: Objects) -> int:
    """Bytes that a split's scaled images take."""
    layout = source.layout
    sizes = (fit(one.size, layout.min_size, layout.max_size)[0] for one in source.examples)
    return sum(3 * height * width for height, width in sizes)


def _check(name: str, splits: dict[str, Objects]) -> None:
    for split, source in splits.items():
        if len(source) == 0:
            raise UsageError(f"{name} {split} holds no images")
    if not has_objects(splits["train"]):
        raise UsageError(f"{name} train holds no objects: none of its images has a box")


def has_objects(source: Objects) -> bool:
    """Whether a split has an object that counts."""
    return any((~one.crowd).any() for one in source.examples)


def _fingerprint(source: Objects) -> dict[str, Any]:
    """Describe which images a split holds: their `count`, and a `digest` of their names, without folders, and boxes."""
    lines = []
    for one in source.examples:
        lines += [os.path.basename(one.name), np.round(one.boxes, 1).tolist(), one.labels.tolist(), one.crowd.tolist()]
    return {"count": len(source), "digest": digest_of(list(map(str, lines)))}


def _tfds(
    name: str, data_dir: Path | None, passed: PassedOver, broken: list[str]
) -> tuple[tuple[str, ...], dict[str, list[Annotated]]]:
    """Read (classes, {split: its images}) of a prepared set, with a line in `broken` for each unreadable image."""
    from tensorflow_datasets.proto import tf_example_pb2

    opened = open_prepared(name, data_dir, reader="coco:, voc: or yolo")
    classes, crowd_key = _features(opened.features, name)

    # VOC counts pixels from 1 and includes both ends (see `train.detect.voc`); TFDS keeps that.
    first_pixel = np.array([1, 1, 0, 0]) if name.split("/")[0] == "voc" else np.zeros(4)

    def parsed(record: bytes) -> Any:
        return tf_example_pb2.Example.FromString(bytes(record)).features.feature

    def read(split: str, position: int, record: bytes) -> Annotated | str:
        values, where = parsed(record), f"{position} of {name} {split}"
        header = read_header(values["image"].bytes_list.value[0])
        if isinstance(header, str):
            return f"cannot read image {where}: {header}"
        height, width = header[0]
        # Relative (y1, x1, y2, x2), of the image as it is stored.
        relative = np.array(values["objects/bbox"].float_list.value, np.float64).reshape(-1, 4)
        labels = np.array(values["objects/label"].int64_list.value, np.int64)
        if len(labels) != len(relative):
            raise UsageError(f"image {where} has {len(relative)} boxes, but {len(labels)} labels")
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
            raise UsageError(f"image {where} has labels out of range: there are {len(classes)} classes")
        crowd = np.array(values[crowd_key].int64_list.value if crowd_key else np.zeros(len(labels)), bool)
        boxes = relative[:, [1, 0, 3, 2]] * [width, height, width, height]
        boxes -= first_pixel
        boxes, keep = cleaned(where, boxes, header[0], passed)
        records = opened.records[split]
        return Annotated(
            name=where,
            read=lambda: parsed(records[position])["image"].bytes_list.value[0],
            size=header[0],
            turned=False,
            boxes=boxes,
            labels=labels[keep].astype(np.int32),
            crowd=crowd[keep],
        )

    splits = {}
    for split, records in opened.records.items():
        found = [read(split, i, records[i]) for i in range(len(records))]
        broken += [line for line in found if isinstance(line, str)]
        splits[split] = [one for one in found if not isinstance(one, str)]
    if "test" in splits and not any(len(one.labels) for one in splits["test"]):
        del splits["test"]  # COCO's test split has no annotations, so it cannot be evaluated
    return classes, splits


def _features(features: Any, name: str) -> tuple[tuple[str, ...], str | None]:
    """Check the features of an `objects` set: its (classes, key of its crowds)."""
    import tensorflow_datasets as tfds

    known = dict(features.items())
    objects: Any = getattr(known.get("objects"), "feature", None)
    keys = set(objects.keys()) if hasattr(objects, "keys") else set()
    if not ({"bbox", "label"} <= keys and isinstance(known.get("image"), tfds.features.Image)):
        raise UsageError(f"{name} is not an object set: it needs an image, and objects with bbox and label")
    form = getattr(objects["bbox"], "bbox_format", None)
    if form is not None and getattr(form, "value", form) != "REL_YXYX":
        raise UsageError(f"{name} has boxes as {getattr(form, 'value', form)}, not as TFDS's usual REL_YXYX")
    crowd = next((f"objects/{key}" for key in ("is_crowd", "is_difficult") if key in keys), None)
    return tuple(objects["label"].names), crowd
