"""Health of representations against plain NumPy, on features known to be healthy or collapsed."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain import health as H
from pretrain.health import collapse_step, health, verdict

B, D = 40, 6
ONE_VIEW = ("uniformity", "mean_negative_similarity", "feature_std", "dead_fraction", "rank_me", "effective_rank")
TWO_VIEWS = ("alignment", "mean_similarity")
ON_DEVICE = {name: jax.jit(getattr(H, name)) for name in (*ONE_VIEW[:4], *TWO_VIEWS)}


def features(seed=0, count=B, dimensions=D):
    """Correlated dimensions of different means, and rows of very different lengths."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, dimensions)) @ rng.normal(size=(dimensions, dimensions)) + rng.normal(size=dimensions)
    return (x * rng.lognormal(0, 1, (count, 1))).astype(np.float32)


def value(name, *x):
    return float(ON_DEVICE.get(name, getattr(H, name))(*x))


# --- references -------------------------------------------------------------------------------------------------------


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def over_pairs(f, x):
    return np.mean([f(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])


def entropy_of(singular):
    p = singular / singular.sum()
    return np.exp(-sum(q * np.log(q) for q in p if q > 0))


REFERENCES = {
    "alignment": lambda a, b: np.mean([2 - 2 * cosine(x, y) for x, y in zip(a, b, strict=True)]),
    "mean_similarity": lambda a, b: np.mean([cosine(x, y) for x, y in zip(a, b, strict=True)]),
    "uniformity": lambda x: np.log(over_pairs(lambda a, b: np.exp(-2 * (2 - 2 * cosine(a, b))), x)),
    "mean_negative_similarity": lambda x: over_pairs(cosine, x),
    "feature_std": lambda x: np.std([r / np.linalg.norm(r) for r in x], axis=0).mean() * np.sqrt(x.shape[1]),
    "dead_fraction": lambda x: np.mean([c.std() < 1e-3 * np.sqrt(np.mean(x**2)) for c in x.T]),
    "rank_me": lambda x: entropy_of(np.sqrt(np.maximum(np.linalg.eigvalsh(x.T @ x), 0))),
    "effective_rank": lambda x: entropy_of(np.sqrt(np.maximum(np.linalg.eigvalsh(np.cov(x.T)), 0))),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", REFERENCES)
def test_equals_the_reference(name, seed):
    views = [features(seed)] if name in ONE_VIEW else [features(seed), features(seed) + features(seed + 10)]
    if name == "dead_fraction":
        # Far from 0 and still, hardly moving, at zero: half of the dimensions.
        views[0][:, :3] = [5.0, 1.0, 0.0]
        views[0][::2, 1] += 1e-4
    want = REFERENCES[name](*(view.astype(np.float64) for view in views))
    assert value(name, *views) == pytest.approx(want, rel=2e-5)
    assert want != pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("rows", [7, 8, 39, 1000])
def test_uniformity_does_not_depend_on_blocks(monkeypatch, rows):
    want = REFERENCES["uniformity"](features().astype(np.float64))
    monkeypatch.setattr(H, "ROWS", rows)
    assert float(jax.jit(partial(H.uniformity))(features())) == pytest.approx(want, rel=1e-5)


# --- what is found ----------------------------------------------------------------------------------------------------


def test_isotropic_features_are_healthy():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 32)).astype(np.float32)
    found = health(x, x + 0.1 * rng.normal(size=x.shape).astype(np.float32))
    assert found["feature_std"] == pytest.approx(1, abs=0.02)
    assert found["negative_similarity"] == pytest.approx(0, abs=0.01)
    # Of the uniform distribution on the sphere: exp(-4 + 4 cos), of cosines of variance 1 / D.
    assert found["uniformity"] == pytest.approx(-4 + 8 / 32, abs=0.05)
    assert found["effective_rank"] == pytest.approx(32, rel=0.02)
    assert found["rank_me"] == pytest.approx(32, rel=0.02)
    assert found["dead_fraction"] == 0
    assert found["positive_similarity"] > 0.99
    assert found["alignment"] == pytest.approx(2 - 2 * found["positive_similarity"], abs=1e-5)
    assert (found["images"], found["dimensions"]) == (2000, 32)
    assert all(type(number) is float for number in found.values())
    assert json.loads(json.dumps(found)) == found


