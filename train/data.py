"""Image sets: what they hold, where they are read from, how they are split.

`load(name)` returns a `Dataset` with three splits. A split is a `Source`: `len(source)` and
`source[i] -> {"image": uint8 [H, W, C], "label": int32}`, which is also what Grain reads from. Small sets are decoded
once into `Arrays`; large ones stay encoded and are decoded by `train.batches` while training runs.

`python -m train.data prepare NAME [--dir DIR]` downloads and prepares a stock TFDS set.
"""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps

from train.errors import UsageError, unknown

MEMORY_LIMIT = 2 << 30  # bytes: sets that decode to no more than this live in memory
Example = dict[str, np.ndarray]


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
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise UsageError(f"images must be uint8 [N, H, W, C], not {self.images.dtype} {self.images.shape}")
        if self.labels.shape != self.images.shape[:1] or not np.issubdtype(self.labels.dtype, np.integer):
            raise UsageError(f"labels must be integers [{len(self.images)}], not {self.labels.dtype} {self.labels.shape}")

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
    """

    read: Callable[[int], tuple[bytes, int]]
    name: Callable[[int], str]
    indices: np.ndarray
    size: int | None
    channels: int
    random_crop: bool = False

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.example(index, None)

    def example(self, index: int, rng: np.random.Generator | None) -> Example:
        """Example `index`; `rng` draws the box where `random_crop` is set."""
        position = int(self.indices[index])
        data, label = self.read(position)
        try:
            box = rng if self.random_crop else None
            return {"image": decode_image(data, self.size, self.channels, rng=box), "label": np.int32(label)}
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UsageError(f"cannot read image {self.name(position)}: {error}") from None

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


def decode_image(
    data: bytes, size: int | None, channels: int, *, rng: np.random.Generator | None = None
) -> np.ndarray:
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
        scale = 257.0 if pixels.max(initial=0) > 255 else 1.0
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


def decode_all(source: Encoded, *, skip_broken: bool = False) -> Arrays:
    """Decode a split into memory, in threads; broken images are refused together, or with `skip_broken` left out.

    Raises:
      UsageError: images that cannot be read, or that differ in size while `source.size` is None.
    """

    def attempt(index: int) -> Example | str:
        try:
            return source[index]
        except UsageError as error:
            return str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        examples = list(pool.map(attempt, range(len(source)), chunksize=256))
    report_broken([e for e in examples if isinstance(e, str)], len(examples), skip_broken)
    good = [e for e in examples if not isinstance(e, str)]
    if not good:
        raise UsageError("no image of this set can be read")
    shapes = {e["image"].shape for e in good}
    if len(shapes) > 1:
        raise UsageError(f"images differ in size ({len(shapes)} sizes): pass --data.image-size")
    return Arrays(images=np.stack([e["image"] for e in good]), labels=np.stack([e["label"] for e in good]))


def report_broken(broken: Sequence[str], of: int, skip: bool) -> None:
    """Refuse a set with broken images, or with `skip` warn of them: how many, and the first by name."""
    if not broken:
        return
    shown = "; ".join(broken[:3]) + ("; ..." if len(broken) > 3 else "")
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

        classes, splits = folder.read(Path(name.removeprefix("folder:")), size=image_size, skip_broken=broken == "skip")
    else:
        classes, splits = _tfds(name, Path(dir).expanduser() if dir else None, image_size)
    splits = _complete(splits, validation, split_seed, by_class=name.startswith("folder:"))

    first = next(iter(splits.values()))[0]["image"]
    if sum(map(len, splits.values())) * first.nbytes <= memory_limit:
        splits = {k: s if isinstance(s, Arrays) else decode_all(s, skip_broken=broken == "skip") for k, s in splits.items()}
    elif random_crop:
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
    names = tuple(classes) if classes else tuple(str(c) for c in range(int(labels.max()) + 1))
    splits = _complete(splits, validation, split_seed, by_class=False)
    for split, source in splits.items():
        check_labels(source, len(names), split)
    return Dataset(name="arrays", classes=names, **splits)


def check_labels(source: Arrays | Encoded, classes: int, name: str) -> None:
    """Labels of a split in memory lie in 0..classes-1; encoded ones are checked as they are read."""
    if len(source) == 0:
        raise UsageError(f"{name} holds no images")
    if isinstance(source, Arrays) and not (0 <= source.labels.min() and source.labels.max() < classes):
        low, high = source.labels.min(), source.labels.max()
        raise UsageError(f"{name}: labels run from {low} to {high}, but there are {classes} classes (0 to {classes - 1})")


def split_indices(count: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(kept, held back): sorted indices of a seeded draw of `round(count * fraction)`, at least one."""
    order = np.random.default_rng(seed).permutation(count)
    held = max(round(count * fraction), 1)
    return np.sort(order[held:]), np.sort(order[:held])


