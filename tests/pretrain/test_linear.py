"""The linear probe against plain NumPy and scikit-learn; only validation decides its learning rate."""

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pretrain import linear
from pretrain.linear import linear_probe, probe_accuracy

CLASSES = 3
QUICK = {"classes": CLASSES, "epochs": 3, "batch": 16}


def problem(count, seed=0, dimensions=5):
    """Overlapping classes in dimensions of very different means and deviations."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    fixed = np.random.default_rng(99)
    centers, scale, shift = fixed.normal(size=(CLASSES, dimensions)), fixed.lognormal(0, 2, dimensions), fixed.normal()
    features = (centers[labels] + rng.normal(size=(count, dimensions))) * scale + shift
    return features.astype(np.float32), labels


def test_as_accurate_as_logistic_regression():
    """On digits, of which some pixels never change."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.split(np.random.default_rng(0).permutation(len(labels)), [900, 1100])
    train, validation, test = ((pixels[part], labels[part]) for part in order)
    other = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000)).fit(*train)
    want = other.score(*test)
    assert 0.7 < want < 0.99
    probe = linear_probe(train, validation, classes=10)
    assert probe_accuracy(probe, *test) == pytest.approx(want, abs=0.015)
    assert probe_accuracy(probe, *validation) == probe.validation_accuracy
    assert len(probe.validation_accuracies) == 7


@pytest.mark.parametrize("batch", [6, 1000])
def test_is_sgd_with_momentum_and_a_cosine(batch):
    """float64, written out: the same permutations, batches without the remainder, momentum 0.9."""
    train, rate, seed, epochs = problem(20), 0.3, 5, 4
    options = {"classes": CLASSES, "seed": seed, "epochs": epochs, "batch": batch}
    probe = linear_probe(train, problem(9, 1), learning_rates=[rate, 0.01], **options)
    single = linear_probe(train, problem(9, 1), learning_rates=[rate], **options)
    features, labels = train[0].astype(np.float64), np.eye(CLASSES)[train[1]]
    mean, std = features.mean(0), features.std(0)
    # The bias is the weight of a last feature of ones.
    features = np.concatenate([(features - mean) / std, np.ones((20, 1))], axis=1)
    size = min(batch, 20)
    steps = 20 // size
    weights = speed = np.zeros((6, CLASSES))
    for epoch in range(epochs):
        order = np.asarray(jax.random.permutation(jax.random.fold_in(jax.random.key(seed), epoch), 20))
        for step in range(steps):
            rows = order[step * size : (step + 1) * size]
            p = np.exp(features[rows] @ weights)
            error = (p / p.sum(1, keepdims=True) - labels[rows]) / size
            speed = 0.9 * speed + features[rows].T @ error
            weights = weights - rate * (1 + np.cos(np.pi * (epoch * steps + step) / (epochs * steps))) / 2 * speed
    np.testing.assert_allclose([*single.kernel, single.bias], weights, atol=1e-5)
    np.testing.assert_allclose([single.mean, single.std], [mean, std], rtol=1e-6)
    # Alone or next to a different rate.
    assert probe.validation_accuracies[rate] == single.validation_accuracy


def test_learning_rate_is_the_best_on_validation():
    """Validation labels that say nothing: what is best on them is not what is best in training."""
    train, (features, _) = problem(200), problem(40, 1)
    chosen = set()
    for seed in range(4):
        validation = features, np.random.default_rng(seed).integers(0, CLASSES, 40)
        probe = linear_probe(train, validation, **QUICK)
        accuracies = probe.validation_accuracies
        assert list(accuracies) == list(linear.LEARNING_RATES)
        assert probe.validation_accuracy == max(accuracies.values()) == probe_accuracy(probe, *validation)
        assert probe.learning_rate == min(rate for rate, a in accuracies.items() if a == max(accuracies.values()))
        chosen.add(probe.learning_rate)
    assert len(chosen) > 1


def test_of_equals_the_smallest_learning_rate_wins():
    train = np.asarray([[-1.0], [1.0]] * 8), np.asarray([0, 1] * 8)
    probe = linear_probe(train, train, **QUICK, learning_rates=[0.3, 0.1, 0.2])
    assert probe.validation_accuracies == {0.1: 1.0, 0.2: 1.0, 0.3: 1.0}
    assert probe.learning_rate == 0.1


