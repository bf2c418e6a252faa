"""Schedules at their corners, optimizers against their definitions, decay and freezing by predicate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_jax.tree import is_head
from train.errors import UsageError
from train.optim import OPTIMIZERS, SCHEDULES, make_optimizer, make_schedule

PARAMS = {
    "stem": {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.full((2,), 2.0)},
    "norm": {"scale": jnp.full((2,), 2.0)},
    "head": {"kernel": jnp.full((2, 3), 2.0)},
}
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)
ONES = jax.tree.map(jnp.ones_like, PARAMS)


@pytest.mark.parametrize("name", [*SCHEDULES, "one_cycle"])
@pytest.mark.parametrize("warmup", [0, 10])
def test_schedule_family(name, warmup):
    """Peak where warm-up ends, never above it, never negative, and a float under jit."""
    schedule = make_schedule(name, peak=0.4, steps=100, warmup=warmup)
    values = np.asarray(jax.vmap(schedule)(jnp.arange(100)))
    top = 30 if name == "one_cycle" and not warmup else warmup
    assert values[top] == pytest.approx(0.4, rel=1e-5)
    assert values.max() <= 0.4 + 1e-6
    assert values.min() > 0
    if warmup:
        assert (np.diff(values[: warmup + 1]) > 0).all()
    assert float(jax.jit(schedule)(7)) == pytest.approx(float(values[7]), rel=1e-6)


def test_schedules_at_single_steps():
    """Their ends, the milestones of step decay, and warm-up from the first step."""

    def rates(steps, name, **options):
        schedule = make_schedule(name, peak=1.0, steps=100, **options)
        return pytest.approx([float(schedule(step)) for step in steps], abs=1e-6)

    for name, last in {"cosine": 0.0, "linear": 0.0, "constant": 1.0, "step": 0.01}.items():
        assert rates([100], name) == [last]
    assert rates([0, 29, 30, 59, 60], "step", milestones=(0.3, 0.6), factor=0.2) == [1, 1, 0.2, 0.2, 0.04]
    assert rates(range(5), "cosine", warmup=4) == [0.2, 0.4, 0.6, 0.8, 1.0]
    # Milestones are fractions of all steps, with a warm-up too, and those on one step of a short run all count.
    assert rates([49, 50, 74, 75], "step", warmup=50) == [50 / 51, 0.1, 0.1, 0.01]
    assert rates([59, 60, 90], "step", warmup=10, milestones=(0.6,)) == [1, 0.1, 0.1]
    assert rates([50, 51], "step", milestones=(0.5, 0.501)) == [0.01, 0.01]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 100])
def test_one_cycle_of_few_steps(steps):
    rates = [float(make_schedule("one_cycle", peak=1.0, steps=steps)(step)) for step in range(steps)]
    assert np.isfinite(rates).all() and min(rates) > 0 and max(rates) <= 1 + 1e-6
    assert steps == 1 or max(rates) == pytest.approx(1)
    for warmup in range(1, steps):  # the peak is at the end of the warm-up, whatever their quotient rounds to
        assert float(make_schedule("one_cycle", peak=1.0, steps=steps, warmup=warmup)(warmup)) == pytest.approx(1)


@pytest.mark.parametrize("name", [*OPTIMIZERS, "optax.adan", "optax.lars", "optax.novograd", "optax.contrib.muon"])
def test_optimizer_family(name):
    """Each by name: descends a quadratic under jit, and decays kernels alone."""
    tx = make_optimizer(name, optax.constant_schedule(0.02), weight_decay=0.0)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(params, state, params)  # the gradient of |params|^2 / 2
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, jax.jit(tx.init)(PARAMS)
    for _ in range(20):
        params, state = step(params, state)
    assert optax.tree.norm(params) < optax.tree.norm(PARAMS)

    decayed = make_optimizer(name, optax.constant_schedule(0.1), weight_decay=0.1)
    updates = jax.jit(lambda params: decayed.update(ZEROS, decayed.init(params), params)[0])(PARAMS)
    assert (updates["stem"]["kernel"] < 0).all() and (updates["head"]["kernel"] < 0).all()
    assert (updates["stem"]["bias"] == 0).all() and (updates["norm"]["scale"] == 0).all()


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_torch_sgd(nesterov):
    """Three steps against the recurrence in torch.optim.SGD's documentation."""
    tx = make_optimizer("sgd", lambda step: 0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.5)
    params, state = PARAMS, tx.init(PARAMS)
    p, velocity = 2.0, 0.0
    for _ in range(3):
        updates, state = tx.update(ONES, state, params)
        params = optax.apply_updates(params, updates)
        g = 1.0 + 0.5 * p
        velocity = 0.9 * velocity + g
        p -= 0.1 * (g + 0.9 * velocity if nesterov else velocity)
    np.testing.assert_allclose(params["stem"]["kernel"], p, rtol=1e-5)


