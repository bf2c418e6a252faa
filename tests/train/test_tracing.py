"""`--profile FROM:TO`: which steps are traced, and what is refused."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from flax import struct

from train.config import TrainConfig, check
from train.errors import UsageError
from train.loop import fit
from train.tracing import Trace, traced_steps


class Counter(struct.PyTreeNode):
    """A state that counts."""

    step: int = 0


class Chunks:
    """Chunks of the next batches, as `fit` asks for them."""

    def chunk(self, count, most):
        return count


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("5", "--profile '5' is not of the form FROM:TO"),
        ("a:b", "not of the form"),
        ("-1:4", "not of the form"),
        ("0:4", "steps count from 1"),
        ("7:6", "FROM must not be above TO"),
        ("5:21", "the run has only 20 steps"),
    ],
)
def test_bad_ranges(profile, message):
    with pytest.raises(UsageError, match=message):
        traced_steps(profile, 20)
    if profile != "5:21":
        with pytest.raises(UsageError, match=message):
            check(TrainConfig(profile=profile))
    assert traced_steps("5:20", 20) == (5, 20) and traced_steps(None, 20) is None


@pytest.mark.parametrize(("per_call", "start"), [(1, 0), (4, 0), (4, 4)])
def test_exactly_these_steps_are_traced(per_call, start, tmp_path, monkeypatch):
    """Calls of several steps end before the first and after the last; validations at the ends are outside."""
    events = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *args, **options: events.append("begin"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("end"))

    def step(state, batch):
        count = batch if per_call > 1 else 1
        events.extend(range(state.step + 1, state.step + count + 1))
        return state.replace(step=state.step + count), {"loss": jnp.ones(count)}

    data = Chunks() if per_call > 1 else itertools.count()
    lines = []
    fit(
        step,
        Counter(step=start),
        data,
        steps=12,
        per_call=per_call,
        hooks=[(5, lambda state: events.append("validation"))],
        trace=Trace(6, 10, tmp_path, lines.append),
    )
    expected = [1, 2, 3, 4, 5, "validation", "begin", 6, 7, 8, 9, 10, "end", "validation", 11, 12, "validation"]
    assert events == [event for event in expected if isinstance(event, str) or event > start]
    assert lines[0].startswith("traced steps 6 to 10: open ")


def test_a_profiler_that_fails_does_not_stop_the_run(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("only one profile at a time")

    monkeypatch.setattr(jax.profiler, "start_trace", fail)
    lines, trace = [], Trace(1, 2, tmp_path, lambda line: lines.append(line))
    for number in range(4):
        trace.before(number, ())
        trace.after(number + 1, ())
    trace.close()
    assert lines == ["note: no profile is written, the run goes on: RuntimeError: only one profile at a time"]


def test_on_other_hosts_only_the_calls_are_cut(tmp_path):
    """All hosts must compute the same calls."""
    traces = [Trace(3, 5, folder, print) for folder in (tmp_path, None)]
    assert [[trace.room(number) for number in range(5)] for trace in traces] == [[2, 1, 3, 2, 1]] * 2
    assert traces[1].room(5) > 10**6
    traces[1].before(2, ())
    assert not traces[1].running
