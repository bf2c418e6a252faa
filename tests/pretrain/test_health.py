"""Health of representations against plain NumPy, on features known to be healthy or collapsed."""

import json
from functools import partial

import jax
import numpy as np
import pytest

from pretrain.health import collapse_step, health, rank, uniformity, verdict

B, D = 40, 6
ALL_EQUAL = {
    "feature_std": 0, "effective_rank": 0, "rank_me": 1, "dead_fraction": 1, "negative_similarity": 1, "uniformity": 0
}  # fmt: skip


def features(seed=0, count=B, dimensions=D):
    """Correlated dimensions of different means, and rows of very different lengths."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, dimensions)) @ rng.normal(size=(dimensions, dimensions)) + rng.normal(size=dimensions)
    return (x * rng.lognormal(0, 1, (count, 1))).astype(np.float32)


# --- references -------------------------------------------------------------------------------------------------------


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def over_pairs(f, x):
    return np.mean([f(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])


def entropy_of(singular):
    p = singular / singular.sum()
    return np.exp(-sum(q * np.log(q) for q in p if q > 0))


def reference(a, b):
    """All measures in float64, pair by pair."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return {
        "alignment": np.mean([2 - 2 * cosine(x, y) for x, y in zip(a, b, strict=True)]),
        "positive_similarity": np.mean([cosine(x, y) for x, y in zip(a, b, strict=True)]),
        "uniformity": np.log(over_pairs(lambda x, y: np.exp(-2 * (2 - 2 * cosine(x, y))), a)),
        "negative_similarity": over_pairs(cosine, a),
        "feature_std": np.std([row / np.linalg.norm(row) for row in a], axis=0).mean() * np.sqrt(a.shape[1]),
        "dead_fraction": np.mean([column.std() < 1e-3 * np.sqrt(np.mean(a**2)) for column in a.T]),
        "rank_me": entropy_of(np.sqrt(np.maximum(np.linalg.eigvalsh(a.T @ a), 0))),
        "effective_rank": entropy_of(np.sqrt(np.maximum(np.linalg.eigvalsh(np.cov(a.T)), 0))),
        "images": len(a),
        "dimensions": a.shape[1],
    }


@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_reference(seed):
    a, b = features(seed), features(seed) + features(seed + 10)
    assert health(a, b) == pytest.approx(reference(a, b), rel=2e-5)
    # Half of the dimensions dead: far from 0 and constant, hardly varying, zero.
    a[:, :3] = [5.0, 1.0, 0.0]
    a[::2, 1] += 1e-4
    assert health(a, b)["dead_fraction"] == reference(a, b)["dead_fraction"] == 0.5


@pytest.mark.parametrize("rows", [7, 8, 39, 1000])
def test_uniformity_does_not_depend_on_blocks(rows):
    units = features() / np.linalg.norm(features(), axis=1, keepdims=True)
    got = jax.jit(partial(uniformity, block=rows))(units)
    assert float(got) == pytest.approx(reference(features(), features())["uniformity"], rel=1e-5)


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
    assert all(type(number) is float for number in found.values())
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("noise", [0, 1e-7])
def test_constant_features_are_found(noise):
    """As float32 rounds them, too: that noise spans all dimensions and is none of them."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(1, 16)) * (1 + noise * rng.normal(size=(64, 16)))).astype(np.float32)
    found = health(x, x)
    assert {name: found[name] for name in ALL_EQUAL} == pytest.approx(ALL_EQUAL, abs=1e-5)


def test_features_on_a_line_are_found():
    """Of rank 1, while single directions are spread: only the ranks see it."""
    rng = np.random.default_rng(0)
    x = np.outer(rng.normal(size=64), rng.normal(size=16)).astype(np.float32)
    found = health(x, x)
    assert found["feature_std"] > 0.7
    assert (found["effective_rank"], found["rank_me"]) == pytest.approx((1, 1), abs=1e-4)
    # Off the origin the centred rank still is 1.
    assert rank(x + 100, center=True) == pytest.approx(1, abs=1e-2)
    assert rank(x + 100) > 1.01


def test_ranks_of_known_spectra():
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(50, 8)))[0]
    for singular in ([1] * 8, [1] * 3 + [0] * 5, [4, 2, 1, 1, 0, 0, 0, 0]):
        assert rank(q * singular) == pytest.approx(entropy_of(np.asarray(singular, float)), rel=1e-6)
    # Small singular values, whose squares float32 would lose next to the large one's.
    small = np.asarray([1.0] + [1e-4] * 7)
    assert rank((q * small).astype(np.float32)) == pytest.approx(entropy_of(small), rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 3), (1, 1), (5, 1), (2, 8)])
def test_degenerate_features_are_finite(shape):
    for constant in (0.0, 2.5, 1e-30):
        found = health(np.full(shape, constant), np.full(shape, -constant))
        assert np.isfinite(list(found.values())).all()
        assert (found["effective_rank"], found["dead_fraction"]) == (0, 1)
        assert found["feature_std"] == pytest.approx(0, abs=1e-6)
        judged = "representations have collapsed to few dimensions" if shape[0] > 3 else "too few validation images"
        assert verdict([], found).startswith(judged)


def test_bad_input_is_named():
    for a, b in [((4, 3), (4, 2)), ((4,), (4,)), ((0, 3), (0, 3)), ((2, 2, 2), (2, 2, 2))]:
        with pytest.raises(ValueError, match=r"one shape \[B, D\] and not be empty, got"):
            health(np.ones(a), np.ones(b))
    with pytest.raises(ValueError, match="not finite"):
        health(np.ones((4, 3)), np.full((4, 3), np.nan))


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


@pytest.mark.parametrize("images", [1, 2, 3, 4, 5, 8])
def test_few_images_are_not_a_collapse(images):
    """Features of every direction are healthy as soon as there are enough to say so; those on a line never are."""
    rng = np.random.default_rng(0)
    spread, line = rng.normal(size=(images, 32)), np.outer(rng.normal(size=images), np.ones(32))
    few = f"too few validation images ({images}) to judge the representations: effective rank "
    healthy, collapsed = "representations are healthy", "representations have collapsed to few dimensions"
    assert verdict([], health(spread, spread)).startswith(healthy if images > 3 else few)
    assert verdict([], health(line, line)).startswith(collapsed if images > 3 else few)
    # The history is measured on training batches.
    assert "since step 10 every image" in verdict(history(0.01, 0.01), health(spread, spread))


def test_few_dimensions_are_few_of_what_the_images_can_span():
    wide = FINAL | {"dimensions": 2048.0, "images": 5000.0}
    assert "collapsed to few dimensions" in verdict([], wide | {"effective_rank": 40.9})
    assert "healthy" in verdict([], wide | {"effective_rank": 41.0})
    assert "healthy: effective rank 9.0 of 2048" in verdict([], wide | {"effective_rank": 9.0, "images": 16.0})
