"""`python -m pretrain.bench`: the task that it adds to those of `train.bench`."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from pretrain.bench import OPTIONS, contrastive, with_views
from pretrain.heads import MLP, Network
from resnet_jax.resnet import MODELS
from tests.train.bench.toy import FLAGS, quick_variables, tiny
from train.bench import bench, work
from train.bench.__main__ import main


@pytest.fixture
def workload(monkeypatch):
    monkeypatch.setattr("pretrain.from_config.draw_variables", lambda config, *rest: quick_variables(*rest))
    return contrastive(tiny())


@pytest.mark.parametrize(("side", "sizes"), [(8, (512, 512, 128)), (72, (2048, 2048, 128))])
def test_work_counts_both_views_and_the_loss(side, sizes, monkeypatch):
    monkeypatch.setattr("pretrain.from_config.make_pretrain_state", lambda *_: SimpleNamespace(params={}))
    network = Network(MODELS["resnet8"](num_classes=None), MLP(sizes, last_norm="affine"))
    products = 3 * 2 * 32 * 32 * 128 / 16  # every view with every view, forward and two gradients
    found = contrastive(tiny(image_size=side)).flops
    assert found == pytest.approx(2 * work.training(work.forward(network, side)) + products)


def test_step_and_its_parts(workload):
    """The step returns a state like the one it was given, and every part of it can be traced by itself."""
    state, metrics = jax.eval_shape(workload.step, workload.state, workload.batch)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, workload.state)
    assert {"loss", "grad_norm"} <= set(metrics)
    assert list(workload.parts) == ["augmentation", "forward", "backward", "optimizer"]
    augmented = jax.eval_shape(workload.parts["augmentation"], workload.state, workload.batch)
    assert augmented.shape == (16, 2, 8, 8, 3)
    for name in ("forward", "backward"):
        jax.eval_shape(workload.parts[name], workload.state, workload.batch)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jit", "shard_map"])
def test_contrastive(mode):
    options = {name: OPTIONS[name] for name in ("tasks", "augmentations")}
    result = bench(tiny(task="contrastive", mode=mode), **options)
    assert result["task"] == "contrastive" and result["traces"] == 1
    assert result["memory"]["aliased_bytes"] > 0


def test_two_views_of_an_image():
    image = jax.ShapeDtypeStruct((8, 8, 3), jnp.float32)
    assert jax.eval_shape(with_views(8)["simclr_two_views"], jax.random.key(0), image).shape == (16, 8, 3)


def test_refusals(fails):
    line = partial(main, **OPTIONS)
    assert "did you mean contrastive?" in fails(2, line, [*FLAGS, "--task", "contrastiv"])
    assert "unknown model" in fails(2, line, ["--model", "vgg"])
