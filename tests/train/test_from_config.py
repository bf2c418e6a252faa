"""From a config to its pieces: every field reaches the piece that it describes."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_jax import MODELS, GroupNorm, StandardizedConv, onednn
from resnet_jax.layers import zero_padded_max_pool
from resnet_jax.losses import sigmoid_cross_entropy, smooth_labels
from resnet_jax.mix import mix
from resnet_jax.tree import count, leaves
from tests.reference.nets import CLASSES, tiny
from train import from_config as build
from train import runtime
from train.config import AugmentConfig, DataConfig, OptimConfig, TrainConfig
from train.data.sets import Dataset
from train.data.sources import Arrays, Encoded
from train.errors import UsageError
from train.state import init_variables

NORMAL = AugmentConfig(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
IMAGE = np.random.default_rng(0).random((12, 12, 3), np.float32)
FIELDS = {
    "crop_padding": 3,
    "resized_crop": 8,
    "flip": True,
    "rand_augment": 9,
    "trivial_augment": True,
    "color_jitter": 0.4,
    "cutout": 5,
    "erasing": 1.0,
}


def augmented(**fields):
    """[8, H, W, 3] views of the one image."""
    augment = build.train_augment(dataclasses.replace(NORMAL, **fields))
    return np.asarray(jax.jit(jax.vmap(lambda key: augment(key, IMAGE)))(jax.random.split(jax.random.key(0), 8)))


def test_every_augmentation_field_is_covered():
    others = {"crop_mode", "min_scale", "mean", "std", "mixup", "cutmix"}
    assert {f.name for f in dataclasses.fields(AugmentConfig)} == FIELDS.keys() | others
    np.testing.assert_allclose(augmented()[0], (IMAGE - 0.5) / 0.25, atol=1e-5)


@pytest.mark.parametrize("name", FIELDS)
def test_augmentation_field_changes_training_images(name):
    views = augmented(**{name: FIELDS[name]})
    side = FIELDS[name] if name == "resized_crop" else 12
    assert views.shape == (8, side, side, 3)
    assert len({view.tobytes() for view in views}) > 1


def test_crop_mode_and_smallest_scale():
    black = (0 - 0.5) / 0.25
    views = {mode: augmented(crop_padding=6, crop_mode=mode) for mode in ("constant", "reflect")}
    assert (views["constant"] == black).any() and not (views["reflect"] == black).any()
    plain = (IMAGE - 0.5) / 0.25
    whole, small = (augmented(resized_crop=12, min_scale=scale) for scale in (1.0, 0.08))
    assert np.abs(whole - plain).mean() < np.abs(small - plain).mean()


def test_evaluation_takes_the_centre():
    config = dataclasses.replace(NORMAL, resized_crop=8, flip=True, cutout=4, color_jitter=0.4)
    seen = build.eval_augment(config)(jax.random.key(0), jnp.asarray(IMAGE))
    np.testing.assert_allclose(seen, (IMAGE[2:10, 2:10] - 0.5) / 0.25, atol=1e-5)


@pytest.mark.parametrize(("backend", "expected"), [("cpu", jnp.float32), ("gpu", jnp.bfloat16), ("tpu", jnp.bfloat16)])
def test_precision(backend, expected, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert build.make_model(TrainConfig(), 10).dtype == expected
    assert build.make_model(TrainConfig(dtype="bfloat16"), 10).dtype == jnp.bfloat16
    assert build.make_model(TrainConfig(dtype="float32"), 10).dtype == jnp.float32


def test_compiler_options_are_for_cpu_alone(monkeypatch):
    options = runtime.compiler_options
    assert options(jnp.bfloat16) == {runtime.YNN: ""}
    assert options(jnp.float32)[runtime.YNN].startswith("LIBRARY_FUSION_TYPE")
    assert options(jnp.float32, plain=False) == {}
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        assert options(jnp.bfloat16) == options(jnp.float32) == {}
    # An option that this jaxlib does not know.
    monkeypatch.setattr(runtime, "YNN", "xla_cpu_no_such_option")
    assert options(jnp.float32) == options(jnp.bfloat16) == {}


def unavailable(dtype):
    raise onednn.Unavailable("no compiler")


# (name, mode, devices, backend, oneDNN's check) -> (whether oneDNN is used, remark or error)
KERNELS = {
    "plain": (("plain", "jit", 1, "cpu", None), (False, "")),
    "auto off CPU": (("auto", "jit", 1, "gpu", None), (False, "")),
    "onednn off CPU": (("onednn", "jit", 1, "gpu", None), (False, "oneDNN runs only on CPU (got gpu)")),
    "auto": (("auto", "jit", 1, "cpu", None), (True, "")),
    "onednn": (("onednn", "jit", 1, "cpu", None), (True, "")),
    "auto without": (("auto", "jit", 1, "cpu", unavailable), (False, "no compiler")),
    "onednn without": (("onednn", "jit", 1, "cpu", unavailable), (False, "no compiler")),
    "several devices": (("auto", "jit", 8, "cpu", None), (False, "use mode shard_map")),
    "sharded": (("auto", "shard_map", 8, "cpu", None), (True, "")),
}


@pytest.mark.parametrize("case", KERNELS)
def test_kernels(case, monkeypatch):
    (name, mode, devices, backend, check), (used, message) = KERNELS[case]
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(onednn, "check", check or (lambda dtype: None))
    if name == "onednn" and message:
        with pytest.raises(UsageError, match=f"--kernels onednn: {re.escape(message)}"):
            build.make_kernels(name, mode)
        return
    fields, remark = build.make_kernels(name, mode)
    assert message in remark and bool(message) == bool(remark)
    assert fields == ({"conv": onednn.Conv, "norm": onednn.BatchNorm, "max_pool": onednn.max_pool} if used else {})


@pytest.mark.parametrize(
    ("backend", "kernels", "source", "options", "number"),
    [
        ("cpu", True, "arrays", {}, 8),
        ("cpu", False, "arrays", {}, 1),  # XLA's convolutions are slow in loops
        ("gpu", False, "arrays", {}, 8),
        ("gpu", False, "decoded into memory", {}, 8),
        ("gpu", False, "too large", {}, 1),
        ("gpu", False, "random crops", {}, 1),
        ("gpu", False, "arrays", {"mode": "pmap"}, 1),
        ("cpu", False, "arrays", {"steps_per_call": 3}, 3),
        ("gpu", False, "too large", {"steps_per_call": 1}, 1),
    ],
)
def test_steps_per_call(backend, kernels, source, options, number, monkeypatch):
    """A rule of the config and the backend: never of a measured time."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    chosen = build.steps_per_call(TrainConfig(**options), dataset(source), {"conv": onednn.Conv} if kernels else {})
    assert chosen == number


