"""Schedules of masks: dates and shares literally, one trace, and a Transformer pruned by the same functions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_jax.mask_schedules import alternating, cubic_sparsity, gradual, rigl
from resnet_jax.masks import apply_masks, full_masks, kernels_except, make_masks, sparsity_of
from resnet_jax.scores import magnitude
from resnet_jax.tree import leaves, map_with_path
from tests.reference.nets import quick_jit

KEY = jax.random.key(0)


def by_magnitude(params, grads, masks, key, sparsity):
    return make_masks(magnitude(params), sparsity, masks=masks)


AT_ONCE = quick_jit(by_magnitude)


def weights(step):
    """50 + 150 weights in a nested list, others at every step."""
    rng = np.random.default_rng(step)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 10), (3, 5, 10)))
    return {"list": [{"kernel": a}, {"kernel": b}], "bias": np.ones(4, np.float32)}


def followed(remask, steps, masks):
    """The masks after each of `steps`, as `train_step` would have them, and how often it was traced."""
    traces, history = [], []

    @quick_jit
    def step(number, params, grads, masks):
        traces.append(1)
        return remask(number, apply_masks(params, masks), grads, masks, jax.random.fold_in(KEY, number))

    for number in range(steps):
        masks = step(number, weights(number), weights(1000 + number), masks)
        history.append(jax.device_get(masks))
    return history, len(traces)


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


@pytest.mark.parametrize(
    ("initial", "dates"),
    [
        (0.0, {3: 0.0, 7: 0.8 * (1 - (7 / 11) ** 3), 11: 0.8 * (1 - (3 / 11) ** 3), 14: 0.8}),
        (0.3, {3: 0.3, 7: 0.8 - 0.5 * (7 / 11) ** 3, 11: 0.8 - 0.5 * (3 / 11) ** 3, 14: 0.8}),
    ],
)
def test_gradual_prunes_at_its_dates_alone(initial, dates):
    """Steps 3, 7, 11 and, off the beat, 14; the weights change at every step, the masks at these."""
    start = full_masks(weights(0))
    history, traces = followed(
        gradual(by_magnitude, final=0.8, begin_step=3, end_step=14, every=4, initial=initial), 25, start
    )
    assert traces == 1
    before = start
    for step, masks in enumerate(history):
        if step in dates:
            assert pruned(masks) == round(200 * dates[step])
            want = AT_ONCE(weights(step), None, before, None, dates[step])
            np.testing.assert_array_equal(flat(masks), flat(want))
            assert not (flat(masks) & ~flat(before)).any()
        else:
            np.testing.assert_array_equal(flat(masks), flat(before))
        before = masks
    assert pruned(history[-1]) == 160
    assert float(sparsity_of(history[-1])) == pytest.approx(0.8, abs=1e-7)
    assert before["bias"].shape == ()


@pytest.mark.parametrize(("end", "last"), [(11, 11), (12, 12), (3, 3), (4, 4)])
def test_gradual_ends_at_its_end(end, last):
    """On the beat, off it, and where there is but one date."""
    history, _ = followed(
        gradual(by_magnitude, final=0.5, begin_step=3, end_step=end, every=4), 16, full_masks(weights(0))
    )
    assert pruned(history[2]) == 0
    if end > 3:
        assert pruned(history[last]) == 100
        assert (0 if last == 4 else 1) <= pruned(history[last - 1]) <= (100 if last == 12 else 99)
    for masks in history[last + 1 :]:
        np.testing.assert_array_equal(flat(masks), flat(history[last]))


def test_a_schedule_is_the_same_wherever_it_resumes():
    remask = gradual(by_magnitude, final=0.8, begin_step=3, end_step=14, every=4)
    history, _ = followed(remask, 20, full_masks(weights(0)))
    step = quick_jit(remask)
    masks = history[9]
    for number in range(10, 20):
        masks = step(number, apply_masks(weights(number), masks), weights(1000 + number), masks, KEY)
    np.testing.assert_array_equal(flat(masks), flat(history[-1]))


# --- alternating ------------------------------------------------------------------------------------------------------


def test_alternating_phases():
    """From 2 to 13 by threes: pruned, dense, pruned, dense, and at 13 pruned for good."""
    start = map_with_path(lambda path, m: m.at[..., 0].set(False) if m.ndim else m, full_masks(weights(0)))
    history, traces = followed(alternating(by_magnitude, final=0.75, begin_step=2, end_step=13, every=3), 20, start)
    assert traces == 1
    assert [pruned(masks) for masks in history] == [20] * 2 + [150] * 3 + [0] * 3 + [150] * 3 + [0] * 2 + [150] * 7
    everything = full_masks(weights(0))
    for date, stays in ((2, 5), (8, 11), (13, 20)):
        # By the weights that are there: at 2 what the start had pruned is zero, later everything was free.
        params = apply_masks(weights(date), start) if date == 2 else weights(date)
        want = flat(AT_ONCE(params, None, everything, None, 0.75))
        for masks in history[date:stays]:
            np.testing.assert_array_equal(flat(masks), want)
    assert (flat(history[8]) & ~flat(history[2])).any()
    assert history[6]["bias"].shape == () and history[6]["bias"]


def test_alternating_prunes_all_weights_alike():
    """Half is pruned from the start, and a quarter is to be: what is pruned is no more than that."""
    history, _ = followed(alternating(by_magnitude, final=0.25, begin_step=2, end_step=9, every=3), 12, half())
    assert [pruned(masks) for masks in history] == [100] * 2 + [50] * 3 + [0] * 3 + [50] * 4


@pytest.mark.parametrize("end", [8, 9, 11, 12, 14])
def test_alternating_ends_pruned(end):
    """Wherever in a phase its end lies."""
    history, _ = followed(
        alternating(by_magnitude, final=0.5, begin_step=2, end_step=end, every=3), 18, full_masks(weights(0))
    )
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
    step = quick_jit(rigl(end_step=100, every=10, fraction=0.5))
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


def half(step=0):
    """Masks that hold every second weight."""
    rng = np.random.default_rng(7 + step)
    return map_with_path(
        lambda path, m: jnp.asarray(rng.permutation(m.size) % 2 == 0).reshape(m.shape) if m.ndim else m,
        full_masks(weights(0)),
    )


@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_replaced_share_falls_by_a_cosine_and_counts_stay(grow):
    start = half()
    history, traces = followed(rigl(end_step=42, every=5, fraction=0.4, grow=grow), 60, start)
    assert traces == 1
    before = start
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
                    wanted = np.abs(leaves(weights(1000 + step))[path])
                    assert wanted[mask & ~old].min(initial=9) > wanted[~mask & ~old].max()
        before = masks
    assert pruned(history[4]) == pruned(history[-1]) == 100


def test_random_growth_is_its_keys_own():
    """The same by the same key, whatever the gradients are; another by another key; only of what was pruned."""
    start, step = half(), quick_jit(rigl(end_step=100, every=10, grow="random"))
    params = apply_masks(weights(0), start)
    first, again = (step(10, params, weights(i), start, KEY) for i in (1, 2))
    other = step(10, params, weights(1), start, jax.random.key(1))
    np.testing.assert_array_equal(flat(first), flat(again))
    assert (flat(first) != flat(other)).any()
    # Both drop the same, and what they grow are draws.
    old, first, other = flat(start), flat(first), flat(other)
    np.testing.assert_array_equal(old & ~first, old & ~other)
    assert (first & ~old).sum() == (other & ~old).sum() > 20


def test_unknown_growth():
    with pytest.raises(ValueError, match=r"\Aunknown growth 'gradients'; choose gradient or random\Z"):
        rigl(end_step=10, every=1, grow="gradients")


# --- any model: a Transformer -----------------------------------------------------------------------------------------

TOKENS, LENGTH, WORDS, WIDTH = 8, 8, 4, 32


class Transformer(nn.Module):
    """Self-attention and an MLP over embedded tokens [B, T], the mean over T classified."""

    @nn.compact
    def __call__(self, tokens):
        places = self.param("places", nn.initializers.normal(0.5), (LENGTH, WIDTH))
        x = nn.Embed(TOKENS, WIDTH, name="embed")(tokens) + places[None]
        y = nn.LayerNorm(name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(y)
        y = nn.LayerNorm(name="norm2")(x)
        x = x + nn.Dense(WIDTH, name="down")(nn.gelu(nn.Dense(2 * WIDTH, name="up")(y)))
        return nn.Dense(WORDS, name="head")(x.mean(1))


def sentences(seed, size):
    """Random tokens [size, LENGTH], one of which is a marker 0 before a word 1..4, the label: others mislead."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, TOKENS, (size, LENGTH))
    labels, places = rng.integers(0, WORDS, size), rng.integers(0, LENGTH - 1, size)
    tokens[np.arange(size), places] = 0
    tokens[np.arange(size), places + 1] = 1 + labels
    return tokens, labels


