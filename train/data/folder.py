"""The user's own images (whatever Pillow reads): one folder per class, or a flat folder without classes."""

import contextlib
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from train.data.decode import fault, orientation
from train.data.sources import Encoded, differ_in_size, report_broken, shortened
from train.errors import UsageError
from train.paths import local_path

UNLABELLED = "unlabelled"
SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "eval", "dev"),
    "test": ("test", "testing"),
}
# Formats that Pillow only identifies, or that need a program of their own, such as Ghostscript.
NO_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# Files and folders that desktops and network drives leave behind; those that begin with a dot are hidden anyway.
LEFT_BEHIND = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin"}
LEFT_BEHIND |= {"system volume information", "lost+found", "icon\r"}
DIGITS = re.compile(r"(\d+)")

Splits = dict[str, Encoded]
PassedOver = list[tuple[str, str]]  # (path, reason)


def read(where: str, *, size: int | None) -> tuple[tuple[str, ...], Splits, tuple[str, ...]]:
    """Find (classes, splits, what was passed over) in a folder of class folders, or of split folders that hold those.

    Classes are in the order of their names as text. A folder with images but no subfolders is a single class,
    `UNLABELLED`, which is enough for pretraining. No image is read: see `check`.

    Raises:
      UsageError: no such folder, no images, an empty class, a class that training does not have, an unclear layout.
    """
    if not where:
        raise UsageError("folder: needs the path of a folder, as in folder:photos")
    root = local_path(where)
    if not root.is_dir():
        raise UsageError(f"there is no folder {root}" + (": it is a file; unpack it" if root.exists() else ""))
    passed: PassedOver = []
    root, folders = _layout(root, passed)
    train = folders["train"]
    classes = tuple(p.name for p in subfolders(train))
    _check_classes(train, classes)
    splits = {}
    for split, folder in folders.items():
        if split != "train" and classes and not subfolders(folder):
            passed.append((str(folder), "a split without class folders"))
        else:
            splits[split] = _split(folder, classes, size, passed)
    _note(root, train, classes, passed)
    return classes or (UNLABELLED,), splits, tuple(f"{path}: {reason}" for path, reason in passed)


def _layout(root: Path, passed: PassedOver) -> tuple[Path, dict[str, Path]]:
    """Find (folder of the set, {split: its folder}): without split folders, all of the set is `train`."""
    inside = subfolders(root)
    named = {split: [p for name in names for p in inside if p.name.lower() == name] for split, names in SPLITS.items()}
    folders = {split: paths[0] for split, paths in named.items() if paths}
    others = [path for path in inside if path not in folders.values()]
    if "train" not in folders:
        if folders and len(folders) == len(inside):
            raise UsageError(f"{root} holds {' and '.join(p.name for p in inside)}, but no folder train")
        if len(inside) == 1 and any(p.name.lower() in SPLITS["train"] for p in subfolders(inside[0])):
            return _layout(inside[0], passed)  # unpacked into a folder of its own
        return root, {"train": root}

    # Folders of images next to `train` may be classes, and `train` one of them.
    others = [path for path in others if any(walk(path, [], set()))]
    classes = {_folded(p.name) for p in subfolders(folders["train"])}
    held_out = [path for split, path in folders.items() if split != "train"]
    if others and not classes and not held_out:
        return root, {"train": root}
    shared = classes & {_folded(p.name) for path in held_out for p in subfolders(path)}
    if others and not shared and not (held_out and len(classes) > 1):
        names, train = shortened([p.name for p in others]), folders["train"].name
        raise UsageError(
            f"{root} holds {train}, which is the name of a split, next to {names}: if it is a class like them, "
            f"rename it, for example to {train}_; if it is the training split, move {names} elsewhere"
        )
    passed += [(str(path), "a folder that is not a split") for path in others]
    passed += [(file, "an image outside of the split folders") for file in own_images(root)]
    return root, folders