def test_steps_per_call_needs_images_in_memory():
    with pytest.raises(UsageError, match="--steps-per-call 4: the images of photos are not in memory"):
        build.steps_per_call(TrainConfig(steps_per_call=4), dataset("too large"), {})


def dataset(kind):
    """A set whose training images are in memory, will be, or are not."""
    small = Arrays(images=np.zeros((4, 8, 8, 3), np.uint8), labels=np.zeros(4, np.int32))
    size = 40_000 if kind == "too large" else 8
    encoded = Encoded(
        read=None, name=str, indices=np.arange(4), size=size, channels=3, random_crop=kind == "random crops"
    )
    train = small if kind == "arrays" else encoded
    return Dataset(name="photos", classes=("a", "b"), train=train, validation=small, test=small)


def test_model_fields():
    config = TrainConfig(model="resnet8", width=8, drop_path=0.2, zero_init=True, sync_bn=False)
    model = build.make_model(config, 7, "data", drop_path=config.drop_path)
    assert (model.width, model.drop_path, model.zero_init, model.sync_bn) == (8, 0.2, True, False)
    assert (model.num_classes, model.axis_name, model.stage_sizes) == (7, "data", (1, 1, 1))
    tx, _ = build.make_tx(config.optim, 10, 1.0)
    # The seed decides the weights.
    states = [build.make_state(dataclasses.replace(config, seed=s), model, tx, (8, 8, 1)) for s in (0, 0, 1)]
    assert count(states[0].params) == 18_975 and states[0].ema is None
    assert (leaves(states[0].params)["stage1_block1/norm2/scale"] == 0).all()
    kernels = [np.asarray(state.params["head"]["kernel"]) for state in states]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert (kernels[0] != kernels[2]).any()
    averaged = dataclasses.replace(config, ema=0.9)
    assert jax.eval_shape(lambda: build.make_state(averaged, model, tx, (8, 8, 1))).ema is not None


