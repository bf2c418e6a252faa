"""Self-supervised losses: the papers' formulas and gradients, symmetries, blocks, examples of all shards.

References are float64 NumPy; their gradients are finite differences. A case has arrays [B, ...] by name, with views on
axis 1, and arrays that all examples share. Every gradient is that of a weighted mean over examples, so that an example
that is mixed up with a different one changes it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from resnet_jax import contrastive as c
from resnet_jax.parallel import compile_step, make_mesh, mean_over, replicated, shard_batch, vary
from tests.reference.compare import assert_near

B, D, K, NEGATIVES = 8, 4, 5, 12  # examples, dimensions, prototypes
SCORES = ("scores", "student", "teacher", "center")

Arrays = dict[str, Any]


# ---- references: `f(x, still)`; no gradient flows through `still`, the same arrays -----------------------------------


def unit(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True))


def positives_loss(x, still, temperature):
    """Mean over an anchor's positives of -log(exp(s) / the sum over all others), mean over the example's views."""
    views, labels = x["views"], x.get("labels", range(len(x["views"])))
    z, group = unit(views).reshape(-1, views.shape[-1]), np.repeat(labels, views.shape[1])
    others = np.exp(z @ z.T / temperature) * (1 - np.eye(len(z)))
    positive = (group[:, None] == group) & ~np.eye(len(z), dtype=bool)
    losses = -np.log(others / others.sum(1, keepdims=True), where=positive, out=np.zeros_like(others))
    return (losses.sum(1) / positive.sum(1)).reshape(views.shape[:2]).mean(1)


def info_nce_loss(x, still, temperature):
    queries, keys = unit(x["queries"]), unit(x["keys"])
    losses = []
    for i, query in enumerate(queries):
        among = unit(x["negatives"]) if "negatives" in x else np.delete(keys, i, axis=0)
        own = math.exp(query @ keys[i] / temperature)
        losses.append(-math.log(own / (own + sum(math.exp(query @ k / temperature) for k in among))))
    return np.array(losses)


def byol_loss(x, still):
    distances = [unit(p) - unit(t) for p, t in zip(x["predictions"], still["targets"], strict=True)]
    return np.array([sum(d**2) for d in distances])


def barlow_twins(x, still):
    a, b = ((view - view.mean(0)) / np.sqrt(view.var(0) + 1e-5) for view in x["views"].swapaxes(0, 1))
    correlation = a.T @ b / len(a)
    return (np.where(np.eye(D), 1, 0.0051) * (np.eye(D) - correlation) ** 2).sum()


def vicreg(x, still):
    a, b = x["views"].swapaxes(0, 1)
    loss = 25 * ((a - b) ** 2).mean()
    for view in (a, b):
        covariance = np.cov(view, rowvar=False)
        loss += 25 / 2 * np.maximum(0, 1 - np.sqrt(np.diag(covariance) + 1e-4)).mean()
        loss += ((1 - np.eye(D)) * covariance**2).sum() / D
    return loss


def sinkhorn(scores, iterations=3):
    """SwAV's algorithm 1: prototypes share all examples alike, then each example is shared out."""
    codes = np.exp(scores / 0.05)
    for _ in range(iterations):
        codes = codes / codes.sum(0, keepdims=True)
        codes = codes / codes.sum(1, keepdims=True)
    return codes


def swav_loss(x, still, temperature):
    codes = [sinkhorn(still["scores"][:, g]) for g in range(2)]
    return pairwise_cross_entropy(codes, softmax(x["scores"] / temperature))


def dino_loss(x, still, temperature):
    targets = softmax((still["teacher"] - still["center"]) / 0.04)
    return pairwise_cross_entropy(targets.swapaxes(0, 1), softmax(x["student"] / temperature))


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def pairwise_cross_entropy(targets, p):
    """Cross entropy of `targets` [G][B, K] and another view of `p` [B, V, K], mean over pairs."""
    terms = []
    for g, target in enumerate(targets):
        terms += [-(target * np.log(p[:, v])).sum(1) for v in range(p.shape[1]) if v != g]
    return np.mean(terms, axis=0)


# ---- cases -----------------------------------------------------------------------------------------------------------


def by_view(x):
    return jnp.swapaxes(x, 0, 1)


@dataclass(frozen=True)
class Case:
    """A loss and its expected properties.

    Attributes:
      loss, reference: `(x, ...)` to [B], or to a scalar.
      shapes: of the arrays that have a row for each example, without B.
      zero: the loss of embeddings that are all 0.
      temperature: the default one.
      shared: shapes of the other arrays.
      still: arrays into which no gradient flows.
      swap: arrays whose views may be exchanged.
      directions: arrays whose rows may have any length.
    """

    loss: Callable[..., jax.Array]
    reference: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    zero: float
    temperature: float | None = None
    shared: dict[str, tuple[int, ...]] = field(default_factory=dict)
    still: tuple[str, ...] = ()
    swap: tuple[str, ...] = ()
    directions: tuple[str, ...] = ()


