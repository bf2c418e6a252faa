"""Readers of COCO JSON, VOC XML and YOLO text: what they find, and one clear line for whatever is wrong."""

import json

import numpy as np
import pytest
from PIL import Image

from train.detect.sets import load
from train.errors import UsageError

WIDTH, HEIGHT = 60, 40
# (x1, y1, x2, y2) and class of the objects of each image; the third has none.
OBJECTS = [[((5, 10, 25, 30), "cat"), ((0, 0, 60, 40), "dog")], [((12, 4, 20, 39), "dog")], [], [((1, 1, 9, 9), "cat")]]
OBJECTS += [[((30, 20, 45, 33), "cat")]]


def picture(path, size=(WIDTH, HEIGHT), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 30)).save(path, **options)


def coco(root, file="annotations/instances_train2017.json", images="train2017", change=None, first=0):
    """Write images and a JSON file of them; `change` edits the content before it is written."""
    content = {"images": [], "annotations": [], "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]}
    for number, objects in enumerate(OBJECTS, first):
        picture(root / images / f"{number}.jpg")
        content["images"].append({"id": number, "file_name": f"{number}.jpg", "width": WIDTH, "height": HEIGHT})
        for (x1, y1, x2, y2), name in objects:
            one = {"image_id": number, "category_id": {"cat": 3, "dog": 7}[name], "bbox": [x1, y1, x2 - x1, y2 - y1]}
            content["annotations"].append(one)
    if change:
        change(content)
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def xml(objects, size=(HEIGHT, WIDTH)):
    """VOC's XML: pixels are counted from 1, and boxes include both ends."""
    text = f"<annotation><size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>"
    for (x1, y1, x2, y2), name in objects:
        ends = f"<xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
        part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
        hard = int(name == "dog")
        text += f"<object><name>{name}</name>{part}<difficult>{hard}</difficult><bndbox>{ends}</bndbox></object>"
    return f"{text}</annotation>"


def voc(root, images="JPEGImages", annotations="Annotations"):
    for number, objects in enumerate(OBJECTS):
        picture(root / images / f"{number:06}.jpg")
        (root / annotations).mkdir(parents=True, exist_ok=True)
        (root / annotations / f"{number:06}.xml").write_text(xml(objects))


def lists(root, **splits):
    folder = root / "ImageSets" / "Main"
    folder.mkdir(parents=True)
    for name, numbers in splits.items():
        (folder / f"{name}.txt").write_text("".join(f"{number:06}\n" for number in numbers))


def lines(objects):
    names = {"cat": 0, "dog": 1}
    return "".join(
        f"{names[name]} {(x1 + x2) / 2 / WIDTH} {(y1 + y2) / 2 / HEIGHT} {(x2 - x1) / WIDTH} {(y2 - y1) / HEIGHT}\n"
        for (x1, y1, x2, y2), name in objects
    )


def yolo(root, images="images", labels="labels", names="names: [cat, dog]\n"):
    for number, objects in enumerate(OBJECTS):
        picture(root / images / f"{number}.jpg")
        (root / labels).mkdir(parents=True, exist_ok=True)
        if objects:  # without a file, an image has no objects
            (root / labels / f"{number}.txt").write_text(lines(objects))
    if names:
        (root / "data.yaml").write_text(names)


def everything(data):
    """Boxes and class names of all images of a set, by the images' names without folders."""
    found = {}
    for source in data.splits.values():
        for one in source.examples:
            boxes = [tuple(np.round(box, 3).tolist()) for box in one.boxes]
            found[one.name.rpartition("/")[2]] = list(zip(boxes, [data.classes[i] for i in one.labels], strict=True))
            assert one.size == (HEIGHT, WIDTH)
    return found


WANT = [[(tuple(map(float, box)), name) for box, name in objects] for objects in OBJECTS]


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"file": "train.json", "images": "."},
        {"file": "labels.json", "images": "images"},
        {"file": "annotations/instances_train2017.json", "images": "images/train2017"},
        {"file": "train/_annotations.coco.json", "images": "train"},
    ],
)
def test_coco(tmp_path, layout):
    coco(tmp_path, **layout)
    data = load(f"coco:{tmp_path}")
    assert data.classes == ("cat", "dog") and not data.passed_over
    assert everything(data) == {f"{number}.jpg": objects for number, objects in enumerate(WANT)}
    assert {split: len(source) for split, source in data.splits.items()} == {"train": 3, "validation": 1, "test": 1}


