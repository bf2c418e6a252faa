"""The user's own images: one folder a class, of JPEG, PNG, WebP ... files of any size and mode."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from train.data import Encoded, report_broken
from train.errors import UsageError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


def read(root: Path, *, size: int | None, skip_broken: bool) -> tuple[tuple[str, ...], dict[str, Encoded]]:
    """Classes and splits of `root`, which holds class folders, or split folders that hold them.

    Raises:
      UsageError: no such folder, no classes, an empty class, a class that training does not have, broken files.
    """
    if not root.is_dir():
        raise UsageError(f"no folder {root}")
    present = {split: root / n for split, names in SPLITS.items() for n in names if (root / n).is_dir()}
    folders = present if "train" in present else {"train": root}
    classes = tuple(sorted(p.name for p in folders["train"].iterdir() if p.is_dir() and not p.name.startswith(".")))
    if not classes:
        raise UsageError(f"{folders['train']} holds no class folders (one subfolder of images for each class)")
    return classes, {split: _split(folder, classes, size, skip_broken) for split, folder in folders.items()}


def _split(folder: Path, classes: Sequence[str], size: int | None, skip_broken: bool) -> Encoded:
    files: list[Path] = []
    labels: list[int] = []
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if path.name not in classes:
            raise UsageError(f"{path} is a class that the training split does not have")
        images = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
        if not images:
            raise UsageError(f"{path} holds no images ({', '.join(sorted(SUFFIXES))})")
        files += images
        labels += [classes.index(path.name)] * len(images)
    if not files:
        raise UsageError(f"{folder} holds no class folders with images")

    with ThreadPoolExecutor() as pool:
        faults = list(pool.map(_fault, files))
    report_broken([f"{f}: {fault}" for f, fault in zip(files, faults, strict=True) if fault], len(files), skip_broken)
    good = np.asarray([i for i, fault in enumerate(faults) if fault is None], int)
    if not len(good):
        raise UsageError(f"{folder} holds no image that can be read")

    return Encoded(
        read=lambda i: (files[i].read_bytes(), labels[i]),
        name=lambda i: str(files[i]),
        indices=good,
        size=size,
        channels=3,
    )


def _fault(path: Path) -> str | None:
    """What is wrong with a file, from its two ends alone: whole folders are checked in seconds."""
    try:
        with Image.open(path) as image:
            kind = image.format
        with path.open("rb") as file:
            file.seek(-min(4096, path.stat().st_size), 2)
            tail = file.read()
        end = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}.get(kind or "", b"")
        if end not in tail:
            # Cameras append data of their own behind the end: only decoding tells.
            with Image.open(path) as image:
                image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return str(error)
    return None
