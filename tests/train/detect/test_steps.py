"""The steps of detection: one result in all modes and on any number of devices; crowds; frozen parts; shapes."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_jax.augment import normalize
from resnet_jax.detection.augment import compose, identity, on_pixels, random_flip
from resnet_jax.parallel import axis_of, compile_step, make_mesh, replicated, shard_batch
from resnet_jax.tree import leaves
from tests.reference.detectors import init, tiny_backbone, tiny_batch, tiny_detector
from tests.reference.nets import tiny_tx
from train.config import OptimConfig
from train.detect.config import DetectConfig
from train.detect.from_config import is_trained
from train.detect.metrics import Detections
from train.detect.run import detect
from train.detect.steps import detect_step, detection, outlined, seen_images
from train.from_config import make_tx
from train.runtime import compile_in
from train.state import init_state
from train.steps import train_step

MODES = ("jit", "pmap", "shard_map")
STEPS, COUNT = 2, 8
TX = tiny_tx(0.01)
AUGMENT = compose(random_flip(), on_pixels(normalize((0.5,) * 3, (0.25,) * 3)))


def detector(mode, kind="faster_rcnn"):
    """One with the statistics of the batch, over all devices."""
    return tiny_detector(kind, backbone=tiny_backbone(axis_name=axis_of(mode)), frozen_stats=False)


@cache
def start(kind="faster_rcnn"):
    """Variables to start from."""
    return init(tiny_detector(kind))


@cache
def trained(mode, devices, kind="faster_rcnn", accumulate=1):
    """(final state, metrics of each step, traces, rows of an evaluation) of a batch on this number of devices."""
    mesh = make_mesh(jax.devices()[:devices])
    model, traces = detector(mode, kind), []

    def counted(state, batch, **options):
        traces.append(mode)
        return train_step(
            state,
            batch,
            model=model,
            tx=TX,
            objective=detection(augment=AUGMENT),
            ema_decay=0.9,
            accumulate=accumulate,
            **options,
        )

    step = compile_step(counted, mesh=mesh, mode=mode)
    batch = tiny_batch(COUNT)
    state = jax.device_put(init_state(start(kind), TX, jax.random.key(1), ema=True), replicated(mesh))
    history = []
    for _ in range(STEPS):
        state, metrics = step(state, shard_batch(batch, mesh, mode=mode))
        history.append(metrics)
    return jax.device_get((state, history, len(traces)))


def assert_equal_runs(got, want):
    state, history, traces = got
    assert traces == 1 and int(state.step) == STEPS
    for name in ("params", "batch_stats", "ema"):
        for path, x in leaves(getattr(want[0], name)).items():
            np.testing.assert_allclose(leaves(getattr(state, name))[path], x, atol=2e-5, rtol=1e-4, err_msg=path)
    for one, other in zip(history, want[1], strict=True):
        assert {k: pytest.approx(float(v), rel=1e-3, abs=1e-5) for k, v in other.items()} == one


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_eight_devices_equal_one(mode):
    """Devices hold different numbers of objects, one of them none: means are over all examples of the batch."""
    assert_equal_runs(trained(mode, 8), trained("jit", 1))


@pytest.mark.slow
def test_eight_devices_equal_one_for_retinanet():
    assert_equal_runs(trained("shard_map", 8, "retinanet"), trained("jit", 1, "retinanet"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_parts_of_a_batch_are_the_same_in_all_modes(mode):
    assert_equal_runs(trained(mode, 4, "faster_rcnn", 2), trained("jit", 1, "faster_rcnn", 2))


def test_losses_are_metrics_and_add_up():
    state, history, _ = trained("jit", 1, "retinanet")
    assert {*history[0]} == {"class_loss", "box_loss", "loss", "grad_norm"}
    for metrics in history:
        assert metrics["loss"] == pytest.approx(metrics["class_loss"] + metrics["box_loss"], rel=1e-6)
    before = start("retinanet")
    moved = {path: np.abs(x - leaves(before["params"])[path]).max() for path, x in leaves(state.params).items()}
    assert all(distance > 0 for distance in moved.values())
    assert not np.array_equal(
        state.batch_stats["backbone"]["stem"]["norm"]["mean"], before["batch_stats"]["backbone"]["stem"]["norm"]["mean"]
    )


class Probe(nn.Module):
    """Its loss tells which images it received."""

    @nn.compact
    def losses(self, images, size, boxes, labels, keys, *, axis_name=None):
        weights = jax.random.normal(jax.random.key(3), images.shape)
        return {"seen": (images * weights).sum() * self.param("one", nn.initializers.ones, ())}


def test_trackers_see_the_images_of_the_next_step():
    batch = tiny_batch(COUNT)
    batch = {**batch, "labels": np.full_like(batch["labels"], -1)}  # without outlines
    still = optax.sgd(0.0)
    state = init_state({"params": {"one": jnp.ones(())}, "batch_stats": {}}, still, jax.random.key(1))
    step = jax.jit(partial(train_step, model=Probe(), tx=still, objective=detection(augment=AUGMENT)))
    for _ in range(2):
        seen = seen_images(state, batch, augment=AUGMENT)
        state, metrics = step(state, batch)
        weights = jax.random.normal(jax.random.key(3), seen.shape)
        assert float(metrics["seen"]) == pytest.approx(float((seen * weights).sum()), rel=1e-4)


def test_outlines_lie_inside_the_boxes():
    boxes = jnp.array([[2.0, 1.0, 9.0, 7.0], [0.0, 0.0, 12.0, 10.0], [4.0, 3.0, 5.0, 4.0]])
    image = outlined(jnp.zeros((10, 12, 3)), boxes, jnp.array([True, False, True]), width=1)
    want = np.zeros((10, 12), bool)
    want[1:7, 2:9] = True
    want[2:6, 3:8] = False
    want[3, 4] = True
    np.testing.assert_array_equal(np.isposinf(image[..., 0]), want)
    np.testing.assert_array_equal(np.isneginf(image[..., 2]), want)
    assert np.all(np.asarray(image)[~want] == 0)


@pytest.fixture(scope="module")
def loss_of():
    """The objective of a batch, compiled: its loss, without augmentation."""
    model, variables = tiny_detector("retinanet"), start("retinanet")
    objective = detection(augment=identity)

    @jax.jit
    def loss(batch):
        rows = {**batch, "index": jnp.arange(COUNT)}
        value, (stats, _) = objective(variables, rows, model=model, rngs={"mix": jax.random.key(0)})
        return value, stats

    return lambda batch: loss(batch)[0]


def test_crowds_are_not_trained_on(loss_of):
    batch = tiny_batch(COUNT)
    crowd = batch["crowd"].copy()
    crowd[3, 1] = crowd[6, 0] = True
    removed = np.where(crowd, -1, batch["labels"])
    with_crowd = loss_of({**batch, "crowd": crowd})
    assert with_crowd == loss_of({**batch, "labels": removed}) != loss_of(batch)


@pytest.mark.parametrize("mode", [pytest.param(m, marks=pytest.mark.slow) if m != "shard_map" else m for m in MODES])
def test_detections_are_in_pixels_of_the_original_images(mode):
    """Rows of the whole batch, in all modes: boxes over the image's scale, and no row for padding."""
    batch = {**tiny_batch(COUNT), "valid": np.arange(COUNT) < 6}
    batch["scale"] = np.linspace(0.5, 2, COUNT).astype(np.float32)
    model, variables, mesh = tiny_detector("retinanet"), start("retinanet"), make_mesh()
    seen = jnp.asarray(batch["image"], jnp.float32) / 255
    want = jax.device_get(jax.jit(model.apply)(variables, seen, batch["size"]))

    step = partial(detect_step, model=model, preprocess=identity)
    program = compile_step(step, mesh=mesh, mode=mode, donate=False)
    got = jax.device_get(program(jax.device_put(variables, replicated(mesh)), shard_batch(batch, mesh, mode=mode)))
    np.testing.assert_array_equal(got["id"], [0, 1, 2, 3, 4, 5, -1, -1])
    np.testing.assert_allclose(got["boxes"] * batch["scale"][:, None, None], want.boxes, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(got["scores"], want.scores, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(got["labels"], np.where(want.valid, want.labels, -1))


def test_detections_are_collected_in_the_order_of_the_split():
    """Images come bucket by bucket, and rows that pad a batch are left out."""
    ids = [np.array([2, 0, -1]), np.array([1, 3, -1])]

    def program(_, batch):
        n = len(batch)
        labels = np.where(np.arange(4)[None] < batch[:, None], 7, -1)  # as many objects as the id
        return {"id": batch, "boxes": np.ones((n, 4, 4)), "scores": np.ones((n, 4)), "labels": labels}

    found = detect(program, None, ids)
    assert [len(one.labels) for one in found] == [0, 1, 2, 3] and all(isinstance(one, Detections) for one in found)


# ---- frozen parts ---------------------------------------------------------------------------------------------------

PARTS = ("stem", "stage1", "stage2", "stage3")


@pytest.mark.parametrize(("freeze", "frozen_stats"), [(0, True), (1, False), (2, True), (9, False)])
def test_frozen_parts_do_not_move(freeze, frozen_stats):
    """Neither by gradients nor by weight decay, by no bit; everything else does."""
    config = DetectConfig(model="resnet8", freeze=freeze, frozen_stats=frozen_stats)
    optim = OptimConfig(name="sgd", lr=0.1, weight_decay=0.1, schedule="constant")
    tx, _ = make_tx(optim, 10, 10.0, trainable=is_trained(config))
    params = start()["params"]

    @jax.jit
    def step(params):
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        return optax.apply_updates(params, updates)

    after = leaves(step(params))
    moved = {path for path, x in leaves(params).items() if not np.array_equal(after[path], x)}
    still = {path for path in after if path.startswith(tuple(f"backbone/{part}" for part in PARTS[:freeze]))}
    if frozen_stats:
        still |= {path for path in after if path.startswith("backbone/") and "/norm" in path}
    assert moved == {*after} - still
    assert still


def test_attention_is_trained_beside_frozen_norms():
    trained = is_trained(DetectConfig(model="seresnet50", frozen_stats=True))
    assert trained("backbone/stage1_block1/attention/fc1/bias", jnp.zeros(4))
    assert not trained("backbone/stage1_block1/norm1/bias", jnp.zeros(4))


# ---- shapes ---------------------------------------------------------------------------------------------------------


def test_each_shape_is_traced_once():
    """A program for each bucket; it is chosen by the shape of the images."""
    traces = []

    def step(state, batch, *, axis_name=None):
        traces.append(batch["image"].shape)
        return state + batch["image"].sum(), {"rows": jnp.float32(batch["image"].shape[1])}

    def batch(height):
        return {"image": np.ones((2, height, 4), np.float32)}

    program = compile_step(step, mesh=make_mesh(jax.devices()[:1]), donate=False)
    with ThreadPoolExecutor(1) as pool:
        wait = compile_in(pool, program, jnp.zeros(()), [batch(4), batch(8)])
        compiled, seconds = wait()
    for height in (4, 8, 4, 8):
        state, metrics = compiled(jnp.zeros(()), batch(height))
        assert (float(state), float(metrics["rows"])) == (8 * height, height)
    assert traces == [(2, 4, 4), (2, 8, 4)] and seconds > 0
    with pytest.raises(KeyError):
        compiled(jnp.zeros(()), batch(16))


@pytest.mark.slow
def test_four_images_are_learnt_by_heart():
    """AP above 0.95 on the four images that a detector is trained on."""
    from train.detect.metrics import Truth, coco_metrics
    from train.detect.shapes import CLASSES, draw

    rng = np.random.default_rng(3)
    drawn = [draw(rng, (96, 128)) for _ in range(4)]
    rows = max(len(labels) for _, _, labels in drawn)
    batch = {
        "image": np.stack([image for image, _, _ in drawn]),
        "size": np.tile(np.int32([96, 128]), (4, 1)),
        "boxes": np.stack([np.pad(boxes, ((0, rows - len(boxes)), (0, 0))) for _, boxes, _ in drawn]),
        "labels": np.stack([np.pad(x, (0, rows - len(x)), constant_values=-1) for *_, x in drawn]),
        "crowd": np.zeros((4, rows), bool),
        "id": np.arange(4, dtype=np.int32),
        "scale": np.ones(4, np.float32),
    }
    model = overfitting(len(CLASSES))
    tx = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(3e-3, 300)))
    preprocess = on_pixels(normalize((0.5,) * 3, (0.25,) * 3))
    shapes = model.init(jax.random.key(0), jnp.zeros((1, 96, 128, 3)))
    state = init_state(shapes, tx, jax.random.key(1))
    objective = detection(augment=preprocess)
    step = jax.jit(partial(train_step, model=model, tx=tx, objective=objective), donate_argnums=0)
    for _ in range(300):
        state, metrics = step(state, batch)
    program = jax.jit(partial(detect_step, model=model, preprocess=preprocess))
    found = detect(program, state.variables, [{**batch, "valid": np.ones(4, bool)}])
    truths = [Truth(boxes, labels, np.zeros(len(labels), bool)) for _, boxes, labels in drawn]
    assert sum(len(truth.labels) for truth in truths) > 8
    ap = coco_metrics(found, truths, CLASSES)["ap"]
    assert ap > 0.95, (ap, float(metrics["loss"]))


def overfitting(classes):
    """A Faster R-CNN that is large enough to learn some images by heart."""
    from resnet_jax.detection.box_head import BoxHead, BoxRules
    from resnet_jax.detection.detector import FasterRCNN
    from resnet_jax.detection.pyramid import FeaturePyramid
    from resnet_jax.detection.rpn import ProposalRules
    from resnet_jax.resnet import MODELS

    return FasterRCNN(
        MODELS["resnet18"](num_classes=None, width=16),
        classes=classes,
        levels=("stage1", "stage2", "stage3"),
        neck=partial(FeaturePyramid, features=32, coarser="none"),
        head=partial(BoxHead, hidden=(64,)),
        proposals=replace(ProposalRules(), before=(200, 100), after=(200, 50), samples=128),
        regions=replace(BoxRules(), samples=64, candidates=100, detections=30),
        pooled_levels=3,
        canonical_size=112,
        anchor_scale=4.0,
        frozen_stats=False,
    )