def _check_classes(folder: Path, classes: Sequence[str]) -> None:
    if not classes and not own_images(folder):
        raise UsageError(f"{folder} holds no class folders (one subfolder of images for each class)")
    known: dict[str, str] = {}
    for name in classes:
        if (same := unicodedata.normalize("NFC", name)) in known:
            raise UsageError(f"{folder} holds {same} twice, in two Unicode forms of the name: merge the two folders")
        known[same] = name
    places: dict[tuple[int, int], str] = {}
    for name in classes:
        place = _place(folder / name)
        if place in places:
            raise UsageError(
                f"{folder / name} and {places[place]} are the same folder: a class needs images of its own"
            )
        places[place] = name


def _note(root: Path, train: Path, classes: Sequence[str], passed: PassedOver) -> None:
    """Say on stderr what may surprise: what was passed over, and the order and number of classes."""
    note_passed(str(root), passed)
    if list(classes) != sorted(classes, key=lambda name: [int(t) if t.isdecimal() else t for t in DIGITS.split(name)]):
        print(f"note: classes are in the order of their names as text: {shortened(classes)}", file=sys.stderr)
    if len(classes) == 1 and (inner := subfolders(train / classes[0])):
        there = shortened([path.name for path in inner])
        line = f"{classes[0]} is the only class; if {there} are the classes, pass folder:{train / classes[0]}"
        print(f"note: {line}", file=sys.stderr)


def note_passed(where: str, passed: PassedOver) -> None:
    """Say on stderr what was passed over: how often for each reason."""
    if passed:
        counted = ", ".join(f"{count} x {reason}" for reason, count in Counter(r for _, r in passed).most_common(5))
        print(f"note: passed over in {where}: {counted} (a run lists them in skipped.txt)", file=sys.stderr)


def _folded(name: str) -> str:
    """A name without regard to its Unicode form and capitals."""
    return unicodedata.normalize("NFC", name).casefold()


@lru_cache(maxsize=1)
def suffixes() -> frozenset[str]:
    """Suffixes of the files that Pillow reads as images."""
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in known.items() if kind in Image.OPEN and kind not in NO_IMAGES)


def is_image(name: str) -> bool:
    """Whether a file's suffix is that of an image that Pillow reads."""
    return os.path.splitext(name)[1].lower() in suffixes()


def scan(folder: str | Path) -> list[tuple[str, str]]:
    """List the visible entries of a folder by name: (path, "folder", "file", or the reason to pass it over)."""

    def kind(entry: os.DirEntry[str]) -> str:
        try:
            if entry.is_dir():
                return "folder"
            if entry.is_file():
                return "file"
        except OSError as error:  # a link that points to itself, a folder that may not be entered
            return str(error.strerror)
        return "a link to nothing" if entry.is_symlink() else "not a file"

    try:
        with os.scandir(folder) as entries:
            shown = [e for e in entries if not e.name.startswith(".") and e.name.lower() not in LEFT_BEHIND]
    except OSError as error:
        raise UsageError(f"cannot list the folder {folder}: {error.strerror}") from None
    return [(entry.path, kind(entry)) for entry in sorted(shown, key=lambda entry: entry.name)]


def subfolders(folder: Path) -> list[Path]:
    """The visible folders in a folder, by name."""
    return [Path(path) for path, kind in scan(folder) if kind == "folder"]


def own_images(folder: Path) -> list[str]:
    """Paths of the images in a folder, by name, without those in folders below."""
    return [path for path, kind in scan(folder) if kind == "file" and is_image(path)]


def _place(folder: str | Path) -> tuple[int, int]:
    """What tells a folder from all others, whatever the links that lead there."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def walk(folder: str | Path, passed: PassedOver, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Yield the image files below a folder in the order of their paths; follow links, but enter each folder once."""
    place = _place(folder)
    if place in seen:
        passed.append((str(folder), "a link to a folder that was read"))
        return
    seen.add(place)
    for path, kind in scan(folder):
        if kind == "folder":
            yield from walk(path, passed, seen)
        elif kind == "file" and is_image(path):
            yield path
        else:
            passed.append((path, kind if kind != "file" else os.path.splitext(path)[1] or "a file without a suffix"))