def test_coco_splits_and_files(tmp_path, capsys):
    file = coco(tmp_path)
    coco(tmp_path, "annotations/instances_val2017.json", "val2017", first=10)
    (tmp_path / "annotations" / "captions_val2017.json").write_text("[]")  # not of objects
    picture(tmp_path / "train2017" / "unlisted.jpg")
    data = load(f"coco:{tmp_path}", validation=0.2)
    assert [one.name[-6:] for one in data.test.examples] == ["10.jpg", "11.jpg", "12.jpg", "13.jpg", "14.jpg"]
    assert len(data.train) + len(data.validation) == 5  # COCO's validation images are those that results are about
    assert data.passed_over == (f"{tmp_path}/train2017/unlisted.jpg: an image without annotations",)
    assert "1 x an image without annotations" in capsys.readouterr().err
    assert sum(map(len, load(f"coco:{file}").splits.values())) == 5


def test_crowds_and_categories_above_others(tmp_path):
    def change(content):
        content["annotations"][0]["iscrowd"] = 1
        content["categories"].insert(0, {"id": 0, "name": "animals", "supercategory": "none"})
        content["categories"][1]["supercategory"] = "animals"

    coco(tmp_path, change=change)
    data = load(f"coco:{tmp_path}")
    assert data.classes == ("cat", "dog")
    crowds = {one.name[-5:]: one.crowd.tolist() for s in data.splits.values() for one in s.examples}
    assert crowds["0.jpg"] == [True, False] and crowds["1.jpg"] == [False]


@pytest.mark.parametrize("place", ["", "VOC2007", "VOCdevkit/VOC2007"])
def test_voc(tmp_path, place):
    voc(tmp_path / place)
    lists(tmp_path / place, train=[0, 1], val=[2, 3], test=[4], cat_train=[9])
    data = load(f"voc:{tmp_path}")
    assert data.classes == ("cat", "dog") and not data.passed_over
    assert everything(data) == {f"{number:06}.jpg": objects for number, objects in enumerate(WANT)}
    assert {split: len(source) for split, source in data.splits.items()} == {"train": 2, "validation": 2, "test": 1}
    assert data.train.examples[0].crowd.tolist() == [False, True]  # difficult


@pytest.mark.parametrize("layout", [{"images": ".", "annotations": "."}, {}, {"images": "images"}])
def test_voc_without_lists(tmp_path, layout):
    voc(tmp_path, **layout)
    folder = tmp_path / layout.get("images", "JPEGImages")
    picture(folder / "alone.jpg")
    (tmp_path / layout.get("annotations", "Annotations") / "lost.xml").write_text(xml([]))
    data = load(f"voc:{tmp_path}")
    assert everything(data) == {f"{number:06}.jpg": objects for number, objects in enumerate(WANT)}
    reasons = sorted(line.rpartition(": ")[2] for line in data.passed_over)
    assert reasons == ["an annotation without an image", "an image without annotations"]


def test_voc_in_split_folders(tmp_path):
    for split in ("train", "valid", "test"):
        voc(tmp_path / split, ".", ".")
    assert {split: len(source) for split, source in load(f"voc:{tmp_path}").splits.items()} == {
        "train": 5,
        "validation": 5,
        "test": 5,
    }
    voc(tmp_path / "more", ".", ".")
    passed = load(f"voc:{tmp_path}").passed_over
    assert passed == (f"{tmp_path}/more: annotations in a folder that is not named after a split",)


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"names": "path: elsewhere\ntrain: ../images\nval:\nnc: 2\nnames:\n  0: cat\n  1: dog\n"},
        {"images": ".", "labels": "."},
        {"images": "train/images", "labels": "train/labels"},
        {"images": "images/train", "labels": "labels/train", "names": "train: images/train\nnames: [cat, dog]"},
    ],
)
def test_yolo(tmp_path, layout):
    yolo(tmp_path, **layout)
    data = load(f"yolo:{tmp_path}")
    assert data.classes == ("cat", "dog") and not data.passed_over
    assert everything(data) == {f"{number}.jpg": objects for number, objects in enumerate(WANT)}


def test_yolo_names_lists_polygons_and_strays(tmp_path):
    yolo(tmp_path, names=None)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "labels" / "3.txt").write_text("1 0.1 0.1 0.5 0.2 0.4 0.75 0.3 0.3\n\n")
    (tmp_path / "labels" / "9.txt").write_text("")
    data = load(f"yolo:{tmp_path}")
    assert everything(data)["3.jpg"] == [((6, 4, 30, 30), "dog")]
    assert data.passed_over == (f"{tmp_path}/labels/9.txt: labels without an image",)
    (tmp_path / "train.txt").write_text("./images/0.jpg\nimages/1.jpg\nimages/2.jpg\nimages/4.jpg\n")
    (tmp_path / "data.yaml").write_text("train: train.txt\nnames: [cat, dog]\n")
    assert len(everything(load(f"yolo:{tmp_path}"))) == 4
    (tmp_path / "data.yaml").write_text("train: images\ntest: ../test/images\nnames: [cat, dog]\n")
    assert "../test/images: images for test that are not there" in load(f"yolo:{tmp_path}").passed_over


