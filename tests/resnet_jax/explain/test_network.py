"""Layers of networks, filters, feature maps, and images that maximize a goal."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax import MODELS
from resnet_jax.explain import (
    Network,
    channel_goal,
    class_score,
    feature_maps,
    filters,
    grid,
    output_goal,
    rescale,
    upsample,
    visualize,
)
from resnet_jax.layers import ZeroPad
from resnet_jax.resnet import BasicBlock
from tests.resnet_jax.explain.nets import IMAGES, KEY, corner_network, linear_network


@pytest.fixture(scope="module")
def preact():
    """A pre-activation ResNet with three stages, and its images."""
    model = MODELS["preact_resnet8"](width=4)
    images = jnp.zeros((2, 8, 8, 3))
    return Network(model, jax.jit(model.init)(KEY, images)), IMAGES[:2]


def test_layers_are_those_of_the_network(preact):
    """In the order of execution; `stage3` is the map that is pooled, and None is the last one."""
    network, images = preact
    layers = network.layers(images)
    assert list(layers)[:2] == ["stem/conv", "stem"] and list(layers)[-1] == "head"
    assert layers["stage2_block1/conv1"].shape == (2, 4, 4, 8)
    paths = {"stage2": "stage2_block1", None: "final", "stem": "stem"}
    assert network.resolve("stage3", images) == "final"

    @jax.jit
    def forward(network):
        levels = network.model.apply(network.variables, images, method="maps")
        return levels, [network.forward(images, layer) for layer in paths]

    levels, found = forward(network)
    for (layer, path), (outputs, maps) in zip(paths.items(), found, strict=True):
        assert network.resolve(layer, images) == path
        np.testing.assert_allclose(maps, levels[layer or "stage3"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(outputs, levels["logits"], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"no layer 'stage4'; layers: stem, .*stage3, and \d+ inside them"):
        network.resolve("stage4", images)
    with pytest.raises(ValueError, match="a function has no layers"):
        linear_network().resolve(None, images)
    flat = Network(nn.Dense(2))
    with pytest.raises(ValueError, match="no layer with a map"):
        Network(flat.model, flat.model.init(KEY, images)).resolve(None, images)


def test_a_tap_perturbs_each_call_of_a_module():
    """A module that is called twice has two layers; adding to a map changes what follows by the linear head."""

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            double = nn.Dense(3, name="shared")
            return double(double(x)).mean((1, 2))

    model = Twice()
    network = Network(model, model.init(KEY, IMAGES))
    assert list(network.layers(IMAGES)) == ["shared", "shared#2"]
    plain, maps = network.forward(IMAGES, "shared")
    tapped, moved = network.forward(IMAGES, "shared#2", 1.0)
    np.testing.assert_allclose(tapped, plain + 1, rtol=1e-5, atol=1e-5)
    tapped, moved = network.forward(IMAGES, "shared", 1.0)
    np.testing.assert_allclose(moved, maps + 1, rtol=1e-6, atol=1e-6)
    shift = network.variables["params"]["shared"]["kernel"].sum(0)
    np.testing.assert_allclose(tapped, plain + shift[None], rtol=1e-5, atol=1e-5)


def test_blocks_that_are_computed_again_in_the_backward_pass():
    """With `nn.remat` in its blocks, a ResNet has the same maps and gradients, in a block and at its end."""

    class Remat(BasicBlock):
        @nn.compact
        def __call__(self, x, *, train=False):
            return nn.remat(lambda block, x: BasicBlock.__call__(block, x, train=train))(self, x)

    plain = MODELS["resnet8"](num_classes=3, width=4)
    model, variables = plain.clone(block=partial(Remat, shortcut=ZeroPad)), jax.jit(plain.init)(KEY, IMAGES)

    @partial(jax.jit, static_argnums=1)
    def gradients(network, layers):
        maps = [network.forward(IMAGES, layer) for layer in layers]
        taps = [jnp.zeros_like(y) for _, y in maps]
        score = [
            jax.grad(lambda tap, at=at: network.forward(IMAGES, at, tap)[0].sum())(tap)
            for at, tap in zip(layers, taps, strict=True)
        ]
        return maps, score

    layers = ("stage2_block1/conv1", "stage2", None)
    again, once = (gradients(Network(m, variables), layers) for m in (model, plain))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), again, once)


def test_filters_and_feature_maps(preact):
    network, images = preact
    kernels = filters(network, images)
    assert kernels.shape == (4, 3, 3, 3)
    assert float(kernels.min()) == 0 and float(kernels.max()) == pytest.approx(1, abs=1e-5)
    assert filters(network, images, "stage2_block1/conv1").shape == (8, 3, 3, 4)
    with pytest.raises(ValueError, match="'head' has no convolution kernel; layers with one: stem/conv, stage1_"):
        filters(network, images, "head")
    tiles = jax.jit(lambda network: feature_maps(network, images, "stem", limit=3))(network)
    assert tiles.shape == (2, 3, 8, 8)


def test_maximized_images_reach_their_goals():
    """Pixels in [0, 1] that score higher than noise, each for its own class or channel; smoothness smooths."""
    network, shape = corner_network(), (3, 8, 8, 3)
    target = class_score(jnp.arange(3))
    for goal in (output_goal(network, target), channel_goal(network, "conv", jnp.asarray([1, 0, 2]))):
        images = jax.jit(lambda key, goal=goal: visualize(goal, key=key, shape=shape, steps=16, rate=0.2))(KEY)
        assert images.shape == shape and float(images.min()) >= 0 and float(images.max()) <= 1
        start = visualize(goal, key=KEY, shape=shape, steps=0)
        assert (goal((images - 0.5) / 0.25) > goal((start - 0.5) / 0.25) + 0.01).all()


def test_pictures():
    """Tiles in rows with gaps; maps keep their corners or their centres; a constant map becomes 0."""
    tiles = jnp.arange(3.0)[:, None, None] * jnp.ones((3, 2, 2))
    expected = [[0, 0, 9, 1, 1], [0, 0, 9, 1, 1], [9, 9, 9, 9, 9], [2, 2, 9, 9, 9], [2, 2, 9, 9, 9]]
    np.testing.assert_array_equal(grid(tiles, fill=9), expected)
    assert grid(jnp.ones((5, 3, 4, 3)), 5, gap=2).shape == (3, 28, 3)
    line = jnp.asarray([[[0.0, 4.0]]])
    np.testing.assert_allclose(upsample(line, (1, 4))[0, 0], [0, 1, 3, 4])
    np.testing.assert_allclose(upsample(line, (1, 5), align_corners=True)[0, 0], [0, 1, 2, 3, 4])
    np.testing.assert_allclose(rescale(jnp.asarray([[[2.0, 4.0]], [[3.0, 3.0]]])), [[[0, 1]], [[0, 0]]], atol=1e-6)
    np.testing.assert_allclose(upsample(line, (1, 4), first=0)[0, 0], [0, 2, 4, 4])
    # A stride of 4, of which the last position sees one pixel.
    np.testing.assert_allclose(upsample(line, (1, 5), first=0)[0, 0], [0, 1, 2, 3, 4])
    np.testing.assert_allclose(rescale(jnp.asarray([[[2e-9, 4e-9, 3e-9]]])), [[[0, 1, 0.5]]], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "layer", "stride"),
    [pytest.param("resnet18", "stage2", 8, marks=pytest.mark.slow), ("resnet20", "stage3", 4)],
)
def test_positions_see_the_pixels_where_they_are_placed(name, layer, stride):
    """With equal weights, the centre of what a position depends on is a multiple of the stride."""
    images = jax.random.uniform(KEY, (16, 96, 96, 3))
    model = MODELS[name](num_classes=3, width=8)
    shapes = jax.eval_shape(model.init, KEY, images)
    variables = jax.tree.map(lambda x: jnp.full(x.shape, 1 / x.size * x.shape[-1] if x.ndim == 4 else 1.0), shapes)
    network = Network(model, variables)
    at = 48 // stride

    def evidence(images):
        return network.forward(images, layer)[1][:, at, at].sum()

    weight = jnp.abs(jax.grad(evidence)(images)).sum((0, 3))
    pixels = jnp.arange(96)
    for axis in (0, 1):
        centre = float((weight.sum(1 - axis) * pixels).sum() / weight.sum())
        assert abs(centre - (network.first_center + at * stride)) < 0.25, centre  # tiling is off by 3.5 and 1.5
