"""Boxes and labels are drawn where they belong, and the page shows the numbers."""

import io
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.train.detect.test_metrics import found, random_images, truth
from train.detect.draw import (
    LARGEST,
    SMALLEST,
    Drawn,
    colour_of,
    contact_sheet,
    draw_best_and_worst,
    draw_objects,
    enlarged,
)
from train.detect.metrics import coco_metrics
from train.page import encode

CLASSES = ("cat", "dog", "owl")
GREY = np.full((500, 600, 3), 128, np.uint8)


def changed(picture, image=GREY):
    return (picture != image).any(-1)


def test_box_is_where_it_should_be():
    picture = draw_objects(GREY, found([[100, 200, 300, 400]], labels=[1]), CLASSES)
    colour = np.array(colour_of(1))
    for y, x in ((200, 250), (399, 150), (300, 100), (300, 299)):
        assert (picture[y, x] == colour).all()
    # Nothing inside, nothing outside but the label above.
    marked = changed(picture)
    assert not marked[203:396, 104:296].any() and not marked[:, 303:].any() and not marked[403:].any()
    ys, xs = np.nonzero(marked[:197])
    assert ys.min() > 170 and xs.min() > 97 and xs.max() < 200


def test_low_scores_are_left_out_and_truth_is_dashed():
    seen = found([[100, 200, 300, 400], [10, 10, 40, 40]], [0.9, 0.4])
    assert not changed(draw_objects(GREY, seen, CLASSES))[:100].any()
    assert changed(draw_objects(GREY, seen, CLASSES, least=0.4))[:100].any()
    # The found object has dashes only; the other is also named.
    dashed = changed(draw_objects(GREY, found([]), CLASSES, truth([[100, 200, 300, 400]], crowd=[True])))
    ys, xs = np.nonzero(dashed)
    assert (ys.min(), ys.max(), xs.min(), xs.max()) == (200, 399, 100, 299)
    missed = changed(draw_objects(GREY, found([]), CLASSES, truth([[100, 200, 300, 400]])))
    assert missed[170:198, 100:180].mean() > 0.5


@pytest.mark.parametrize("shape", [(96, 96, 3), (64, 96, 1), (1500, 1000, 3), (1, 1, 3), (5, 900, 3)])
def test_size_of_the_picture(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    picture, scale = enlarged(image)
    assert SMALLEST <= max(picture.size) <= LARGEST and picture.mode == "RGB"
    if scale >= 1:
        assert scale == int(scale) and (np.asarray(picture)[:: int(scale), :: int(scale)] == image).all()
    height, width, _ = shape
    drawn = draw_objects(image, found([[0, 0, width, height]]), CLASSES)
    assert drawn.shape == (picture.height, picture.width, 3)


def test_labels_stay_inside_and_apart(monkeypatch):
    places = []
    rectangle = ImageDraw.ImageDraw.rectangle

    def note(self, place, **look):
        if look.get("fill"):
            places.append(place)
        return rectangle(self, place, **look)

    monkeypatch.setattr(ImageDraw.ImageDraw, "rectangle", note)
    rng = np.random.default_rng(1)
    corner = rng.uniform(0, 560, (60, 2)) * [1, 0.8]
    boxes = np.concatenate([[[0, 0, 600, 500], [-20, -20, 640, 540]], np.concatenate([corner, corner + 40], 1)])
    draw_objects(GREY, found(boxes, labels=np.arange(62) % 3), ["a name of a class " * 9, "b", "c"])
    left, top, right, bottom = np.array(places).T
    assert len(places) > 20
    assert left.min() >= 0 and top.min() >= 0 and right.max() < 600 and bottom.max() < 500
    covered = np.zeros((500, 600), int)
    for x, y, *end in places:
        covered[y : end[1] + 1, x : end[0] + 1] += 1
    assert covered.max() == 1


def test_contact_sheet_and_files():
    pictures = [np.full((h, w, 3), at, np.uint8) for at, (h, w) in enumerate([(480, 480), (480, 960), (100, 50)])]
    sheet = contact_sheet([Drawn(x, "a long caption " * 9) for x in pictures], columns=2, side=240)
    assert sheet.shape[1] == 2 * 248 + 8
    assert (sheet[8:248, 8:248] == 0).all() and (sheet[8:128, 256:496] == 1).all() and (sheet == 2).all(-1).any()
    with pytest.raises(ValueError, match="no images"):
        contact_sheet([])
    files = [encode(sheet), encode(sheet, "jpeg")]
    assert [Image.open(io.BytesIO(file)).format for file in files] == ["PNG", "JPEG"]


def test_best_and_worst_are_drawn():
    detections, truths = random_images(0, count=5)
    asked = []

    def read(at):
        asked.append(at)
        return GREY

    best, worst = draw_best_and_worst(detections, truths, CLASSES, read, count=2)
    assert len(best) == len(worst) == 2 and len({*asked}) == 4
    f1 = [float(re.search(r"F1 ([\d.]+)", drawn.caption)[1]) for drawn in best + worst]
    assert f1[0] >= f1[1] >= f1[3] >= f1[2]


@pytest.mark.parametrize("case", ["objects", "many classes", "nothing"])
def test_page_shows_the_numbers(tmp_path, case):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    from train.detect.page import detection_page, write_page

    classes = CLASSES if case != "many classes" else [f"<class> {at}" for at in range(20)]
    detections, truths = random_images(0, classes=len(classes))
    if case == "nothing":
        detections, truths = [found([])] * 2, [truth([])] * 2
    metrics = coco_metrics(detections, truths, classes)
    about = ("Detections", metrics, detections, truths, classes)
    paths = write_page(tmp_path / "page.html", *about, lambda at: GREY[:64, :64], count=2)
    assert [str(path.relative_to(tmp_path)) for path in paths] == ["page.html", "page/best.png", "page/worst.png"]
    assert all(path.stat().st_size for path in paths)
    text = paths[0].read_text()
    assert text == detection_page(*about, draw_best_and_worst(*about[2:], lambda at: GREY[:64, :64], count=2))
    assert text.count("data:image/jpeg") == (2 if case == "nothing" else 4) and "<class>" not in text
    if case == "nothing":
        assert "AP none on 2 images: 0 of 0 objects found." in text
    else:
        assert f"AP {100 * metrics['ap']:.2f}\N{NO-BREAK SPACE}% on 12 images" in text
        assert ("mean of " in text) == (case == "many classes")