def test_optimizer_fields():
    optim = OptimConfig(
        lr=0.4, schedule="step", milestones=(0.2, 0.6), factor=0.5, warmup_epochs=0.5, clip_norm=0.1, momentum=0.0
    )
    with pytest.raises(UsageError, match="2,147,483,648 steps, and can count at most 2,147,483,647"):
        build.make_tx(optim, 2**31, 8.0)
    tx, schedule = build.make_tx(optim, 104, 8.0)
    rates = [float(schedule(step)) for step in (0, 3, 4, 20, 21, 61, 62)]  # 0.2 and 0.6 of all 104 steps
    assert rates == pytest.approx([0.08, 0.32, 0.4, 0.4, 0.2, 0.2, 0.1])
    params = {"a": {"kernel": jnp.ones((2, 2))}}
    updates, _ = tx.update(jax.tree.map(lambda p: 100 * p, params), tx.init(params), params)
    assert float(optax.tree.norm(updates)) == pytest.approx(0.1 * 0.08, rel=1e-4)
    decayed, _ = build.make_tx(OptimConfig(name="adamw", lr=0.1, weight_decay=0.5), 10, 1.0)
    updates, _ = decayed.update(jax.tree.map(jnp.zeros_like, params), decayed.init(params), params)
    np.testing.assert_allclose(updates["a"]["kernel"], -0.05, rtol=1e-5)


def test_objective_of_a_config(images):
    """The config's loss, smoothing, mixing and frozen statistics are those of the objective."""
    batch = {"image": images[0].astype(np.float32) / 255, "label": images[1]}
    variables = init_variables(tiny(), jax.random.key(0), (8, 8, 3))
    rngs = {"mix": jax.random.key(1), "drop_path": jax.random.key(2)}

    config = TrainConfig(
        loss="sigmoid", label_smoothing=0.2, freeze=True, augment=dataclasses.replace(NORMAL, mixup=0.3)
    )
    objective = jax.jit(partial(build.make_objective(config, CLASSES), model=tiny(), axis_name=None))
    loss, (stats, metrics) = objective(variables, batch, rngs=rngs)

    labels = jax.nn.one_hot(batch["label"], CLASSES)
    mixed = jax.jit(partial(mix, mixup_alpha=0.3, cutmix_alpha=0.0))
    inputs, targets = mixed(rngs["mix"], batch["image"], labels)
    logits = jax.jit(partial(tiny().apply, train=False))(variables, inputs)
    want = sigmoid_cross_entropy(logits, smooth_labels(targets, 0.2)).mean()
    assert float(loss) == pytest.approx(float(want), rel=1e-5)
    assert metrics["accuracy"] == (logits.argmax(-1) == batch["label"]).mean()
    assert all(map(np.array_equal, jax.tree.leaves(stats), jax.tree.leaves(variables["batch_stats"])))


def test_statistics_are_measured_on_training_images_alone():
    config = TrainConfig(data=DataConfig(name="synthetic", image_size=8, validation=0.2, split_seed=3))
    dataset = build.load_data(config)
    assert len(dataset.validation) == round(0.2 * 2048)
    measured = build.with_statistics(config, dataset).augment
    pixels = dataset.train.images / 255
    np.testing.assert_allclose(measured.mean, pixels.mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(measured.std, pixels.std((0, 1, 2)), atol=1e-4)


def test_kernels_leave_a_model_s_own_layers_alone():
    kernels = {"conv": onednn.Conv, "norm": onednn.BatchNorm, "max_pool": onednn.max_pool}
    taken = {name: build.with_kernels(MODELS[name](), kernels) for name in ("resnet18", "resnet50_gn")}
    assert (taken["resnet18"].conv, taken["resnet18"].norm) == (onednn.Conv, onednn.BatchNorm)
    assert (taken["resnet50_gn"].conv, taken["resnet50_gn"].norm) == (onednn.Conv, GroupNorm)
    bit = build.with_kernels(MODELS["resnetv2_50x1_bit"](), kernels)
    assert (bit.conv, bit.max_pool) == (StandardizedConv, zero_padded_max_pool)
