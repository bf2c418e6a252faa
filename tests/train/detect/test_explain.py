"""`python -m train.detect explain`: on a run of one step, and on bad input."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.train.test_old_runs import extracted
from train.detect import explain as module
from train.detect.__main__ import main
from train.detect.explain import best, inside
from train.detect.metrics import Detections
from train.detect.presets import PRESETS
from train.detect.run import run
from train.detect.shapes import read
from train.errors import UsageError

pytest.importorskip("matplotlib", reason="needs the extra plot")


def test_share_of_the_heat_in_a_box():
    heat = np.zeros((10, 20), np.float32)
    heat[2:4, 5:8], heat[8, 0], heat[9, 19] = 1, 2, -5
    assert inside(heat, np.array([4.5, 1.5, 8.2, 5])) == pytest.approx(6 / 8)
    assert inside(np.ones((10, 20)), np.array([0, 0, 10, 10])) == pytest.approx(0.5)
    assert inside(np.zeros((10, 20)), np.array([0, 0, 10, 10])) == 0


def test_best_detections():
    found = Detections(np.arange(16.0).reshape(4, 4), np.array([0.3, 0.9, 0.6, 0.7]), np.arange(4))
    assert best(found, 2, 0.5).labels.tolist() == [1, 3] and len(best(found, 2, 0.95).labels) == 0


def test_bad_input(tmp_path):
    start = ["explain", str(tmp_path), "a.png", "--out", str(tmp_path / "out")]
    with pytest.raises(UsageError, match=r"unknown method 'gradcam': did you mean grad_cam\?.*choose one of saliency"):
        main([*start, "--methods", "gradcam"])
    with pytest.raises(UsageError, match="--count must be at least 1"):
        main([*start, "--count", "0"])
    with pytest.raises(UsageError, match="--least between 0 and 1"):
        main([*start, "--least", "50"])
    with pytest.raises(UsageError, match="not a run folder"):
        main(start)
    start[1] = str(extracted("train", tmp_path))
    with pytest.raises(UsageError, match=r"is a run of train, not of train\.detect"):
        main(start)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A run of one step on shapes, and one of its images as a file."""
    folder = tmp_path_factory.mktemp("detect")
    preset = PRESETS["shapes_fasterrcnn"]()
    config = replace(preset, init=None, freeze=0, width=4, features=8, hidden=(8,), steps=1, batch=8)
    config = replace(config, frozen_stats=False, out=str(folder / "run"))
    run(config, "shapes_fasterrcnn", test=False)
    image = read()[1]["test"][1].read()[:90]
    Image.fromarray(image).save(folder / "a.png")
    return folder


@pytest.mark.slow
def test_page_of_a_run(tiny, capsys):
    out, image = tiny / "out", str(tiny / "a.png")
    start = ["explain", str(tiny / "run"), image, "--out", str(out)]
    main([*start, "--methods", "hires_cam", "saliency", "--count", "2", "--least", "0.06"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((out / "scores.json").read_text()) == result
    (shown,) = result["images"]
    assert shown["image"] == image and len(shown["objects"]) == 2
    for one in shown["objects"]:
        assert one["label"] in read()[0] and 0 < one["area"] <= 1 and list(one["inside"]) == ["hires_cam", "saliency"]
        assert all(0 <= share <= 1 for share in one["inside"].values())
    text = (out / "index.html").read_text()
    assert not re.search('(src|href)="(?!data:|#)', text) and "saliency has" in text  # self-contained
    assert sorted(file.name for file in (out / "pictures").iterdir()) == ["000_a_0.png", "000_a_1.png"]

    # An image without objects is not an error, and a new explanation replaces the old one.
    main([*start, "--least", "1"])
    printed = capsys.readouterr()
    assert "a.png: no object with a score of at least 1\n" in printed.err
    assert json.loads(printed.out.splitlines()[-1])["images"] == [{"image": image, "objects": []}]
    assert "Nothing was detected" in (out / "index.html").read_text() and not [*(out / "pictures").iterdir()]


@pytest.mark.slow
def test_other_detectors_and_folders_are_refused(tiny, monkeypatch):
    (tiny / "mine").mkdir()
    (tiny / "mine" / "thesis.txt").touch()
    with pytest.raises(UsageError, match="holds other things"):
        module.explain(str(tiny / "run"), [str(tiny / "a.png")], out=str(tiny / "mine"))
    with pytest.raises(UsageError, match="cannot read image"):
        module.explain(str(tiny / "run"), [str(tiny / "none.png")], out=str(tiny / "new"))
    loaded = module.load(str(tiny / "run"))
    monkeypatch.setattr(module, "load", lambda run: loaded._replace(model=loaded.model.backbone))
    with pytest.raises(UsageError, match="only boxes of faster_rcnn can be explained"):
        module.explain(str(tiny / "run"), [str(tiny / "a.png")], out=str(tiny / "new"))
