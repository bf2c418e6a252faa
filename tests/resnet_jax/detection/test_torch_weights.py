"""With the same weights, detectors equal torchvision's: maps, proposals, detections, losses, gradients.

The tests always compare with the stored outputs of `make_detector_golden.py`, and with torchvision's full detectors if
it is installed.
"""

import importlib.util
import json
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.detection.box_head import BoxHead, BoxRules
from resnet_jax.detection.detector import FasterRCNN
from resnet_jax.detection.pyramid import FeaturePyramid
from resnet_jax.detection.retinanet import DenseRules, RetinaNet
from resnet_jax.detection.rpn import ProposalRules
from resnet_jax.detection.torch_weights import BODY, from_torchvision, torchvision_name
from resnet_jax.resnet import MODELS
from resnet_jax.torch_weights import from_layout, torch_name
from resnet_jax.tree import leaves
from tests.reference.make_detector_golden import (
    AFTER,
    BEFORE,
    CANONICAL,
    CLASSES,
    DETECTORS,
    EVERYTHING,
    FEATURES,
    FOUND,
    HIDDEN,
    KINDS,
    SIZES,
    WIDTH,
    answers,
    calm_weights,
    examples,
    shapes_of,
    summary,
)

HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
LOSSES = {
    "objectness_loss": "loss_objectness",
    "proposal_loss": "loss_rpn_box_reg",
    "class_loss": "loss_classifier",
    "box_loss": "loss_box_reg",
}
DENSE_LOSSES = {"class_loss": "classification", "box_loss": "bbox_regression"}


def small(kind, **options):
    """The detector of `make_detector_golden.small`."""
    backbone = MODELS["resnet18"](num_classes=None, width=WIDTH).clone(stage_sizes=(1, 1, 1, 1))
    if kind == "retinanet":
        rules = DenseRules(candidates=BEFORE[1], detections=FOUND)
        neck = partial(FeaturePyramid, features=FEATURES, coarser="conv")
        return RetinaNet(backbone, **{"classes": CLASSES, "rules": rules, "neck": neck, **options})
    fields = {
        "classes": CLASSES,
        "neck": partial(FeaturePyramid, features=FEATURES),
        "head": partial(BoxHead, hidden=(HIDDEN, HIDDEN)),
        "proposals": ProposalRules(before=BEFORE, after=AFTER, samples=EVERYTHING),
        "regions": BoxRules(samples=EVERYTHING, fraction=0.5, detections=FOUND),
        "canonical_size": CANONICAL,
    }
    return FasterRCNN(backbone, **(fields | options))


def full(kind):
    """torchvision's detectors on a ResNet-50, of the usual size."""
    backbone = MODELS["resnet50"](num_classes=None)
    if kind == "retinanet":
        return RetinaNet(backbone, classes=CLASSES)
    rules = ProposalRules(samples=EVERYTHING), BoxRules(samples=EVERYTHING, fraction=0.5)
    return FasterRCNN(backbone, classes=CLASSES, proposals=rules[0], regions=rules[1])


@cache
def shapes_here(model, size):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *size, 3)))


def ours(model, variables, images, boxes, labels):
    """What `make_detector_golden.answers` returns, by this project's detector."""
    two_stages = isinstance(model, FasterRCNN)

    @jax.jit
    def compute(variables):
        maps = model.apply(variables, images, method="features")
        found = {f"map/{level}": x for level, x in enumerate(maps)}
        if two_stages:
            levels = model.apply(variables, images, method=lambda m, x: m.score(m.rpn, maps, x, None))
            found["proposals"] = model.apply(variables, levels, images, None, method="propose")

        def loss(params):
            keys = jax.random.split(jax.random.key(0), len(images))
            losses = model.apply({**variables, "params": params}, images, None, boxes, labels, keys, method="losses")
            return sum(losses.values()), losses

        grads, losses = jax.grad(loss, has_aux=True)(variables["params"])
        return found, model.apply(variables, images), losses, grads

    found, detections, losses, grads = jax.device_get(compute(variables))
    if two_stages:
        rows = found.pop("proposals")
        found |= {f"proposals/{i}": rows.boxes[i][valid] for i, valid in enumerate(rows.valid)}
    for i, valid in enumerate(detections.valid):
        found |= {f"{name}/{i}": getattr(detections, name)[i][valid] for name in ("boxes", "scores", "labels")}
    found |= {f"loss/{(LOSSES if two_stages else DENSE_LOSSES)[name]}": x for name, x in losses.items()}
    for path, x in leaves(grads).items():
        part, _, rest = path.partition("/")
        name = BODY + torch_name(rest, pooled=False) if part == "backbone" else torchvision_name(path)
        found[f"grad/{name}"] = in_their_layout(path, x)
    return found


