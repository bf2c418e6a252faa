"""Pruning inside the step: the same masks on one device and on eight, and pruned weights that stay zero."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_jax.channels import channel_groups, channel_masks, channel_scores, kept_channels
from resnet_jax.layers import CifarStem
from resnet_jax.losses import softmax_cross_entropy
from resnet_jax.mask_schedules import alternating, gradual, rigl
from resnet_jax.masks import apply_masks, full_masks, make_masks
from resnet_jax.mix import mix
from resnet_jax.parallel import axis_of, compile_step, make_mesh, replicated, shard_batch
from resnet_jax.resnet import BasicBlock, ResNet
from resnet_jax.scores import magnitude
from resnet_jax.tree import leaves, map_with_path
from tests.reference.nets import CLASSES, batch_of
from train.optim import make_optimizer
from train.state import TrainState, init_state, init_variables
from train.steps import classify, train_step

MODES = ("jit", "pmap", "shard_map")
STEPS = 6
constant = optax.constant_schedule


def net(**options):
    """A stem, a block and a head for 8x8 images: 1.5 thousand weights."""
    return ResNet((1,), BasicBlock, num_classes=CLASSES, width=8, stem=CifarStem, **options)


VARIABLES = jax.device_get(init_variables(net(), jax.random.key(0), (8, 8, 3)))
GROUPS = channel_groups(net(), VARIABLES["params"])


def by_magnitude(params, grads, masks, key, sparsity):
    return make_masks(magnitude(params), sparsity, masks=masks)


def by_channel(params, grads, masks, key, sparsity):
    scores = channel_scores(magnitude(params), GROUPS)
    return channel_masks(scores, sparsity, groups=GROUPS, params=params, round_to=1, masks=masks)


def some(params, share=0.3):
    """Masks that a start pruned by chance."""
    rng = np.random.default_rng(5)
    return map_with_path(lambda path, m: jnp.asarray(rng.random(m.shape) > share) if m.ndim else m, full_masks(params))


@jax.jit
def every_channel(params):
    scores = {group.name: jnp.ones(group.size) for group in GROUPS}
    return channel_masks(scores, 0.0, groups=GROUPS, params=params, round_to=1)


def state_of(tx, masks, *, ema=False):
    params = jax.tree.map(jnp.asarray, VARIABLES["params"])
    variables = {
        "params": apply_masks(params, masks),
        "batch_stats": jax.tree.map(jnp.asarray, VARIABLES["batch_stats"]),
    }
    return init_state(variables, tx, jax.random.key(3), masks=jax.tree.map(jnp.copy, masks), ema=ema)


def arrays(tree):
    """Leaves by path in NumPy, as copies: a later step consumes the buffers."""
    return {path: np.array(x) for path, x in leaves(tree).items()}


def history(tx, masks, batch, *, steps=STEPS, mode="jit", devices=1, **options):
    """(states by step, the first one too, as NumPy; metrics of each step; number of traces)."""
    mesh, traces = make_mesh(jax.devices()[:devices]), []

    def counted(state, batch, **kwargs):
        traces.append(mode)
        return train_step(state, batch, model=net(axis_name=axis_of(mode)), tx=tx, **options, **kwargs)

    step = compile_step(counted, mesh=mesh, mode=mode)
    state = jax.device_put(state_of(tx, masks, ema="ema_decay" in options), replicated(mesh))
    states, metrics = [on_host(state)], []
    for _ in range(steps):
        state, figures = step(state, shard_batch(batch, mesh, mode=mode))
        states.append(on_host(state))
        metrics.append({name: float(value) for name, value in figures.items()})
    return states, metrics, len(traces)


def on_host(state: TrainState) -> TrainState:
    return jax.tree.map(np.array, state.replace(key=jax.random.key_data(state.key)))


def assert_masked(params, masks):
    """Zero, of positive sign, wherever a mask is False; and not zero elsewhere in what is pruned."""
    masks = arrays(masks)
    for path, x in arrays(params).items():
        want = np.where(masks[path], x, np.float32(0))
        np.testing.assert_array_equal(x.view(np.uint32), want.view(np.uint32), err_msg=path)


def pruned(masks):
    return sum(int((~m).sum()) for m in arrays(masks).values())


@pytest.fixture(scope="module")
def batch(images):
    return batch_of(images)


# --- one step, three compilers ----------------------------------------------------------------------------------------

REMASKS = {
    "gradual": (gradual(by_magnitude, final=0.8, begin_step=1, end_step=5, every=2), full_masks),
    "alternating": (alternating(by_magnitude, final=0.6, begin_step=1, end_step=5, every=2), full_masks),
    "rigl": (rigl(end_step=6, every=2), some),
    "channels": (gradual(by_channel, final=0.5, begin_step=1, end_step=5, every=2), every_channel),
}
NESTEROV = make_optimizer("sgd", constant(0.05), nesterov=True, weight_decay=1e-3)


@pytest.fixture(scope="module")
def single(batch):
    """The run on one device, by schedule."""
    done = {}

    def get(name):
        if name not in done:
            remask, start = REMASKS[name]
            done[name] = history(NESTEROV, start(VARIABLES["params"]), batch, remask=remask, ema_decay=0.9)
        return done[name]

    return get


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode"), [(n, mode) for n in REMASKS for mode in MODES if n == "rigl" or mode == "shard_map"]
)
def test_eight_devices_prune_as_one(name, mode, batch, single):
    """After every step the same masks, to the bit, and the same weights."""
    remask, start = REMASKS[name]
    wanted, wanted_metrics, _ = single(name)
    masks = start(VARIABLES["params"])
    states, metrics, traces = history(NESTEROV, masks, batch, mode=mode, devices=8, remask=remask, ema_decay=0.9)
    assert traces == 1
    for got, want in zip(states, wanted, strict=True):
        jax.tree.map(np.testing.assert_array_equal, got.masks, want.masks)
        for part in ("params", "batch_stats", "ema"):
            close = partial(np.testing.assert_allclose, atol=1e-6, rtol=0)
            jax.tree.map(close, getattr(got, part), getattr(want, part))
        assert_masked(got.params, got.masks)
        assert_masked(got.ema["params"], got.masks)
    for got, want in zip(metrics, wanted_metrics, strict=True):
        assert got == {name: pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in want.items()}


def test_what_the_schedules_do_in_the_step(single):
    """Masks change after the steps that a schedule names, by as much."""
    size = sum(m.size for m in arrays(full_masks(VARIABLES["params"])).values() if m.ndim)
    share = {name: [m["sparsity"] for m in single(name)[1]] for name in REMASKS}
    cubic = [0.8 * (1 - (1 - progress) ** 3) for progress in (0, 0, 0.5, 0.5, 1, 1)]
    assert share["gradual"] == pytest.approx([round(s * size) / size for s in cubic], abs=1e-6)
    assert share["alternating"] == pytest.approx([0.6, 0.6, 0, 0, 0.6, 0.6], abs=1 / size)
    assert share["rigl"] == [pytest.approx(pruned(some(VARIABLES["params"])) / size)] * 6
    masks = [np.concatenate([m.ravel() for m in arrays(state.masks).values()]) for state in single("rigl")[0]]
    assert [(a != b).any() for a, b in pairwise(masks)] == [False, True, False, True, False, False]
    kept = [{k: int(v.sum()) for k, v in kept_channels(s.masks, GROUPS).items()} for s in single("channels")[0]]
    assert [set(k.values()) for k in kept] == [{8}] * 3 + [{int(8 * (1 - 0.5 * (1 - 0.5**3)) + 0.5)}] * 2 + [{4}] * 2


# --- nothing moves what is pruned -------------------------------------------------------------------------------------

TRAININGS = {
    "sgd": (make_optimizer("sgd", constant(0.1), nesterov=True, weight_decay=0.1, clip_norm=1.0), {"ema_decay": 0.9}),
    "adamw": (make_optimizer("adamw", constant(0.01), weight_decay=0.1), {}),
    "lars": (make_optimizer("lars", constant(1.0), weight_decay=1e-3, trust_coefficient=0.1), {}),
    "mix and accumulation": (
        make_optimizer("sgd", constant(0.1)),
        {"objective": classify(mix=partial(mix, mixup_alpha=0.4, cutmix_alpha=1.0), classes=CLASSES), "accumulate": 2},
    ),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_pruned_weights_are_zero_after_every_step(name, batch):
    """Pruned at the start, or after steps that gave them momentum; masks never grow, and the metric counts them."""
    tx, options = TRAININGS[name]
    remask = gradual(by_magnitude, final=0.8, initial=0.4, begin_step=2, end_step=4, every=1)
    states, metrics, traces = history(tx, some(VARIABLES["params"]), batch, remask=remask, **options)
    assert traces == 1
    for state in states:
        assert_masked(state.params, state.masks)
        if state.ema is not None:
            assert_masked(state.ema["params"], state.masks)
    size = sum(m.size for m in arrays(states[0].masks).values() if m.ndim)
    for (before, after), figures in zip(pairwise(states), metrics, strict=True):
        assert all(
            (old | ~new).all() for old, new in zip(*map(jax.tree.leaves, (before.masks, after.masks)), strict=True)
        )
        assert figures["sparsity"] == pytest.approx(pruned(after.masks) / size, abs=1e-6)
        # All others moved: the step does train.
        for path, mask in arrays(after.masks).items():
            if mask.ndim:
                moved = arrays(before.params)[path] != arrays(after.params)[path]
                assert moved[mask].mean() > 0.9, path
    counts = [pruned(state.masks) for state in states]
    assert counts[0] == counts[1] < counts[2] < counts[3] < counts[4] == counts[5] == counts[6] == round(0.8 * size)
    if "ema_decay" in options:
        assert all(state.ema is not None for state in states)


def test_what_grows_starts_at_zero(batch):
    """Also where the optimizer still has momentum of a weight that was dropped before."""
    tx, masks = make_optimizer("sgd", constant(0.1)), some(VARIABLES["params"], 0.5)
    remask = rigl(end_step=1000, every=1, fraction=0.5, grow="random")
    states, _, _ = history(tx, masks, batch, remask=remask)
    returned = 0
    alive = {path: np.zeros(m.shape, bool) for path, m in arrays(masks).items()}
    for before, after in pairwise(states):
        for path, new in arrays(after.masks).items():
            old = arrays(before.masks)[path]
            grown = new & ~old
            assert not arrays(after.params)[path][grown].any()
            returned += (grown & alive[path]).sum()
            alive[path] |= old
        assert_masked(after.params, after.masks)
    assert returned > 100


# --- what reaches the optimizer ---------------------------------------------------------------------------------------


def gradient(state, batch):
    """Of the mean loss with respect to all weights, in NumPy by path."""
    x = jnp.asarray(batch["image"], jnp.float32) / 255

    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, _ = net().apply(variables, x, train=True, mutable=["batch_stats"])
        return softmax_cross_entropy(logits, jax.nn.one_hot(batch["label"], CLASSES)).mean()

    return arrays(jax.jit(jax.grad(loss))(state.params))


def norm(tree):
    return np.sqrt(sum(np.square(x.astype(np.float64)).sum() for x in tree.values()))


@pytest.fixture(scope="module")
def half_pruned(batch):
    """Masks, parameters and the gradient of all weights of a network of which half is pruned."""
    masks = some(VARIABLES["params"], 0.5)
    state = state_of(NESTEROV, masks)
    return masks, arrays(state.params), gradient(state, batch)


def test_clipping_ignores_what_is_pruned(batch, half_pruned):
    """One step of plain SGD by hand: the norm is that of the gradients of the weights that are left."""
    masks, params, grads = half_pruned
    kept = {path: np.where(mask, grads[path], 0) for path, mask in arrays(masks).items()}
    assert norm(grads) > 1.1 * norm(kept)
    tx = optax.chain(optax.clip_by_global_norm(norm(kept) / 4), optax.sgd(0.5))
    states, (metrics,), _ = history(tx, masks, batch, steps=1)
    assert metrics.keys() == {"loss", "accuracy", "grad_norm"}  # and no sparsity, which does not change
    assert metrics["grad_norm"] == pytest.approx(norm(kept), rel=1e-4)
    for path, got in arrays(states[1].params).items():
        np.testing.assert_allclose(got, params[path] - 0.5 / 4 * kept[path], atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_no_moment_of_what_was_pruned_from_the_start(name, batch, half_pruned):
    """Exactly zero in the optimizer's state, whose gradient is not."""
    masks, _, grads = half_pruned
    tx = make_optimizer(name, constant(0.01), nesterov=True, weight_decay=0.1)
    states, _, _ = history(tx, masks, batch, steps=2)
    moments = [optax.tree.get(states[-1].opt_state, key) for key in {"sgd": ["trace"], "adamw": ["mu", "nu"]}[name]]
    for moment in moments:
        for path, x in arrays(moment).items():
            mask = arrays(masks)[path]
            if mask.ndim:
                assert not x[~mask].any() and (x[mask] != 0).mean() > 0.8, path
                assert (grads[path][~mask] != 0).mean() > 0.8, path  # some channels are off for all images


def test_growth_sees_the_gradients_of_what_is_pruned(batch, half_pruned):
    """By hand: of the pruned weights those of the largest gradients, which the optimizer did not see."""
    masks, params, grads = half_pruned
    tx, remask = optax.sgd(1e-3), rigl(end_step=100, every=1, fraction=0.2)
    states, _, _ = history(tx, masks, batch, steps=1, remask=remask)
    share = 0.1 * (1 + np.cos(np.pi / 100))
    for path, new in arrays(states[1].masks).items():
        old = arrays(masks)[path]
        if not old.ndim:
            continue
        count = int(share * old.sum())
        grown = np.argsort(-np.where(old, 0, np.abs(grads[path])).ravel())[:count]
        assert set(np.flatnonzero(new & ~old)) == set(grown), path
        stepped = np.where(old, params[path] - 1e-3 * grads[path], np.inf)
        assert set(np.flatnonzero(old & ~new)) == set(np.argsort(np.abs(stepped).ravel())[:count]), path
