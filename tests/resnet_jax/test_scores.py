"""Pruning scores: literal values, formulas in float64, conservation."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from resnet_jax import scores
from resnet_jax.losses import softmax_cross_entropy
from resnet_jax.masks import make_masks
from resnet_jax.scores import SCORES, fisher, magnitude, norm_scale, random, snip, synflow, taylor
from resnet_jax.tree import leaves

BY_GRADIENTS = {"snip": snip, "taylor": taylor, "fisher": fisher}
RNG = np.random.default_rng(0)


# --- a linear classifier, and what its scores are in float64 ----------------------------------------------------------

PARAMS = {"kernel": RNG.normal(size=(3, 4)).astype(np.float32), "bias": RNG.normal(size=4).astype(np.float32)}
BATCHES = [
    {"image": RNG.normal(size=(6, 3)).astype(np.float32), "label": RNG.integers(0, 4, 6).astype(np.int32)}
    for _ in range(3)
]


def linear_loss(params, batch):
    logits = batch["image"] @ params["kernel"] + params["bias"][None]
    return softmax_cross_entropy(logits, jax.nn.one_hot(batch["label"], 4))


def expected(name):
    """`name`'s scores from the gradients [batches, examples, ...] of the cross entropy, float64."""
    images, labels = (np.stack([batch[key] for batch in BATCHES]) for key in ("image", "label"))
    odds = np.exp(images.astype(np.float64) @ PARAMS["kernel"] + PARAMS["bias"])
    error = odds / odds.sum(-1, keepdims=True) - np.eye(4)[labels]
    gradients = {"kernel": images[..., None] * error[..., None, :], "bias": error}
    formulas = {
        "snip": lambda g, w: np.abs(g.mean((0, 1)) * w),
        "taylor": lambda g, w: ((g.mean(1) * w) ** 2).mean(0),
        "fisher": lambda g, w: w**2 * (g**2).mean((0, 1)),
    }
    result = {leaf: formulas[name](gradients[leaf], w.astype(np.float64)) for leaf, w in PARAMS.items()}
    total = sum(score.sum() for score in result.values()) if name == "snip" else 1
    return {leaf: score / total for leaf, score in result.items()}


@pytest.mark.parametrize("name", BY_GRADIENTS)
def test_scores_by_gradients_equal_the_formulas(name):
    got = SCORES[name](PARAMS, loss=linear_loss, batches=iter(BATCHES))
    assert {leaf: s.dtype for leaf, s in got.items()} == dict.fromkeys(PARAMS, jnp.float32)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-8), got, expected(name))
    if name == "snip":
        assert sum(float(s.sum()) for s in got.values()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", BY_GRADIENTS)
def test_scores_inside_a_compiled_step(name):
    """Under `jit`, and as masks of each shard under `shard_map`."""

    def masks(params, batch):
        scores = SCORES[name](params, loss=linear_loss, batches=[batch])
        return make_masks(scores, 0.5)["kernel"]

    want = make_masks(SCORES[name](PARAMS, loss=linear_loss, batches=[BATCHES[0]]), 0.5)["kernel"]
    np.testing.assert_array_equal(jax.jit(masks)(PARAMS, BATCHES[0]), want)
    mesh, split = Mesh(np.array(jax.devices()[:2]), ("data",)), PartitionSpec("data")
    both = jax.tree.map(lambda a, b: np.concatenate([a, b]), *BATCHES[:2])
    sharded = jax.shard_map(masks, mesh=mesh, in_specs=(PartitionSpec(), split), out_specs=split)
    second = make_masks(SCORES[name](PARAMS, loss=linear_loss, batches=[BATCHES[1]]), 0.5)["kernel"]
    np.testing.assert_array_equal(jax.jit(sharded)(PARAMS, both), np.concatenate([want, second]))


@pytest.mark.parametrize(("at_once", "length"), [(1, 6), (2 * 16, 3), (5 * 16, 2), (6 * 16, 1), (1 << 20, 1)])
def test_fisher_holds_no_more_gradients_than_it_says(monkeypatch, at_once, length):
    """16 parameters, 6 examples: as many at a time as fit and divide them."""
    monkeypatch.setattr(scores, "MAX_EXAMPLE_GRADIENTS", at_once)

    def loss(params, batch):  # of this test's own, so that it is traced under this limit
        assert batch["image"].shape == (1, 3)
        return linear_loss(params, batch)

    program = jax.make_jaxpr(lambda p, b: scores._fisher(p, b, loss))(PARAMS, BATCHES[0])
    assert [e.params["length"] for e in program.eqns if e.primitive.name == "scan"] == [length]
    got = fisher(PARAMS, loss=loss, batches=BATCHES)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-8), got, expected("fisher"))


@pytest.mark.parametrize("name", BY_GRADIENTS)
def test_one_trace_over_batches_and_calls(name):
    traces = []

    def loss(params, batch):
        traces.append(name)
        return linear_loss(params, batch)

    SCORES[name](PARAMS, loss=loss, batches=BATCHES[:1])
    once = len(traces)  # a scan may trace its body more than once
    SCORES[name](jax.tree.map(lambda w: 2 * w, PARAMS), loss=loss, batches=BATCHES)
    assert len(traces) == once


# --- without data -----------------------------------------------------------------------------------------------------


def test_magnitude():
    got = magnitude({"a": [jnp.asarray([-2.0, 0.0, 0.5]), jnp.asarray(-1.0, jnp.bfloat16)]})
    np.testing.assert_array_equal(got["a"][0], [2, 0, 0.5])
    assert (float(got["a"][1]), got["a"][1].dtype) == (1, jnp.float32)


