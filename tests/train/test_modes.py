"""One step, three compilers: the same parameters on one device and on four, one trace, the state donated."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.augment import compose, normalize, random_crop, random_flip
from resnet_jax.masks import apply_masks
from resnet_jax.mix import mix
from resnet_jax.parallel import axis_of, compile_step, make_mesh, replicated, shard_batch
from resnet_jax.tree import is_kernel, map_with_path
from tests.reference.nets import CLASSES, batch_of, tiny, tiny_state, tiny_tx
from train.loop import evaluate
from train.steps import classify, confusion_matrix, eval_step, train_step

MODES = ("jit", "pmap", "shard_map")
STEPS = 3
TX = tiny_tx()
AUGMENT = compose(random_crop(1), random_flip(), normalize((0.5,) * 3, (0.25,) * 3))
VARIANTS = {
    "plain": {},
    "everything": {
        "augment": AUGMENT,
        "masks": True,
        "objective": classify(
            mix=partial(mix, mixup_alpha=0.4, cutmix_alpha=1.0), classes=CLASSES, label_smoothing=0.1
        ),
        "ema_decay": 0.9,
        "accumulate": 2,
        "drop_path": 0.3,
    },
}


def half_mask(path, leaf):
    """Every second weight of a kernel pruned."""
    return jnp.asarray(np.arange(leaf.size).reshape(leaf.shape) % 2 == 0 if is_kernel(path, leaf) else True)


def run(mode, devices, images, *, masks=False, drop_path=0.0, **options):
    """(final state, metrics of each step, traces, whether the first state was consumed)."""
    mesh = make_mesh(jax.devices()[:devices])
    # One block is enough to show that the modes agree.
    model = tiny(stage_sizes=(1,), axis_name=axis_of(mode), drop_path=drop_path)
    state = tiny_state(TX, ema="ema_decay" in options, model=tiny(stage_sizes=(1,)))
    if masks:
        masks = map_with_path(half_mask, state.params)
        state = state.replace(masks=masks, params=apply_masks(state.params, masks))
    traces = []

    def counted(state, batch, **kwargs):
        traces.append(mode)
        return train_step(state, batch, model=model, tx=TX, **options, **kwargs)

    step = compile_step(counted, mesh=mesh, mode=mode)
    first = state = jax.device_put(state, replicated(mesh))
    history = []
    for _ in range(STEPS):
        state, metrics = step(state, shard_batch(batch_of(images), mesh, mode=mode))
        history.append(metrics)
    return state, jax.device_get(history), len(traces), first.params["stem"]["conv"]["kernel"].is_deleted()


@pytest.fixture(scope="module")
def single(images):
    """The same run on one device, by variant."""
    return cache(lambda variant: run("jit", 1, images, **VARIANTS[variant]))


@pytest.mark.parametrize("variant", [pytest.param("plain", marks=pytest.mark.slow), "everything"])
@pytest.mark.parametrize("mode", MODES)
def test_four_devices_equal_one(mode, variant, images, single):
    expected, expected_history, _, _ = single(variant)
    state, history, traces, donated = run(mode, 4, images, **VARIANTS[variant])
    assert traces == 1
    assert donated
    assert int(state.step) == STEPS
    for name in ("params", "batch_stats", "ema"):
        got, want = jax.device_get((getattr(state, name), getattr(expected, name)))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=0), got, want)
    for got, want in zip(history, expected_history, strict=True):
        assert {k: pytest.approx(float(v), rel=1e-4, abs=1e-6) for k, v in want.items()} == got
    for tree in [state.params, state.ema["params"]] if state.ema else []:
        jax.tree.map(np.testing.assert_array_equal, tree, apply_masks(tree, state.masks))


@pytest.mark.slow
def test_local_statistics_differ_by_device_and_are_averaged(images):
    """sync_bn=False: each shard normalises by its own part, which gives another result than the whole batch."""
    mesh = make_mesh()
    states = {}
    for sync in (True, False):
        model = tiny(axis_name="data", sync_bn=sync)
        step = compile_step(partial(train_step, model=model, tx=TX), mesh=mesh, mode="shard_map")
        state = jax.device_put(tiny_state(TX), replicated(mesh))
        states[sync], _ = step(state, shard_batch(batch_of(images), mesh))
    whole, parts = (jax.device_get(states[sync].batch_stats["stem"]["norm"]) for sync in (True, False))
    np.testing.assert_allclose(whole["mean"], parts["mean"], atol=1e-6)  # the mean of means
    assert (parts["var"] < whole["var"] - 1e-5).any()  # parts vary less than the whole


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_counts_each_example_once(mode, images):
    """Padding rows change nothing, in any mode, on any number of devices."""
    model, state = tiny(), tiny_state(TX)
    batch = {**batch_of(images), "valid": np.arange(16) < 13}
    mesh = make_mesh(jax.devices()[:4])
    judge = compile_step(partial(eval_step, model=model), mesh=mesh, mode=mode, donate=False)
    variables = jax.device_put(state.variables, replicated(mesh))
    got = evaluate(judge, variables, [shard_batch(batch, mesh, mode=mode)])

    logits = np.asarray(model.apply(state.variables, images[0].astype(np.float32) / 255, train=False))[:13]
    labels = images[1][:13]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert got["count"] == 13
    assert got["accuracy"] == pytest.approx((logits.argmax(-1) == labels).mean())
    assert got["top5_accuracy"] == 1.0
    assert got["loss"] == pytest.approx(-log_p[np.arange(13), labels].mean(), rel=1e-5)
    want = np.zeros((4, 4), int)
    np.add.at(want, (labels, logits.argmax(-1)), 1)
    np.testing.assert_array_equal(confusion_matrix(got["confusion"], 4), want)
    np.testing.assert_array_equal(got["per_class_accuracy"], np.diag(want) / want.sum(1))


def test_refusals(images):
    with pytest.raises(ValueError, match="batch of 13 is not divisible by 8 devices"):
        shard_batch({"image": images[0][:13]}, make_mesh())
    with pytest.raises(ValueError, match="unknown mode 'pjit'; choose one of jit, pmap, shard_map"):
        axis_of("pjit")
    with pytest.raises(ValueError, match="pmap takes no compiler options"):
        compile_step(train_step, mesh=make_mesh(), mode="pmap", compiler_options={"xla_cpu_enable_fast_math": True})
