"""Reports of pruning: counts, times, text and pictures."""

import functools
import json
import math
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.layers import CifarStem
from resnet_jax.masks import no_masks
from resnet_jax.resnet import MODELS, BasicBlock, ResNet
from resnet_jax.tree import map_with_path
from tests.reference.nets import tiny
from train.bench.work import forward
from train.errors import UsageError
from train.prune import report as report_module
from train.prune.layers import layer_table, totals
from train.prune.layers import text as layers_text
from train.prune.measure import compare, latency, sensitivity
from train.prune.report import draw, text

IMAGE = (8, 8, 3)
# Of tiny(): path, shape, positions of its output.
TINY = [
    ("stem/conv/kernel", [3, 3, 3, 8], 64),
    ("stage1_block1/conv1/kernel", [3, 3, 8, 8], 64),
    ("stage1_block1/conv2/kernel", [3, 3, 8, 8], 64),
    ("stage2_block1/conv1/kernel", [3, 3, 8, 16], 16),
    ("stage2_block1/conv2/kernel", [3, 3, 16, 16], 16),
    ("stage2_block1/shortcut/conv/kernel", [1, 1, 8, 16], 16),
    ("head/kernel", [16, 4], 1),
]
FIRST, HEAD = TINY[0][0], TINY[-1][0]


def shapes_of(model, image_shape=IMAGE):
    return jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, *image_shape))), jax.random.key(0))


@functools.cache
def published(name, size, classes):
    """(model, shapes of its variables, rows) of a network without masks."""
    model = MODELS[name](num_classes=classes)
    shapes = shapes_of(model, (size, size, 3))
    return model, shapes, layer_table(model, shapes, no_masks(shapes["params"]), (size, size, 3))


def masked(params, masks):
    """Masks that keep everything except where `masks` has one."""
    return map_with_path(lambda path, leaf: masks.get(path, np.ones((), bool)), params)


@pytest.fixture(scope="module")
def variables():
    return shapes_of(tiny())


@pytest.fixture(scope="module")
def masks(variables):
    """Of the stem's 216 weights 54 are kept, of the first convolution's 576 none."""
    kept = np.broadcast_to(np.arange(8) < 2, (3, 3, 3, 8))
    return masked(variables["params"], {FIRST: kept, TINY[1][0]: np.zeros((3, 3, 8, 8), bool)})


@pytest.mark.parametrize(
    ("name", "size", "classes", "low", "high"),
    [
        # https://arxiv.org/abs/1512.03385 table 1 counts 3.8e9 with the stride on the 1x1; V1.5 is known for 4.09e9.
        ("resnet50", 224, 1000, 4.085e9, 4.095e9),
        ("resnet20", 32, 10, 40.55e6, 40.81e6),
        ("resnet18_cifar", 32, 10, 0.555e9, 0.557e9),
        ("resnext50_32x4d", 224, 1000, 4.22e9, 4.27e9),  # https://arxiv.org/abs/1611.05431 table 1: 4.2e9
    ],
)
def test_macs_of_published_networks(name, size, classes, low, high):
    model, shapes, rows = published(name, size, classes)
    found = totals(rows, shapes)
    assert low <= found["macs"] <= high
    assert found["macs"] == found["nonzero_macs"] == forward(model, size).flops / 2  # counted from the program instead
    assert found["parameters"] == found["kept_parameters"]
    assert found["sparsity"] == 0


def test_table_fits_a_terminal():
    lines = layers_text(published("resnet50", 224, 1000)[2]).splitlines()
    assert len(lines) == 1 + 54 + 1
    assert max(map(len, lines)) <= 100
    assert lines[1].split() == ["stem/conv", "7x7x3x64", "9,408", "9,408", "0.0%", "118.014", "118.014"]
    assert lines[-1].split()[-1] == "4,089.184"


