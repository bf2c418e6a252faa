"""Interleaved timing: the order of measurements, medians and their spread, the interval of a ratio."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.timing import interleaved, ratio, summary

blocks = st.integers(2, 6).flatmap(
    lambda n: st.lists(st.lists(st.floats(1e-4, 10), min_size=3, max_size=3), min_size=n, max_size=n).map(np.array)
)


@pytest.fixture(scope="module", autouse=True)
def few_resamples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.timing.RESAMPLES", 100)
        yield


@given(blocks, st.floats(0.01, 100))
@settings(deadline=None, max_examples=5)
def test_ratio_and_interval_scale(a, factor):
    assert ratio(a, a) == {"value": 1.0, "low": 1.0, "high": 1.0}
    b = a[::-1] * np.linspace(1, 2, a.size).reshape(a.shape)
    want = {name: pytest.approx(factor * value) for name, value in ratio(a, b).items()}
    assert ratio(factor * a, b) == want
    assert ratio(a, b) == ratio(a, b)  # the seed is fixed
    turned, one = ratio(b, a), ratio(a, b)
    assert one["low"] <= one["value"] <= one["high"]
    assert turned["value"] == pytest.approx(1 / one["value"])


def test_interval_covers_the_truth_as_often_as_it_claims():
    """Blocks of equal runners that drift: 95 % intervals miss 1 in about one of twenty comparisons."""
    rng = np.random.default_rng(0)

    def drifting(n):
        return np.exp(rng.normal(0, 0.05, (n, 1)) + rng.exponential(0.05, (n, 5)))

    for n in (3, 5):
        found = [ratio(drifting(n), drifting(n)) for _ in range(100)]
        assert sum(not one["low"] <= 1 <= one["high"] for one in found) <= 12
    for a, b in ((1, 1), (3, 2)):
        with pytest.raises(ValueError, match="two or more pairs of blocks"):
            ratio(np.ones((a, 3)), np.ones((b, 3)))


def test_summary_has_known_quartiles():
    found = summary(np.arange(1, 101).reshape(10, 10) / 1e3)
    assert found["step_ms"] == pytest.approx(50.5)
    assert (found["step_ms_q1"], found["step_ms_q3"]) == pytest.approx((25.75, 75.25))
    assert (found["step_ms_min"], found["step_ms_max"]) == pytest.approx((1, 100))
    assert found["step_ms_p95"] == pytest.approx(95.05)
    assert found["spread"] == pytest.approx(49.5 / 50.5)


class Result:
    """Logs when it is waited for."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def block_until_ready(self):
        self.log.append(f"wait {self.name}")
        return self


def test_runners_take_turns_in_both_orders():
    log = []
    runners = {name: lambda name=name: log.append(name) for name in "ab"}
    seconds = interleaved(runners, steps=2, repeats=3, warmup=1, settle=0)
    assert "".join(log) == "ab" + "aabb" + "bbaa" + "aabb"
    assert {name: s.shape for name, s in seconds.items()} == {"a": (3, 2), "b": (3, 2)}
    log.clear()
    interleaved(runners, steps=1, repeats=2, warmup=1)
    assert "".join(log) == "ab" + "aabb" + "bbaa"  # one untimed call after each change


@pytest.mark.parametrize(
    ("ahead", "order"),
    [
        (False, "call 1, wait 1, call 2, wait 2, call 3, wait 3"),
        (True, "call 1, call 2, wait 1, call 3, wait 2, wait 3"),
    ],
)
def test_each_call_is_waited_for(ahead, order):
    log = []

    def runner():
        number = sum(line.startswith("call") for line in log)
        log.append(f"call {number}")
        time.sleep(0.01)
        return Result(log, number)

    seconds = interleaved({"a": runner}, steps=3, repeats=1, warmup=1, ahead=ahead)["a"]
    assert ", ".join(log) == f"call 0, wait 0, {order}"
    assert (seconds[:, :-1] >= 0.01).all()
