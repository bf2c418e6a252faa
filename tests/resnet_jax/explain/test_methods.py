"""Each method on networks whose explanation is known: a linear one, and one that looks at a quadrant only."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax import MODELS, onednn
from resnet_jax.explain import (
    METHODS,
    Network,
    class_difference,
    class_score,
    completeness_error,
    grad_cam,
    guided_backprop,
    hires_cam,
    input_x_gradient,
    integrated_gradients,
    occlusion,
    rise,
    saliency,
    similarity,
    smooth_grad,
)
from resnet_jax.masks import apply_masks, make_masks
from resnet_jax.parallel import batch_sharding, make_mesh
from resnet_jax.scores import magnitude
from tests.resnet_jax.explain.nets import IMAGES, KEY, corner_network, linear, linear_network

OPTIONS = {
    "smooth_grad": {"samples": 5},
    "integrated_gradients": {"steps": 6},
    "occlusion": {"window": 1, "stride": 1},
    "rise": {"samples": 300, "cells": 4, "chunk": 100},
}
COMPILED = {
    name: jax.jit(partial(method, **OPTIONS.get(name, {})), static_argnames="layer") for name, method in METHODS.items()
}
ONE = class_score(0)


@pytest.mark.parametrize("name", METHODS)
def test_heat_lies_where_the_network_looks(name):
    """A float32 heat map as large as the image, whose mass is in the quadrant and the pixel next to it."""
    heat = COMPILED[name](corner_network(), IMAGES, class_score(2), key=KEY)
    assert heat.shape == IMAGES.shape[:3] and heat.dtype == jnp.float32
    assert np.isfinite(heat).all()
    if name == "rise":  # the mean score is everywhere
        heat = heat - np.median(heat, (1, 2), keepdims=True)
    mass = np.abs(heat).sum(0)
    share = mass[:5, :5].sum() / mass.sum()
    expected = {"random": (0.3, 0.5), "rise": (0.5, 1)}.get(name, (0.97, 1.001))
    assert expected[0] < share < expected[1]


VARIANTS = ("bfloat16", "sharded", "pruned", "encoder")
CHEAP = {("saliency", "bfloat16"), ("grad_cam", "sharded"), ("grad_cam", "encoder"), ("guided_backprop", "pruned")}


@pytest.mark.parametrize(
    "name, variant",
    [pytest.param(n, v, marks=() if (n, v) in CHEAP else pytest.mark.slow) for n in METHODS for v in VARIANTS],
)
def test_variants_of_a_network(name, variant):
    """Sharding changes nothing, bfloat16 little; pruned networks and encoders are explained too."""
    network, images, target = corner_network(), IMAGES, class_score(2)
    other, other_images = network, images
    if variant == "bfloat16":
        other = corner_network(jnp.bfloat16)
    elif variant == "sharded":
        other_images = jax.device_put(images, batch_sharding(make_mesh()))
    elif variant == "pruned":
        params = network.variables["params"]
        masks = make_masks(magnitude(params), 0.5)
        other = Network(network.model, {"params": apply_masks(params, masks)})
    else:
        target = similarity(network.outputs(images)[::-1])
    heat = np.asarray(COMPILED[name](other, other_images, target, key=KEY))
    assert heat.dtype == np.float32 and np.isfinite(heat).all()
    if variant in ("bfloat16", "sharded"):
        plain = np.asarray(COMPILED[name](network, images, target, key=KEY))
        share = 0.1 if variant == "bfloat16" else 1e-5
        assert np.linalg.norm(heat - plain) <= share * np.linalg.norm(plain)


def test_grad_cam_is_cam():
    """With global average pooling and a linear head Grad-CAM is CAM divided by the positions, for any class."""
    network, labels = corner_network(), jnp.arange(8) % 3
    _, maps = network.forward(IMAGES, "corner")
    weights = network.variables["params"]["head"]["kernel"].T[labels]
    cam = jax.nn.relu(jnp.einsum("bhwk,bk->bhw", maps, weights)) / 64
    for method in (grad_cam, hires_cam):  # the gradient is the same at each position
        np.testing.assert_allclose(method(network, IMAGES, class_score(labels)), cam, rtol=1e-6, atol=1e-9)


def test_linear_function():
    """Gradients are the weights, contributions are weights times inputs, and they sum to the score."""
    network = linear_network()
    weights, shape = network.variables[None], IMAGES.shape

    @jax.jit
    def explanations(network):
        gradients = saliency(network, IMAGES, ONE), smooth_grad(network, IMAGES, ONE, key=KEY, samples=5)
        contributions = (
            input_x_gradient(network, IMAGES, ONE),
            integrated_gradients(network, IMAGES, ONE, steps=3),
        )
        errors = [completeness_error(network, IMAGES, ONE, attribution) for attribution in contributions]
        windows = ((2, 2), (5, 5), (1, 1))
        hidden = [occlusion(network, IMAGES, ONE, window=w, stride=s, chunk=7) for w, s in windows]
        return gradients, contributions, errors, hidden

    gradients, contributions, errors, hidden = explanations(network)
    for gradient in gradients:
        np.testing.assert_allclose(gradient, np.broadcast_to(weights, shape), rtol=1e-5, atol=1e-6)
    for attribution, error in zip(contributions, errors, strict=True):
        np.testing.assert_allclose(attribution, weights * IMAGES, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(error, 0, atol=1e-4)
    contribution = np.asarray((weights * IMAGES).sum(-1))
    blocks = contribution.reshape(8, 4, 2, 4, 2).sum((2, 4))
    np.testing.assert_allclose(hidden[0], np.kron(blocks, np.ones((1, 2, 2))), atol=1e-4)
    # The last window is cut off at the edge; stride 1 takes the mean over the windows.
    np.testing.assert_allclose(hidden[1][:, 7, 7], contribution[:, 5:, 5:].sum((1, 2)), atol=1e-4)
    np.testing.assert_allclose(hidden[2], contribution, atol=1e-4)


def test_rise_finds_the_pixels_of_a_linear_function():
    """The pixels' ranks agree with contributions that are smooth enough for its masks."""
    weights = jnp.zeros((8, 8, 3)).at[2:5, 3:7].set(1.0)
    network, images = linear_network(), jnp.ones((1, 8, 8, 3))
    heat = rise(Network(network.model, weights), images, ONE, key=KEY, samples=512, cells=4, chunk=64)[0]
    assert np.mean(heat[2:5, 3:7]) > np.percentile(heat, 80)


