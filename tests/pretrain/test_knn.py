"""The nearest-neighbour classifier against NumPy and scikit-learn."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from pretrain.knn import knn_accuracy, knn_scores

CLASSES = 4
SCORES = jax.jit(partial(knn_scores, classes=CLASSES), static_argnames=("k", "chunk"))


def clusters(count, seed=0, dimensions=6):
    """Overlapping classes, rows of very different lengths."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    centers = np.random.default_rng(99).normal(size=(CLASSES, dimensions))
    features = (centers[labels] + rng.normal(size=(count, dimensions))) * rng.lognormal(0, 2, (count, 1))
    return features.astype(np.float32), labels


def reference(queries, bank, labels, k, temperature):
    """float64, one query after the other."""
    queries, bank = queries.astype(np.float64), bank.astype(np.float64)
    scores = np.zeros((len(queries), CLASSES))
    for row, query in enumerate(queries):
        similarity = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        nearest = np.argsort(-similarity, kind="stable")[:k]
        for index in nearest:
            scores[row, labels[index]] += np.exp((similarity[index] - similarity[nearest[0]]) / temperature)
    return scores


@pytest.mark.parametrize(("k", "chunk"), [(1, 16), (5, 53), (20, 8), (1000, 16)])
def test_votes_are_those_of_the_reference(k, chunk):
    """Whatever the chunks: dividing the bank or not, larger than it, smaller than k."""
    (queries, _), (bank, labels) = clusters(9, 1), clusters(53)
    for temperature in (0.1, 2.0):
        got = SCORES(queries, bank, labels, k=k, temperature=temperature, chunk=chunk)
        assert got.shape == (9, CLASSES) and got.dtype == jnp.float32
        np.testing.assert_allclose(got, reference(queries, bank, labels, k, temperature), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("k", [1, 30])
def test_accuracy_is_scikit_learns(k):
    (queries, truth), (bank, labels) = clusters(101, 1), clusters(300)
    other = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.5))
    want = other.fit(bank, labels).score(queries, truth)
    assert 0.4 < want < 0.95
    options = {"classes": CLASSES, "k": k, "temperature": 0.5, "block": 32}
    got = knn_accuracy(jnp.asarray(queries), truth, bank, jnp.asarray(labels), **options)
    assert got == pytest.approx(want, abs=1e-9)


def test_defaults_are_the_protocols():
    (queries, truth), (bank, labels) = clusters(50, 1), clusters(600)
    want = np.mean(reference(queries, bank, labels, 200, 0.1).argmax(1) == truth)
    assert knn_accuracy(queries, truth, bank, labels, classes=CLASSES) == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("classes", [CLASSES, 30, 5000])
def test_accuracy_does_not_depend_on_absent_classes(classes):
    """With more classes than neighbours, only the neighbours' classes are counted; ties go to the lower class."""
    (queries, truth), (bank, labels) = clusters(50, 1), clusters(300)
    queries, bank = (np.sign(x) for x in (queries, bank))  # many equal similarities
    want = np.mean(np.asarray(SCORES(queries, bank, labels, k=6, temperature=0.5)).argmax(1) == truth)
    assert knn_accuracy(queries, truth, bank, labels, classes=classes, k=6, temperature=0.5) == want


@pytest.mark.parametrize("block", [1, 4, 13, 1024])
def test_every_query_counts_once(block):
    """13 queries of which the last alone is wrong, in blocks that do and do not divide them."""
    bank, labels = np.eye(CLASSES, dtype=np.float32), np.arange(CLASSES)
    truth = np.arange(13) % CLASSES
    queries = bank[truth]
    truth[-1] = 3
    assert knn_accuracy(queries, truth, bank, labels, classes=CLASSES, k=1, block=block) == pytest.approx(12 / 13)


def test_padding_is_never_a_neighbour():
    """All of the bank points away from the query, so that rows of zeros would be nearer."""
    bank = -np.abs(clusters(5)[0])
    query = np.ones((1, bank.shape[1]), np.float32)
    labels = np.asarray([1, 2, 3, 1, 2])
    got = SCORES(query, bank, labels, k=5, chunk=4)
    np.testing.assert_allclose(got, reference(query, bank, labels, 5, 0.1), rtol=2e-5)
    assert got[0, 0] == 0


@pytest.mark.parametrize("chunk", [2, 100])
def test_of_equals_the_earlier_vote(chunk):
    bank, labels = np.ones((9, 3), np.float32), np.asarray([2, 1, 1, 1, 0, 0, 0, 3, 3])
    got = SCORES(bank[:1], bank, labels, k=4, chunk=chunk)
    np.testing.assert_array_equal(got, [[0, 3, 1, 0]])


def test_rows_of_zeros_and_low_temperatures_are_finite():
    queries, (bank, labels) = clusters(3, 1)[0], clusters(20)
    queries[0] = bank[4] = 0
    for temperature in (1e-6, 0.1):
        got = np.asarray(SCORES(queries, bank, labels, k=5, temperature=temperature, chunk=8))
        assert np.isfinite(got).all() and (got.max(1) >= 1).all()


def test_memory_does_not_grow_with_the_bank():
    """The similarities of 512 queries and 65536 rows would be 128 MiB."""
    size = 1 << 16
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((512, 8), (size, 8))]
    labels = jax.ShapeDtypeStruct((size,), jnp.int32)
    step = jax.jit(lambda *a: knn_scores(*a, classes=10, chunk=1024))
    memory = step.lower(*shapes, labels).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 24 << 20


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": 0}, "k must be at least 1, not 0"),
        ({"temperature": 0.0}, "temperature must be above 0, not 0.0"),
        ({"temperature": float("nan")}, "temperature must be above 0"),
        ({"queries": np.zeros((0, 6))}, r"queries: needs features \[N, D\] and labels \[N\], got \(0, 6\) and \(3,\)"),
        ({"queries": np.ones((3, 2, 3))}, "queries: needs features"),
        ({"query_labels": np.zeros(4, int)}, r"queries: needs features .* got \(3, 6\) and \(4,\)"),
        ({"bank_labels": np.zeros(8)}, r"bank: labels must be integers in \[0, 4\)"),
        ({"bank_labels": np.arange(8)}, r"bank: labels must be integers in \[0, 4\)"),
        ({"query_labels": np.asarray([0, -1, 0])}, r"queries: labels must be integers in \[0, 4\)"),
        ({"bank": np.full((8, 6), np.nan)}, "bank: some features are not finite"),
    ],
)
def test_bad_input_is_named(wrong, message):
    arguments = {
        "queries": np.ones((3, 6)),
        "query_labels": np.zeros(3, int),
        "bank": np.ones((8, 6)),
        "bank_labels": np.zeros(8, int),
    }
    with pytest.raises(ValueError, match=message):
        knn_accuracy(**arguments | {"classes": CLASSES} | wrong)
