"""Image sets: what they hold, where they are read from, how they are split.

`load(name)` returns a `Dataset` with three splits. A split is a `Source`: `len(source)` and
`source[i] -> {"image": uint8 [H, W, C], "label": int32}`, which is also what Grain reads from. Small sets are decoded
once into `Arrays`; large ones stay encoded and are decoded by `train.batches` while training runs.

`python -m train.data prepare NAME [--dir DIR]` downloads and prepares a stock TFDS set.
"""

import contextlib
import difflib
import io
import os
import re
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from train.errors import UsageError, unknown

MEMORY_LIMIT = 2 << 30  # bytes: sets that decode to no more than this live in memory
# What Pillow raises on images that are none, are cut off, corrupted, or claim to be enormous.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
Example = dict[str, Any]


class BrokenImage(UsageError):
    """An image that cannot be decoded; the message names it."""


class Source(Protocol):
    """Random access to labelled images, all of one shape."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...


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
      name: position -> what to call the image when it cannot be read.
      indices: positions in this split.
      size: side of the square that images are resized and cropped to; None keeps images as they are.
      channels: 1 or 3.
      random_crop: whether training cuts a random box out of the whole image while decoding, instead of the centre.
      read_many: `read` for many positions at once, where that is quicker than one by one.
      labels: label of each position, where they are known without reading.
    """

    read: Callable[[int], tuple[bytes, int]]
    name: Callable[[int], str]
    indices: np.ndarray
    size: int | None
    channels: int
    random_crop: bool = False
    read_many: Callable[[Sequence[int]], Sequence[tuple[bytes, int]]] | None = None
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.example(index, None)

    def example(self, index: int, rng: np.random.Generator | None) -> Example:
        """Example `index`; `rng` draws the box where `random_crop` is set."""
        position = int(self.indices[index])
        box = rng if self.random_crop else None
        try:
            data, label = self.read(position)
            return {"image": decode_image(data, self.size, self.channels, rng=box), "label": np.int32(label)}
        except UNREADABLE as error:
            raise BrokenImage(f"cannot read image {self.name(position)}: {fault(error)}") from None

    def subset(self, indices: np.ndarray) -> "Encoded":
        return replace(self, indices=self.indices[indices])


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Three splits of one set. `test` is looked at once, at the end; decisions are made on `validation`."""

    name: str
    classes: tuple[str, ...]
    train: Arrays | Encoded
    validation: Arrays | Encoded
    test: Arrays | Encoded

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return tuple(self.train[0]["image"].shape)

    @property
    def splits(self) -> dict[str, Arrays | Encoded]:
        return {"train": self.train, "validation": self.validation, "test": self.test}


# ---- decoding -----------------------------------------------------------------------------------------------------


def decode_image(data: bytes, size: int | None, channels: int, *, rng: np.random.Generator | None = None) -> np.ndarray:
    """JPEG, PNG, WebP ... of any size and mode to uint8 [size, size, channels] (or its own size where that is None).

    The short side is resized to `size` and the centre cut out; with `rng` a random box of 8-100 % of the area and
    an aspect of 3/4-4/3 is cut instead (https://arxiv.org/abs/1409.4842). Orientation marks are followed.
    """
    with Image.open(io.BytesIO(data)) as image:
        if size is not None and rng is None:
            image.draft(None, (size, size))  # JPEG decodes straight to a half, a quarter ... where that is enough
        image = ImageOps.exif_transpose(image)
        image = to_mode(image, "L" if channels == 1 else "RGB")
        if size is not None:
            width, height = image.size
            box = _centre(width, height) if rng is None else _random_box(width, height, rng)
            if image.size != (size, size) or rng is not None:
                image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
        pixels = np.asarray(image)
    return pixels[..., None] if channels == 1 else pixels


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Any Pillow mode as 8-bit grey or RGB: 16-bit is scaled, transparency falls on black."""
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image, np.float64)
        # A dark image in a mode of 16 bits is dark; the wider modes hold 8-bit values as well.
        scale = 257.0 if image.mode.startswith("I;16") or pixels.max(initial=0) > 255 else 1.0
        image = Image.fromarray(np.clip(np.rint(pixels / scale), 0, 255).astype(np.uint8))
    if image.mode in ("P", "PA", "LA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    return image.convert(mode)


def _centre(width: int, height: int) -> tuple[float, float, float, float]:
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _random_box(width: int, height: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = np.sqrt(area * aspect), np.sqrt(area / aspect)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    return _centre(width, height)


def fault(error: Exception) -> str:
    """What is wrong with an unreadable image; Pillow's own words for a file of another kind name a Python object."""
    return "not an image" if isinstance(error, UnidentifiedImageError) else str(error)


def decode_all(source: Encoded, *, skip_broken: bool = False) -> Arrays:
    """Decode a split into memory, in threads; broken images are refused together, or with `skip_broken` left out.

    Raises:
      UsageError: images that cannot be read, or that differ in size while `source.size` is None.
    """

    def decode(indices: np.ndarray) -> list[Example | str]:
        part = source.subset(indices)
        if part.read_many is not None:
            positions = part.indices.tolist()
            part = replace(part, read=dict(zip(positions, part.read_many(positions), strict=True)).__getitem__)
        examples: list[Example | str] = []
        for index in range(len(part)):
            try:
                examples.append(part[index])
            except BrokenImage as error:
                examples.append(str(error))
        return examples

    chunks = np.split(np.arange(len(source)), range(256, len(source), 256))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        examples = [example for chunk in pool.map(decode, chunks) for example in chunk]
    report_broken([e for e in examples if isinstance(e, str)], len(examples), skip_broken)
    good = [e for e in examples if not isinstance(e, str)]
    if not good:
        raise UsageError("no image of this set can be read")
    if len({e["image"].shape for e in good}) > 1:
        raise differ_in_size("the images of this set")
    return Arrays(images=np.stack([e["image"] for e in good]), labels=np.stack([e["label"] for e in good]))


def differ_in_size(what: str) -> UsageError:
    """The error for images that cannot be stacked as they are."""
    return UsageError(f"{what} differ in size: pass --data.image-size")


def report_broken(broken: Sequence[str], of: int, skip: bool) -> None:
    """Refuse a set with broken images, or with `skip` warn of them: how many, and the first by name."""
    if not broken:
        return
    shown = "; ".join(broken[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
    line = f"{len(broken)} of {of} images are broken: {shown}"
    if not skip:
        raise UsageError(f"{line}. Mend or remove them, or pass --data.broken skip")
    print(f"warning: skipped {line}", file=sys.stderr)


# ---- loading ------------------------------------------------------------------------------------------------------


def load(
    name: str,
    *,
    dir: str | Path | None = None,
    image_size: int | None = None,
    validation: float = 0.1,
    split_seed: int = 0,
    random_crop: bool = False,
    broken: str = "refuse",
    memory_limit: int = MEMORY_LIMIT,
) -> Dataset:
    """An image set by name, split three ways, in memory if it decodes to at most `memory_limit` bytes.

    Args:
      name: `digits`, `synthetic`, `folder:DIR` (class = subfolder, with or without train/validation/test above), or a
        TFDS set prepared as ArrayRecord in `dir`: `NAME`, `NAME/VERSION` or `NAME/CONFIG/VERSION`.
      dir: the TFDS data_dir; None is TFDS's own default, `TFDS_DATA_DIR` or a folder in the user's home.
      image_size: side of the square that images are brought to; None keeps sets of one size as they are.
      validation: fraction of the training split held back where the set has no validation split, in (0, 1); also
        the fraction held back for test where there is no test split either.
      split_seed: of that draw; not the run's seed, so that all runs hold back the same examples.
      random_crop: see `Encoded`; only for sets too large for memory.
      broken: `refuse` or `skip` images that cannot be decoded.

    Raises:
      UsageError: no such set, an empty or broken one, labels out of range.
    """
    if not 0 < validation < 1:
        raise UsageError(f"the validation fraction must lie between 0 and 1, got {validation}")
    if broken not in ("refuse", "skip"):
        raise unknown("way with broken images", broken, ["refuse", "skip"])
    if name == "synthetic":
        classes, splits = _synthetic(image_size or 32)
    elif name.startswith("folder:"):
        from train import folder

        root = Path(name.removeprefix("folder:")).expanduser()
        classes, splits = folder.read(root, size=image_size, skip_broken=broken == "skip")
    else:
        classes, splits = _tfds(name, Path(dir).expanduser() if dir else None, image_size)
    splits = _complete(splits, validation, split_seed)

    encoded = {split: source for split, source in splits.items() if isinstance(source, Encoded)}
    if sum(len(source) * _image_bytes(source) for source in encoded.values()) <= memory_limit:
        splits |= {split: decode_all(source, skip_broken=broken == "skip") for split, source in encoded.items()}
        if len({source.images.shape[1:] for source in splits.values()}) > 1:
            raise differ_in_size(f"the splits of {name}")
    elif random_crop:
        if image_size is None:
            raise UsageError("--data.random-crop needs --data.image-size, the side that boxes are brought to")
        splits["train"] = replace(splits["train"], random_crop=True)
    for split, source in splits.items():
        check_labels(source, len(classes), f"{name} {split}")
    return Dataset(name=name, classes=classes, **splits)


def from_arrays(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    classes: Sequence[str] | None = None,
    test: tuple[np.ndarray, np.ndarray] | None = None,
    validation: float = 0.1,
    split_seed: int = 0,
) -> Dataset:
    """Arrays in memory, images uint8 [N, H, W, C] and integer labels [N], as a `Dataset`.

    `test` are the test split's images and labels; without it a second fraction `validation` is held back for it.
    """
    splits: dict[str, Arrays | Encoded] = {"train": Arrays(images=images, labels=labels)}
    if test is not None:
        splits["test"] = Arrays(images=test[0], labels=test[1])
    names = tuple(classes) if classes else tuple(str(c) for c in range(int(labels.max(initial=-1)) + 1))
    splits = _complete(splits, validation, split_seed)
    for split, source in splits.items():
        check_labels(source, len(names), split)
    return Dataset(name="arrays", classes=names, **splits)


def check_labels(source: Arrays | Encoded, classes: int, name: str) -> None:
    """Labels of a split in memory lie in 0..classes-1; encoded ones are checked as they are read."""
    if len(source) == 0:
        raise UsageError(f"{name} holds no images")
    if isinstance(source, Arrays):
        low, high = source.labels.min(), source.labels.max()
        if low < 0 or high >= classes:
            span = f"there are {classes} classes (0 to {classes - 1})"
            raise UsageError(f"{name}: labels run from {low} to {high}, but {span}")


def split_indices(count: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(kept, held back): sorted indices of a seeded draw of `round(count * fraction)`, at least one, never the last."""
    order = np.random.default_rng(seed).permutation(count)
    held = min(max(round(count * fraction), 1), count - 1)
    return np.sort(order[held:]), np.sort(order[:held])


def split_by_class(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """As `split_indices`, but drawn within each class, so that all classes of two or more appear in both parts."""
    parts = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        kept, held = split_indices(len(members), fraction, seed + int(label))
        parts.append((members[kept], members[held]))
    kept, held = (np.sort(np.concatenate(part)) for part in zip(*parts, strict=True))
    return kept, held


def _image_bytes(source: Encoded) -> int:
    """Bytes of one decoded image: where no size is set, of the first that can be read."""
    if source.size is not None:
        return source.size**2 * source.channels
    for index in range(len(source)):
        with contextlib.suppress(BrokenImage):
            return source[index]["image"].nbytes
    return 0


def _complete(splits: dict[str, Any], fraction: float, seed: int) -> dict[str, Any]:
    """Train, validation and test from whatever of them a set has."""
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


def _synthetic(size: int, count: int = 2048, classes: int = 10) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Seeded noise over one smooth pattern a class: to try things and to measure speed, not to report accuracy on."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(64, 192, (classes, 4, 4, 3), dtype=np.uint8)
    patterns = np.stack([np.asarray(Image.fromarray(c).resize((size, size))) for c in coarse]).astype(np.int16)

    def split(n: int) -> Arrays:
        labels = rng.integers(0, classes, n, dtype=np.int32)
        noise = rng.integers(-64, 64, (n, size, size, 3), dtype=np.int16)
        return Arrays(images=(patterns[labels] + noise).clip(0, 255).astype(np.uint8), labels=labels)

    return tuple(map(str, range(classes))), {"train": split(count), "test": split(count // 4)}


def _tfds(name: str, data_dir: Path | None, size: int | None) -> tuple[tuple[str, ...], dict[str, Any]]:
    import tensorflow_datasets as tfds

    root = data_dir or default_data_dir()
    if name == "digits" and not prepared_folder(name, root):
        prepare("digits", root)
    folder = prepared_folder(name, root)
    if folder is None:
        have = sorted(p.name for p in root.glob("*") if prepared_folder(p.name, root)) if root.is_dir() else []
        raise UsageError(
            f"no prepared set {name!r} in {root} (there: {', '.join(have) or 'none'}); 'python -m train.data prepare "
            f"{name}' prepares a stock TFDS set, --data.dir names another folder, folder:DIR reads plain images"
        )
    builder = tfds.builder_from_directory(folder)
    features = builder.info.features
    image_key, image = _feature(features, tfds.features.Image, name)
    label_key, label = _feature(features, tfds.features.ClassLabel, name)
    if None in image.shape[:2] and size is None:
        raise differ_in_size(f"the images of {name}")

    known = [s for s in ("train", "validation", "test") if s in builder.info.splits]
    if "train" not in known:
        raise UsageError(f"{name} has no split named train (there: {', '.join(builder.info.splits)})")
    undecoded = {image_key: tfds.decode.SkipDecoding()}
    try:
        sources = {split: builder.as_data_source(split, decoders=undecoded) for split in known}
    except NotImplementedError:
        raise UsageError(
            f"{folder} is stored in a format without random access: prepare it as array_record, "
            f"with 'python -m train.data prepare {name}' and another --dir"
        ) from None
    if "test" in sources and len(sources["test"]) and sources["test"][0][label_key] == -1:
        del sources["test"]  # ImageNet's comes without labels: there is nothing to report on it

    def encoded(split: str, records: Any) -> Encoded:
        def content(position: int, record: dict[str, Any]) -> tuple[bytes, int]:
            if not 0 <= record[label_key] < label.num_classes:
                raise UsageError(f"label {record[label_key]} of image {position} of {name} {split} is out of range")
            return record[image_key], record[label_key]

        return Encoded(
            read=lambda position: content(position, records[position]),
            read_many=lambda positions: list(map(content, positions, records.__getitems__(positions))),
            name=lambda position: f"{position} of {name} {split}",
            indices=np.arange(len(records)),
            size=size,
            channels=1 if image.shape[-1] == 1 else 3,
        )

    return tuple(label.names), {split: encoded(split, records) for split, records in sources.items()}


def _feature(features: Any, kind: type, name: str) -> tuple[str, Any]:
    for key, feature in features.items():
        if isinstance(feature, kind):
            return key, feature
    raise UsageError(f"{name} is no classification set: it has no {kind.__name__} feature")


def default_data_dir() -> Path:
    """TFDS's data_dir: `TFDS_DATA_DIR`, else tensorflow_datasets in the user's home."""
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def prepared_folder(name: str, root: Path) -> Path | None:
    """The folder of a prepared set's newest version, or of the one that `name` ends with."""

    def versions() -> Iterator[tuple[tuple[int, ...], Path]]:
        for path in (root / name, *(root / name).glob("*"), *(root / name).glob("*/*")):
            if re.fullmatch(r"\d+\.\d+\.\d+", path.name) and (path / "dataset_info.json").is_file():
                yield tuple(map(int, path.name.split("."))), path

    found = max(versions(), default=None) if name else None  # no name would find any set
    return found[1] if found else None


# ---- preparing ----------------------------------------------------------------------------------------------------


def prepare(name: str, root: Path) -> Path:
    """Prepare a stock TFDS set (or `digits`) as ArrayRecord under `root`; returns its folder.

    Raises:
      UsageError: no such set, TensorFlow is missing, the source cannot be reached (after seconds, not minutes).
    """
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    if name == "digits":
        from train.digits import Digits

        make = Digits
    else:
        stock = tfds.list_builders(with_community_datasets=False)  # those would be asked for over the network
        base = re.split("[/:]", name)[0]
        if base not in stock:
            near = " or ".join(difflib.get_close_matches(base, stock)) or "see https://www.tensorflow.org/datasets"
            raise UsageError(f"TFDS has no set {base!r}: did you mean {near}?")
        try:
            import tensorflow  # noqa: F401
        except ImportError:
            raise UsageError("preparing a stock TFDS set needs TensorFlow: pip install 'resnet-jax[prepare]'") from None
        make = partial(tfds.builder, name)
    folder = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        builder = make(data_dir=root, file_format="array_record")
        folder = Path(builder.data_dir)
        if not folder.is_dir():
            if name != "digits":
                _check_reachable(builder.info.homepage)
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints; stdout is for results
                builder.download_and_prepare()
    except (AssertionError, ImportError, OSError, ValueError, tfds.download.DownloadError) as error:
        # AssertionError is how TFDS asks for files to be fetched by hand, as ImageNet's are.
        if folder is None or not folder.is_dir():  # else another run has just prepared it too
            raise UsageError(f"cannot prepare {name} in {root}: {error}") from None
    return folder


def _check_reachable(homepage: str, timeout: float = 5.0) -> None:
    """TFDS retries a dead network for minutes; ask once, first, whether the set's own site can be reached at all."""
    import socket
    from urllib.parse import urlparse
    from urllib.request import getproxies

    url = urlparse(homepage)
    if not url.hostname or getproxies():
        return
    try:
        socket.create_connection((url.hostname, url.port or (80 if url.scheme == "http" else 443)), timeout).close()
    except OSError as error:
        raise UsageError(f"cannot reach {url.hostname} to download the set: {error}") from None


def main() -> None:
    """`python -m train.data prepare NAME [--dir DIR]`."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m train.data", description=main.__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("prepare", help="download and prepare a stock TFDS set as ArrayRecord")
    command.add_argument("name")
    command.add_argument("--dir", type=Path, default=None, help="the TFDS data_dir")
    args = parser.parse_args()
    print(prepare(args.name, args.dir or default_data_dir()))


if __name__ == "__main__":
    from train.errors import one_line

    with one_line():
        main()
