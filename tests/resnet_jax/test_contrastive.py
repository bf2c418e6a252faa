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

pytestmark = pytest.mark.usefixtures("unoptimised")

B, D, K, NEGATIVES = 8, 4, 5, 12  # examples, dimensions, prototypes
SCORES = ("scores", "student", "teacher", "center")

Arrays = dict[str, Any]


# ---- references: `f(x, still)`; no gradient flows through `still`, the same arrays -----------------------------------


def unit(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True))


def positives_loss(views, labels, temperature):
    """Mean over an anchor's positives of -log(exp(s) / the sum over all others), mean over the example's views."""
    z, group = unit(views).reshape(-1, views.shape[-1]), np.repeat(labels, views.shape[1])
    others = np.exp(z @ z.T / temperature) * (1 - np.eye(len(z)))
    positive = (group[:, None] == group) & ~np.eye(len(z), dtype=bool)
    losses = -np.log(others / others.sum(1, keepdims=True), where=positive, out=np.zeros_like(others))
    return (losses.sum(1) / positive.sum(1)).reshape(views.shape[:2]).mean(1)


def nt_xent(x, still, temperature=0.5):
    return positives_loss(x["views"], range(len(x["views"])), temperature)


def sup_con(x, still, temperature=0.1):
    return positives_loss(x["views"], x["labels"], temperature)


def info_nce(x, still, temperature=0.2):
    queries, keys = unit(x["queries"]), unit(x["keys"])
    losses = []
    for i, query in enumerate(queries):
        among = unit(x["negatives"]) if "negatives" in x else np.delete(keys, i, axis=0)
        own = math.exp(query @ keys[i] / temperature)
        losses.append(-math.log(own / (own + sum(math.exp(query @ k / temperature) for k in among))))
    return np.array(losses)


def byol(x, still):
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


def swav(x, still, temperature=0.1):
    codes = [sinkhorn(still["scores"][:, g]) for g in range(2)]
    return pairwise_cross_entropy(codes, softmax(x["scores"] / temperature))


def dino(x, still, temperature=0.1):
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


def pair(f, x, **options):
    return f(x["views"][:, 0], x["views"][:, 1], **options)


def of_nt_xent(x, **options):
    return c.nt_xent(*by_view(x["views"]), **options)


def of_sup_con(x, **options):
    return c.sup_con(by_view(x["views"]), x["labels"], **options)


def of_info_nce(x, **options):
    return c.info_nce(x["queries"], x["keys"], x.get("negatives"), **options)


def of_byol(x, axis_name=None):
    return c.byol(x["predictions"], x["targets"])


def of_swav(x, **options):
    return c.swav(by_view(x["scores"]), **options)


def of_dino(x, axis_name=None, **options):
    return c.dino(by_view(x["student"]), by_view(x["teacher"]), x["center"], **options)


@dataclass(frozen=True)
class Case:
    """A loss, what it takes and what it keeps to.

    Attributes:
      loss, reference: `(x, ...)` to [B], or to a scalar.
      shapes: of the arrays that have a row for each example, without B.
      shared: shapes of the others.
      zero: the loss of embeddings that are all 0.
      still: arrays into which no gradient flows.
      swap: arrays whose views may be exchanged.
      directions: arrays whose rows may have any length.
    """

    loss: Callable[..., jax.Array]
    reference: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    zero: float
    shared: dict[str, tuple[int, ...]] = field(default_factory=dict)
    still: tuple[str, ...] = ()
    swap: tuple[str, ...] = ()
    directions: tuple[str, ...] = ()


def among_views(loss, reference, count, **shapes):
    shapes = {"views": (count, D), **shapes}
    zero = math.log(count * B - 1)
    return Case(loss, reference, shapes, zero, swap=("views",), directions=("views",))


