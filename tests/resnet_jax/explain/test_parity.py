"""Equal weights, equal values: captum's and pytorch-grad-cam's explanations of a small torchvision ResNet.

The golden file is that of `tests/reference/make_explain_golden.py`; where the packages of the extra `parity-full` are
installed, they are run too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax import BasicBlock, ResNet, from_torch
from resnet_jax.explain import (
    Network,
    class_score,
    eigen_cam,
    grad_cam,
    grad_cam_plus_plus,
    guided_backprop,
    hires_cam,
    impute,
    infidelity,
    input_x_gradient,
    integrated_gradients,
    layer_cam,
    occlusion,
    rescale,
    saliency,
    score_cam,
    upsample,
)
from tests.reference import make_explain_golden as reference
from tests.reference.make_golden import weights

GIVEN = reference.arrays()
IMAGES, TARGET = jnp.asarray(GIVEN["images"]), class_score(jnp.asarray(reference.TARGETS))
CAMS = {
    "GradCAM": grad_cam,
    "GradCAMPlusPlus": grad_cam_plus_plus,
    "HiResCAM": hires_cam,
    "LayerCAM": layer_cam,
    "ScoreCAM": lambda *args: score_cam(*args, align_corners=True),
    "EigenCAM": eigen_cam,
}
METHODS = {
    "saliency": saliency,
    "input_x_gradient": input_x_gradient,
    "integrated_gradients": lambda *args: integrated_gradients(*args, steps=reference.STEPS),
    "guided_backprop": guided_backprop,
    "occlusion": lambda *args: occlusion(*args, window=reference.WINDOW, stride=reference.STRIDE),
}


@pytest.fixture(scope="module")
def golden():
    with np.load(reference.GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def network(golden):
    """The same network here, with the same weights."""
    shapes = {name.removeprefix("shape/"): tuple(x) for name, x in golden.items() if name.startswith("shape/")}
    model = ResNet(
        reference.BLOCKS, BasicBlock, reference.CLASSES, width=reference.WIDTH, stem_width=reference.STEM_WIDTH
    )
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    return Network(model, from_torch(weights("explain", shapes), variables))


def ours(name, network):
    """Our value of what the golden file has under this name."""
    if name in METHODS:
        return reference.stored({name: np.asarray(jax.jit(METHODS[name])(network, IMAGES, TARGET))})[name]
    maps = jax.jit(CAMS[name], static_argnums=3)(network, IMAGES, TARGET, "stage2")
    return np.asarray(rescale(upsample(rescale(maps), (32, 32))))


def check(name, network, expected):
    found = ours(name, network)
    if name == "EigenCAM":  # the sign that LAPACK gives to a component is arbitrary
        positive = [np.abs(a - b).max() < 1e-3 for a, b in zip(found, expected, strict=True)]
        maps = np.asarray(network.forward(IMAGES, "stage2")[1]).reshape(2, -1, 8 * 2)
        for i, (same, values) in enumerate(zip(positive, maps, strict=True)):
            if not same:
                left, size, _ = np.linalg.svd(values - values.mean(0), full_matrices=False)
                sides = [np.maximum(sign * left[:, 0] * size[0], 0).reshape(1, 4, 4) for sign in (1, -1)]
                scaled = [rescale(upsample(rescale(jnp.asarray(side)), (32, 32)))[0] for side in sides]
                assert sorted(np.abs(side - expected[i]).max() < 1e-3 for side in scaled) == [False, True]
                assert min(np.abs(side - found[i]).max() for side in scaled) < 1e-3
        return
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max(), name


FAST = ("saliency", "guided_backprop", "GradCAMPlusPlus")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in [*METHODS, *CAMS]]
)
def test_values_are_those_of_the_golden_file(name, network, golden):
    check(name, network, golden[name])


def test_imputed_pixels_are_those_of_the_golden_file(golden):
    filled = np.asarray(impute(IMAGES, jnp.asarray(GIVEN["removed"])))
    np.testing.assert_allclose(filled[:, ::2], golden["impute"], atol=1e-4)


@pytest.mark.slow
def test_infidelity_is_that_of_the_golden_file(network, golden):
    gradient, noise = saliency(network, IMAGES, TARGET), jnp.asarray(GIVEN["noise"])
    keys = jax.random.split(jax.random.key(0), reference.SAMPLES)

    def perturb(key, images):
        """The stored noise, by the position of the key."""
        index = jnp.argmax((jax.random.key_data(keys) == jax.random.key_data(key)[None]).all(1))
        return noise[index], images - noise[index]

    for name, scaled in (("infidelity", False), ("scaled_infidelity", True)):
        options = {"samples": reference.SAMPLES, "perturb": perturb, "scaled": scaled}
        found = infidelity(network, IMAGES, TARGET, gradient, key=jax.random.key(0), **options)
        np.testing.assert_allclose(found, golden[name], rtol=1e-3)


def test_the_golden_file_names_its_versions(golden):
    assert [line.split()[0] for line in golden["versions"]] == list(reference.PACKAGES)
    assert reference.GOLDEN.stat().st_size < 200_000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_values_are_those_of_the_installed_packages(network, golden):
    for package in ("captum", "pytorch_grad_cam", "torchvision"):
        pytest.importorskip(package)
    live = reference.stored(reference.torch_reference())
    for name in [*METHODS, *CAMS]:
        check(name, network, live[name])
    for name in ("infidelity", "scaled_infidelity", "impute"):
        np.testing.assert_allclose(live[name], golden[name], rtol=1e-3, atol=1e-5)