def in_their_layout(path, x):
    """A gradient in PyTorch's layout, with zeros for the box of the background."""
    x = from_layout(path, x)
    if path == "box_head/hidden1/kernel":
        x = x.reshape(len(x), 7, 7, -1).transpose(0, 3, 1, 2).reshape(len(x), -1)
    return np.concatenate([np.zeros_like(x[:4]), x]) if path.startswith("box_head/deltas/") else x


def assert_answers_agree(got, want, images):
    """Compare answers or their summaries. Boxes whose scores nearly tie may come in a different order."""
    for name, x in want.items():
        kind, _, rest = name.partition("/")
        if kind == "map":
            assert got[name].shape == x.shape, name
            np.testing.assert_allclose(got[name], x, rtol=0, atol=1e-4 * np.abs(x).max() + 1e-6, err_msg=name)
        elif kind == "grad":
            # Rounding decides some ReLUs, which changes the gradients of single channels.
            assert got[name].shape == x.shape, name
            assert np.linalg.norm(got[name] - x) <= 1e-2 * np.linalg.norm(x) + 1e-6, name
        elif kind == "loss":
            np.testing.assert_allclose(got[name], x, rtol=1e-5, err_msg=name)
        elif kind in ("proposals", "boxes"):
            assert got[name].shape == x.shape, name
            pairs = np.abs(got[name][:, None] - x[None]).max(2) < 0.02  # pixels
            if kind == "boxes":
                labels, scores = f"labels/{rest}", f"scores/{rest}"
                pairs &= got[labels][:, None] == want[labels][None]
                pairs &= np.abs(got[scores][:, None] - want[scores][None]) < 1e-5
            assert pairs.any(0).all() and pairs.any(1).all(), name
    assert {name for name in want if name.startswith("grad/")} <= {*got}
    assert len([name for name in want if name.startswith("boxes/")]) == images


@cache
def golden(kind):
    """(state dict, stored summary) of a small detector."""
    with np.load(DETECTORS) as stored:
        found = {name.removeprefix(f"{kind}/"): x for name, x in stored.items() if name.startswith(kind)}
    return calm_weights(kind, json.loads(str(found.pop("shapes")))), found


@pytest.mark.parametrize("kind", [KINDS[0], pytest.param(KINDS[1], marks=pytest.mark.slow)])
def test_golden(kind):
    state, want = golden(kind)
    model, arrays = small(kind), examples(*SIZES[kind])
    variables = from_torchvision(state, shapes_here(model, SIZES[kind]))
    got = summary(ours(model, variables, *arrays))
    assert_answers_agree(got, want, len(arrays[0]))


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TORCHVISION, reason="torchvision is not installed")
@pytest.mark.parametrize("kind", KINDS)
def test_full_detectors_of_torchvision(kind):
    import torch
    from torchvision.models import detection

    classes = CLASSES + 1 if kind == "faster_rcnn" else CLASSES
    make = {"faster_rcnn": detection.fasterrcnn_resnet50_fpn, "retinanet": detection.retinanet_resnet50_fpn}[kind]
    net = make(weights=None, weights_backbone=None, num_classes=classes)
    state = calm_weights(kind, shapes_of(net))
    net.load_state_dict({name: torch.from_numpy(x) for name, x in state.items()}, strict=False)
    model, arrays = full(kind), examples(128, 128)
    variables = from_torchvision(net.state_dict(), shapes_here(model, (128, 128)))
    with jax.default_matmul_precision("highest"):
        assert_answers_agree(ours(model, variables, *arrays), answers(net, *arrays), len(arrays[0]))


