"""Numbers of views against values known by hand, and the figures that they are drawn as."""

import io
import math
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.data.sources import Arrays, sample
from train.errors import UsageError
from train.explain import dataset, embeddings, figures, pages
from train.explain.attributions import Attribution
from train.explain.config import VIEW_NAMES
from train.explain.dataset import VIEWS, View
from train.explain.embeddings import neighbours, project
from train.explain.images import choose, evenly
from train.explain.landscape import filter_direction, loss_surface
from train.explain.mistakes import calibration, confusion, worst
from train.explain.outputs import Outputs
from train.explain.pages import STEPS, cascade_view, open_out, write_report
from train.steps import confusion_matrix, most_confused


def test_neighbours_by_cosine_whatever_the_length():
    bank = np.array([[1, 0], [0, 5], [3, 3], [2, 0]], np.float32)
    nearest, similarity = neighbours(np.array([[0.1, 0], [1, 1]], np.float32), bank, 3)
    assert nearest.tolist() == [[0, 3, 2], [2, 0, 1]]  # ties in order
    np.testing.assert_allclose(similarity, [[1, 1, 0.5**0.5], [1, 0.5**0.5, 0.5**0.5]], atol=1e-6)


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_projection_separates_two_groups(method):
    features = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)
    features[8:] += 30
    points = project(features, method)
    assert points.shape == (16, 2) and points.dtype == np.float32
    centres = points[:8].mean(0), points[8:].mean(0)
    closer = [np.linalg.norm(p - centres[i >= 8]) < np.linalg.norm(p - centres[i < 8]) for i, p in enumerate(points)]
    assert all(closer)
    np.testing.assert_array_equal(points, project(features, method))


@pytest.mark.slow
def test_umap_separates_two_groups():
    pytest.importorskip("umap", reason="needs the extra umap")
    features = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    features[15:] += 30
    points = project(features, "umap")
    gap = np.linalg.norm(points[:15].mean(0) - points[15:].mean(0))
    assert gap > np.linalg.norm(points[:15] - points[:15].mean(0), axis=1).max()


def test_projections_that_cannot_be_made(monkeypatch):
    with pytest.raises(UsageError, match="pca needs 4 images or more, got 3"):
        project(np.zeros((3, 2)), "pca")
    with pytest.raises(UsageError, match=r"unknown projection 'tsnee': did you mean tsne\?"):
        project(np.zeros((9, 2)), "tsnee")
    monkeypatch.setitem(__import__("sys").modules, "umap", None)
    with pytest.raises(UsageError, match=r'pip install -e "\.\[umap\]"'):
        project(np.zeros((9, 2)), "umap")


def test_a_slow_first_call_of_umap_says_why(monkeypatch, capsys):
    timers = []

    class Timer(threading.Timer):
        def start(self):
            timers.append(self)

    class Slow:
        def fit_transform(self, features):
            """It takes a second."""
            for timer in timers:
                if timer.interval < 1 and not timer.finished.is_set():
                    timer.function(*timer.args, **timer.kwargs)
            return features[:, :2]

    monkeypatch.setattr(embeddings, "Timer", Timer)
    monkeypatch.setattr(embeddings, "_reducer", lambda *args: Slow())
    for patience, method, said in ((0.01, "umap", True), (0.01, "pca", False), (9, "umap", False)):
        monkeypatch.setattr(embeddings, "PATIENCE", patience)
        assert project(np.zeros((9, 3)), method).shape == (9, 2)
        assert ("note: umap compiles its code" in capsys.readouterr().err) == said
    assert len(timers) == 2 and all(timer.finished.is_set() for timer in timers)  # a cancelled one stays silent


def test_confusion_counts_true_by_row():
    counted = confusion(np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 0, 0, 2]))
    assert confusion_matrix(counted, 3).tolist() == [[1, 1, 0], [0, 1, 0], [2, 0, 1]]
    assert most_confused(counted, 5).tolist() == [[2, 0, 2], [0, 1, 1]]
    assert most_confused(confusion(np.arange(3), np.arange(3)), 5).tolist() == []