def test_integrated_gradients_are_complete():
    """On a smooth function the error is that of the quadrature: none with enough steps."""

    def curved(weights, images):
        return jnp.tanh(linear(weights / 20, images)) * linear(weights[::-1] / 20, images)

    network = Network(curved, linear_network().variables)
    errors = {}
    for steps in (2, 16):
        attribution = integrated_gradients(network, IMAGES, ONE, baseline=0.3, steps=steps, chunk=16)
        errors[steps] = np.abs(completeness_error(network, IMAGES, ONE, attribution, baseline=0.3)).max()
    assert errors[16] < 1e-4 < errors[2]


def test_guided_backprop_stops_negative_gradients():
    """Two layers of ReLU by hand, one written as `jnp.maximum` and one inside a `jit` and a `scan`."""
    a, b = np.random.default_rng(0).normal(size=(2, 12, 12)).astype(np.float32)

    def net(variables, images):
        x = jnp.maximum(images.reshape(len(images), -1) @ a, 0)

        @jax.jit
        def rectify(x):
            return jax.lax.scan(lambda x, _: (jax.nn.relu(x @ b), None), x, length=1)[0]

        return rectify(x)

    images = np.random.default_rng(1).normal(size=(4, 2, 2, 3)).astype(np.float32)
    x1 = images.reshape(4, -1) @ a
    x2 = np.maximum(x1, 0) @ b
    gradient = np.zeros((4, 12), np.float32)
    gradient[:, 3] = 1.0
    expected = np.maximum((gradient * (x2 > 0)) @ b.T, 0) * (x1 > 0) @ a.T
    found = guided_backprop(Network(net), images, class_score(3))
    np.testing.assert_allclose(found, expected.reshape(images.shape), rtol=1e-5, atol=1e-6)
    assert np.abs(found - saliency(Network(net), images, class_score(3))).max() > 0.1
    with pytest.raises(ValueError, match="needs a network with ReLUs"):
        guided_backprop(linear_network(), IMAGES, ONE)


def test_keys_decide_what_is_drawn():
    for name in ("smooth_grad", "rise", "random"):
        first, again, other = (COMPILED[name](corner_network(), IMAGES, ONE, key=jax.random.key(s)) for s in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert np.abs(first - other).max() > 0
        with pytest.raises(ValueError, match="needs a key"):
            METHODS[name](corner_network(), IMAGES, ONE)


def test_targets():
    outputs = jnp.asarray([[1.0, 2.0, 4.0], [3.0, 5.0, 0.0]])
    np.testing.assert_array_equal(class_score([2, 0])(outputs), [4, 3])
    np.testing.assert_array_equal(class_difference(1, jnp.asarray([0, 2]))(outputs), [1, 5])
    np.testing.assert_allclose(similarity(outputs[0])(outputs), [1, 13 / np.sqrt(21 * 34)], rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda t, x: t(x))(class_score(7), outputs), np.nan)
    for index in (3, -1, [0, 3]):
        with pytest.raises(ValueError, match="out of range: there are 3 classes"):
            class_score(index)(outputs)


def test_bad_arguments():
    with pytest.raises(ValueError, match="stride must be between 1 and the window's 2 pixels"):
        occlusion(linear_network(), IMAGES, ONE, window=2, stride=3)
    with pytest.raises(ValueError, match="not a map"):
        grad_cam(corner_network(), IMAGES, ONE, "head")


@pytest.mark.slow
def test_onednn_kernels_are_explained_alike():
    """Gradients, guided ones and sampled ones go through oneDNN's kernels; their norms leave ReLUs that are found."""
    try:
        onednn.load()
    except onednn.Unavailable as error:
        pytest.skip(str(error))
    kernels = {"conv": onednn.Conv, "norm": onednn.BatchNorm, "max_pool": onednn.max_pool}
    plain, fast = MODELS["resnet8"](width=4), MODELS["resnet8"](width=4, **kernels)
    variables = jax.jit(plain.init)(KEY, IMAGES)
    for name in ("saliency", "guided_backprop", "grad_cam", "smooth_grad"):
        expected, found = (
            COMPILED[name](Network(model, variables), IMAGES, class_score(2), key=KEY) for model in (plain, fast)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.max()))
