"""`python -m train.explain` on small runs: of training, pruning and pretraining, and on bad input."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from tests.train.test_old_runs import extracted
from train.errors import UsageError
from train.explain.__main__ import main
from train.explain.attributions import SCORES, options_of
from train.explain.images import pixels_of
from train.explain.subject import class_index
from train.from_config import make_kernels, with_kernels
from train.run_folder import load_state
from train.sparse_file import save_sparse
from train.trained import load_trained

pytest.importorskip("matplotlib", reason="needs the extra plot")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tfds_dir):
    """Runs of two steps on digits: `train`, `prune`, `pretrain`."""
    folder = tmp_path_factory.mktemp("runs")
    return {name: extracted(name, folder) for name in ("train", "prune", "pretrain")}


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "seven.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12), dtype=np.uint8)).save(path)
    return str(path)


def result_of(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_images_and_views_of_a_run(runs, tmp_path, capsys):
    """Without images, some of the validation split; everything is in one folder, and again in its place."""
    out = tmp_path / "out"
    arguments = [str(runs["train"]), "--out", str(out), "--count", "2", "--batch", "2"]
    main([*arguments, "--methods", "saliency", "--dataset", "confusion", "reliability", "mistakes", "neighbours"])
    result = result_of(capsys)
    assert json.loads((out / "scores.json").read_text()) == result
    assert list(result["methods"]) == ["saliency", "random"] and list(result["methods"]["random"]) == list(SCORES)
    assert result["methods"]["random"]["randomization"] == pytest.approx(1, abs=1e-4)
    wrong, right = result["images"]
    assert wrong["label"] != wrong["predicted"] == wrong["explained"] and right["label"] == right["predicted"]
    means = np.mean([image["scores"]["saliency"]["deletion"] for image in result["images"]])
    assert result["methods"]["saliency"]["deletion"] == pytest.approx(means)
    assert 0 < result["confusion"]["accuracy"] < 1 and result["confusion"]["images"] == 144
    assert len(result["mistakes"]) == 24 and [len(row["labels"]) for row in result["neighbours"]] == [6, 6]
    page = (out / "index.html").read_text()
    assert not re.search('(src|href)="(?!data:|#)', page)  # self-contained
    assert all(text in page for text in ("Confusion matrix", "Worst mistakes", "insertion", "saliency"))
    pictures = {file.name for file in (out / "pictures").iterdir()}
    assert {"confusion.png", "reliability.png", "mistakes.png", "neighbours.png"} < pictures and len(pictures) == 6


@pytest.mark.slow
def test_cascade_and_completeness_of_a_run(runs, image, tmp_path, capsys):
    """Guided backprop is added; the last step of the cascade is the score; only integrated gradients are complete."""
    arguments = [str(runs["train"]), image, "--out", str(tmp_path), "--methods", "integrated_gradients", "--cascade"]
    main(arguments)
    result = result_of(capsys)
    means = result["methods"]
    assert list(means) == ["integrated_gradients", "guided_backprop", "random"]
    assert set(means["integrated_gradients"]) - set(means["random"]) == {"completeness_error"}
    assert means["integrated_gradients"]["completeness_error"] < 0.1
    assert list(result["cascade"]) == ["integrated_gradients", "guided_backprop"]
    for name, values in result["cascade"].items():
        assert (next(iter(values)), [*values][-1]) == ("head", "stem")
        assert values["stem"] == pytest.approx(means[name]["randomization"], abs=1e-5)
    page = (tmp_path / "index.html").read_text()
    assert "Random weights, layer by layer" in page and "completeness_error" in page
    assert {file.name for file in (tmp_path / "pictures").iterdir()} > {"cascade.png", "cascade_maps.png"}


@pytest.mark.slow
def test_inside_of_a_network_in_place_of_an_earlier_explanation(runs, image, tmp_path, capsys):
    arguments = [str(runs["train"]), image, "--out", str(tmp_path), "--methods"]
    main([*arguments, "random"])
    main([*arguments, "--features"])
    assert {file.name for file in (tmp_path / "pictures").iterdir()} == {
        "filters.png",
        "feature_maps.png",
        "dreams.png",
    }
    assert "methods" not in result_of(capsys)


@pytest.mark.slow
def test_targets_of_a_classifier(runs, image, tmp_path, capsys):
    main([str(runs["prune"]), image, "--out", str(tmp_path / "a"), "--methods", "grad_cam", "--target", "7:1"])
    assert result_of(capsys)["images"][0]["explained"] == "7 rather than 1"
    main([str(runs["pretrain"]), image, "--out", str(tmp_path / "b"), "--target", f"image:{image}"])
    assert result_of(capsys)["images"][0]["explained"] == f"similar to {image}"


@pytest.mark.slow
def test_encoder_explains_similarity(runs, image, tmp_path, capsys):
    arguments = [str(runs["pretrain"]), image, "--methods", "grad_cam", "--layer", "stage1"]
    main([*arguments, "--out", str(tmp_path / "a"), "--dataset", "pca"])
    (found,) = result_of(capsys)["images"]
    assert re.fullmatch(r"similar to a training image of \d", found["explained"]) and "predicted" not in found


def test_sparse_file_is_the_run_with_its_weights(runs):
    state = load_state(runs["prune"])
    file = runs["prune"] / "sparse.safetensors"
    save_sparse(file, state.variables, state.masks, values="float32", metadata={})
    dense, sparse = (load_trained(source) for source in (runs["prune"], file))
    np.testing.assert_array_equal(
        dense.variables["params"]["head"]["kernel"], sparse.variables["params"]["head"]["kernel"]
    )
    assert dense.classes == sparse.classes


def test_what_a_network_sees_can_be_shown(runs):
    trained = load_trained(runs["train"])
    fields, _ = make_kernels("auto", dtype=trained.dtype)
    assert load_trained(runs["train"], kernels="auto").model == with_kernels(trained.model, fields)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    pixels = pixels_of(trained)
    seen = np.asarray(pixels.see(images))
    np.testing.assert_array_equal(pixels.show(seen), images)
    np.testing.assert_allclose(seen, (images / 255 - pixels.mean) / pixels.std, atol=1e-5)
    np.testing.assert_allclose(pixels.mean, trained.config.augment.mean, atol=1e-5)


def test_options_of_small_images():
    assert options_of("occlusion", (8, 8, 1)) == {"window": 1, "stride": 1}
    assert options_of("occlusion", (224, 224, 3)) == {"window": 28, "stride": 14}
    assert options_of("grad_cam", (8, 8, 1)) == {}


def test_classes_by_name_and_number():
    assert class_index("cat", ["dog", "cat"]) == 1 == class_index("1", ["dog", "cat"])
    assert class_index("1", ["1", "0"]) == 0  # names come first
    with pytest.raises(UsageError, match=r"unknown class '2': choose one of dog, cat, or a number from 0 to 1"):
        class_index("2", ["dog", "cat"])
    with pytest.raises(UsageError, match=r"and 900 more, or a number from 0 to 999"):
        class_index("cat", list(map(str, range(1000))))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the folder to write to: --out DIR"),
        (["--out", "OUT", "nowhere.png"], "cannot read image nowhere.png: No such file or directory"),
        (["--out", "OUT", "EMPTY"], "EMPTY holds no images"),
        (["--out", "OUT", "IMAGE", "--layer", "stage9"], "--layer: no layer 'stage9'; layers: stem, stage1_block1"),
        (["--out", "OUT", "IMAGE", "--layer", "head"], "--layer head: its output is not a map [B, h, w, K]"),
        (["--out", "OUT", "IMAGE", "--target", "10"], "unknown class '10': choose one of 0, 1, 2"),
        (["--out", "OUT", "IMAGE", "--target", "1:x"], "unknown class 'x'"),
        (["--out", "OUT", "IMAGE", "--target", "1:1"], "--target 1:1 names one class twice"),
        (["--out", "OUT", "IMAGE", "--target", "image:nowhere.png"], "cannot read image nowhere.png"),
        (["--out", "OUT", "--methods", "gradcam"], "unknown method 'gradcam': did you mean grad_cam?"),
        (["--out", "OUT", "--dataset", "confusions"], "unknown view 'confusions': did you mean confusion?"),
        (["--out", "OUT", "--methods"], "nothing to do: name --methods, or pass --features or --dataset"),
        (["--out", "OUT", "--methods", "--features", "--target", "7"], "--target has no effect without --methods"),
        (["--out", "OUT", "--methods", "--features", "--cascade"], "--cascade has no effect without --methods"),
        (["--out", "OUT", "--count", "0"], "--count must be at least 1"),
        (["--out", "FULL"], "FULL holds other things than an explanation: choose a different --out"),
        (["--out", "FULL/notes.txt/out"], "cannot write to FULL/notes.txt/out: Not a directory"),
    ],
)
def test_bad_input(runs, image, tmp_path, fails, words, message):
    (tmp_path / "FULL").mkdir()
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FULL" / "notes.txt").touch()
    places = {"OUT": "OUT", "EMPTY": "EMPTY", "FULL": "FULL"}
    words = [re.sub(r"^(OUT|EMPTY|FULL)", lambda m: str(tmp_path / places[m[1]]), word) for word in words]
    line = fails(2, main, [str(runs["train"]), *(image if word == "IMAGE" else word for word in words)])
    assert message in line.replace(f"{tmp_path}/", "")


def test_runs_that_cannot_be_explained(runs, image, tmp_path, fails, monkeypatch):
    out = ["--out", str(tmp_path / "out")]
    assert "name a run folder, or a model by name" in fails(2, main, out)
    assert "is not a run folder" in fails(2, main, [str(tmp_path), *out])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text((runs["train"] / "config.json").read_text())
    assert "has no checkpoints yet" in fails(2, main, [str(tmp_path / "run"), *out])
    assert "has no image set of its own" in fails(2, main, ["cifar10_resnet20", *out])
    encoder = [str(runs["pretrain"]), image, *out]
    assert "has no classes: pass --target image:PATH" in fails(2, main, [*encoder, "--target", "7"])
    needs = "confusion needs the 10 classes of digits, but"
    assert needs in fails(2, main, [*encoder, "--dataset", "confusion"])
    for module, extra in (("matplotlib.figure", "plot"),):
        monkeypatch.setitem(__import__("sys").modules, module, None)
        assert f'pip install -e ".[{extra}]"' in fails(2, main, [str(runs["train"]), *out])