PAIRS = {"queries": (D,), "keys": (D,)}
QUEUE = {"zero": math.log(1 + NEGATIVES), "shared": {"negatives": (NEGATIVES, D)}, "directions": (*PAIRS, "negatives")}
CENTER = {"zero": math.log(K), "shared": {"center": (K,)}, "still": ("teacher", "center")}
PREDICTED = {"predictions": (D,), "targets": (D,)}
CASES = {
    "nt_xent": among_views(of_nt_xent, nt_xent, 2),
    "nt_xent 3 views": among_views(of_nt_xent, nt_xent, 3),
    "nt_xent in blocks": among_views(partial(of_nt_xent, block=3), nt_xent, 2),
    "sup_con": among_views(of_sup_con, sup_con, 2, labels=()),
    "info_nce": Case(of_info_nce, info_nce, PAIRS, math.log(B), directions=tuple(PAIRS)),
    "info_nce queue": Case(of_info_nce, info_nce, PAIRS, **QUEUE),
    "info_nce queue in blocks": Case(partial(of_info_nce, block=3), info_nce, PAIRS, **QUEUE),
    "byol": Case(of_byol, byol, PREDICTED, 2.0, still=("targets",), directions=tuple(PREDICTED)),
    "barlow_twins": Case(partial(pair, c.barlow_twins), barlow_twins, {"views": (2, D)}, D, swap=("views",)),
    "vicreg": Case(partial(pair, c.vicreg), vicreg, {"views": (2, D)}, 25 * 0.99, swap=("views",)),
    "swav": Case(of_swav, swav, {"scores": (2, K)}, math.log(K), swap=("scores",)),
    "swav 4 views": Case(of_swav, swav, {"scores": (4, K)}, math.log(K)),
    "dino": Case(of_dino, dino, {"student": (2, K), "teacher": (2, K)}, swap=("student", "teacher"), **CENTER),
    "dino 4 views": Case(of_dino, dino, {"student": (4, K), "teacher": (2, K)}, **CENTER),
}
BLOCKED = ("nt_xent", "nt_xent 3 views", "sup_con", "info_nce", "info_nce queue")
TEMPERATURE = tuple(name for name, case in CASES.items() if case.reference in (nt_xent, sup_con, info_nce, swav, dino))
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


@cache
def compiled(name: str, **options):
    def weighted(floats, rest, weights):
        losses = CASES[name].loss({**floats, **rest}, **options)
        return (losses * weights).mean(), losses

    return jax.jit(jax.value_and_grad(weighted, has_aux=True))


def ours(name: str, x: Arrays, weights: np.ndarray = WEIGHTS[:B], **options: Any) -> tuple[np.ndarray, Arrays]:
    """(losses, gradients of their weighted mean)."""
    floats = {k: v for k, v in x.items() if is_float(v)}
    rest = {k: v for k, v in x.items() if k not in floats}
    (_, losses), gradients = compiled(name, **options)(floats, rest, weights)
    return jax.device_get((losses, gradients))


def wide(x: Arrays) -> Arrays:
    return {k: v.astype(np.float64) if is_float(v) else v for k, v in x.items()}


def differences(f: Callable[[Arrays], float], x: Arrays, name: str, step: float = 1e-5) -> np.ndarray:
    """Central differences of f by x[name]."""
    gradient = np.zeros(x[name].shape)
    for place in np.ndindex(gradient.shape):
        ends = []
        for sign in (1, -1):
            moved = x[name].copy()
            moved[place] += sign * step
            ends.append(f({**x, name: moved}))
        gradient[place] = (ends[0] - ends[1]) / (2 * step)
    return gradient


def assert_near(got: np.ndarray, want: np.ndarray, what: str, tolerance: float = 1e-5) -> None:
    """Largest difference at most `tolerance` of the largest value."""
    assert got.shape == want.shape, what
    error = np.abs(got - want).max() / max(np.abs(want).max(), 1e-6)
    assert error < tolerance, f"{what}: {error:.2e}"


every_case = pytest.mark.parametrize("name", CASES)


# ---- formulas --------------------------------------------------------------------------------------------------------


@every_case
def test_value_and_gradient_are_the_papers(name):
    case, x = CASES[name], draw(CASES[name])
    losses, gradients = ours(name, x)
    exact = wide(x)
    np.testing.assert_allclose(losses, case.reference(exact, exact), rtol=1e-5)
    assert losses.dtype == np.float32
    for key, got in gradients.items():
        want = differences(lambda moved: (case.reference(moved, exact) * WEIGHTS[:B]).mean(), exact, key)
        if key in case.still:
            np.testing.assert_array_equal(got, 0, err_msg=key)
            assert not want.any()
        else:
            assert np.abs(want).max() > 1e-3, key
            assert_near(got, want, key)