def test_divergence_does_not_win():
    """Logits that are nan predict class 0, which here would be right each time."""
    train, (features, _) = problem(200), problem(40, 1)
    validation = features, np.zeros(40, int)
    probe = linear_probe(train, validation, **QUICK, learning_rates=[0.1, 3e38])
    assert probe.validation_accuracies[3e38] == 0 < probe.validation_accuracies[0.1] < 1
    assert probe.learning_rate == 0.1 and np.isfinite(probe.kernel).all()
    with pytest.raises(ValueError, match="diverged at every learning rate, even at the lowest, 3e\\+38"):
        linear_probe(train, validation, **QUICK, learning_rates=[3e38])


def test_other_splits_do_not_shape_the_probe():
    """Validation features of another kind move neither the standardisation nor the weights."""
    train, (features, labels) = problem(200), problem(40, 1)
    options = {**QUICK, "learning_rates": [0.1]}
    probe = linear_probe(train, (features, labels), **options)
    other = linear_probe(train, (features * 100 - 7, 2 - labels), **options)
    for name in ("kernel", "bias", "mean", "std"):
        np.testing.assert_array_equal(getattr(probe, name), getattr(other, name))
    assert probe.validation_accuracy != other.validation_accuracy


def test_dead_dimensions_are_harmless():
    """Constants, of which one is not exact in float32 and comes back rounded otherwise; at the test they may differ."""
    train, test = problem(200), problem(300, 2)
    plain = linear_probe(train, test, **QUICK, learning_rates=[0.1])

    def with_dead(split, values):
        features, labels = split
        return np.concatenate([features, np.broadcast_to(values, (len(features), 3))], axis=1), labels

    noise = np.where(np.arange(200) % 7 == 0, np.nextafter(np.float32(0.1), np.float32(1)), np.float32(0.1))
    dead = with_dead(train, np.stack([0 * noise, 0 * noise + 1000.1, noise], axis=1))
    for values in ([0.0, 1000.1, 0.1], [5.0, 0.0, 0.3]):
        probe = linear_probe(dead, with_dead(test, np.asarray(values, np.float32)), **QUICK, learning_rates=[0.1])
        np.testing.assert_allclose(probe.kernel[:5], plain.kernel, atol=1e-6)
        np.testing.assert_allclose(probe.kernel[5:], 0, atol=1e-6)
        assert probe.validation_accuracy == plain.validation_accuracy


def test_units_of_the_features_do_not_matter():
    (features, labels), units = problem(200), np.asarray([2.0**40, 2.0**-30, 1, 8, 0.5], np.float32)
    probe = linear_probe((features, labels), (features, labels), **QUICK)
    other = linear_probe((features * units, labels), (features * units, labels), **QUICK)
    np.testing.assert_allclose(probe.kernel, other.kernel, atol=1e-6)
    assert probe.validation_accuracies == other.validation_accuracies


def test_equal_seeds_are_equal_and_one_compilation_serves_all():
    train, validation = problem(210), problem(40, 1)
    first = linear_probe(train, validation, **QUICK)
    before = linear._fit._cache_size()
    again, other = (linear_probe(train, validation, **QUICK, seed=seed) for seed in (0, 1))
    assert linear._fit._cache_size() == before
    np.testing.assert_array_equal(first.kernel, again.kernel)
    assert first.validation_accuracies == again.validation_accuracies
    assert not np.array_equal(first.kernel, other.kernel)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"learning_rates": []}, "pass at least one learning rate"),
        ({"learning_rates": [0.1, -1.0]}, "all above 0 and finite, got"),
        ({"epochs": 0}, "epochs and batch must be at least 1, got 0 and 16"),
        ({"batch": 0}, "epochs and batch must be at least 1, got 3 and 0"),
        ({"classes": 2}, r"train: labels must be integers in \[0, 2\)"),
        ({"train": (np.ones((0, 5)), np.ones(0, int))}, "train: needs features"),
        ({"validation": (np.ones((2, 5)), np.ones(3, int))}, "validation: needs features"),
        ({"validation": (np.full((2, 5), np.inf), np.ones(2, int))}, "validation: some features are not finite"),
    ],
)
def test_bad_input_is_named(wrong, message):
    arguments = {"train": problem(20), "validation": problem(9, 1)} | QUICK | wrong
    with pytest.raises(ValueError, match=message):
        linear_probe(**arguments)