def nt_xent(views: int, **options: Any) -> Case:
    def loss(x, **more):
        return c.nt_xent(*by_view(x["views"]), **options, **more)

    shapes = {"views": (views, D)}
    return Case(loss, positives_loss, shapes, math.log(views * B - 1), 0.5, swap=("views",), directions=("views",))


def sup_con(**options: Any) -> Case:
    def loss(x, **more):
        return c.sup_con(by_view(x["views"]), x["labels"], **options, **more)

    shapes = {"views": (2, D), "labels": ()}
    return Case(loss, positives_loss, shapes, math.log(2 * B - 1), 0.1, swap=("views",), directions=("views",))


def info_nce(negatives: int | None = None, **options: Any) -> Case:
    def loss(x, **more):
        return c.info_nce(x["queries"], x["keys"], x.get("negatives"), **options, **more)

    pairs = {"queries": (D,), "keys": (D,)}
    if negatives is None:
        return Case(loss, info_nce_loss, pairs, math.log(B), 0.2, directions=tuple(pairs))
    shared = {"negatives": (negatives, D)}
    return Case(loss, info_nce_loss, pairs, math.log(1 + negatives), 0.2, shared, directions=(*pairs, *shared))


def two_views(loss, reference, zero):
    shapes = {"views": (2, D)}
    return Case(lambda x, **o: loss(*by_view(x["views"]), **o), reference, shapes, zero, swap=("views",))


def swav(views):
    swap = ("scores",) if views == 2 else ()
    shapes = {"scores": (views, K)}
    return Case(lambda x, **o: c.swav(by_view(x["scores"]), **o), swav_loss, shapes, math.log(K), 0.1, swap=swap)


def dino(views):
    def loss(x, axis_name=None, **options):
        return c.dino(by_view(x["student"]), by_view(x["teacher"]), x["center"], **options)

    shapes, shared, still = {"student": (views, K), "teacher": (2, K)}, {"center": (K,)}, ("teacher", "center")
    return Case(loss, dino_loss, shapes, math.log(K), 0.1, shared, still, tuple(shapes) if views == 2 else ())


def byol():
    def loss(x, axis_name=None):
        return c.byol(x["predictions"], x["targets"])

    shapes = {"predictions": (D,), "targets": (D,)}
    return Case(loss, byol_loss, shapes, 2.0, still=("targets",), directions=tuple(shapes))


# Blocks of 5 rows leave padding in the last one.
CASES = {
    "nt_xent": nt_xent(2),
    "nt_xent 3 views": nt_xent(3),
    "nt_xent in blocks": nt_xent(2, block=5),
    "sup_con": sup_con(),
    "sup_con in blocks": sup_con(block=5),
    "info_nce": info_nce(),
    "info_nce in blocks": info_nce(block=5),
    "info_nce queue": info_nce(NEGATIVES),
    "info_nce queue in blocks": info_nce(NEGATIVES, block=5),
    "byol": byol(),
    "barlow_twins": two_views(c.barlow_twins, barlow_twins, D),
    "vicreg": two_views(c.vicreg, vicreg, 25 * 0.99),
    "swav": swav(2),
    "swav 4 views": swav(4),
    "dino": dino(2),
    "dino 4 views": dino(4),
}
WEIGHTS = np.random.default_rng(9).uniform(0.5, 1.5, 16).astype(np.float32)


def draw(case: Case, size: int = B) -> Arrays:
    """float32 arrays; embeddings vary less than 1 in some dimensions and more in others."""
    rng = np.random.default_rng(0)

    def array(name, shape):
        if name == "labels":
            return (np.arange(size) % 3).astype(np.int32)
        scale = 0.3 if name in SCORES else np.linspace(0.3, 1.7, D)
        return (rng.normal(size=shape) * scale).astype(np.float32)

    rows = {name: array(name, (size, *shape)) for name, shape in case.shapes.items()}
    return rows | {name: array(name, shape) for name, shape in case.shared.items()}


