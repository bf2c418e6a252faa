"""`yolo:DIR`: images annotated in YOLO's text files, with class names in data.yaml or classes.txt."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from train.data.folder import SPLITS, PassedOver, subfolders, walk
from train.data.sources import shortened
from train.detect.annotations import Found, Splits, check_names, existing, read_lines, split_folders
from train.errors import UsageError
from train.json_text import to_json

NAMES = ("classes.txt", "labels/classes.txt", "obj.names", "classes.names")


def read(where: str, passed: PassedOver, faults: list[str]) -> tuple[tuple[str, ...], Splits]:
    """Read (classes, splits) of a folder with data.yaml, or with images and labels, or with these in split folders.

    The labels of images/a.jpg are in labels/a.txt, or next to the image; without that file, an image has no objects. A
    line is a class number and a relative centre, width and height, or a polygon, which becomes its box.

    Raises:
      UsageError: no such folder, no class names, no labels at all, two folders of a split, a list that cannot be read.
    """
    root = existing(where, "yolo:")
    settings = _settings(root)
    if root.is_file():
        root = root.parent
    classes = _classes(root, settings)
    folders = _from_settings(root, settings, passed) or _from_layout(root)
    splits, used = {}, set()
    for split, images in folders.items():
        labels = [_label_file(image) for image in images]
        used |= {str(file) for file in labels}
        found = [_parsed(image, file, classes) for image, file in zip(images, labels, strict=True)]
        faults += [one for one in found if isinstance(one, str)]
        splits[split] = [one for one in found if not isinstance(one, str)]
        if not any(map(os.path.isfile, labels)):
            raise UsageError(f"none of the {len(images)} images of {root} {split} has a file of labels, {labels[0]}")
    for folder in sorted({os.path.dirname(file) for file in used}):
        others = (path for path in sorted(Path(folder).glob("*.txt")) if str(path) not in used)
        passed += [(str(path), "labels without an image") for path in others if path.name not in ("classes.txt",)]
    return classes, splits


def _settings(root: Path) -> dict[str, Any]:
    """Read data.yaml, or the YAML file that was named, if there is one."""
    import yaml

    files = [root] if root.is_file() else sorted([*root.glob("*.yaml"), *root.glob("*.yml")])
    files = [file for file in files if file.stem == "data"] or files
    if not files:
        return {}
    try:
        settings = yaml.safe_load(files[0].read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{files[0]} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("names"), list | dict):
        raise UsageError(f"{files[0]} does not list the names of the classes")
    return settings


def _classes(root: Path, settings: dict[str, Any]) -> tuple[str, ...]:
    names = settings.get("names")
    if isinstance(names, dict):
        if sorted(names) != list(range(len(names))):
            raise UsageError(f"{root}: the names of the classes are not numbered from 0 to {len(names) - 1}")
        names = [names[number] for number in range(len(names))]
    if names is None:
        file = next((root / name for name in NAMES if (root / name).is_file()), None)
        if file is None:
            raise UsageError(
                f"{root} does not name its classes: add data.yaml, or classes.txt with a name in each line"
            )
        names = read_lines(file)
    return check_names([str(name) for name in names], root)


def _from_settings(root: Path, settings: dict[str, Any], passed: PassedOver) -> dict[str, list[str]]:
    """Find the images of each split where data.yaml says they are: folders, or text files that list images."""
    folders: dict[str, list[str]] = {}
    base = root / str(settings.get("path") or "")
    for key, names in {"train": ("train",), "validation": ("val", "valid"), "test": ("test",)}.items():
        places: Any = next((settings[name] for name in names if settings.get(name)), [])
        places = [places] if isinstance(places, str) else places
        if not (isinstance(places, list) and all(isinstance(place, str) for place in places)):
            raise UsageError(f"{root}: data.yaml must name folders or files for {key}, got {to_json(places)}")
        for place in places:
            # Many exports write a path that is relative to some other folder.
            options = [base / place, root / place, root / place.removeprefix("../")]
            path = next((option for option in options if os.path.exists(option)), None)
            if path is not None:
                folders.setdefault(key, []).extend(_images(path, root))
            elif key == "train":
                raise UsageError(f"{root}: data.yaml names {place} for {key}, which is not there")
            else:
                passed.append((place, f"images for {key} that are not there"))
    return folders if "train" in folders else {}


def _images(path: Path, root: Path) -> list[str]:
    """Images in a folder and below, or those that a text file lists."""
    if path.is_dir():
        images = list(walk(path, [], set()))
    else:
        images = [os.path.normpath(root / line) for line in read_lines(path)]
    if not images:
        raise UsageError(f"{path} holds no images")
    return images


def _from_layout(root: Path) -> dict[str, list[str]]:
    """Find the images of each split: in images/train, in train/images, or without splits, in images or the folder."""
    images = root / "images"
    for above, below in ((images, ""), (root, "images")):
        inside = subfolders(above) if above.is_dir() else []
        folders = split_folders(path for path in inside if path.name.lower() in sum(SPLITS.values(), ()))
        if "train" in folders:
            places = {split: path / below for split, path in folders.items()}
            return {split: _images(place if place.is_dir() else place.parent, root) for split, place in places.items()}
    return {"train": _images(images if images.is_dir() else root, root)}


def _label_file(image: str) -> Path:
    """The file of an image's labels: where the last folder `images` is called `labels`, or next to the image."""
    path = Path(image).with_suffix(".txt")
    parts = list(path.parts)
    if "images" in parts:
        place = len(parts) - 1 - parts[::-1].index("images")
        moved = Path(*parts[:place], "labels", *parts[place + 1 :])
        return moved if os.path.isfile(moved) or not os.path.isfile(path) else path
    return path


def _parsed(image: str, file: Path, classes: tuple[str, ...]) -> Found | str:
    """Read the labels of an image, or say why they cannot be read."""
    boxes, labels = [], []
    try:
        lines = file.read_text(encoding="utf-8").splitlines() if os.path.isfile(file) else []
        for number, line in enumerate(lines, 1):
            if not (words := line.split()):
                continue
            values = np.array(words, np.float64)
            if len(values) != 5 and not (len(values) >= 7 and len(values) % 2):
                return f"{file}: line {number} has {len(values)} numbers instead of 5"
            label = values[0]
            if label not in range(len(classes)):
                return f"{file}: line {number} has class {words[0]}, but there are {len(classes)}: {shortened(classes)}"
            if len(values) == 5:
                x, y, width, height = values[1:].tolist()
                boxes.append((x - width / 2, y - height / 2, x + width / 2, y + height / 2))
            else:
                points = values[1:].reshape(-1, 2)
                boxes.append((*points.min(axis=0).tolist(), *points.max(axis=0).tolist()))
            labels.append(classes[int(label)])
    except (OSError, ValueError) as error:
        return f"{file}: {error}"
    return Found(image=image, boxes=boxes, labels=labels, crowd=[False] * len(boxes), relative=True)