def test_what_needs_one_view_is_of_the_first():
    a, b = features(), features(1)
    found, swapped = health(a, b), health(b, a)
    names = {name.removeprefix("mean_"): value(name, a) for name in ONE_VIEW}
    assert {name: found[name] for name in names} == pytest.approx(names, rel=1e-5)
    assert found["alignment"] == pytest.approx(swapped["alignment"], rel=1e-6)
    assert found["effective_rank"] != pytest.approx(swapped["effective_rank"], rel=1e-3)


@pytest.mark.parametrize("noise", [0, 1e-7])
def test_constant_features_are_found(noise):
    """As float32 rounds them, too: that noise spans all dimensions and is none of them."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(1, 16)) * (1 + noise * rng.normal(size=(64, 16)))).astype(np.float32)
    found = health(x, x)
    assert found["feature_std"] < 1e-5
    assert found["effective_rank"] == 0
    assert found["rank_me"] == pytest.approx(1, abs=1e-5)
    assert found["dead_fraction"] == 1
    assert found["negative_similarity"] == pytest.approx(1, abs=1e-6)
    assert found["uniformity"] == pytest.approx(0, abs=1e-5)


def test_features_on_a_line_are_found():
    """Of rank 1, while single directions are spread: only the ranks see it."""
    rng = np.random.default_rng(0)
    x = np.outer(rng.normal(size=64), rng.normal(size=16)).astype(np.float32)
    found = health(x, x)
    assert found["feature_std"] > 0.7
    assert found["effective_rank"] == pytest.approx(1, abs=1e-4)
    assert found["rank_me"] == pytest.approx(1, abs=1e-4)
    # Off the origin the centred rank still is 1.
    assert H.effective_rank(x + 100) == pytest.approx(1, abs=1e-2)
    assert H.rank_me(x + 100) > 1.01


def test_ranks_of_known_spectra():
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(50, 8)))[0]
    for singular in ([1] * 8, [1] * 3 + [0] * 5, [4, 2, 1, 1, 0, 0, 0, 0]):
        assert H.rank_me(q * singular) == pytest.approx(entropy_of(np.asarray(singular, float)), rel=1e-6)
    # Small singular values, whose squares float32 would lose beside the large one's.
    small = np.asarray([1.0] + [1e-4] * 7)
    assert H.rank_me((q * small).astype(np.float32)) == pytest.approx(entropy_of(small), rel=1e-6)


def test_spread_of_a_known_mean_cosine():
    """`feature_std` is sqrt(1 - c) for a mean cosine c of different images, which the threshold's comment says."""
    x = np.random.default_rng(0).normal(size=(4000, 64)).astype(np.float32)
    for offset in (1, 3, 20):
        c = value("mean_negative_similarity", x + offset)
        assert value("feature_std", x + offset) == pytest.approx(np.sqrt(1 - c), rel=0.02)
    assert np.sqrt(1 - 0.9975) == pytest.approx(H.COLLAPSED_STD)


@pytest.mark.parametrize("shape", [(5, 3), (1, 3), (1, 1), (5, 1), (2, 8)])
@pytest.mark.parametrize("constant", [0.0, 2.5, 1e-30])
def test_degenerate_features_are_finite(shape, constant):
    found = health(np.full(shape, constant), np.full(shape, -constant))
    assert np.isfinite(list(found.values())).all()
    assert found["effective_rank"] == 0
    assert found["feature_std"] == pytest.approx(0, abs=1e-6)
    assert found["dead_fraction"] == 1
    assert verdict([], found).startswith("representations have collapsed to few dimensions")


def test_gradients_are_finite_at_zero():
    """They may serve as losses too."""
    loss = jax.jit(jax.grad(lambda a, b: H.alignment(a, b) + H.uniformity(a), argnums=(0, 1)))
    assert np.isfinite(loss(jnp.zeros((4, 3)), jnp.ones((4, 3)))).all()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"one shape \[B, D\] and not be empty, got \(4, 3\) and \(4, 2\)"):
        health(np.ones((4, 3)), np.ones((4, 2)))
    for shape in ((4,), (0, 3), (2, 2, 2)):
        with pytest.raises(ValueError, match="one shape"):
            health(np.ones(shape), np.ones(shape))
    with pytest.raises(ValueError, match="not finite"):
        health(np.ones((4, 3)), np.full((4, 3), np.nan))


