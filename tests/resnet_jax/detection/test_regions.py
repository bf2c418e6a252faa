"""The class logits of fixed boxes as a network of images: equal to the detector's, and explained by every method."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.detection import (
    BoxHead,
    BoxRules,
    FasterRCNN,
    FeaturePyramid,
    ProposalRules,
    region_layers,
    region_network,
)
from resnet_jax.explain import METHODS, cascade, class_probability, class_score
from resnet_jax.layers import CifarStem
from resnet_jax.resnet import BasicBlock, ResNet

SIZE = jnp.array([[50, 128], [64, 100]])
IMAGES = jax.random.normal(jax.random.key(0), (2, 64, 128, 3))
BOXES = jnp.array([[4.0, 8.0, 30.0, 36.0], [20.0, 2.0, 60.0, 60.0]])


@cache
def detector():
    """A detector with two levels, of strides 1 and 2, and its variables."""
    backbone = ResNet((1, 1), BasicBlock, num_classes=None, width=4, stem=CifarStem)
    model = FasterRCNN(
        backbone,
        levels=("stage1", "stage2"),
        neck=partial(FeaturePyramid, features=4, coarser="none"),
        classes=3,
        head=partial(BoxHead, hidden=(8,)),
        proposals=ProposalRules(before=(20, 20), after=(6, 6)),
        regions=BoxRules(score=0.0),
        pooled=3,
        pooled_levels=2,
        canonical_size=300,
    )
    return model, jax.jit(model.init)(jax.random.key(1), IMAGES)


def region(boxes=BOXES):
    return region_network(*detector(), boxes, SIZE)


def test_scores_are_those_of_the_detector():
    """The best detection of an image is the proposal and class with the highest softmax of the logits."""
    model, variables = detector()

    @jax.jit
    def propose(images):
        def proposals(model, images, size):
            maps = model.features(images, size)
            return model.propose(model.score(model.rpn, maps, images, size), images, size)

        return model.apply(variables, images, SIZE, method=proposals), model.apply(variables, images, SIZE)

    proposals, found = propose(IMAGES)
    assert proposals.valid.all()
    outputs = jax.jit(lambda network: network.outputs(IMAGES))
    logits = jnp.stack([outputs(region(boxes)) for boxes in jnp.moveaxis(proposals.boxes, 1, 0)], 1)
    assert logits.shape == (2, 6, 4)
    classes = jax.nn.softmax(logits)[..., :-1].reshape(2, -1)  # without the background, the last
    np.testing.assert_allclose(classes.max(1), found.scores[:, 0], rtol=1e-5)
    np.testing.assert_array_equal(classes.argmax(1) % 3, found.labels[:, 0])
    label = found.labels[:, 0]
    best = region(jnp.take_along_axis(proposals.boxes, (classes.argmax(1) // 3)[:, None, None], 1)[:, 0])
    np.testing.assert_allclose(class_probability(label)(outputs(best)), found.scores[:, 0], rtol=1e-5)


def test_gradient_is_where_the_network_looks():
    gradient = jax.jit(METHODS["saliency"])(region(), IMAGES, class_score(jnp.array([0, 2])))
    assert gradient[0, 8:36, 4:30].max() > 0 and gradient[1, 2:60, 20:60].max() > 0
    assert gradient[0, :, 60:].max() == 0  # outside of the receptive field
    assert gradient[0, 50:].max() == gradient[1, :, 100:].max() == 0  # in the padding


@pytest.mark.parametrize("name", METHODS)
def test_every_method(name):
    options = {"rise": {"samples": 4}, "smooth_grad": {"samples": 2}, "integrated_gradients": {"steps": 2}}
    options["occlusion"] = {"window": 32, "stride": 32}
    method = jax.jit(partial(METHODS[name], **options.get(name, {})), static_argnames="layer")
    network = region()
    heat = method(network, IMAGES, class_score(1), key=jax.random.key(0), layer="detector/pyramid/output1")
    assert heat.shape == IMAGES.shape[:3] and jnp.isfinite(heat).all() and heat.max() > 0


def test_map_of_the_level_that_a_box_is_read_from():
    layers = region_layers(region(jnp.array([[0.0, 0, 20, 20], [0, 0, 100, 50]])), IMAGES)
    assert layers == ["detector/pyramid/output1", "detector/pyramid/output2"]
    gradient = jax.jit(
        jax.grad(lambda tap, layer: region().forward(IMAGES, layer, tap)[0].sum()), static_argnames="layer"
    )
    used = [
        jnp.abs(gradient(jnp.zeros((2, 64 // s, 128 // s, 4)), f"detector/pyramid/output{s}")).max() for s in (1, 2)
    ]
    want = region_layers(region(), IMAGES)
    assert {*want} == {f"detector/pyramid/output{s}" for s in (1, 2) if used[s - 1] > 0}
    # A box lights up in the map where it is in the image: in HiResCAM nowhere else.
    method = jax.jit(METHODS["hires_cam"], static_argnames="layer")
    heat = method(region(), IMAGES, class_score(1), layer=want[0])
    assert heat[0, 8:36, 4:30].sum() > 0.8 * heat[0].sum() > 0


@pytest.mark.slow
def test_random_weights_for_comparison():
    """Cascading randomization starts from new weights for the whole detector, and keeps the boxes."""
    (name, fresh), *others = cascade(region(), IMAGES, key=jax.random.key(2))
    assert name == "detector" and not others
    np.testing.assert_array_equal(fresh.variables["regions"]["boxes"], BOXES)
    assert jnp.abs(fresh.outputs(IMAGES) - region().outputs(IMAGES)).max() > 1e-3


@pytest.mark.slow
def test_whole_images_without_sizes():
    model, variables = detector()
    whole = region_network(model, variables, jnp.array([[0.0, 0, 128, 64]] * 2))
    plain = {kind: tree for kind, tree in whole.variables.items() if kind != "regions"}
    np.testing.assert_array_equal(whole.model.apply(plain, IMAGES), whole.outputs(IMAGES))