def test_norm_scale_is_zero_but_for_scales():
    params = {"norm1": {"scale": jnp.asarray([-2.0, 0.5]), "bias": jnp.ones(2)}, "scale": {"kernel": jnp.ones((2, 1))}}
    got = leaves(norm_scale(params))
    np.testing.assert_array_equal(got["norm1/scale"], [2, 0.5])
    np.testing.assert_array_equal(got["norm1/bias"], [0, 0])
    np.testing.assert_array_equal(got["scale/kernel"], [[0], [0]])


def test_random_depends_on_the_key_alone_and_differs_by_leaf():
    params = [jnp.zeros(500), {"a": jnp.zeros(500), "b": jnp.zeros((2, 250), jnp.bfloat16)}]
    different = jax.tree.map(lambda w: w + 9, params)
    first, again = (random(tree, key=jax.random.key(0)) for tree in (params, different))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, params)
    assert {s.dtype for s in jax.tree.leaves(first)} == {jnp.dtype(jnp.float32)}

    other = random(params, key=jax.random.key(1))
    draws = np.stack([s.ravel() for tree in (first, other) for s in jax.tree.leaves(tree)])
    assert draws.min() >= 0 and draws.max() < 1
    np.testing.assert_allclose(draws.mean(1), 0.5, atol=0.06)
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 0.2


# --- synaptic flow ----------------------------------------------------------------------------------------------------


def chain(kernels):
    x = jnp.ones((1, kernels[0].shape[0]))
    for kernel in kernels[:-1]:
        x = jax.nn.relu(x @ kernel)
    return x @ kernels[-1]


def test_synflow_by_hand():
    """R = 2 (3 + 5) + 1 (1 + 0) = 17 along the paths of two units."""
    got = synflow([jnp.asarray([[-2.0, 1.0]]), jnp.asarray([[3.0, -5.0], [1.0, 0.0]])], forward=chain)
    np.testing.assert_array_equal(got[0], [[16, 1]])
    np.testing.assert_array_equal(got[1], [[6, 10], [1, 0]])


def test_synflow_is_conserved_from_layer_to_layer():
    kernels = [jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((5, 7), (7, 9), (9, 4), (4, 3))]
    flow = float(chain([abs(w) for w in kernels]).sum())
    sums = [np.asarray(s).sum() for s in synflow(kernels, forward=chain)]
    np.testing.assert_allclose(sums, flow, rtol=1e-5)
    # Of every unit: what comes in is what goes out.
    first, second, *_ = synflow(kernels, forward=chain)
    np.testing.assert_allclose(first.sum(0), second.sum(1), rtol=1e-5)


def test_synflow_in_rounds_is_traced_once():
    traces = []

    def forward(params):
        traces.append(1)
        return chain(params)

    for scale in (1.0, 2.0, 3.0):
        synflow([jnp.full((2, 2), scale)] * 2, forward=forward)
    assert len(traces) == 1


def test_synflow_of_a_net_that_overflows():
    with pytest.raises(ValueError, match=r"\Asynflow: scores are not finite: .*input and its output.*\Z"):
        synflow([jnp.full((10, 10), 1e3)] * 12, forward=chain)
    mended = synflow([jnp.full((10, 10), 1e3)] * 12, forward=lambda p: 1e-20 * chain([1e-20 * p[0], *p[1:]]))
    np.testing.assert_allclose([s.sum() for s in mended], 1e-40 * 10**49, rtol=1e-5)


# --- all scores -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCORES)
def test_any_tree(name):
    """Lists and tuples in dicts, leaves of no axes and of bfloat16, in NumPy and in JAX; pruned weights score 0."""
    params = {
        "layers": [
            (np.full((3, 2), -0.5, np.float32), jnp.ones(2, jnp.bfloat16)),
            (jnp.eye(2, 4) + jnp.eye(2, 4, 2), jnp.zeros(4)),
        ],
        "norm": {"scale": jnp.asarray(1.5)},
    }

    def forward(params, x=BATCHES[0]["image"]):
        for kernel, bias in params["layers"]:
            x = x @ kernel * params["norm"]["scale"] + bias[None].astype(jnp.float32)
        return x

    def loss(params, batch):
        return softmax_cross_entropy(forward(params, batch["image"]), jax.nn.one_hot(batch["label"], 4))

    offered = {"loss": loss, "batches": BATCHES, "forward": forward, "key": jax.random.key(0)}
    got = SCORES[name](params, **{k: v for k, v in offered.items() if k in inspect.signature(SCORES[name]).parameters})
    assert jax.tree.structure(got) == jax.tree.structure(params)
    for score, w in zip(jax.tree.leaves(got), jax.tree.leaves(params), strict=True):
        assert (score.shape, score.dtype) == (w.shape, jnp.float32)
        assert float(score.min()) >= 0
        assert name == "random" or not score[w == 0].any()
    assert sum(float(score.sum()) for score in jax.tree.leaves(got)) > 0


@pytest.mark.parametrize("name", BY_GRADIENTS)
def test_errors(name):
    with pytest.raises(ValueError, match=r"\Ano batches: .*\Z"):
        SCORES[name](PARAMS, loss=linear_loss, batches=iter(()))
    with pytest.raises(ValueError, match=rf"\A{name}: scores are not finite: .*\Z"):
        SCORES[name]({**PARAMS, "bias": np.full(4, np.nan, np.float32)}, loss=linear_loss, batches=BATCHES)
    if name == "snip":
        with pytest.raises(ValueError, match="all are 0"):
            snip(PARAMS, loss=lambda p, b: 0 * linear_loss(p, b), batches=BATCHES)