def test_a_transformer_is_pruned_by_the_same_functions():
    """80 % of all kernels but the head's, gradually, in a step that knows nothing of ResNets."""
    model, tx, prunable = Transformer(), optax.adam(5e-3), kernels_except(["^head/"])

    def make(params, grads, masks, key, sparsity):
        return make_masks(magnitude(params), sparsity, prunable=prunable, masks=masks)

    remask = gradual(make, final=0.8, begin_step=60, end_step=180, every=20)
    traces = []

    def loss(params, tokens, labels):
        logits = model.apply({"params": params}, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(number, params, opt_state, masks, tokens, labels):
        traces.append(1)
        grads = jax.grad(loss)(params, tokens, labels)
        updates, opt_state = tx.update(apply_masks(grads, masks), opt_state, params)
        params = apply_masks(optax.apply_updates(params, updates), masks)
        masks = remask(number + 1, params, grads, masks, KEY)
        return apply_masks(params, masks), opt_state, masks

    params = quick_jit(model.init)(KEY, np.zeros((1, LENGTH), int))["params"]
    masks, opt_state = full_masks(params, prunable), tx.init(params)
    for number in range(240):
        params, opt_state, masks = step(number, params, opt_state, masks, *sentences(number, 64))
    assert len(traces) == 1

    chosen = {path: np.asarray(m) for path, m in leaves(masks).items() if m.ndim}
    parts = ["down", "up", *(f"attention/{name}" for name in ("key", "out", "query", "value"))]
    assert chosen.keys() == {f"{name}/kernel" for name in parts}
    assert chosen["attention/query/kernel"].shape == (WIDTH, 4, WIDTH // 4)
    size = sum(m.size for m in chosen.values())
    assert sum((~m).sum() for m in chosen.values()) == round(0.8 * size)
    for path, mask in chosen.items():
        np.testing.assert_array_equal(np.asarray(leaves(params)[path]) != 0, mask)
    assert (np.asarray(params["head"]["kernel"]) != 0).all() and (np.asarray(params["embed"]["embedding"]) != 0).all()

    tokens, labels = sentences(10_000, 512)
    accuracy = (quick_jit(model.apply)({"params": params}, tokens).argmax(-1) == labels).mean()
    assert accuracy > 0.9, accuracy
