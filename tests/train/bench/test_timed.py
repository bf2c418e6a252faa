"""How often steps are timed: as flags say, otherwise within some seconds. Shares of a step's time."""

import pytest

from tests.train.bench.toy import tiny
from train import timing
from train.bench import timed
from train.bench.timed import how_often, split, time_runners


@pytest.mark.parametrize(
    ("flags", "rounds", "fewest", "settle", "want"),
    [
        ((None, None), 1e6, 1, 1, (10, 5)),  # all that is ever timed
        ((None, None), 25, 1, 1, (4, 5)),  # an untimed call and four steps, five times
        ((None, None), 10.9, 1, 0, (2, 5)),
        ((None, None), 3.5, 1, 0, (1, 3)),
        ((None, None), 0.1, 1, 1, (1, 2)),  # the least that has a spread
        ((None, None), 7, 2, 0, (2, 3)),  # one step ahead
        ((20, None), 1e6, 1, 0, (20, 5)),
        ((20, None), 60, 1, 0, (20, 3)),
        ((None, 30), 60, 1, 1, (1, 30)),
        ((7, 9), 0.1, 3, 1, (7, 9)),
    ],
)
def test_how_often(flags, rounds, fewest, settle, want):
    assert how_often(tiny(steps=flags[0], repeats=flags[1]), rounds, fewest, settle) == want


@pytest.fixture
def run(monkeypatch):
    """`run(seconds, **fields)`: how often runners of these seconds are timed; compiling takes four times as long."""
    clock = [0.0]
    monkeypatch.setattr(timed.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(timing.gc, "collect", lambda: 0)

    def run(seconds, **fields):
        calls = dict.fromkeys(seconds, 0)

        def runner(name):
            def call():
                clock[0] += seconds[name] * (1 if calls[name] else 5)
                calls[name] += 1

            return call

        began = clock[0]
        each, counts = time_runners({name: runner(name) for name in seconds}, tiny(**fields), seconds=10)
        assert {name: x.shape for name, x in each.items()} == dict.fromkeys(
            seconds, (counts["repeats"], counts["steps"])
        )
        blocks = counts["repeats"] * (counts["steps"] + counts["settle"])
        assert calls == dict.fromkeys(seconds, counts["warmup"] + blocks)
        return counts, clock[0] - began

    return run


AUTO = {"steps": None, "repeats": None, "warmup": None}


def test_quick_steps_are_timed_as_often_as_ever(run):
    assert run({"a": 1e-3}, **AUTO)[0] == {"warmup": 3, "settle": 0, "steps": 10, "repeats": 5}
    assert run({"a": 1e-3, "b": 2e-3}, **AUTO)[0] == {"warmup": 3, "settle": 1, "steps": 10, "repeats": 5}


def test_slow_steps_are_timed_less_often(run):
    counts, seconds = run({"a": 0.7, "b": 0.3}, **AUTO)
    assert counts == {"warmup": 3, "settle": 0, "steps": 2, "repeats": 5}
    assert seconds == pytest.approx(7 + 10)
    counts, seconds = run({"a": 2.0, "b": 1.0}, **AUTO)
    assert counts == {"warmup": 2, "settle": 0, "steps": 1, "repeats": 3}


def test_flags_say_how_often(run):
    assert run({"a": 2.0}, steps=7, repeats=9, warmup=4)[0] == {"warmup": 4, "settle": 0, "steps": 7, "repeats": 9}
    assert run({"a": 2.0}, **{**AUTO, "repeats": 9})[0] == {"warmup": 2, "settle": 0, "steps": 1, "repeats": 9}


def test_shares_are_differences_and_add_up():
    found = split({"input": 1.0, "augmentation": 1.0, "forward": 3.0, "backward": 7.0, "optimizer": 7.0})
    want = {"input": 0.125, "augmentation": 0.125, "forward": 0.25, "backward": 0.5, "optimizer": 0.0}
    assert found == pytest.approx(want)
    # The loss was measured as slower than with its gradient: the gradient adds nothing, and no share is negative.
    assert split({"forward": 4.0, "backward": 3.0, "optimizer": 5.0}) == pytest.approx(
        {"forward": 0.6, "backward": 0.0, "optimizer": 0.4}
    )