def split_by_class(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """As `split_indices`, but drawn within each class, so that small classes appear in both parts."""
    parts = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        kept, held = split_indices(len(members), fraction, seed + int(label))
        parts.append((members[kept], members[held]))
    return tuple(np.sort(np.concatenate(part)) for part in zip(*parts, strict=True))


def _complete(splits: dict[str, Any], fraction: float, seed: int, *, by_class: bool) -> dict[str, Any]:
    """Train, validation and test from whatever of them a set has."""
    if "test" not in splits and "validation" in splits:
        # A lone held-out split (ImageNet's "validation") is what results are reported on: the test split.
        splits["test"] = splits.pop("validation")
    for missing in ("test", "validation"):
        if missing not in splits:
            train = splits["train"]
            if len(train) < 3:
                raise UsageError(f"{len(train)} images are too few to hold some back for {missing}")
            if by_class:
                labels = np.asarray([train.read(int(i))[1] for i in train.indices])
                kept, held = split_by_class(labels, fraction, seed)
            else:
                kept, held = split_indices(len(train), fraction, seed)
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
    channels = image.shape[-1] or 3
    if None in image.shape[:2] and size is None:
        raise UsageError(f"images of {name} differ in size: pass --data.image-size")

    def encoded(split: str) -> Encoded:
        records = builder.as_data_source(split, decoders={image_key: tfds.decode.SkipDecoding()})

        def read(position: int) -> tuple[bytes, int]:
            record = records[position]
            if not 0 <= record[label_key] < label.num_classes:
                raise UsageError(f"{name} {split} {position}: label {record[label_key]} is out of range")
            return record[image_key], record[label_key]

        def describe(position: int) -> str:
            return f"{position} of {name} {split}"

        # Sets of one size that is the wanted one need no resizing.
        target = None if image.shape[0] == image.shape[1] == (size or image.shape[0]) else size
        return Encoded(read=read, name=describe, indices=np.arange(len(records)), size=target, channels=channels)

    known = [s for s in ("train", "validation", "test") if s in builder.info.splits]
    if "train" not in known:
        raise UsageError(f"{name} has no split named train (there: {', '.join(builder.info.splits)})")
    return tuple(label.names), {split: encoded(split) for split in known}


def _feature(features: Any, kind: type, name: str) -> tuple[str, Any]:
    for key, feature in features.items():
        if isinstance(feature, kind):
            return key, feature
    raise UsageError(f"{name} is no classification set: it has no {kind.__name__} feature")


def default_data_dir() -> Path:
    """TFDS's data_dir: `TFDS_DATA_DIR`, else tensorflow_datasets in the user's home."""
    return Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def prepared_folder(name: str, root: Path) -> Path | None:
    """The folder of a prepared set's newest version, or of the one that `name` ends with."""

    def versions() -> Iterator[tuple[tuple[int, ...], Path]]:
        for path in (root / name, *(root / name).glob("*"), *(root / name).glob("*/*")):
            if (path / "features.json").is_file() and (path / "dataset_info.json").is_file():
                yield tuple(int(n) for n in path.name.split(".") if n.isdigit()), path

    found = max(versions(), default=None)
    return found[1] if found else None


# ---- preparing ----------------------------------------------------------------------------------------------------


def prepare(name: str, root: Path) -> Path:
    """Prepare a stock TFDS set (or `digits`) as ArrayRecord under `root`; returns its folder.

    Raises:
      UsageError: no such set, TensorFlow is missing, the source cannot be reached (after seconds, not minutes).
    """
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    root.mkdir(parents=True, exist_ok=True)
    if name == "digits":
        from train.digits import Digits

        builder = Digits(data_dir=root, file_format="array_record")
    else:
        try:
            import tensorflow  # noqa: F401
        except ImportError:
            raise UsageError(
                "preparing a stock TFDS set needs TensorFlow: pip install 'resnet-jax[prepare]'"
            ) from None
        try:
            builder = tfds.builder(name, data_dir=root, file_format="array_record")
        except tfds.core.DatasetNotFoundError:
            raise unknown("TFDS set", name, tfds.list_builders()) from None
        _check_reachable(builder.info.homepage)
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints; stdout is for results
        builder.download_and_prepare()
    return Path(builder.data_dir)


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