def test_calibration_error_by_hand():
    """Two bins: three at 0.2 of which one is right, one at 0.9 that is wrong: (3 * |0.2 - 1/3| + 0.9) / 4."""
    found = calibration(np.array([0.2, 0.2, 0.2, 0.9]), np.array([True, False, False, False]), bins=2)
    assert found.counts.tolist() == [3, 1]
    np.testing.assert_allclose(found.confidence, [0.2, 0.9])
    np.testing.assert_allclose(found.accuracy, [1 / 3, 0])
    assert found.error == pytest.approx((3 * (1 / 3 - 0.2) + 0.9) / 4)
    assert calibration(np.ones(5), np.ones(5, bool)).error == 0
    assert math.isnan(calibration(np.ones(5), np.ones(5, bool)).accuracy[0])


def test_worst_mistakes_first():
    correct = np.array([True, False, False, True, False])
    assert worst(np.array([0.9, 0.5, 0.8, 0.99, 0.8]), correct, 2).tolist() == [2, 4]


def test_images_that_are_chosen():
    """Half of them are mistakes, if there are enough; the others are right, and spread over the split."""
    images, labels = np.arange(10 * 4, dtype=np.uint8).reshape(10, 2, 2, 1), np.arange(10, dtype=np.int32) % 2
    source = Arrays(images=images, labels=labels)
    predicted = labels.copy()
    predicted[[3, 7, 8]] ^= 1
    seen = Outputs(np.zeros((10, 1)), labels, predicted, np.linspace(0, 1, 10))
    found = choose(source, seen, ["even", "odd"], 4, "test")
    assert found.names == ["test 8", "test 7", "test 0", "test 9"]
    assert found.labels == ["even", "odd", "even", "odd"]
    np.testing.assert_array_equal(found.pixels, images[[8, 7, 0, 9]])
    assert choose(source, None, ["even", "odd"], 3, "test").names == ["test 0", "test 4", "test 9"]
    assert evenly(3, 10).tolist() == [0, 1, 2]
    assert len(sample(source, 4)) == 4 and sample(source, 10) is source


def test_directions_have_the_norm_of_each_filter():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 2, 4)).astype(np.float32)
    kernel[..., 1] = 0  # a pruned filter
    kernel[0, 0, 0] = 0  # pruned weights
    params = {"conv": {"kernel": jnp.asarray(kernel)}, "norm": {"scale": jnp.ones(4)}}
    direction = filter_direction(params, jax.random.key(0))
    drawn = np.asarray(direction["conv"]["kernel"])
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=(0, 1))[0], np.linalg.norm(kernel, axis=(0, 1))[0], rtol=1)
    norms = [np.sqrt(np.square(x).sum((0, 1, 2))) for x in (drawn, kernel)]
    np.testing.assert_allclose(*norms, rtol=1e-5)
    assert not drawn[kernel == 0].any() and not np.asarray(direction["norm"]["scale"]).any()


def test_surface_of_a_quadratic():
    """The loss |w - 2|^2 summed over a batch, along two directions of the norm of w."""
    params = {"kernel": jnp.array([[2.0]])}
    places, total = loss_surface(
        lambda p, batch: jnp.square(p["kernel"] - 2).sum() * batch.sum(),
        params,
        [jnp.ones(2), jnp.ones(1)],
        key=jax.random.key(1),
        side=3,
        reach=0.5,
    )
    assert places.tolist() == [-0.5, 0, 0.5]
    # In one dimension both directions are 2 or -2.
    assert total[1, 1] == 0 and total[0, 1] == total[2, 1] == total[1, 0] == 3
    assert sorted((total[0, 0], total[0, 2])) == [0, 12]


def test_figures_are_drawn():
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    rng = np.random.default_rng(0)
    points, labels = rng.normal(size=(30, 2)).astype(np.float32), np.arange(30) % 3
    shown = figures.spread(points, 5)
    assert len({*shown.tolist()}) == 5
    assert len(figures.spread(np.array([[0.0, 0], [0, 0], [1, 1]]), 5)) == 2  # others would hide each other
    images = rng.integers(0, 256, (5, 4, 4, 1), dtype=np.uint8)
    drawings = [
        figures.scatter(points, labels, "abc", shown, images, "pca"),
        figures.reliability_figure(calibration(np.linspace(0, 1, 9), np.arange(9) > 4)),
        figures.landscape_figure(np.linspace(-1, 1, 3), 1 + np.arange(9.0).reshape(3, 3)),
        figures.gallery([[*images[:3]], [*images[3:]]], ["abc", "de"]),
    ]
    for drawing in drawings:
        drawing.savefig(io.BytesIO())