# --- invariances ------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3))
def test_order_and_scale_do_not_matter(seed, scale):
    rng = np.random.default_rng(seed)
    order, views = rng.permutation(B), [features(seed), features(seed + 1)]
    others = [view[order] * np.float32(scale) for view in views]
    for name in REFERENCES:
        count = 1 if name in ONE_VIEW else 2
        assert value(name, *others[:count]) == pytest.approx(value(name, *views[:count]), rel=1e-4, abs=1e-5), name


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_rotations_do_not_matter(seed):
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(D, D)))[0].astype(np.float32)
    views = [features(seed), features(seed + 1)]
    others = [view @ rotation for view in views]
    for name in set(REFERENCES) - {"feature_std", "dead_fraction"}:
        count = 1 if name in ONE_VIEW else 2
        assert value(name, *others[:count]) == pytest.approx(value(name, *views[:count]), rel=1e-4, abs=1e-5), name


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_ranks_and_values_keep_their_ranges(seed):
    a, b = features(seed), features(seed + 1)
    assert 1 <= value("rank_me", a) <= D + 1e-9
    assert 1 <= value("effective_rank", a) <= D + 1e-9
    assert -8 <= value("uniformity", a) <= 1e-6
    assert 0 <= value("alignment", a, b) <= 4
    assert value("effective_rank", a) == pytest.approx(value("effective_rank", a + np.float32(3)), rel=1e-3)


# --- verdicts ---------------------------------------------------------------------------------------------------------


def history(*stds, **extra):
    return [{"step": 10 * (i + 1), "loss": 1.0, "projection_std": std, **extra} for i, std in enumerate(stds)]


@pytest.mark.parametrize(
    ("rows", "step"),
    [
        ([], None),
        ([{"step": 1, "loss": 2.0}], None),
        (history(0.9, 0.8, 0.9), None),
        (history(0.9, 0.01, 0.02, 0.01), 20),
        (history(0.01, 0.02), 10),
        (history(0.01), 10),
        (history(0.9), None),
        (history(0.9, 0.01, 0.01, 0.9), None),
        (history(0.9, 0.01, 0.9, 0.01, 0.01), 40),
        (history(0.9, 0.01), None),
        (history(0.9, 0.05, 0.0499, 0.0499), 30),
        (history(0.9, float("nan"), 0.01, 0.01), 30),
        ([*history(0.9, 0.01, 0.01), {"step": 35, "validation": 1.0}], 20),
        ([{"step": 5}, *history(0.01), {"step": 35}], 10),
    ],
)
def test_collapse_is_what_lasts(rows, step):
    assert collapse_step(rows) == step


def test_collapse_threshold():
    assert collapse_step(history(0.9, 0.3, 0.2), threshold=0.4) == 20
    assert collapse_step(history(0.9, 0.3, 0.2)) is None


FINAL = {
    "effective_rank": 31.2,
    "dimensions": 64.0,
    "images": 1000.0,
    "dead_fraction": 0.0,
    "positive_similarity": 0.914,
    "negative_similarity": 0.35,
}


@pytest.mark.parametrize(
    ("rows", "final", "sentence"),
    [
        (
            history(0.9, 0.0031, 0.003, projection_negative_similarity=0.9999),
            {},
            "representations have collapsed: since step 20 every image is projected to nearly the same point "
            "(spread 0.003, mean similarity of different images 0.9999)",
        ),
        (
            [*history(0.0001), {"step": 11, "projection_negative_similarity": 0.5}],
            {"negative_similarity": 0.75},
            "representations have collapsed: since step 10 every image is projected to nearly the same point "
            "(spread 0.0001, mean similarity of different images 0.7500)",
        ),
        (
            history(0.9, 0.8),
            {"effective_rank": 1.84},
            "representations have collapsed to few dimensions: effective rank 1.8 of 64, 0% dead dimensions, "
            "positives 0.91 similar, negatives 0.35",
        ),
        (
            history(0.9, 0.8),
            {},
            "representations are healthy: effective rank 31 of 64, 0% dead dimensions, positives 0.91 similar, "
            "negatives 0.35",
        ),
        (
            [],
            {"dead_fraction": 0.6},
            "representations are healthy: effective rank 31 of 64, positives 0.91 similar, negatives 0.35, but 60% of "
            "the dimensions are dead",
        ),
    ],
)
def test_verdict(rows, final, sentence):
    assert verdict(rows, FINAL | final) == sentence


def test_few_dimensions_are_few_of_what_the_images_can_span():
    wide = FINAL | {"dimensions": 2048.0, "images": 5000.0}
    assert "collapsed to few dimensions" in verdict([], wide | {"effective_rank": 40.9})
    assert "healthy" in verdict([], wide | {"effective_rank": 41.0})
    assert "healthy: effective rank 9.0 of 2048" in verdict([], wide | {"effective_rank": 9.0, "images": 16.0})