def test_lars_scales_by_the_trust_ratio():
    tx = make_optimizer("lars", lambda step: 1.0, momentum=0.0, weight_decay=0.0)
    updates, _ = tx.update(ONES, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["stem"]["kernel"], -0.001 * 2.0, rtol=1e-5)  # 0.001 * |p| / |g|
    np.testing.assert_allclose(updates["stem"]["bias"], -1.0, rtol=1e-6)


def test_clipping():
    tx = make_optimizer("sgd", lambda step: 1.0, momentum=0.0, clip_norm=0.5)
    updates, _ = tx.update(ONES, tx.init(PARAMS), PARAMS)
    assert float(optax.tree.norm(updates)) == pytest.approx(0.5, rel=1e-5)


def test_frozen_parameters_do_not_move_and_do_not_count_when_clipping():
    tx = make_optimizer("sgd", lambda step: 1.0, momentum=0.0, weight_decay=0.1, clip_norm=0.5, trainable=is_head)
    updates, _ = tx.update(ONES, tx.init(PARAMS), PARAMS)
    assert (updates["stem"]["kernel"] == 0).all() and (updates["norm"]["scale"] == 0).all()
    head = np.full((2, 3), 0.5 / np.sqrt(6)) + 0.2  # clipped over the head alone, then decay
    np.testing.assert_allclose(updates["head"]["kernel"], -head, rtol=1e-5)


@pytest.mark.parametrize("name", ["sdg", "optax.chain", "optax.nothing"])
def test_unknown_optimizer(name):
    with pytest.raises(UsageError, match=rf"unknown optimizer '{name}'.*sgd, adamw, lars, lamb, optax.NAME"):
        make_optimizer(name, lambda step: 0.1)


@pytest.mark.parametrize(
    ("name", "reason"),
    {
        "optax.lbfgs": "missing 3 required keyword-only arguments",
        "optax.rprop": "scheduled rate",
        "optax.noisy_sgd": "its state holds a random key",
        "optax.contrib.momo": "missing 1 required",
        "optax.contrib.dpsgd": "missing 3 required",
        "optax.contrib.schedule_free_adamw": "it trains different parameters from those to evaluate",
    }.items(),
)
@pytest.mark.filterwarnings("ignore:Specifying a key")
def test_optimizers_that_do_not_fit_a_train_step(name, reason):
    with pytest.raises(UsageError, match=rf"^{name} does not fit a train step, .*{reason}") as refusal:
        make_optimizer(name, lambda step: 0.1)
    assert len(str(refusal.value).splitlines()) == 1


def test_optimizer_that_decays_everything_decays_kernels_alone():
    """Its own weight decay takes no mask, so it gets L2."""
    tx = make_optimizer("optax.contrib.madgrad", lambda step: 0.1, weight_decay=0.5)
    updates, _ = tx.update(ZEROS, tx.init(PARAMS), PARAMS)
    assert float(abs(updates["head"]["kernel"]).max()) > 0
    assert float(abs(updates["norm"]["scale"]).max()) == 0