def test_boxes_are_clipped_or_passed_over(tmp_path, capsys):
    def change(content):
        boxes = [[-5, -5, 20, 20], [50, 30, 100, 100], [70, 10, 5, 5], [10, 10, 0, 5], [10, 10, -3, 5]]
        boxes += [[float("nan"), 1, 2, 3]]
        content["annotations"] = [{"image_id": 0, "category_id": 3, "bbox": box} for box in boxes]
        content["annotations"] += [{"image_id": 99, "category_id": 3, "bbox": [1, 2, 3, 4]}]
        content["annotations"] += [{"image_id": n, "category_id": 7, "bbox": [1, 2, 3, 4]} for n in range(1, 5)]

    file = coco(tmp_path, change=change)
    data = load(f"coco:{tmp_path}")
    assert [box for box, _ in everything(data)["0.jpg"]] == [(0, 0, 15, 15), (50, 30, 60, 40)]
    image = f"{tmp_path}/train2017/0.jpg"
    assert sorted(data.passed_over) == sorted(
        [
            f"{file}: an annotation of an image that is not listed",
            f"{image}: a box outside of the image",
            f"{image}: a box without area",
            f"{image}: a box without area",
            f"{image}: a box that is not finite",
        ]
    )
    assert "2 x a box without area" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "want"), [((WIDTH, HEIGHT), True), ((HEIGHT, WIDTH), False)])
def test_exif_orientation_follows_the_annotation(tmp_path, size, want):
    """An image is turned, unless it was annotated as it is stored."""
    coco(tmp_path, change=lambda content: content["images"][0].update(width=size[0], height=size[1]))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "train2017" / "0.jpg", (HEIGHT, WIDTH), exif=exif)
    data = load(f"coco:{tmp_path}")
    source, place = next((s, i) for s in data.splits.values() for i, e in enumerate(s.examples) if "/0.jpg" in e.name)
    assert source.examples[place].turned is want
    assert source[place]["size"].tolist() == [size[1], size[0]]


def cut_short(root):
    file = coco(root)
    file.write_text(file.read_text()[:-30])


def smaller_image(root):
    coco(root)
    picture(root / "train2017" / "1.jpg", (30, 20))


def broken_image(root):
    coco(root)
    (root / "train2017" / "1.jpg").write_bytes(b"text")


def truncated_image(root):
    coco(root)
    path = root / "train2017" / "1.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-1000])


def broken_xml(root):
    voc(root)
    path = root / "Annotations" / "000001.xml"
    path.write_text(path.read_text()[:-20])


def no_box_in_xml(root):
    voc(root)
    (root / "Annotations" / "000001.xml").write_text("<a><object><name>cat</name></object></a>")


def missing_xml(root):
    voc(root)
    lists(root, train=[0, 1, 3, 7], test=[4])


def unknown_number(root):
    yolo(root)
    (root / "labels" / "1.txt").write_text("2 0.5 0.5 0.1 0.1")


def words(root):
    yolo(root)
    (root / "labels" / "1.txt").write_text("0 0.5 0.5 wide 0.1")