def is_float(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def cast(x: Arrays, dtype: Any) -> Arrays:
    return {k: v.astype(dtype) if is_float(v) else v for k, v in x.items()}


@cache
def compiled(name: str):
    def weighted(floats, rest, weights, options):
        losses = CASES[name].loss({**floats, **rest}, **options)
        return (losses * weights).mean(), losses

    return jax.jit(jax.value_and_grad(weighted, has_aux=True))


def ours(name: str, x: Arrays, weights: np.ndarray = WEIGHTS[:B], temperature: float | None = None):
    """(losses, gradients of their weighted mean)."""
    temperature = temperature or CASES[name].temperature
    floats = {k: v for k, v in x.items() if is_float(v)}
    rest = {k: v for k, v in x.items() if k not in floats}
    options = {} if temperature is None else {"temperature": temperature}
    (_, losses), gradients = compiled(name)(floats, rest, weights, options)
    return jax.device_get((losses, gradients))


def differences(f: Callable[[Arrays], float], x: Arrays, name: str, step: float = 1e-5) -> np.ndarray:
    """Central differences of f by x[name]."""
    gradient = np.zeros(x[name].shape)
    for place in np.ndindex(gradient.shape):
        moved = np.zeros(gradient.shape)
        moved[place] = step
        gradient[place] = (f({**x, name: x[name] + moved}) - f({**x, name: x[name] - moved})) / (2 * step)
    return gradient


every_case = pytest.mark.parametrize("name", CASES)


# ---- formulas --------------------------------------------------------------------------------------------------------


@every_case
def test_value_and_gradient_are_the_papers(name):
    case, x = CASES[name], draw(CASES[name])
    losses, gradients = ours(name, x)
    exact = cast(x, np.float64)
    reference = partial(case.reference, **({} if case.temperature is None else {"temperature": case.temperature}))
    np.testing.assert_allclose(losses, reference(exact, exact), rtol=1e-5)
    assert losses.dtype == np.float32
    for key, got in gradients.items():
        want = differences(lambda moved: (reference(moved, exact) * WEIGHTS[:B]).mean(), exact, key)
        if key in case.still:
            np.testing.assert_array_equal(got, 0, err_msg=key)
            assert not want.any()
        else:
            assert np.abs(want).max() > 1e-3, key
            assert_near(got, want, what=key)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.temperature])
def test_low_temperature(name):
    x = draw(CASES[name])
    exact = cast(x, np.float64)
    losses, gradients = ours(name, x, temperature=0.01)
    np.testing.assert_allclose(losses, CASES[name].reference(exact, exact, temperature=0.01), rtol=1e-5, atol=1e-4)
    assert all(np.isfinite(g).all() for g in gradients.values())


@every_case
@pytest.mark.parametrize("alike", ["zeros", "ones", "a row of zeros"])
def test_collapsed_embeddings(name, alike):
    """Ties and rows without a direction: a finite value, the known one of zeros, and a finite gradient."""
    case, x = CASES[name], draw(CASES[name])
    for key in case.shapes:
        if alike == "a row of zeros" and is_float(x[key]):
            x[key][0] = 0
        elif is_float(x[key]):
            x[key] = getattr(np, alike)(x[key].shape, np.float32)
    losses, gradients = ours(name, x)
    assert np.isfinite(losses).all()
    assert all(np.isfinite(g).all() for g in gradients.values())
    if alike == "zeros":
        np.testing.assert_allclose(losses, case.zero, rtol=1e-6)


def test_low_precision_loses_what_its_inputs_lose():
    """bfloat16 embeddings give the float32 loss of the same numbers, at the default temperatures."""
    inputs = {name: draw(case) for name, case in CASES.items()}
    rounded = {name: cast(x, jnp.bfloat16) for name, x in inputs.items()}
    low = jax.jit(lambda xs: {name: CASES[name].loss(x) for name, x in xs.items()})(rounded)
    for name, x in rounded.items():
        assert low[name].dtype == np.float32
        np.testing.assert_allclose(low[name], ours(name, cast(x, np.float32))[0], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(low[name], ours(name, inputs[name])[0], rtol=0.05, atol=0.05, err_msg=name)


def test_an_example_without_a_positive_has_no_loss():
    x = {**draw(CASES["sup_con"]), "labels": np.array([0, 1, 0, 2, 2, 2, 3, 4], np.int32)}
    x["views"] = x["views"][:, :1]
    losses, gradients = ours("sup_con", x)
    assert ((losses > 0) == [True, False, True, True, True, True, False, False]).all()
    assert (losses >= 0).all()
    assert np.isfinite(gradients["views"]).all()


def test_small_covariances_next_to_large_variances():
    """The sum over pairs is not what rounding leaves of a difference of squared variances."""
    a = scipy.linalg.hadamard(16)[:, 1:] * 100 + np.random.default_rng(0).normal(size=(16, 15)) * 0.1
    a = a.astype(np.float32)
    covariances = np.cov(a.astype(np.float64), rowvar=False)
    want = 2 * ((covariances - np.diag(np.diag(covariances))) ** 2).sum() / 15
    got = jax.jit(partial(c.vicreg, invariance=0.0, variance=0.0))(a, a)
    np.testing.assert_allclose(got, want, rtol=1e-3)


# ---- symmetries ------------------------------------------------------------------------------------------------------


@every_case
def test_order_of_examples_and_views(name):
    case, x, order = CASES[name], draw(CASES[name]), np.random.default_rng(1).permutation(B)
    losses, gradients = ours(name, x)
    shuffled = {k: v[order] if k in case.shapes else v for k, v in x.items()}
    got, got_gradients = ours(name, shuffled, WEIGHTS[:B][order])
    np.testing.assert_allclose(got, losses[order] if losses.ndim else losses, rtol=1e-5)
    if losses.ndim:
        for key in gradients.keys() & case.shapes.keys():
            np.testing.assert_allclose(got_gradients[key], gradients[key][order], rtol=1e-4, atol=1e-6)
    if case.swap:
        swapped = {k: v[:, ::-1] if k in case.swap else v for k, v in x.items()}
        np.testing.assert_allclose(ours(name, swapped)[0], losses, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.directions])