@pytest.mark.parametrize("name", TEMPERATURE)
def test_low_temperature(name):
    x, exact = draw(CASES[name]), wide(draw(CASES[name]))
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


@every_case
def test_low_precision_loses_what_its_inputs_lose(name):
    """bfloat16 embeddings give the float32 loss of the same numbers."""
    x = draw(CASES[name])
    rounded = {k: v.astype(jnp.bfloat16) if is_float(v) else v for k, v in x.items()}
    low = jax.jit(CASES[name].loss)(rounded)
    same, _ = ours(name, {k: v.astype(np.float32) if is_float(v) else v for k, v in rounded.items()})
    full, _ = ours(name, x)
    assert low.dtype == np.float32
    np.testing.assert_allclose(low, same, rtol=1e-5)
    np.testing.assert_allclose(low, full, rtol=0.05, atol=0.05)


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
def test_order_of_examples(name):
    x, order = draw(CASES[name]), np.random.default_rng(1).permutation(B)
    losses, gradients = ours(name, x)
    shuffled = {k: v[order] if k in CASES[name].shapes else v for k, v in x.items()}
    got, got_gradients = ours(name, shuffled, WEIGHTS[:B][order])
    np.testing.assert_allclose(got, losses[order] if losses.ndim else losses, rtol=1e-5)
    if losses.ndim:
        for key in gradients.keys() & CASES[name].shapes.keys():
            np.testing.assert_allclose(got_gradients[key], gradients[key][order], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.swap])
def test_order_of_views(name):
    x = draw(CASES[name])
    swapped = {k: v[:, ::-1] if k in CASES[name].swap else v for k, v in x.items()}
    np.testing.assert_allclose(ours(name, swapped)[0], ours(name, x)[0], rtol=1e-5)


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


# ---- blocks of rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCKED)
def test_blocks_change_nothing(name):
    x = draw(CASES[name])
    rows = B * CASES[name].shapes.get("views", (1,))[0]
    losses, gradients = ours(name, x)
    for block in (1, 5, rows + 3):
        got, got_gradients = ours(name, x, block=block)
        np.testing.assert_allclose(got, losses, rtol=1e-5)
        for key, want in gradients.items():
            assert_near(got_gradients[key], want, f"{key} in blocks of {block}")


@pytest.mark.parametrize("name", BLOCKED)
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


@given(
    arrays(np.float32, (B, K), elements=st.floats(-1, 1, width=32)),
    st.sampled_from([1.0, 1e2, 1e4, 1e6]),
)
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

one_device = [pytest.param(mode, 1, marks=pytest.mark.slow) for mode in ("pmap", "shard_map")]
elsewhere = pytest.mark.parametrize(("mode", "devices"), [*one_device, ("jit", 8), ("pmap", 8), ("shard_map", 8)])


def run(step, state, batch, mode, devices):
    mesh = make_mesh(jax.devices()[:devices])
    compiled = compile_step(step, mesh=mesh, mode=mode, donate=False, compiler_options={})
    placed = jax.device_put(state, replicated(mesh))
    return jax.device_get(compiled(placed, shard_batch(batch, mesh, mode=mode)))


def trained(name, mode, devices):
    """Loss and gradient of one linear map of each input, and of what all examples share, over 16 examples."""
    case, rng = CASES[name], np.random.default_rng(2)
    x = draw(case, 16)
    batch = {**{k: x[k] for k in case.shapes}, "weight": WEIGHTS}
    maps = {k: rng.normal(size=(x[k].shape[-1],) * 2).astype(np.float32) for k in case.shapes if is_float(x[k])}
    state = {"maps": maps, "shared": {k: x[k] for k in case.shared}}

    def step(state, batch, *, axis_name=None):
        def objective(state):
            x = {k: batch[k] @ state["maps"][k] if k in maps else batch[k] for k in case.shapes}
            return (case.loss({**x, **state["shared"]}, axis_name=axis_name) * batch["weight"]).mean()

        return mean_over(jax.value_and_grad(objective)(vary(state, axis_name)), axis_name)

    return run(step, state, batch, mode, devices)