def test_cascade_shows_who_does_not_notice():
    """A line per method, the thick one of guided backprop; maps of at most eight layers; the reference is left out."""
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    layers = ["head", *(f"stage{at}_block1" for at in range(9, 0, -1)), "stem"]
    values = {"grad_cam": 0.1, "guided_backprop": 0.8, "random": 1.0}
    heat = np.random.default_rng(0).normal(size=(2, 4, 4)).astype(np.float32)
    found = {
        name: Attribution(heat, {}, {at: np.full(2, value) for at in layers}, np.repeat(heat[:1], len(layers), 0))
        for name, value in values.items()
    }
    view = cascade_view(np.full((4, 4, 3), 128, np.uint8), "a cat", found)
    assert list(view.numbers["cascade"]) == ["grad_cam", "guided_backprop"]
    assert view.numbers["cascade"]["guided_backprop"] == dict.fromkeys(layers, pytest.approx(0.8))
    lines = view.drawings["cascade"].axes[0].lines
    widths = {float(line.get_ydata()[-1]): line.get_linewidth() for line in lines}
    assert widths[0.8] > widths[0.1] and [line.get_ydata()[0] for line in lines[:2]] == [1, 1]
    text = "".join(view.pieces)
    assert "Highest on average: guided_backprop (0.80)" in text and "Maps of a cat" in text
    assert text.count("<img") == 2 * (STEPS + 1)
    view.drawings["cascade_maps"].savefig(io.BytesIO())


def test_interrupted_report_can_be_written_again(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pages, "save_figure", interrupt)
    out = str(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        write_report(open_out(out), {"One": View({"figure": None}, (), {})}, {"run": "run", "command": "python"})
    assert open_out(out).joinpath("pictures").is_dir()


def test_overlay_marks_the_hottest_pixel():
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    image, heat = np.full((4, 4, 1), 128, np.uint8), np.zeros((4, 4), np.float32)
    heat[1, 2] = 3
    laid = figures.overlay(image, heat)
    assert laid.shape == (4, 4, 3) and laid.dtype == np.uint8
    brightness = laid.astype(int).sum(-1)
    assert np.unravel_index(brightness.argmax(), (4, 4)) == (1, 2)
    np.testing.assert_array_equal(figures.overlay(image, heat - 9), laid)  # of one sign: the level does not matter
    np.testing.assert_array_equal(figures.overlay(image, heat + 9), laid)
    heat[0, 0] = -3
    red, _, blue = figures.overlay(image, heat).astype(int)[[1, 0], [2, 0]].T
    assert red[0] > blue[0] and blue[1] > red[1]  # supports, opposes


def test_views_are_the_ones_that_flags_name():
    assert tuple(VIEWS) == VIEW_NAMES


def test_views_draw_from_the_seed(monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    seeds = []

    def projected(features, method, seed=0):
        seeds.append(seed)
        return features

    def surface(*_, key):
        seeds.append(int(jax.random.key_data(key)[-1]))
        return np.arange(3), np.ones((3, 3))

    monkeypatch.setattr(dataset, "project", projected)
    monkeypatch.setattr(dataset, "loss_surface", surface)
    split = Arrays(images=np.zeros((4, 8, 8, 1), np.uint8), labels=np.zeros(4, np.int32))
    points = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    subject = SimpleNamespace(
        config=SimpleNamespace(seed=5, batch=1, data=SimpleNamespace(split="test")),
        trained=SimpleNamespace(model=None, preprocess=None, variables={"params": {}}),
        dataset=SimpleNamespace(classes=["0"], train=split),
        split=split,
        seen=Outputs(points, split.labels, split.labels, np.ones(4)),
    )
    for name in ("tsne", "landscape"):
        VIEWS[name][1](subject, None)
    assert seeds == [5, 5]
