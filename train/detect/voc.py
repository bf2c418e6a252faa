"""`voc:DIR`: images annotated in Pascal VOC's XML, in the layout of VOCdevkit, or XML files next to their images."""

import os
from pathlib import Path
from xml.etree import ElementTree

from train.data.folder import PassedOver, own_images, subfolders
from train.detect.annotations import Found, Splits, check_names, existing, read_lines, split_folders, split_named
from train.errors import UsageError

IMAGES = ("JPEGImages", "images", "Images")


def read(where: str, passed: PassedOver, faults: list[str]) -> tuple[tuple[str, ...], Splits]:
    """Read (classes, splits) of a folder with Annotations, or with split folders, or with XML files next to images.

    Boxes on file count pixels from 1 and include both ends. Objects marked as difficult become `crowd`. Classes are
    those of the training split, in the order of their names. Images without a file, or files without an image, are
    passed over, unless ImageSets/Main lists them.

    Raises:
      UsageError: no such folder, no annotations, several years of VOC, two folders of a split, lists that cannot be
        read.
    """
    root = _root(existing(where, "voc:"))
    if (root / "Annotations").is_dir() and (listed := _lists(root)):
        splits = {split: _listed(root, names, faults) for split, names in listed.items()}
    else:
        inside = [path for path in subfolders(root) if _holds_annotations(path)]
        folders = split_folders(inside)
        if "train" in folders:
            others = [path for path in inside if path not in folders.values()]
            passed += [(str(path), "annotations in a folder that is not named after a split") for path in others]
        else:
            folders = {"train": root}
        splits = {split: _flat(folder, passed, faults) for split, folder in folders.items()}
    classes = check_names(sorted({label for one in splits["train"] for label in one.labels}), root)
    return classes, splits


def _root(root: Path) -> Path:
    """Find the folder of the set: as VOCdevkit, it may hold a single folder of a year."""
    if not root.is_dir():
        raise UsageError(f"{root} is a file: pass the folder that holds the annotations")
    inside = [path for path in (root, root / "VOCdevkit") if path.is_dir()]
    years = [
        p for folder in inside for p in subfolders(folder) if (p / "Annotations").is_dir() and not split_named(p.name)
    ]
    if (root / "Annotations").is_dir() or not years:
        return root
    if len(years) > 1:
        raise UsageError(f"{root} holds {' and '.join(path.name for path in years)}: pass one, as in voc:{years[0]}")
    return years[0]


def _holds_annotations(folder: Path) -> bool:
    return any(folder.glob("*.xml")) or any((folder / "Annotations").glob("*.xml"))


def _lists(root: Path) -> dict[str, list[str]]:
    """Names of the images of each split that ImageSets/Main lists; trainval is for training if train is not there."""
    lists = {}
    for file, split in (("trainval", "train"), ("train", "train"), ("val", "validation"), ("test", "test")):
        path = root / "ImageSets" / "Main" / f"{file}.txt"
        if path.is_file() and (lines := read_lines(path)):
            lists[split] = [line.split()[0] for line in lines]
    return lists if "train" in lists else {}


def _images(folder: Path) -> dict[str, str]:
    """Paths of a folder's images by their names without a suffix."""
    places = [folder, *(folder / name for name in IMAGES if (folder / name).is_dir())]
    return {os.path.splitext(os.path.basename(path))[0]: path for place in places for path in own_images(place)}


def _listed(root: Path, names: list[str], faults: list[str]) -> list[Found]:
    images = _images(root)
    found = []
    for name in names:
        file = root / "Annotations" / f"{name}.xml"
        image = images.get(name, str(root / "JPEGImages" / f"{name}.jpg"))
        if isinstance(one := _parsed(file, image), str):
            faults.append(one)
        else:
            found.append(one)
    return found


def _flat(folder: Path, passed: PassedOver, faults: list[str]) -> list[Found]:
    """Read all XML files of a folder, or of its Annotations, that have an image."""
    images = _images(folder)
    files = sorted([*folder.glob("*.xml"), *(folder / "Annotations").glob("*.xml")])
    if not files:
        raise UsageError(f"{folder} holds no annotations: no XML files in it or in its folder Annotations")
    found, used = [], set()
    for file in files:
        image = images.get(file.stem)
        if image is None:
            passed.append((str(file), "an annotation without an image"))
            continue
        used.add(image)
        if isinstance(one := _parsed(file, image), str):
            faults.append(one)
        else:
            found.append(one)
    passed += [(path, "an image without annotations") for path in images.values() if path not in used]
    return found


def _parsed(file: Path, image: str) -> Found | str:
    """Read the annotation of an image, or say why it cannot be read."""
    try:
        tree = ElementTree.fromstring(file.read_bytes())
        objects = tree.findall("object")
        boxes = []
        for one in objects:
            x1, y1, x2, y2 = (float(_text(one, f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
            boxes.append((x1 - 1, y1 - 1, x2, y2))
        labels = [_text(one, "name") for one in objects]
        crowd = [(one.findtext("difficult") or "0").strip() not in ("", "0", "false") for one in objects]
        sides = [tree.findtext(f"size/{key}") for key in ("height", "width")]
        size = (int(float(sides[0])), int(float(sides[1]))) if sides[0] and sides[1] else None
    except OSError as error:
        return f"{file}: {error.strerror}"
    except ElementTree.ParseError as error:
        return f"{file}: not valid XML, it may be cut short ({error})"
    except (ValueError, OverflowError) as error:
        return f"{file}: {error}"
    return Found(image=image, boxes=boxes, labels=labels, crowd=crowd, size=size)


def _text(one: ElementTree.Element, path: str) -> str:
    text = (one.findtext(path) or "").strip()
    if not text:
        raise ValueError(f"an object has no {path.rpartition('/')[2]}")
    return text