trained_once = cache(partial(trained, mode="jit", devices=1))


@every_case
@elsewhere
def test_whole_batch_takes_part(name, mode, devices):
    """Loss and gradient are those of one device."""
    (want, want_gradients), (got, gradients) = trained_once(name), trained(name, mode, devices)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    jax.tree.map(lambda a, b: assert_near(a, b, name), gradients, want_gradients)


def remembered(mode, devices):
    """A queue, a center and assignments after one step, as each device has them and as their mean."""
    x = draw(CASES["dino 4 views"], 16)
    batch = {"teacher": x["teacher"], "student": x["student"][:, 0]}
    state = {"queue": np.zeros((48, K), np.float32), "center": x["center"], "step": np.int32(4)}

    def step(state, batch, *, axis_name=None):
        codes = c.sinkhorn(batch["student"], axis_name=axis_name)
        new = {
            "queue": c.enqueue(state["queue"], batch["student"], state["step"], axis_name=axis_name),
            "center": c.update_center(state["center"], by_view(batch["teacher"]), axis_name=axis_name),
            "codes": mean_over(codes.T @ batch["student"] / len(codes), axis_name),
        }
        return new, mean_over(vary(new, axis_name), axis_name)

    return run(step, state, batch, mode, devices)


@elsewhere
def test_devices_remember_the_same(mode, devices):
    want, _ = remembered("jit", 1)
    for got in remembered(mode, devices):
        for key in want:
            assert_near(got[key], want[key], key)
    np.testing.assert_array_equal(want["queue"][:16], 0)
    assert np.abs(want["queue"][16:32]).max(1).all()  # step 4 of 3 places is the second


# ---- PyTorch ---------------------------------------------------------------------------------------------------------

TWINS = {
    "nt_xent": lambda t, x: t.nt_xent(x["views"][:, 0], x["views"][:, 1]),
    "sup_con": lambda t, x: t.sup_con(x["views"], x["labels"]),
    "info_nce": lambda t, x: t.moco_v3(x["queries"], x["keys"]),
    "info_nce queue": lambda t, x: t.moco(x["queries"], x["keys"], x["negatives"]),
    "byol": lambda t, x: t.byol(x["predictions"], x["targets"]),
    "barlow_twins": lambda t, x: t.barlow_twins(x["views"][:, 0], x["views"][:, 1]),
    "vicreg": lambda t, x: t.vicreg(x["views"][:, 0], x["views"][:, 1]),
    "swav": lambda t, x: t.swav(x["scores"].unbind(1)),
    "swav 4 views": lambda t, x: t.swav(x["scores"].unbind(1)),
    "dino": lambda t, x: t.DINO(x["center"])(x["student"].unbind(1), x["teacher"].unbind(1)),
    "dino 4 views": lambda t, x: t.DINO(x["center"])(x["student"].unbind(1), x["teacher"].unbind(1)),
}


@pytest.mark.parametrize("name", TWINS)
def test_live_twins(name):
    torch = pytest.importorskip("torch")
    from tests.reference import torch_contrastive

    x = draw(CASES[name], 16)
    losses, gradients = ours(name, x, np.ones(16, np.float32))
    theirs = {k: torch.tensor(v, requires_grad=is_float(v)) for k, v in x.items()}
    value = TWINS[name](torch_contrastive, theirs)
    value.backward()
    np.testing.assert_allclose(losses.mean(), value.item(), rtol=1e-5)
    for key, got in gradients.items():
        want = theirs[key].grad
        assert_near(got, np.zeros_like(got) if want is None else want.numpy(), key, 1e-4)


def test_live_center_and_assignment():
    torch = pytest.importorskip("torch")
    from tests.reference import torch_contrastive

    x = draw(CASES["dino"], 16)
    loss = torch_contrastive.DINO(torch.tensor(x["center"]))
    loss(*(torch.tensor(x[k]).unbind(1) for k in ("student", "teacher")))
    assert_near(np.asarray(c.update_center(x["center"], by_view(x["teacher"]))), loss.center[0].numpy(), "center")
    codes = torch_contrastive.sinkhorn(torch.tensor(x["student"][:, 0]))
    assert_near(np.asarray(c.sinkhorn(x["student"][:, 0])), codes.numpy(), "codes")