def _split(folder: Path, classes: Sequence[str], size: int | None, passed: PassedOver) -> Encoded:
    """Make a split of the images in class folders, or without classes, of all images as a single one."""
    files: list[str] = []
    labels: list[int] = []
    inside = subfolders(folder) if classes else []
    # Links may lead back up, or from one class to another, whose images are not also of this one.
    elsewhere = {_place(path) for path in (folder, folder.parent, *inside)}
    for path in inside or [folder]:
        label = _label(path, classes) if classes else 0
        others: PassedOver = []
        images = list(walk(path, others, elsewhere - {_place(path)} if classes else set()))
        if not images:
            counted = ", ".join(f"{n} x {reason}" for reason, n in Counter(r for _, r in others).most_common(3))
            there = f"; it holds {counted}" if others else ""
            raise UsageError(f"{path} holds no images (.jpg, .png, .webp and others that Pillow reads){there}")
        files += images
        labels += [label] * len(images)
        passed += others
    if classes:
        passed += [(file, "an image outside of the class folders") for file in own_images(folder)]
    return Encoded(
        read=lambda i: (Path(files[i]).read_bytes(), labels[i]),
        name=lambda i: files[i],
        indices=np.arange(len(files)),
        size=size,
        channels=3,
        labels=np.asarray(labels),
        files=files,
    )


def _label(path: Path, classes: Sequence[str]) -> int:
    """The label of a class folder; a name in another Unicode form, or else in other capitals, is the same name.

    Raises:
      UsageError: training does not have this class.
    """
    if path.name in classes:
        return classes.index(path.name)
    for same in (partial(unicodedata.normalize, "NFC"), _folded):
        equal = [label for label, name in enumerate(classes) if same(name) == same(path.name)]
        if len(equal) == 1:
            return equal[0]
    raise UsageError(f"{path} is a class that the training split does not have ({shortened(classes)})")


def check(name: str, splits: Splits, *, skip_broken: bool) -> tuple[Splits, list[str]]:
    """Look at the image files of all splits: (splits without broken ones, a line for each of those).

    This reads only both ends of the files, so that thousands are checked in seconds; decoding may still find a fault.

    Raises:
      UsageError: broken images (unless they are skipped), or images that differ in size while no size is set.
    """
    broken: list[str] = []
    good, sizes = {}, {}
    for split, source in splits.items():
        files = [source.name(position) for position in source.indices.tolist()]
        with ThreadPoolExecutor() as pool:
            seen = list(pool.map(_look, map(Path, files)))
        broken += [f"{file}: {look}" for file, look in zip(files, seen, strict=True) if isinstance(look, str)]
        good[split] = source.subset(np.flatnonzero([not isinstance(look, str) for look in seen]))
        sizes[split] = {look for look in seen if not isinstance(look, str)}
    report_broken(broken, sum(map(len, splits.values())), skip_broken)
    for split, source in good.items():
        if not len(source):
            raise UsageError(f"{name} {split} holds no image that can be read")
        if source.size is None and len(sizes[split]) > 1:
            raise differ_in_size(f"the images of {name} {split}")
    return good, broken


def _look(path: Path) -> tuple[int, int] | str:
    """Check an image: its width and height, or the reason why it cannot be read."""
    try:
        with Image.open(path) as image:
            kind = image.format
            width, height = image.size
            if orientation(image) >= 5:
                width, height = height, width  # rotated by 90 degrees
        with path.open("rb") as file:
            file.seek(-min(4096, path.stat().st_size), 2)
            tail = file.read()
        if {"JPEG": b"\xff\xd9", "PNG": b"IEND"}.get(kind or "", b"") not in tail:
            # Cameras append data after the end marker, so only decoding can tell.
            with Image.open(path) as image:
                image.load()
    except Exception as error:  # Pillow's readers raise exceptions of any type for malformed files
        with contextlib.suppress(OSError), path.open("rb") as file:
            return fault(error, file.read(100))
        return fault(error)
    return width, height