# ---- the state dict -------------------------------------------------------------------------------------------------


def test_every_tensor_is_used_once():
    """The variables hold as many numbers as torchvision's tensors, except for the box of the background."""
    for kind in KINDS:
        state, _ = golden(kind)
        loaded = from_torchvision(state, shapes_here(small(kind), SIZES[kind]))
        background = 4 * (HIDDEN + 1) if kind == "faster_rcnn" else 0
        assert sum(x.size for x in jax.tree.leaves(loaded)) == sum(x.size for x in state.values()) - background


def without(state, *names):
    return {name: x for name, x in state.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "rpn.head.bbox_pred.bias"), r"missing 1: rpn\.head\.bbox_pred\.bias$"),
        (lambda s: without(s, "backbone.body.layer2.0.conv1.weight"), r"missing 1: layer2\.0\.conv1\.weight$"),
        (lambda s: {**s, "mask_head.weight": np.zeros(3)}, r"unexpected 1: mask_head\.weight$"),
        (
            lambda s: {**s, "rpn.head.cls_logits.weight": np.zeros((9, FEATURES, 1, 1))},
            r"of a different shape 1: rpn\.head\.cls_logits\.weight \[9, 16, 1, 1\] "
            r"\(here \[1, 1, 16, 9\], not \[1, 1, 16, 3\]\)$",
        ),
        (
            lambda s: {**s, "roi_heads.box_head.fc6.weight": np.zeros((HIDDEN, 783))},
            r"of a different shape 1: roi_heads\.box_head\.fc6\.weight \[32, 783\] ",
        ),
        (lambda s: {}, r"missing 60: layer1\.0\.bn1\.running_mean, "),
    ],
)
def test_state_dicts_that_do_not_fit_are_refused(change, message):
    state, _ = golden("faster_rcnn")
    with pytest.raises(ValueError, match=message):
        from_torchvision(change(state), shapes_here(small("faster_rcnn"), SIZES["faster_rcnn"]))


def test_detectors_with_layers_that_torchvision_lacks_are_refused():
    state, _ = golden("faster_rcnn")
    deeper = small("faster_rcnn", head=partial(BoxHead, hidden=(HIDDEN,) * 3))
    with pytest.raises(ValueError, match="torchvision's detectors have no box_head/hidden3/"):
        from_torchvision(state, shapes_here(deeper, SIZES["faster_rcnn"]))


OLDER = (("_blocks.0.0.", "_blocks.0."), ("_blocks.1.0.", "_blocks.1."), ("rpn.head.conv.0.0.", "rpn.head.conv."))


def test_names_from_before_torchvision_0_13_and_an_epsilon_of_0():
    """Files of `COCO_V1` have other names, and norms without an epsilon."""
    state, _ = golden("faster_rcnn")
    older = dict(state)
    for new, old in OLDER:
        older = {name.replace(new, old): x for name, x in older.items()}
    assert older.keys() != state.keys()
    shapes = shapes_here(small("faster_rcnn"), SIZES["faster_rcnn"])
    got, want = from_torchvision(older, shapes, epsilon=0), from_torchvision(state, shapes)
    jax.tree.map(np.testing.assert_array_equal, got["params"], want["params"])
    for path, x in leaves(want["batch_stats"]).items():
        shift = 1e-5 if path.endswith("/var") else 0
        np.testing.assert_allclose(leaves(got["batch_stats"])[path], x - shift, rtol=1e-6)


def test_older_names_of_retinanet():
    state, _ = golden("retinanet")
    older = {}
    for name, x in state.items():
        parts = name.split(".")
        if parts[0] == "head" and parts[2] == "conv":  # a sequence of convolutions and ReLUs
            name = ".".join([*parts[:3], str(2 * int(parts[3])), parts[5]])
        older[name] = x
    assert older.keys() != state.keys()
    shapes = shapes_here(small("retinanet"), SIZES["retinanet"])
    jax.tree.map(np.testing.assert_array_equal, from_torchvision(older, shapes), from_torchvision(state, shapes))
