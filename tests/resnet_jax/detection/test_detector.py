"""Detectors: any number of objects, their variants by composition, the rules that select boxes, and the losses."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.detection.box_head import BoxHead, BoxRules, Regions, region_loss, sample_regions, select_detections
from resnet_jax.detection.boxes import decode, encode
from resnet_jax.detection.losses import binary_cross_entropy, focal, mean_of, smooth_l1
from resnet_jax.detection.pyramid import FeaturePyramid
from resnet_jax.detection.rpn import ProposalRules, Proposals, propose
from resnet_jax.resnet import MODELS
from resnet_jax.tree import leaves
from tests.reference.detectors import CLASSES, init, tiny_backbone, tiny_detector

ROWS, SIDE = 100, 64
KINDS = ("faster_rcnn", "retinanet")
KEYS = jax.random.split(jax.random.key(0), 4)


def objects(*counts):
    """Random images [B, H, W, 3], with this many objects each: boxes [B, ROWS, 4] and labels [B, ROWS]."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(len(counts), SIDE, SIDE, 3)).astype(np.float32)
    low = rng.uniform(0, 40, (len(counts), ROWS, 2))
    boxes = np.concatenate([low, low + rng.uniform(4, 24, low.shape)], 2).astype(np.float32)
    labels = rng.integers(0, CLASSES, (len(counts), ROWS)).astype(np.int32)
    padding = np.arange(ROWS)[None] >= np.array(counts)[:, None]
    return images, np.where(padding[..., None], 0, boxes), np.where(padding, -1, labels)


@cache
def trained(kind):
    """(variables, compiled function of them, images, boxes and labels to losses, statistics and gradients)."""
    model = tiny_detector(kind)

    @jax.jit
    def compute(variables, images, boxes, labels):
        def loss(params):
            arrays = (images, None, boxes, labels, KEYS)
            losses, updated = model.apply(
                {**variables, "params": params}, *arrays, method="losses", mutable=["batch_stats"]
            )
            return sum(losses.values()), (losses, updated["batch_stats"])

        grads, (losses, stats) = jax.grad(loss, has_aux=True)(variables["params"])
        return losses, stats, grads

    return init(model), lambda *arrays: jax.device_get(compute(*arrays))


def finite(tree):
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