def test_rows_of_a_network(variables, masks):
    rows = layer_table(tiny(), variables, masks, IMAGE)
    assert [(row["path"], row["shape"], row["macs"] // row["parameters"]) for row in rows] == TINY
    assert all(row["parameters"] == math.prod(row["shape"]) for row in rows)
    assert rows[0] | {"kept": 54, "sparsity": 0.75, "prunable": True, "nonzero_macs": 54 * 64} == rows[0]
    assert rows[1] | {"kept": 0, "sparsity": 1.0, "prunable": True, "nonzero_macs": 0} == rows[1]
    assert all(row["kept"] == row["parameters"] and not row["prunable"] for row in rows[2:])

    found = totals(rows, variables)
    assert found["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert found["kept_parameters"] == found["parameters"] - 162 - 576
    assert found["sparsity"] == 1 - 54 / (216 + 576)
    assert found["macs"] - found["nonzero_macs"] == (162 + 576) * 64
    with pytest.raises(ValueError, match="broadcast"):
        layer_table(tiny(), variables, masked(variables["params"], {FIRST: np.ones((3, 3, 3, 9), bool)}), IMAGE)


def test_sensitivity_prunes_the_smallest_weights_of_one_kernel_at_a_time():
    """Of equal ones, those with the lower index."""
    params = {
        "a": {"kernel": jnp.array([[3.0, 1.0, -2.0, 4.0]])},
        "b": {"kernel": jnp.array([[1.0, 8.0, 1.0, 1.0]]), "bias": jnp.ones(1)},
    }
    traces = []

    @jax.jit
    def evaluate(params):
        traces.append(1)
        weights = jnp.array([[1.0, 10.0, 100.0, 1000.0]])
        return jnp.abs(params["a"]["kernel"]).sum() + (params["b"]["kernel"] * weights).sum() + params["b"]["bias"][0]

    found = sensitivity(evaluate, params, [0.0, 0.25, 0.5])
    assert found == {"a/kernel": [1192.0, 1191.0, 1189.0], "b/kernel": [1192.0, 1191.0, 1091.0]}
    assert json.loads(json.dumps(found)) == found
    assert len(traces) == 1


class Linear(nn.Module):
    """The smallest network that can be timed."""

    dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(4)(x.reshape(len(x), -1))


def test_latency_of_interleaved_networks():
    variables = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes_of(Linear()))
    found = latency(dict.fromkeys(("a", "b"), (Linear(), variables)), IMAGE, batches=(1, 4), steps=2, repeats=2)
    assert {batch: list(timed) for batch, timed in found.items()} == {"1": ["a", "b"], "4": ["a", "b"]}
    for timed in found.values():
        assert all(times["step_ms"] > 0 and times["spread"] >= 0 for times in timed.values())
        assert "speedup" not in timed["a"]
        speedup = timed["b"]["speedup"]
        assert 0 < speedup["low"] <= speedup["value"] <= speedup["high"]
        assert speedup["value"] == pytest.approx(timed["a"]["step_ms"] / timed["b"]["step_ms"])
    assert json.loads(json.dumps(found)) == found


def timed(before, after, value):
    speedup = {"value": value, "low": value - 0.1, "high": value + 0.1}
    return {"before": {"step_ms": before}, "after": {"step_ms": after, "speedup": speedup}}


@pytest.fixture(scope="module")
def report(variables, masks):
    found = compare((tiny(), variables, no_masks(variables["params"])), (tiny(), variables, masks), IMAGE)
    found["before"] |= {"accuracy": 0.9, "bytes": 20_000}
    found["after"] |= {"accuracy": 0.8825, "bytes": 5_000}
    # Not in the order of the forward pass, as a tree's leaves are not.
    curves = {"baseline": 0.9, "sparsities": [0.5, 0.975], "accuracy": {HEAD: [0.8, 0.3], FIRST: [0.85, 0.6]}}
    return {**found, "latency": {"1": timed(1.0, 1.0, 1.0), "64": timed(20.0, 10.0, 2.0)}, "sensitivity": curves}


def test_report_is_json(report, variables, masks):
    assert json.loads(json.dumps(report)) == report
    assert report["layers"] == layer_table(tiny(), variables, masks, IMAGE)
    assert report["before"]["sparsity"] == 0 < report["after"]["sparsity"]


def test_report_of_a_network_that_became_smaller(variables):
    """Layers are those before, with what is left of them: narrower, or gone."""
    smaller = ResNet((1,), BasicBlock, num_classes=4, width=4, stem=CifarStem)
    shapes = shapes_of(smaller)
    networks = [(model, v, no_masks(v["params"])) for model, v in ((tiny(), variables), (smaller, shapes))]
    report = compare(*networks, IMAGE)
    rows = {row["path"]: row for row in report["layers"]}
    assert [*rows] == [path for path, _, _ in TINY]
    stem, gone = rows[FIRST], rows["stage2_block1/conv1/kernel"]
    assert (stem["kept"], stem["sparsity"], stem["nonzero_macs"]) == (3 * 3 * 3 * 4, 0.5, 3 * 3 * 3 * 4 * 64)
    assert (gone["kept"], gone["sparsity"], gone["nonzero_macs"]) == (0, 1.0, 0)
    assert report["after"]["macs"] == report["after"]["nonzero_macs"] < report["before"]["macs"]
    for side in ("before", "after"):
        report[side] |= {"accuracy": 0.9, "bytes": 20_000}
    report |= {"latency": None, "sensitivity": None}
    assert not [part for part in ("Zeros are multiplied", "latency", "pruned to a sparsity") if part in text(report)]


def test_report_as_text(report):
    lines = text(report).splitlines()
    assert max(map(len, lines)) <= 100
    lines = [" ".join(line.split()) for line in lines]
    parameters = f"{report['before']['parameters']:,}"
    assert lines[1:4] == [
        "accuracy 90.00% 88.25% -1.75 points",
        "bytes stored 20,000 5,000 4.00x less",
        f"parameters {parameters} {parameters} the same",
    ]
    assert "latency, batch 64 20.00 ms 10.00 ms 2.00x as fast (1.90 to 2.10)" in lines
    assert any(line.startswith("Zeros are multiplied") for line in lines)
    assert "stage1_block1/conv1 3x3x8x8 576 0 100.0% 0.037 0.000" in lines
    assert lines[-3:] == ["layer 50% 97.5%", "stem/conv 85.0 60.0", "head 80.0 30.0"]


@pytest.fixture
def drawn(monkeypatch):
    """`drawn(report)` is the figure that `draw` makes of a report."""
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    figures = []
    monkeypatch.setattr(report_module, "save_figure", lambda figure, picture: figures.append(figure))
    return lambda report: draw(report, None) or figures[-1]


def texts(labels):
    return [label.get_text().strip() for label in labels]


def test_picture(report, drawn):
    figure = drawn(report)
    layers, sides, curves = figure.axes
    titles = ["kept weights by layer", "before and after", "accuracy with only one layer pruned (colours as left)"]
    assert [axes.get_title() for axes in figure.axes] == titles
    assert texts(layers.get_yticklabels())[:2] == ["stem/conv", "stage1_block1/conv1"]
    assert all(axes.get_legend() is not None for axes in (layers, sides))
    assert "20,000 → 5,000" in texts(sides.texts)
    # A layer's curve has the colour of its bar.
    bars = layers.containers[1]
    assert tuple(curves.lines[0].get_color()) == bars[0].get_facecolor()
    assert tuple(curves.lines[1].get_color()) == bars[-1].get_facecolor()


def test_without_matplotlib(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r'pip install -e "\.\[plot\]"'):
        draw(report, tmp_path / "pruned.png")
