"""Use a finished run of detection: predictions, the page about its test split, and pruned detectors."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

from resnet_jax.tree import leaves
from tests.train.detect.quick_run import CONFIG
from train import predict
from train.config import TrainConfig
from train.data import from_arrays
from train.detect.from_config import is_prunable, open_objects
from train.detect.outputs import DETECTIONS, read_detections, report_main
from train.detect.predict import load, picture_names
from train.detect.run import run
from train.errors import UsageError
from train.prune.config import PruneConfig, PruningConfig
from train.prune.run import run as prune_run
from train.run import run as train_run

pytestmark = [pytest.mark.usefixtures("one_device_for_all"), pytest.mark.slow]


@pytest.fixture(scope="module")
def images():
    """Images uint8 [H, W, 3] of the test split, as they are."""
    source = open_objects(CONFIG.data).test
    return [source.examples[at].decode(None, None) for at in range(3)]


def test_detections_are_those_of_the_run(finished, images):
    """The run found them in batches of padded images."""
    detector, kept = load(finished[2]), read_detections(finished[2] / DETECTIONS)
    assert len(kept) == 120 and detector.classes == ("disc", "square", "triangle", "star")
    for image, before in zip(images, kept, strict=False):
        found = detector.detect(image)
        np.testing.assert_allclose(found.boxes, before.boxes, atol=0.05)
        np.testing.assert_allclose(found.scores, before.scores, atol=1e-3)
        assert (found.labels == before.labels).all()
    named = detector(images, least=0.0)
    assert [len(one) for one in named] == [len(one.labels) for one in kept[:3]]
    assert named[0] == sorted(named[0], key=lambda one: -one.score)


def test_images_of_any_size(finished):
    """One that no bucket holds has a size of its own, and one that cannot be read is named."""
    detector = load(finished[2])
    for shape in ((40, 200, 3), (1, 1, 3)):
        assert isinstance(detector(np.zeros(shape, np.uint8)), list)
    with pytest.raises(UsageError, match=r"cannot read image nowhere\.png: No such file"):
        detector("nowhere.png")


def test_prediction_from_the_command_line(finished, images, fails, capsys, tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for path, image in zip(paths, images, strict=False):
        Image.fromarray(image).save(path)
    line = [str(finished[2]), *map(str, paths), "--least", "0.1", "--draw", str(tmp_path / "drawn")]
    predict.main(line)
    shown = capsys.readouterr()
    rows = json.loads(shown.out)
    assert [row["image"] for row in rows] == [str(path) for path in paths]
    for row, image in zip(rows, images, strict=False):
        for one in row["objects"]:
            assert one["score"] >= 0.1 and one["label"] in ("disc", "square", "triangle", "star")
            x1, y1, x2, y2 = one["box"]
            assert 0 <= x1 < x2 <= image.shape[1] and 0 <= y1 < y2 <= image.shape[0]
    drawn = [np.asarray(Image.open(tmp_path / "drawn" / path.name)) for path in paths]
    assert all(picture.shape[2] == 3 for picture in drawn) and shown.err.count(".png: ") == 2

    with pytest.raises(UsageError, match=r"cannot read image missing\.png"):
        predict.main([line[0], "missing.png", *line[1:]])
    rows = json.loads(capsys.readouterr().out)
    assert [sorted(row) for row in rows] == [["error", "image"], ["image", "objects"], ["image", "objects"]]
    assert "--least must be" in fails(2, predict.main, [*line, "--least", "2"])
    assert "--top is for classes" in fails(2, predict.main, [*line, "--top", "2"])
    assert "cannot write to" in fails(2, predict.main, [*line[:-1], str(paths[0])])


def test_pictures_of_images_with_the_same_name():
    paths = ["a/1.jpg", "b/1.jpg", "2.png", "a/1.jpg", "c/1-2.jpg"]
    assert picture_names(paths) == {
        "a/1.jpg": "1.png",
        "b/1.jpg": "1-2.png",
        "2.png": "2.png",
        "c/1-2.jpg": "1-2-2.png",
    }


def test_page_of_a_run(finished, fails, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    report_main([str(finished[2]), "--out", str(tmp_path / "page.html"), "--least", "0.1"])
    files = json.loads(capsys.readouterr().out)["files"]
    text = (tmp_path / "page.html").read_text()
    assert files[0] == str(tmp_path / "page.html") and "star" in text and "<script src" not in text
    assert "not a run folder" in fails(2, report_main, [str(tmp_path)])
    assert "--least" in fails(2, report_main, [str(finished[2]), "--least", "7"])


def test_a_pruned_detector_and_a_pruned_backbone(tmp_path):
    """`--sparsity` prunes what it says, and `--init` keeps what was pruned before unless it is set free."""
    states = []
    config = replace(CONFIG, model="resnet8", sparsity=0.8, steps=8, out=str(tmp_path / "pruned"))
    result = run(config, hooks=[(8, states.append)], test=False)
    params, prunable = leaves(states[0].params), is_prunable(config)
    for path, mask in leaves(states[0].masks).items():
        assert bool(mask.ndim) == prunable(path, params[path])
    assert result["sparsity"] == pytest.approx(0.8, abs=0.01)

    rng = np.random.default_rng(0)
    pictures, labels = rng.integers(0, 256, (128, 16, 16, 3), dtype=np.uint8), np.arange(128) % 4
    classifier = TrainConfig(model="resnet8", width=8, steps=2, batch=64, kernels="plain", out=str(tmp_path / "dense"))
    train_run(classifier, dataset=from_arrays(pictures, labels))
    sparse = PruneConfig(
        **{**vars(classifier), "init": str(tmp_path / "dense"), "out": str(tmp_path / "sparse")},
        prune=PruningConfig(sparsity=0.5, schedule="one_shot"),
    )
    prune_run(sparse, dataset=from_arrays(pictures, labels))
    start = replace(CONFIG, model="resnet8", init=str(tmp_path / "sparse"), steps=1)
    for dense in (False, True):
        run(replace(start, dense=dense, out=str(tmp_path / str(dense))), hooks=[(1, states.append)], test=False)
    kept, free = (state.masks["backbone"] for state in states[1:])
    assert any(mask.ndim and not mask.all() for mask in jax.tree.leaves(kept))
    assert not any(mask.ndim for mask in jax.tree.leaves(free))