@given(data=st.data())
@settings(deadline=None, max_examples=10)
def test_lengths_do_not_matter(name, data):
    x = draw(CASES[name])
    want, _ = ours(name, x)
    for key in CASES[name].directions:
        lengths = st.floats(2.0**-10, 2.0**10, width=32)
        x[key] = x[key] * data.draw(arrays(np.float32, x[key].shape[:-1], elements=lengths))[..., None]
    np.testing.assert_allclose(ours(name, x)[0], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg"])
@given(mean=arrays(np.float32, D, elements=st.floats(-4, 4, width=32)))
@settings(deadline=None, max_examples=10)
def test_means_do_not_matter(name, mean):
    x = draw(CASES[name])
    np.testing.assert_allclose(ours(name, {"views": x["views"] + mean})[0], ours(name, x)[0], rtol=1e-4)


@pytest.mark.parametrize("name", ["nt_xent", "info_nce queue"])
def test_large_batches_go_in_blocks(name, monkeypatch):
    """No matrix of all similarities, forwards or backwards, and a fraction of the memory; small ones go at once."""
    x = draw(CASES[name], 1024)
    rows, columns = [1024 * CASES[name].shapes.get("views", (1,))[0]] * 2
    if "negatives" in x:
        x["negatives"], columns = np.ones((4096, D), np.float32), 4096

    def compile_with(at_once):
        monkeypatch.setattr(c, "MAX_SIMILARITIES", at_once)
        gradient = jax.grad(lambda floats: CASES[name].loss({**x, **floats}).mean())
        traced = jax.jit(gradient).trace({k: v for k, v in x.items() if is_float(v)})
        return str(traced.jaxpr), traced.lower().compile().memory_analysis().temp_size_in_bytes

    plain, plain_bytes = compile_with(rows * columns)
    text, block_bytes = compile_with(rows * columns // 32)
    assert f"[{rows},{columns}]" in plain
    assert "scan" not in plain
    assert f"[{rows},{columns}]" not in text
    assert f"[{rows // 32},{columns}]" in text
    assert block_bytes < plain_bytes / 4


# ---- memories and assignments ----------------------------------------------------------------------------------------

share_out = jax.jit(c.sinkhorn)


def test_queue_holds_the_last_batches():
    rng = np.random.default_rng(0)
    queue = first = rng.normal(size=(12, D)).astype(np.float32)
    batches = rng.normal(size=(5, 4, D)).astype(np.float32)
    push = jax.jit(c.enqueue)
    for step, batch in enumerate(batches):
        queue = push(queue, batch, jnp.int32(step))
        if step == 0:
            np.testing.assert_array_equal(queue[4:], first[4:])
    want = np.concatenate([unit(batches[3]), unit(batches[4]), unit(batches[2])])
    np.testing.assert_allclose(queue, want, rtol=1e-5)
    with pytest.raises(ValueError, match="the queue size 10 is not a multiple of the batch size 4"):
        c.enqueue(jnp.zeros((10, D)), jnp.zeros((4, D)), jnp.int32(0))


def test_nearest_is_the_most_similar_row():
    rng = np.random.default_rng(0)
    queries, bank = rng.normal(size=(B, D)).astype(np.float32), rng.normal(size=(20, D)).astype(np.float32)
    want = [max(bank, key=lambda row: unit(query) @ unit(row)) for query in queries]
    np.testing.assert_array_equal(jax.jit(c.nearest)(queries, bank), want)


def test_sinkhorn_shares_out_alike():
    scores = np.random.default_rng(0).normal(size=(32, K)).astype(np.float32) * 0.3
    np.testing.assert_allclose(share_out(scores), sinkhorn(scores.astype(np.float64)), rtol=1e-4, atol=1e-7)
    codes = c.sinkhorn(scores, iterations=60)  # not jitted: XLA would take half a minute for so long a chain
    np.testing.assert_allclose(codes.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(codes.sum(0), 32 / K, rtol=1e-3)
    gradient = jax.jit(jax.grad(lambda s: (c.sinkhorn(s) * scores).sum()))(scores)
    np.testing.assert_array_equal(gradient, 0)


@given(arrays(np.float32, (B, K), elements=st.floats(-1, 1, width=32)), st.sampled_from([1.0, 1e2, 1e4, 1e6]))
@settings(deadline=None, max_examples=20)
def test_sinkhorn_of_any_scores(scores, scale):
    codes = share_out(scores * np.float32(scale))
    assert (codes >= 0).all()
    np.testing.assert_allclose(codes.sum(1), 1, rtol=1e-5)


def test_center_moves_towards_the_teacher():
    x = draw(CASES["dino"])
    want = 0.9 * x["center"] + 0.1 * x["teacher"].mean((0, 1))
    np.testing.assert_allclose(c.update_center(x["center"], by_view(x["teacher"])), want, rtol=1e-5, atol=1e-7)


# ---- modes -----------------------------------------------------------------------------------------------------------

# One case for each use of the whole batch.
SHARDED = ("nt_xent", "nt_xent in blocks", "sup_con", "info_nce", "barlow_twins", "vicreg", "swav 4 views")


@cache
def trained(mode, devices):
    """Losses and gradients of linear maps of the inputs, over 16 examples, and what is remembered after a step.

    The queue, the center and the assignments come twice: as each device has them, and as their mean.
    """
    rng = np.random.default_rng(2)
    inputs = {name: draw(CASES[name], 16) for name in SHARDED}
    scores = draw(CASES["dino"], 16)
    maps = {n: {k: rng.normal(size=(v.shape[-1],) * 2) for k, v in x.items() if is_float(v)} for n, x in inputs.items()}
    memory = {"queue": np.zeros((48, K)), "center": scores["center"], "step": np.int32(4)}
    state = jax.tree.map(lambda x: x.astype(np.float32) if is_float(x) else x, {"maps": maps, "memory": memory})
    batch = {"inputs": inputs, "teacher": scores["teacher"], "student": scores["student"][:, 0], "weight": WEIGHTS}

    def step(state, batch, *, axis_name=None):
        def losses(maps):
            found = {}
            for name, x in batch["inputs"].items():
                x = {k: v @ maps[name][k] if k in maps[name] else v for k, v in x.items()}
                found[name] = (CASES[name].loss(x, axis_name=axis_name) * batch["weight"]).mean()
            return sum(found.values()), found

        gradients, found = jax.grad(losses, has_aux=True)(vary(state["maps"], axis_name))
        memory, codes = state["memory"], c.sinkhorn(batch["student"], axis_name=axis_name)
        new = {
            "queue": c.enqueue(memory["queue"], batch["student"], memory["step"], axis_name=axis_name),
            "center": c.update_center(memory["center"], by_view(batch["teacher"]), axis_name=axis_name),
            "codes": mean_over(codes.T @ batch["student"] / len(codes), axis_name),
        }
        return *mean_over((found, gradients), axis_name), new, mean_over(vary(new, axis_name), axis_name)

    mesh = make_mesh(jax.devices()[:devices])
    compiled = compile_step(step, mesh=mesh, mode=mode, donate=False)
    placed = jax.device_put(state, replicated(mesh))
    return jax.device_get(compiled(placed, shard_batch(batch, mesh, mode=mode)))


@pytest.mark.parametrize("mode", ["jit", "pmap", "shard_map"])
def test_whole_batch_takes_part(mode):
    """Losses, gradients, the queue, the center and the assignments on eight devices are those of one device."""
    (want, want_gradients, memory, _), (got, gradients, *memories) = trained("jit", 1), trained(mode, 8)
    for name in SHARDED:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)
    for of_devices in memories:
        assert_near(of_devices, memory)
    assert_near(gradients, want_gradients)
    np.testing.assert_array_equal(memory["queue"][:16], 0)
    assert np.abs(memory["queue"][16:32]).max(1).all()  # step 4 of 3 places is the second