# ---- numbers of objects ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_images_with_none_one_and_a_hundred_objects(kind):
    """One program for all numbers of objects, up to all rows; the running statistics stay as they are."""
    variables, compute = trained(kind)
    losses, stats, grads = compute(variables, *objects(0, 1, 7, ROWS))
    assert finite((losses, grads)) and all(value > 0 for value in losses.values())
    assert all(np.abs(x).max() > 0 for x in leaves(grads).values())
    jax.tree.map(np.testing.assert_array_equal, stats, variables["batch_stats"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_objects_teaches_the_background(kind):
    variables, compute = trained(kind)
    losses, _, grads = compute(variables, *objects(0, 0, 0, 0))
    assert finite((losses, grads))
    boxes = {name for name in losses if name in ("box_loss", "proposal_loss")}
    assert all((value == 0) == (name in boxes) for name, value in losses.items())
    head = "rpn" if kind == "faster_rcnn" else "dense_head"
    last = {"rpn": "objectness", "dense_head": "logits"}[head]
    assert np.abs(grads[head][last]["conv"]["kernel"]).max() > 0
    assert np.abs(grads[head]["deltas"]["conv"]["kernel"]).max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_losses_without_rows_for_objects_are_those_of_padding(kind):
    variables, (images, boxes, labels) = trained(kind)[0], objects(0, 0)
    losses = jax.jit(partial(tiny_detector(kind).apply, method="losses"))
    want, got = (losses(variables, images, None, boxes[:, :n], labels[:, :n], KEYS[:2]) for n in (1, 0))
    assert want.keys() == got.keys()
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_of_rows_that_are_padding_count_nothing(kind):
    variables, compute = trained(kind)
    images, boxes, labels = objects(0, 1, 7, 30)
    everywhere = np.where((labels >= 0)[..., None], boxes, np.float32([10, 10, 30, 30]))
    want, got = compute(variables, images, boxes, labels), compute(variables, images, everywhere, labels)
    jax.tree.map(np.testing.assert_array_equal, got, want)


# ---- variants -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_proposals_alone_are_the_first_stage():
    """A `ProposalNetwork` has the first stage's losses and proposals, with the same variables and keys."""
    variables, compute = trained("faster_rcnn")
    arrays = objects(0, 1, 7, 30)
    want, *_ = compute(variables, *arrays)
    model, whole = tiny_detector("proposals"), tiny_detector()
    first = {kind: {k: x for k, x in tree.items() if k != "box_head"} for kind, tree in variables.items()}
    images, boxes, labels = arrays
    anchor_keys = jax.vmap(jax.random.split)(KEYS)[:, 0]
    got = jax.jit(partial(model.apply, method="losses"))(first, images, None, boxes, labels, anchor_keys)
    assert got == {name: pytest.approx(float(want[name]), rel=1e-5) for name in ("objectness_loss", "proposal_loss")}

    def stage(m, x):
        return m.propose(m.score(m.rpn, m.features(x), x, None), x, None)

    found, expected = (
        jax.jit(model.apply)(first, images),
        jax.jit(partial(whole.apply, method=stage))(variables, images),
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4), found, expected)
    assert found.boxes.shape == (4, 20, 4)


VARIANTS = {
    "class_agnostic": {"head": partial(BoxHead, hidden=(32,), shared_boxes=True)},
    "single_level": {
        "levels": ("stage3",),
        "neck": partial(FeaturePyramid, features=16, coarser="none"),
        "pooled_levels": 1,
    },
    "bfloat16": {"backbone": tiny_backbone(dtype=jnp.bfloat16)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_by_composition(name):
    model = tiny_detector(**VARIANTS[name])
    variables = init(model)
    images, boxes, labels = objects(0, 1, 7, 30)
    maps = jax.eval_shape(partial(model.apply, method="features"), variables, images)
    found = jax.jit(model.apply)(variables, images)
    assert found.boxes.shape == (4, 10, 4) and found.boxes.dtype == found.scores.dtype == jnp.float32
    assert (found.boxes >= 0).all() and (found.boxes <= SIDE).all() and found.valid.any()

    @jax.jit
    @jax.grad
    def gradient(params):
        arrays = images, None, boxes, labels, KEYS
        losses = model.apply({**variables, "params": params}, *arrays, method="losses")
        assert all(value.dtype == jnp.float32 for value in losses.values())
        return sum(losses.values())

    grads = gradient(variables["params"])
    assert finite(grads) and all(x.dtype == jnp.float32 for x in jax.tree.leaves(grads))
    if name == "class_agnostic":
        assert variables["params"]["box_head"]["deltas"]["kernel"].shape == (32, 4)
    if name == "single_level":
        assert [x.shape for x in maps] == [(4, 16, 16, 16)]
    if name == "bfloat16":
        assert {x.dtype for x in maps} == {jnp.dtype(jnp.bfloat16)}
        want = jax.jit(tiny_detector().apply)(variables, images)
        np.testing.assert_allclose(found.scores, want.scores, atol=0.1)


def test_unknown_levels_are_named():
    model = tiny_detector(levels=("stage3", "stage4"))
    with pytest.raises(
        ValueError, match="the backbone has no level stage4; it has stem, stage1, stage2, stage3, pooled"
    ):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))


@pytest.mark.parametrize(("coarser", "sides"), [("none", [8, 4]), ("pool", [8, 4, 2]), ("conv", [8, 4, 2, 1])])
def test_pyramid_has_equal_widths_at_all_levels(coarser, sides):
    neck = FeaturePyramid(features=16, coarser=coarser)
    maps = [jnp.zeros((2, 8, 8, 12)), jnp.zeros((2, 4, 4, 24))]
    pyramid, _ = jax.eval_shape(neck.init_with_output, jax.random.key(0), maps)
    assert [x.shape for x in pyramid] == [(2, side, side, 16) for side in sides]


@pytest.mark.slow
def test_default_anchors_are_those_of_the_papers():
    """32 to 512 pixels on strides 4 to 64, and three sizes from 32 pixels on strides 8 to 128."""
    backbone = MODELS["resnet18"](num_classes=None, width=8).clone(stage_sizes=(1, 1, 1, 1))
    for kind, strides, sizes in (
        ("proposals", (4, 8, 16, 32, 64), ((32,), (64,), (128,), (256,), (512,))),
        (
            "retinanet",
            (8, 16, 32, 64, 128),
            ((32, 40, 50), (64, 80, 101), (128, 161, 203), (256, 322, 406), (512, 645, 812)),
        ),
    ):
        options = {"neck": partial(FeaturePyramid, features=4, coarser="pool" if kind == "proposals" else "conv")}
        levels = [f"stage{n}" for n in range(1 if kind == "proposals" else 2, 5)]
        model = tiny_detector(kind, backbone=backbone, levels=levels, **options)
        head = "rpn" if kind == "proposals" else "dense_head"

        def anchors(m, x, head=head):
            return m.score(getattr(m, head), m.features(x), x, None).anchors

        found, _ = jax.jit(partial(model.init_with_output, method=anchors))(
            jax.random.key(0), jnp.zeros((1, 128, 128, 3))
        )
        for level, stride, wanted in zip(found, strides, sizes, strict=True):
            assert len(level) == (128 // stride) ** 2 * 3 * len(wanted)
            square = np.asarray(level)[len(wanted) : 2 * len(wanted)]  # ratio 1 of the first cell
            np.testing.assert_allclose(square[:, 2] - square[:, 0], wanted, atol=1)


# ---- rules ----------------------------------------------------------------------------------------------------------


def test_proposals_are_the_best_that_do_not_overlap():
    """One level at a time; anchors in the padding and sides below `min_side` are dropped."""
    anchors = jnp.array(
        [[0, 0, 10, 10], [1, 0, 11, 10], [30, 30, 40, 40], [50, 50, 50, 60], [60, 0, 70, 10]], jnp.float32
    )
    present = jnp.array([True, True, True, True, False])
    levels = ([jnp.array([1.0, 3, 2, 5, 6])] * 2, [jnp.zeros((5, 4))] * 2, [anchors] * 2, [present] * 2)
    found = propose(*levels, jnp.array([64, 64]), before=5, after=6, rules=ProposalRules())
    np.testing.assert_array_equal(found.valid, [True] * 4 + [False] * 2)
    np.testing.assert_array_equal(found.logits[:4], [3, 3, 2, 2])
    np.testing.assert_array_equal(found.boxes[:4], anchors[jnp.array([1, 1, 2, 2])])
    # The best anchor that is present is too thin.
    few = propose(*levels, jnp.array([64, 64]), before=2, after=3, rules=ProposalRules())
    np.testing.assert_array_equal(few.valid, [True, True, False])
    none = propose(*levels, jnp.array([64, 64]), before=1, after=2, rules=ProposalRules())
    np.testing.assert_array_equal(none.valid, [False, False])


def test_regions_are_proposals_and_truths():
    truth = jnp.array([[0, 0, 10, 10], [20, 20, 40, 40], [0, 0, 0, 0]], jnp.float32)
    proposals = Proposals(
        jnp.array([[0, 0, 10, 9], [50, 50, 60, 60], [20, 20, 40, 40]], jnp.float32),
        jnp.zeros(3),
        jnp.array([True, True, False]),
    )
    found = sample_regions(
        proposals, truth, jnp.array([2, 0, -1]), jax.random.key(0), rules=BoxRules(samples=6, fraction=1.0)
    )
    rows = {
        tuple(box): int(label)
        for box, label, valid in zip(*map(np.asarray, found[:2]), found.valid, strict=True)
        if valid
    }
    assert rows == {(0, 0, 10, 9): 2, (50, 50, 60, 60): -1, (0, 0, 10, 10): 2, (20, 20, 40, 40): 0}
    assert int(found.valid.sum()) == 4


def test_each_class_has_its_own_box_or_all_share_one():
    rules = BoxRules(detections=4)
    proposals = Proposals(jnp.array([[10.0, 10, 30, 30]]), jnp.zeros(1), jnp.array([True]))
    logits = jnp.log(jnp.array([[0.1, 0.3, 0.6]]))
    shifted = jnp.array([[14.0, 10, 34, 30]])
    own = jnp.stack([jnp.zeros((1, 4)), encode(shifted, proposals.boxes, rules.weights)], 1)
    for deltas, second in ((own, [10.0, 10, 30, 30]), (own[:, 1:], [14.0, 10, 34, 30])):
        found = select_detections(logits, deltas, proposals, jnp.array([64, 64]), rules=rules)
        np.testing.assert_array_equal(found.valid, [True, True])
        np.testing.assert_array_equal(found.labels, [1, 0])
        np.testing.assert_allclose(found.scores, [0.6, 0.3], rtol=1e-5)
        np.testing.assert_allclose(found.boxes, [[14.0, 10, 34, 30], second], atol=1e-4)


def test_region_losses_count_the_box_of_the_true_class():
    rules = BoxRules()
    boxes = jnp.array([[0.0, 0, 10, 10], [0, 0, 10, 10], [5, 5, 9, 9]])
    truth = jnp.array([[0.0, 0, 10, 10], [1, 0, 11, 10], [0, 0, 10, 10]])
    regions = Regions(boxes, jnp.array([0, 1, -1]), truth, jnp.array([True, True, True]))
    targets = encode(truth, boxes, rules.weights)
    deltas = jnp.stack([targets + 100, targets], 1).at[0].set(targets[0])  # wrong for class 0, except in the first row
    sums = region_loss(jnp.zeros((3, 3)), deltas, regions, rules=rules)
    assert (float(sums.boxes), float(sums.examples)) == (0, 3)
    np.testing.assert_allclose(sums.classes, 3 * np.log(3), rtol=1e-6)
    dropped = region_loss(
        jnp.zeros((3, 3)), deltas + 1, regions._replace(valid=jnp.array([True, False, True])), rules=rules
    )
    np.testing.assert_allclose(dropped.boxes, 4 * (1 - 0.5 / 9), rtol=1e-6)
    np.testing.assert_allclose(dropped.classes, 2 * np.log(3), rtol=1e-6)
    np.testing.assert_allclose(decode(targets, boxes, rules.weights), truth, atol=1e-5)


# ---- losses ---------------------------------------------------------------------------------------------------------


def test_losses_are_those_of_their_papers():
    errors = jnp.array([-2.0, -0.05, 0.0, 0.1, 3.0])
    np.testing.assert_allclose(smooth_l1(errors, 0.1), [1.95, 0.0125, 0, 0.05, 2.95], rtol=1e-5)
    np.testing.assert_array_equal(smooth_l1(errors, 0.0), jnp.abs(errors))
    logits, targets = jnp.array([-3.0, 0.5, 2.0, 80.0, -80.0]), jnp.array([0.0, 1.0, 0.0, 1.0, 0.0])
    p = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    right = np.where(targets == 1, p, 1 - p)
    np.testing.assert_allclose(binary_cross_entropy(logits, targets), -np.log(right), rtol=1e-5, atol=1e-7)
    want = np.where(targets == 1, 0.25, 0.75) * (1 - right) ** 2 * -np.log(right)
    np.testing.assert_allclose(focal(logits, targets), want, rtol=1e-5, atol=1e-7)
    hard = jax.grad(lambda x: focal(x, jnp.array([1.0, 0, 1, 0, 1])).sum())(jnp.array([-1e4, 1e4, 1e4, -1e4, 0.0]))
    assert finite(hard)


def test_means_are_over_the_examples_of_all_shards():
    """Shards that count different numbers of examples, and none at all."""
    totals, counts = jnp.array([4.0, 0.0, 2.0, 0.0]), jnp.array([3.0, 0.0, 1.0, 0.0])
    means = jax.pmap(partial(mean_of, axis_name="data"), axis_name="data")(totals, counts)
    assert float(means.mean()) == 1.5 == float(mean_of(totals.sum(), counts.sum(), None))
    nothing = jnp.zeros(4)
    assert float(jax.pmap(partial(mean_of, axis_name="data"), axis_name="data")(nothing, nothing).sum()) == 0
    assert float(mean_of(jnp.zeros(()), jnp.zeros(()), None)) == 0
