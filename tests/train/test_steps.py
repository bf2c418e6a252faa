"""The supervised step: golden metrics, overfitting, and the effect of each option."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_jax.augment import normalize
from resnet_jax.losses import LOSSES, smooth_labels
from resnet_jax.masks import apply_masks
from resnet_jax.tree import is_head, is_kernel, leaves, map_with_path
from tests.reference.compare import assert_close
from tests.reference.nets import CLASSES, batch_of, tiny, tiny_state, tiny_tx
from train.loop import evaluate
from train.optim import make_optimizer
from train.state import digest, init_state, init_variables
from train.steps import classify, eval_step, train_step

TX = tiny_tx()
STEP = jax.jit(partial(train_step, model=tiny(), tx=TX))
GOLDEN = {"loss": 1.400973, "accuracy": 0.25, "grad_norm": 0.659943, "params_norm": 13.246058}


def test_golden_metrics(images):
    """The metric dict of the second step, pinned: any change of the mathematics shows here."""
    state, _ = STEP(tiny_state(TX), batch_of(images))
    state, metrics = STEP(state, batch_of(images))
    assert {name: float(value) for name, value in metrics.items()} == {
        "loss": pytest.approx(GOLDEN["loss"], rel=1e-4),
        "accuracy": GOLDEN["accuracy"],
        "grad_norm": pytest.approx(GOLDEN["grad_norm"], rel=1e-3),
    }
    assert float(optax.tree.norm(state.params)) == pytest.approx(GOLDEN["params_norm"], rel=1e-5)


def test_step_is_sgd_on_the_mean_loss(images):
    """One step, written out again: gradient of the mean cross entropy, decay on kernels, momentum, learning rate."""
    model, state = tiny(), tiny_state(TX)
    x = jnp.asarray(images[0], jnp.float32) / 255

    @jax.jit
    @jax.grad
    def gradient(params):
        logits, _ = model.apply(
            {"params": params, "batch_stats": state.batch_stats}, x, train=True, mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, images[1]).mean()

    # First Nesterov step from zero velocity: (1 + momentum) * gradient; learning rate 0.1 / 3 on the way up.
    want = map_with_path(
        lambda path, p, g: p - 0.1 / 3 * 1.9 * (g + (1e-3 * p if is_kernel(path, p) else 0)),
        state.params,
        gradient(state.params),
    )
    got, _ = STEP(state, batch_of(images))
    assert_close(got.params, want, atol=1e-6, rtol=0)


def test_64_bits_change_no_dtype(images):
    """Learning rates are float64 then, and JAX would promote the parameters."""
    with jax.enable_x64(True):
        state = tiny_state(TX, ema=True)
        step = partial(train_step, model=tiny(), tx=TX, ema_decay=0.9)
        new, _ = jax.eval_shape(step, state, batch_of(images))
    dtypes = [{str(x.dtype) for x in jax.tree.leaves(s)} for s in (state, new)]
    assert dtypes[0] == dtypes[1] == {"float32", "int32", "bool", "key<fry>"}


def test_overfits_32_images():
    """32 noise images with random labels are learnt by heart."""
    rng = np.random.default_rng(1)
    batch = {
        "image": rng.integers(0, 256, (32, 8, 8, 3), dtype=np.uint8),
        "label": rng.integers(0, CLASSES, 32).astype(np.int32),
    }
    tx = tiny_tx(lr=0.1, steps=150)
    step = jax.jit(
        partial(train_step, model=tiny(), tx=tx, augment=normalize((0.5,) * 3, (0.25,) * 3)), donate_argnums=0
    )
    state = tiny_state(tx)
    for _ in range(150):
        state, metrics = step(state, batch)
    assert metrics["accuracy"] == 1.0
    assert metrics["loss"] < 0.05


def test_accumulation_is_the_mean_of_the_parts_gradients(images):
    """Two parts: the mean gradient of the even and the odd rows, statistics carried from one part to the next.

    The first step of momentum and weight decay is linear in the gradient.
    """
    state, one, two = tiny_state(TX), batch_of(images), batch_of((255 - images[0], images[1]))
    whole = {name: np.stack([one[name], two[name]], 1).reshape(32, *one[name].shape[1:]) for name in one}
    got, metrics = jax.jit(partial(train_step, model=tiny(), tx=TX, accumulate=2))(state, whole)
    (even, first), (odd, second) = STEP(state, one), STEP(state, two)
    assert_close(got.params, jax.tree.map(lambda a, b: (a + b) / 2, even.params, odd.params), atol=1e-6, rtol=0)
    assert float(metrics["loss"]) == pytest.approx((float(first["loss"]) + float(second["loss"])) / 2, rel=1e-5)
    carried = jax.tree.map(
        lambda s0, a, b: 0.9 * a + (b - 0.9 * s0), state.batch_stats, even.batch_stats, odd.batch_stats
    )
    # Only the first norm's inputs are independent of what the statistics are.
    assert_close(got.batch_stats["stem"], carried["stem"], atol=1e-6, rtol=0)


def test_accumulation_must_divide_the_batch(images):
    with pytest.raises(ValueError, match="batch of 16 is not divisible into 3 parts"):
        train_step(tiny_state(TX), batch_of(images), model=tiny(), tx=TX, accumulate=3)


def test_moving_average_and_masks(images):
    """The average follows parameters and statistics; pruned weights stay zero under momentum and decay, in both."""
    plain = tiny_state(TX)
    masks = map_with_path(lambda path, p: jnp.abs(p) > 0.05 if is_kernel(path, p) else np.True_, plain.params)
    before = {"params": apply_masks(plain.params, masks), "batch_stats": plain.batch_stats}
    state = init_state(before, TX, plain.key, masks=masks, ema=True)
    step = jax.jit(partial(train_step, model=tiny(), tx=TX, ema_decay=0.999))
    state, _ = step(state, batch_of(images))
    # At step 0 the decay is (1 + 0) / (10 + 0).
    after = {"params": state.params, "batch_stats": state.batch_stats}
    assert_close(state.ema, jax.tree.map(lambda a, b: 0.1 * a + 0.9 * b, before, after), atol=1e-6, rtol=0)
    assert state.variables is state.ema
    for _ in range(2):
        state, _ = step(state, batch_of(images))
        for tree in (state.params, state.ema["params"]):
            assert_close(tree, apply_masks(tree, masks), atol=0)
    kernel = np.asarray(state.params["stem"]["conv"]["kernel"])
    assert 0 < (kernel == 0).mean() < 1


def test_frozen_backbone_and_statistics(images):
    tx = make_optimizer("sgd", lambda step: 0.1, weight_decay=0.1, trainable=is_head)
    state = tiny_state(tx)
    step = jax.jit(partial(train_step, model=tiny(), tx=tx, objective=classify(frozen_stats=True)))
    new, _ = step(state, batch_of(images))
    old = leaves(state.params)
    for path, leaf in leaves(new.params).items():
        assert np.array_equal(leaf, old[path]) != path.startswith("head/"), path
    assert_close(new.batch_stats, state.batch_stats, atol=0)


def test_step_key_depends_on_the_step_alone(images):
    """The same step number draws the same augmentation, another number another."""

    def noisy(key, image):
        return image + jax.random.normal(key, image.shape)

    step = jax.jit(partial(train_step, model=tiny(), tx=TX, augment=noisy))
    state = tiny_state(TX)
    first, again = (step(state, batch_of(images))[1]["loss"] for _ in range(2))
    other = step(state.replace(step=jnp.ones((), jnp.int32)), batch_of(images))[1]["loss"]
    assert first == again != other


def test_bfloat16_computes_low_and_keeps_float32(images):
    step = jax.jit(partial(train_step, model=tiny(dtype=jnp.bfloat16), tx=TX))
    state, metrics = step(tiny_state(TX), batch_of(images))
    for leaf in jax.tree.leaves((state.params, state.batch_stats, metrics)):
        assert leaf.dtype == jnp.float32
    _, exact = STEP(tiny_state(TX), batch_of(images))
    assert float(metrics["loss"]) == pytest.approx(float(exact["loss"]), rel=0.05)
    assert metrics["loss"] != exact["loss"]
    low = partial(tiny(dtype=jnp.bfloat16).apply, method="maps")
    maps = jax.eval_shape(low, state.variables, jnp.zeros((1, 8, 8, 3)))
    assert maps["stage1"].dtype == jnp.bfloat16
    assert maps["logits"].dtype == maps["pooled"].dtype == jnp.float32


def test_calibration_and_top5_sums(images):
    """Sums against NumPy on logits made to be over-confident."""
    classes = 7

    class Fixed(nn.Module):
        def __call__(self, images):
            return self.get_variable("params", "logits")

    rng = np.random.default_rng(0)
    logits = rng.normal(size=(40, classes)).astype(np.float32) * 4
    labels = rng.integers(0, classes, 40).astype(np.int32)
    batch = {"image": np.zeros((40, 1, 1, 1), np.float32), "label": labels, "valid": np.ones(40, bool)}
    sums = jax.device_get(eval_step({"params": {"logits": jnp.asarray(logits)}}, batch, model=Fixed()))
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    confidence, correct = p.max(-1), p.argmax(-1) == labels
    for index in range(15):
        inside = (confidence >= index / 15) & (confidence < (index + 1) / 15)
        want = [inside.sum(), confidence[inside].sum(), correct[inside].sum()]
        np.testing.assert_allclose(sums["calibration"][:, index], want, rtol=1e-5)
    top5 = np.argsort(-logits, axis=-1)[:, :5]
    assert sums["top5"] == (top5 == labels[:, None]).any(-1).sum()


def test_evaluation_grows_with_the_batch_not_with_the_classes_squared(images):
    """5,000 classes: nothing has more numbers than the logits, neither while computing nor in what is returned."""
    classes, count = 5000, 16
    model = tiny(num_classes=classes)
    variables = init_variables(model, jax.random.key(0), images[0].shape[1:])
    batch = {**batch_of(images), "label": np.arange(count, dtype=np.int32) * 300, "valid": np.arange(count) < 13}
    step = jax.jit(partial(eval_step, model=model)).lower(variables, batch).compile()
    used = step.memory_analysis()
    assert used.temp_size_in_bytes + used.output_size_in_bytes < 20 * 4 * count * classes < 4 * classes**2 / 10
    found = evaluate(step, variables, [batch, batch])
    assert found["count"] == found["confusion"][:, 2].sum() == 26
    np.testing.assert_array_equal(np.unique(found["confusion"][:, 0]), batch["label"][:13])
    assert np.isfinite(found["per_class_accuracy"]).sum() == 13


def test_losses():
    """Against NumPy, and finite at extremes; smoothing keeps the mass."""
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(6, 5)) * 3, rng.dirichlet(np.ones(5), 6)
    p = 1 / (1 + np.exp(-logits))
    want = {
        "softmax": -(targets * (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))).sum(-1),
        "sigmoid": -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).sum(-1),
    }
    extreme, one = jnp.asarray([[1e4, -1e4, 0.0]]), jnp.asarray([[0.0, 1.0, 0.0]])
    for name, loss in LOSSES.items():
        np.testing.assert_allclose(loss(jnp.asarray(logits, jnp.float32), targets), want[name], rtol=1e-5)
        value, gradient = jax.value_and_grad(lambda x, loss=loss: loss(x, one).sum())(extreme)
        assert np.isfinite(value) and np.isfinite(gradient).all()
    smoothed = smooth_labels(jax.nn.one_hot(jnp.arange(3), 4), 0.1)
    np.testing.assert_allclose(smoothed, 0.9 * np.eye(3, 4) + 0.025, rtol=1e-6)


def test_digest_sees_every_part(images):
    state = tiny_state(TX)
    new, _ = STEP(state, batch_of(images))
    masks = map_with_path(lambda path, m: m & (path != "head/kernel"), state.masks)
    digests = {digest(s) for s in (state, new, state.replace(batch_stats=new.batch_stats), state.replace(masks=masks))}
    assert len(digests) == 4
    assert digest(state) == digest(tiny_state(TX))
