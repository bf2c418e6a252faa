"""Mask schedules: literal steps and fractions, and one trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.mask_schedules import alternating, cubic_sparsity, gradual, rigl
from resnet_jax.masks import apply_masks, full_masks, make_masks, sparsity_of
from resnet_jax.scores import magnitude
from resnet_jax.tree import leaves, map_with_path

KEY = jax.random.key(0)


def by_magnitude(params, grads, masks, key, sparsity):
    return make_masks(magnitude(params), sparsity, masks=masks)


AT_ONCE = jax.jit(by_magnitude)


def weights(step):
    """50 + 150 weights in a nested list, different at every step."""
    rng = np.random.default_rng(step)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 10), (3, 5, 10)))
    return {"list": [{"kernel": a}, {"kernel": b}], "bias": np.ones(4, np.float32)}


FULL = full_masks(weights(0))


def half(path, mask):
    """Every second weight, in random order."""
    order = np.random.default_rng(mask.size).permutation(mask.size)
    return jnp.asarray(order % 2 == 0).reshape(mask.shape) if mask.ndim else mask


HALF = map_with_path(half, FULL)


def run(remask, steps, masks, first=0):
    """The masks after each of `steps`, as `train_step` would have them; asserts a single trace."""
    traces, history = [], []

    @jax.jit
    def step(number, params, grads, masks):
        traces.append(1)
        return remask(number, apply_masks(params, masks), grads, masks, jax.random.fold_in(KEY, number))

    for number in range(first, steps):
        masks = step(number, weights(number), weights(1000 + number), masks)
        history.append(jax.device_get(masks))
    assert len(traces) == 1
    return history


def flat(masks):
    return np.concatenate([m.ravel() for m in jax.tree.leaves(masks) if m.ndim])


def pruned(masks):
    return int((~flat(masks)).sum())


# --- gradual ----------------------------------------------------------------------------------------------------------


def test_cubic_sparsity():
    steps = np.arange(60)
    got = np.asarray(cubic_sparsity(jnp.asarray(steps), begin_step=10, end_step=50, final=0.9, initial=0.2))
    progress = np.clip((steps - 10) / 40, 0, 1)
    np.testing.assert_allclose(got, 0.9 + (0.2 - 0.9) * (1 - progress) ** 3, atol=1e-6)
    np.testing.assert_array_equal(got[:11], got[0])
    np.testing.assert_array_equal(got[50:], np.float32(0.9))
    assert (np.diff(got[10:51]) > 0).all() and (np.diff(got[10:51], 2) < 1e-6).all()  # fast at first
    assert float(cubic_sparsity(jnp.asarray(3), begin_step=3, end_step=3, final=0.5)) == 0  # of no steps
    assert float(cubic_sparsity(jnp.asarray(4), begin_step=3, end_step=3, final=0.5)) == 0.5


@pytest.mark.parametrize("initial", [0.0, 0.3])
def test_gradual_prunes_at_its_dates_alone(initial):
    """Steps 3, 7, 11 and, off the beat, 14; the weights change at every step, the masks only at these."""
    remask = gradual(by_magnitude, final=0.8, begin_step=3, end_step=14, every=4, initial=initial)
    sparsity = {date: 0.8 - (0.8 - initial) * ((14 - date) / 11) ** 3 for date in (3, 7, 11, 14)}
    history = run(remask, 25, FULL)
    before = FULL
    for step, masks in enumerate(history):
        if step in sparsity:
            assert pruned(masks) == round(200 * sparsity[step])
            want = AT_ONCE(weights(step), None, before, None, sparsity[step])
            np.testing.assert_array_equal(flat(masks), flat(want))
            assert not (flat(masks) & ~flat(before)).any()
        else:
            np.testing.assert_array_equal(flat(masks), flat(before))
        before = masks
    assert pruned(history[-1]) == 160
    assert float(sparsity_of(history[-1])) == pytest.approx(0.8, abs=1e-7)
    assert before["bias"].shape == ()
    # A run that resumes after step 9 ends in the same masks.
    np.testing.assert_array_equal(flat(run(remask, 20, history[9], first=10)[-1]), flat(history[-1]))


@pytest.mark.parametrize("end", [11, 3])
def test_gradual_ends_at_its_end(end):
    """At a multiple of its interval, and with a single date."""
    history = run(gradual(by_magnitude, final=0.5, begin_step=3, end_step=end, every=4), 16, FULL)
    assert pruned(history[2]) == 0
    assert {pruned(masks) for masks in history[end:]} == ({100} if end > 3 else {pruned(history[3])})


# --- alternating ------------------------------------------------------------------------------------------------------


def test_alternating_phases():
    """From 2 to 13 by threes: pruned, dense, pruned, dense, and at 13 pruned for good."""
    start = map_with_path(lambda path, m: m.at[..., 0].set(False) if m.ndim else m, FULL)
    history = run(alternating(by_magnitude, final=0.75, begin_step=2, end_step=13, every=3), 20, start)
    assert [pruned(masks) for masks in history] == [20] * 2 + [150] * 3 + [0] * 3 + [150] * 3 + [0] * 2 + [150] * 7
    for date, last in ((2, 5), (8, 11), (13, 20)):
        # By the current weights: at 2 those pruned at the start are zero, later all were free.
        params = apply_masks(weights(date), start) if date == 2 else weights(date)
        want = flat(AT_ONCE(params, None, FULL, None, 0.75))
        for masks in history[date:last]:
            np.testing.assert_array_equal(flat(masks), want)
    assert (flat(history[8]) & ~flat(history[2])).any()
    assert history[6]["bias"].shape == () and history[6]["bias"]


def test_alternating_ranks_pruned_weights_too():
    """Half is pruned at the start and a quarter is the target, so no more than that is pruned."""
    history = run(alternating(by_magnitude, final=0.25, begin_step=2, end_step=9, every=3), 12, HALF)
    assert [pruned(masks) for masks in history] == [100] * 2 + [50] * 3 + [0] * 3 + [50] * 4


@pytest.mark.parametrize("end", [8, 9, 11, 12])
def test_alternating_ends_pruned(end):
    """Wherever in a phase its end lies."""
    history = run(alternating(by_magnitude, final=0.5, begin_step=2, end_step=end, every=3), 18, FULL)
    assert {pruned(masks) for masks in history[end:]} == {100}
    assert all((flat(masks) == flat(history[end])).all() for masks in history[end:])
    assert pruned(history[end - 1]) == (100 if (end - 1 - 2) // 3 % 2 == 0 else 0)


# --- dropping and growing ---------------------------------------------------------------------------------------------


def test_rigl_literally():
    """At step 10 of 100 half / 2 * (1 + cos(pi / 10)) = 0.488 of a leaf's active weights: 2 of 5, 1 of 4 of which.

    The second leaf has room for one only, the third for none.
    """
    params = {
        "a": {"kernel": jnp.asarray([[5.0, -1.0, 3.0, -0.5], [2.0, 0.0, 0.0, 0.0]])},
        "b": {"kernel": jnp.asarray([[1.0, 1.0, -1.0, 1.0, 0.0]])},
        "c": {"kernel": jnp.ones((1, 3))},
        "bias": jnp.zeros(2),
    }
    masks = {
        "a": {"kernel": jnp.asarray([[1, 1, 1, 1], [1, 0, 0, 0]], bool)},
        "b": {"kernel": jnp.asarray([[1, 1, 1, 1, 0]], bool)},
        "c": {"kernel": jnp.ones((1, 3), bool)},
        "bias": jnp.ones((), bool),
    }
    # The largest gradients are of what is dropped, which does not return at once.
    grads = {
        "a": {"kernel": jnp.asarray([[9.0, 9.0, 9.0, 9.0], [9.0, 1.0, -3.0, 2.0]])},
        "b": {"kernel": jnp.asarray([[0.0, 9.0, 9.0, 9.0, 0.0]])},
        "c": {"kernel": jnp.ones((1, 3))},
        "bias": jnp.zeros(2),
    }
    step = jax.jit(rigl(end_step=100, every=10, fraction=0.5))
    got = leaves(step(10, params, grads, masks, KEY))
    np.testing.assert_array_equal(got["a/kernel"].astype(int), [[1, 0, 1, 0], [1, 0, 1, 1]])
    # Of equally small ones the later goes, and nothing but a gradient of zero is there to grow.
    np.testing.assert_array_equal(got["b/kernel"].astype(int), [[1, 1, 1, 0, 1]])
    np.testing.assert_array_equal(got["c/kernel"], True)
    assert got["bias"].shape == ()
    # Ties of growth: the earlier.
    tied = {**grads, "a": {"kernel": jnp.ones((2, 4))}}
    np.testing.assert_array_equal(
        step(10, params, tied, masks, KEY)["a"]["kernel"].astype(int), [[1, 0, 1, 0], [1, 1, 1, 0]]
    )
    for number in (0, 5, 9, 11, 100, 110):
        jax.tree.map(np.testing.assert_array_equal, step(number, params, grads, masks, KEY), masks)


@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_replaced_fraction_decays_by_a_cosine_and_counts_stay(grow):
    history = run(rigl(end_step=42, every=5, fraction=0.4, grow=grow), 60, HALF)
    before = HALF
    for step, masks in enumerate(history):
        share = 0.2 * (1 + np.cos(np.pi * step / 42)) if step % 5 == 0 and 0 < step < 42 else 0
        for path, mask in leaves(masks).items():
            if mask.ndim:
                old = np.asarray(leaves(before)[path])
                active = mask.size // 2
                assert mask.sum() == active
                assert (old & ~mask).sum() == (mask & ~old).sum() == int(share * active), (step, path)
                size = np.abs(leaves(weights(step))[path])
                if share:
                    assert size[old & ~mask].max(initial=0) < size[old & mask].min()
                if share and grow == "gradient":
                    growth = np.abs(leaves(weights(1000 + step))[path])
                    assert growth[mask & ~old].min(initial=9) > growth[~mask & ~old].max()
        before = masks
    assert pruned(history[4]) == pruned(history[-1]) == 100


def test_random_growth_depends_on_the_key_alone():
    """Not on the gradients; a different key drops the same weights and grows different ones that were pruned."""
    step = jax.jit(rigl(end_step=100, every=10, grow="random"))
    params = apply_masks(weights(0), HALF)
    first, again = (step(10, params, weights(i), HALF, KEY) for i in (1, 2))
    other = step(10, params, weights(1), HALF, jax.random.key(1))
    np.testing.assert_array_equal(flat(first), flat(again))
    old, first, other = flat(HALF), flat(first), flat(other)
    assert (first != other).any()
    np.testing.assert_array_equal(old & ~first, old & ~other)
    assert (first & ~old).sum() == (other & ~old).sum() > 20


def test_what_rigl_refuses():
    with pytest.raises(ValueError, match=r"\Aunknown growth 'gradients'; choose gradient or random\Z"):
        rigl(end_step=10, every=1, grow="gradients")
    with pytest.raises(ValueError, match=r"no prunable leaf has a mask; .* named `kernel`; leaves: 1: w"):
        rigl(end_step=10, every=1)(0, {"w": jnp.ones(3)}, {"w": jnp.ones(3)}, {"w": jnp.ones(3, bool)}, KEY)
