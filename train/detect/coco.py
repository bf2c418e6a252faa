"""`coco:FOLDER` or `coco:FILE.json`: images annotated in COCO's JSON, as COCO itself and many tools write it."""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from train.data.folder import PassedOver, own_images, subfolders
from train.data.sources import shortened
from train.detect.annotations import Found, Splits, check_names, existing, split_named
from train.errors import UsageError


def read(where: str, passed: PassedOver, faults: list[str]) -> tuple[tuple[str, ...], Splits]:
    """Read (classes, splits): FOLDER/annotations/*.json, FOLDER/*.json, FOLDER/train/*.json, or FILE.json as training.

    Images are next to the file, or in a folder that is named after the split; those without annotations are kept, if
    the JSON lists them.

    Raises:
      UsageError: no JSON, a damaged one, one that is not of objects, unknown category ids.
    """
    root = existing(where, "coco:")
    files = {"train": root} if root.is_file() else _files(root)
    contents = {split: _parsed(file) for split, file in files.items()}
    classes: tuple[str, ...] = ()
    splits = {}
    for split, content in contents.items():
        try:
            classes = _classes(content, files[split]) if split == "train" else classes
            splits[split] = _found(files[split], content, passed)
        except (KeyError, TypeError, OverflowError) as error:  # entries of unexpected kinds
            raise UsageError(f"{files[split]} is not in COCO's format: {type(error).__name__}: {error}") from None
    _note_unlisted(splits, passed)
    return classes, splits


def _files(root: Path) -> dict[str, Path]:
    """Find the JSON file of each split."""
    # An export for training has a file in each split's folder; COCO itself has one folder for all files.
    places = [[root / "annotations"], [root], subfolders(root)]
    found = [[file for place in some for file in sorted(place.glob("*.json"))] for some in places]
    files = next((some for some in found if some), [])
    files = [file for file in files if file.name.startswith("instances")] or files
    if not files:
        raise UsageError(f"{root} holds no annotations: no JSON file in it, in its folder annotations or in its splits")
    if len(files) == 1 and split_named(files[0].name) is None:
        return {"train": files[0]}
    named: dict[str, Path] = {}
    for file in files:
        split = split_named(file.name) or (split_named(file.parent.name) if file.parent != root else None)
        if split is None or split in named:
            names = shortened([str(file.relative_to(root)) for file in files])
            raise UsageError(
                f"{root} holds {names}: cannot tell which is which split; name one per split, such as train.json and "
                f"val.json, or pass a single file, coco:{file}"
            )
        named[split] = file
    if "train" not in named:
        raise UsageError(f"{root} has no annotations to train on, only {files[0].name}: pass coco:{files[0]}")
    return named


def _parsed(file: Path) -> dict[str, Any]:
    """Read a JSON file and check that it has lists of images, annotations and categories."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read as JSON, it may be cut short: {error}") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UsageError(f"{file} is not in COCO's format: it has no list {key!r}")
        if not all(isinstance(entry, dict) for entry in content[key]):
            raise UsageError(f"{file} is not in COCO's format: {key!r} holds something else than objects")
    return content


def _classes(content: dict[str, Any], file: Path) -> tuple[str, ...]:
    """Names of the categories in the order of their ids, without those that only stand above others."""
    used = {entry.get("category_id") for entry in content["annotations"]}
    above = {entry.get("supercategory") for entry in content["categories"]}
    names = _categories(content, file)
    return check_names([name for key, name in sorted(names.items()) if key in used or name not in above], file)


def _categories(content: dict[str, Any], file: Path) -> dict[int, str]:
    try:
        names = {int(entry["id"]): str(entry["name"]) for entry in content["categories"]}
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"{file} is not in COCO's format: a category has no id or no name") from None
    if len(names) < len(content["categories"]):
        raise UsageError(f"{file} is not in COCO's format: categories with the same id")
    return names


def _found(file: Path, content: dict[str, Any], passed: PassedOver) -> list[Found]:
    """Collect the annotations of each image of a file."""
    names = _categories(content, file)
    objects, unknown = defaultdict(list), []
    images = {entry["id"]: entry for entry in content["images"]}
    if len(images) < len(content["images"]) or not all(isinstance(e["file_name"], str) for e in images.values()):
        raise UsageError(f"{file} is not in COCO's format: images with the same id, or without a file_name")
    for number, entry in enumerate(content["annotations"]):
        box = entry.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, int | float) for v in box):
            raise UsageError(f"{file}: annotation {number} has no bbox of four numbers, so it is not of an object")
        if entry.get("category_id") not in names:
            unknown.append(entry.get("category_id"))
        elif entry.get("image_id") not in images:
            passed.append((str(file), "an annotation of an image that is not listed"))
        else:
            objects[entry["image_id"]].append(entry)
    if unknown:
        ids = shortened(sorted(map(str, set(unknown))))
        raise UsageError(f"{file}: {len(unknown)} annotations have category ids that it does not define: {ids}")
    base = _base(file, [entry["file_name"] for entry in content["images"][:3]])

    def found(entry: dict[str, Any]) -> Found:
        own = objects[entry["id"]]
        boxes = np.array([one["bbox"] for one in own], np.float64).reshape(-1, 4)
        size = entry.get("height"), entry.get("width")
        return Found(
            image=os.path.join(base, entry["file_name"]),
            boxes=np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1).tolist(),
            labels=[names[one["category_id"]] for one in own],
            crowd=[bool(one.get("iscrowd")) for one in own],
            size=size if all(isinstance(side, int) for side in size) else None,  # type: ignore[arg-type]
        )

    return [found(entry) for entry in content["images"]]


def _base(file: Path, names: list[str]) -> Path:
    """Find the folder that image names are relative to: where one of the first images is."""
    last = file.stem.rpartition("_")[2]  # train2017 of instances_train2017.json
    inside = ("", "images", last, f"images/{last}", f"{split_named(file.stem)}", f"images/{split_named(file.stem)}")
    places = [above / folder for above in (file.parent, file.parent.parent) for folder in inside]
    base = next((place for name in names for place in places if os.path.isfile(place / name)), None)
    if base is None and names:
        raise UsageError(f"{names[0]}, an image of {file}, is not next to it, nor in a folder images or {last} there")
    return base or file.parent


def _note_unlisted(splits: Splits, passed: PassedOver) -> None:
    """Pass over images next to listed ones that no file lists."""
    listed = {os.path.normpath(one.image) for found in splits.values() for one in found}
    folders = sorted({os.path.dirname(path) for path in listed})
    there = (path for folder in folders if os.path.isdir(folder) for path in own_images(Path(folder)))
    passed += [(path, "an image without annotations") for path in there if os.path.normpath(path) not in listed]
