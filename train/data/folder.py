"""The user's own images (JPEG, PNG, WebP ...): one folder per class, or a flat folder without classes."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from train.data.decode import UNREADABLE, fault
from train.data.sources import Encoded, differ_in_size, report_broken
from train.errors import UsageError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
UNLABELLED = "unlabelled"
SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


def read(root: Path, *, size: int | None, skip_broken: bool) -> tuple[tuple[str, ...], dict[str, Encoded]]:
    """Read (classes, splits) of `root`, which holds class folders, or split folders that contain class folders.

    A folder with images but no subfolders is a single class, `UNLABELLED`, which is enough for pretraining.

    Raises:
      UsageError: no such folder, no images, an empty class, a class that training does not have, broken files.
    """
    if not root.is_dir():
        raise UsageError(f"there is no folder {root}")
    inside = _subfolders(root)
    folders = {split: p for p in inside for split, names in SPLITS.items() if p.name.lower() in names}
    if "train" not in folders:
        if folders and len(folders) == len(inside):
            raise UsageError(f"{root} holds {' and '.join(p.name for p in inside)}, but no folder train")
        folders = {"train": root}
    classes = tuple(p.name for p in _subfolders(folders["train"]))
    if not classes and not _images(folders["train"]):
        raise UsageError(f"{folders['train']} holds no class folders (one subfolder of images for each class)")
    splits = {split: _split(folder, classes, size, skip_broken) for split, folder in folders.items()}
    return classes or (UNLABELLED,), splits


def _images(folder: Path) -> list[Path]:
    """List the image files below a folder."""
    images = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
    # Skip hidden files: copies and metadata left by desktops and notebooks (._a.jpg, .ipynb_checkpoints/a.jpg).
    return [f for f in images if not any(part.startswith(".") for part in f.relative_to(folder).parts)]


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _split(folder: Path, classes: Sequence[str], size: int | None, skip_broken: bool) -> Encoded:
    """Make a split of the images in class folders, or without classes, of all images as a single one."""
    files: list[Path] = []
    labels: list[int] = []
    for path in _subfolders(folder) if classes else [folder]:
        if classes and path.name not in classes:
            raise UsageError(f"{path} is a class that the training split does not have")
        images = _images(path)
        if not images:
            raise UsageError(f"{path} holds no images ({', '.join(sorted(SUFFIXES))})")
        files += images
        labels += [classes.index(path.name) if classes else 0] * len(images)
    if not files:
        raise UsageError(f"{folder} holds no class folders with images")

    with ThreadPoolExecutor() as pool:
        seen = list(pool.map(_look, files))
    broken = [f"{file}: {wrong}" for file, wrong in zip(files, seen, strict=True) if isinstance(wrong, str)]
    report_broken(broken, len(files), skip_broken)
    good = np.asarray([i for i, look in enumerate(seen) if not isinstance(look, str)], int)
    if not len(good):
        raise UsageError(f"{folder} holds no image that can be read")
    if size is None and len({seen[i] for i in good}) > 1:
        raise differ_in_size(f"the images in {folder}")

    return Encoded(
        read=lambda i: (files[i].read_bytes(), labels[i]),
        name=lambda i: str(files[i]),
        indices=good,
        size=size,
        channels=3,
        labels=np.asarray(labels),
    )


def _look(path: Path) -> tuple[int, int] | str:
    """Check an image: its width and height, or the reason why it cannot be read.

    Reads only both ends of the file, so that whole folders are checked in seconds.
    """
    try:
        with Image.open(path) as image:
            kind = image.format
            width, height = image.size
            # Test `info` first: `getexif` alone would decode a whole PNG.
            if "exif" in image.info and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:
                width, height = height, width  # rotated by 90 degrees
        with path.open("rb") as file:
            file.seek(-min(4096, path.stat().st_size), 2)
            tail = file.read()
        if {"JPEG": b"\xff\xd9", "PNG": b"IEND"}.get(kind or "", b"") not in tail:
            # Cameras append data after the end marker, so only decoding can tell.
            with Image.open(path) as image:
                image.load()
    except UNREADABLE as error:
        return fault(error)
    return width, height