BROKEN = {  # those that `broken="skip"` leaves out
    "smaller_image": (smaller_image, "coco", r"1 of 5 .*1\.jpg: annotated as 60x40 pixels, but it has 30x20"),
    "broken_image": (
        broken_image,
        "coco",
        r"1 of 5 images or their annotations .*1\.jpg: not an image",
    ),
    "truncated_image": (truncated_image, "coco", r"1 of 5 images cannot be decoded: .*1\.jpg: .*truncated"),
    "broken_xml": (broken_xml, "voc", r"000001\.xml: not valid XML, it may be cut short .*--data\.broken skip"),
    "no_box_in_xml": (no_box_in_xml, "voc", r"000001\.xml: an object has no xmin"),
    "missing_xml": (missing_xml, "voc", r"1 of 5 .*000007\.xml: No such file"),
    "unknown_number": (unknown_number, "yolo", r"1\.txt: line 1 has class 2, but there are 2: cat, dog"),
    "words": (words, "yolo", r"1\.txt: could not convert string to float: 'wide'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_refused_or_skipped(tmp_path, name, capsys):
    make, kind, message = BROKEN[name]
    make(tmp_path)
    with pytest.raises(UsageError, match=message):
        load(f"{kind}:{tmp_path}")
    data = load(f"{kind}:{tmp_path}", broken="skip", validation=0.3)
    assert len(data.passed_over) == 1 and "skipping them" in capsys.readouterr().err
    assert sum(map(len, data.splits.values())) == 4


def utf16(path):
    """As PowerShell writes it."""
    path.write_text("cat\ndog\n", encoding="utf-16")


def unlisted_category(content):
    content["annotations"][0]["category_id"] = content["annotations"][1]["category_id"] = 90


REFUSED = {
    "cut_short": (cut_short, "coco", r"instances_train2017\.json cannot be read as JSON, it may be cut short"),
    "category": (lambda r: coco(r, change=unlisted_category), "coco", r"2 annotations have category ids .*: 90"),
    "no_boxes": (
        lambda r: coco(r, change=lambda c: c["annotations"][1].pop("bbox")),
        "coco",
        "1 has no bbox",
    ),
    "same_id": (lambda r: coco(r, change=lambda c: c["images"][1].update(id=0)), "coco", "images with the same id"),
    "no_id": (lambda r: coco(r, change=lambda c: c["images"][1].pop("id")), "coco", "KeyError: 'id'"),
    "same_category": (lambda r: coco(r, change=lambda c: c["categories"][1].update(id=3)), "coco", "same id"),
    "list_as_id": (lambda r: coco(r, change=lambda c: c["annotations"][1].update(image_id=[1])), "coco", "unhashable"),
    "no_list": (lambda r: coco(r, change=lambda c: c.pop("categories")), "coco", "it has no list 'categories'"),
    "same_name": (lambda r: coco(r, change=lambda c: c["categories"][0].update(name="dog")), "coco", "class dog twice"),
    "only_val": (lambda r: coco(r, "annotations/instances_val2017.json"), "coco", "no annotations to train on, only"),
    "two": (lambda r: (coco(r, "a.json"), coco(r, "b.json")), "coco", "a.json, b.json: cannot tell which is which"),
    "no_images": (lambda r: coco(r, images="pictures"), "coco", r"0\.jpg, an image of .*, is not next to it"),
    "empty_coco": (lambda r: None, "coco", "holds no annotations: no JSON file"),
    "empty_voc": (lambda r: None, "voc", "holds no annotations: no XML files"),
    "years": (
        lambda r: (voc(r / "VOC2007"), voc(r / "VOC2012")),
        "voc",
        r"VOC2007 and VOC2012: pass one, as",
    ),
    "two_splits": (
        lambda r: [voc(r / name, ".", ".") for name in ("train", "val", "valid")],
        "voc",
        "holds val and valid: merge them, both are for validation",
    ),
    "list_in_utf16": (
        lambda r: (voc(r), lists(r, train=[1]), utf16(r / "ImageSets" / "Main" / "train.txt")),
        "voc",
        r"train\.txt cannot be read: 'utf-8' codec",
    ),
    "two_yolo_splits": (
        lambda r: [yolo(r, images=f"{name}/images", labels=f"{name}/labels") for name in ("train", "val", "valid")],
        "yolo",
        "holds val and valid: merge them",
    ),
    "classes_in_utf16": (
        lambda r: (yolo(r, names=None), utf16(r / "classes.txt")),
        "yolo",
        r"classes\.txt cannot be read: 'utf-8' codec",
    ),
    "number_as_place": (
        lambda r: yolo(r, names="train: 5\nnames: [cat, dog]"),
        "yolo",
        r"data\.yaml must name folders or files for train, got 5",
    ),
    "nothing_as_place": (
        lambda r: yolo(r, names="train: [null]\nnames: [cat, dog]"),
        "yolo",
        r"data\.yaml must name folders or files for train, got \[null\]",
    ),
    "no_names": (lambda r: yolo(r, names=None), "yolo", "does not name its classes: add data.yaml, or classes.txt"),
    "numbers": (lambda r: yolo(r, names="names: {1: cat, 2: dog}"), "yolo", "not numbered from 0 to 1"),
    "elsewhere": (
        lambda r: yolo(r, names="train: there\nnames: [cat, dog]"),
        "yolo",
        "names there for train",
    ),
    "yaml": (lambda r: yolo(r, names="names: [cat"), "yolo", r"data\.yaml cannot be read as YAML"),
    "no_labels": (lambda r: yolo(r, labels="texts"), "yolo", r"none of the 5 images .* has a file of labels"),
    "nothing": (lambda r: None, "yolo", "does not name its classes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_in_one_line(tmp_path, name):
    make, kind, message = REFUSED[name]
    make(tmp_path)
    with pytest.raises(UsageError, match=message):
        load(f"{kind}:{tmp_path}")


def test_a_class_that_training_does_not_have(tmp_path):
    voc(tmp_path)
    lists(tmp_path, train=[3], test=[4, 1])
    with pytest.raises(UsageError, match=r"test has objects of dog, which the training split does not have \(cat\)"):
        load(f"voc:{tmp_path}")


@pytest.mark.parametrize("name", ["coco:", "voc:", "yolo:/nowhere", "coco:/nowhere/train.json"])
def test_places_that_are_not_there(name):
    with pytest.raises(UsageError, match=r"needs the path of a folder|there is no"):
        load(name)
