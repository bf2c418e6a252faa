"""The training loop: when it calls hooks, what it reports, how it stops."""

import itertools
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from train.errors import RunError
from train.loop import Progress, evaluate, fit, read_rows
from train.run_folder import write_confusion
from train.steps import confusion_matrix, summarize


class Counter(struct.PyTreeNode):
    """A state that counts."""

    step: int = 0


class FakeState(struct.PyTreeNode):
    """The fields of a state that must be finite."""

    step: int = 0
    params: Any = None
    batch_stats: Any = None
    ema: Any = None


HOOKS = {2: [2, 4, 6, 7], 3: [3, 6, 7]}  # when those of 7 steps are called: always after the last


def count(state, batch):
    return state.replace(step=state.step + 1), {"loss": jnp.asarray(float(batch)), "accuracy": jnp.asarray(0.5)}


@pytest.mark.parametrize("start", [0, 4])
def test_steps_logs_and_hooks(start):
    """From where the state is."""
    logged, hooked = [], {2: [], 3: []}
    state = fit(
        count,
        Counter(step=start),
        itertools.count(start + 1),
        steps=7,
        hooks=[(every, lambda s, every=every: hooked[every].append(s.step)) for every in hooked],
        log=lambda step, rows: logged.append((step, rows[0]["loss"])),
    )
    assert state.step == 7
    assert logged == [(n, float(n)) for n in range(start + 1, 8)]
    assert hooked == {every: [n for n in numbers if n > start] for every, numbers in HOOKS.items()}


def test_logging_lags_one_step_behind_the_dispatch():
    """Metrics are looked at only after the next step was dispatched: the device never waits for the host."""
    events = []

    def step(state, batch):
        events.append(f"dispatch {batch}")
        return count(state, batch)

    fit(step, Counter(), itertools.count(1), steps=3, log=lambda n, metrics: events.append(f"look {n}"))
    assert events == ["dispatch 1", "dispatch 2", "look 1", "dispatch 3", "look 2", "look 3"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [4, 6])
def test_not_finite_stops_before_any_hook_sees_it(bad, at):
    seen = []

    def step(state, batch):
        state, metrics = count(state, batch)
        return state, metrics | {"loss": jnp.asarray(bad if batch == at else 1.0)}

    with pytest.raises(RunError, match=f"loss at step {at} is not finite"):
        fit(step, Counter(), itertools.count(1), steps=10, hooks=[(2, lambda s: seen.append(s.step))])
    assert seen == [n for n in (2, 4) if n < at]


@pytest.mark.parametrize("field", ["params", "batch_stats", "ema"])
@pytest.mark.parametrize("hooks", [[], [(1, print)]])
def test_parameters_after_the_last_update(field, hooks, capsys):
    """Its loss was finite: that of the next step would not be."""

    def step(state, batch):
        return FakeState(step=1, **{field: {"w": jnp.asarray([1.0, jnp.nan])}}), {}

    with pytest.raises(RunError, match=r"after step 1 are not finite: lower the learning rate"):
        fit(step, FakeState(), itertools.count(), steps=1, hooks=hooks)
    assert capsys.readouterr().out == ""


def test_progress_writes_means_and_resumes_without_duplicates(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 9.0}\n{"step": 4, "loss": 9.0}\n{"step": 6, "lo')
    progress = Progress(path, start=2, steps=6, epoch_steps=2.0, batch=8, every=2)
    for step in range(3, 7):
        progress.log(step, [{"loss": float(step), "accuracy": 0.5}])
    progress.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in rows] == [(2, 9.0), (4, 3.5), (6, 5.5)]
    assert rows[-1]["epoch"] == 3.0
    said = capsys.readouterr().err
    assert "step 6/6" in said and "loss 5.5" in said and "images/s" in said
    assert progress.images_per_second > 0


def test_rate_is_that_of_the_calls(monkeypatch):
    """Neither the first call counts, nor what comes after the last one: writing checkpoints and traces."""
    clock = iter([0.0, 10.0, 11.0, 12.0])
    monkeypatch.setattr("train.loop.time.perf_counter", lambda: next(clock))
    progress = Progress(None, start=0, steps=9, epoch_steps=9.0, batch=8, every=9, silent=True)
    for step in (3, 6, 9):
        progress.log(step, [{"loss": 0.0}] * 3)
    assert progress.images_per_second == 6 * 8 / 2.0
    progress.close()


def test_history_survives_a_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n')

    def full(self, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.write_bytes", full)
        with pytest.raises(RunError, match=r"cannot write .*metrics\.jsonl: .*No space left"):
            Progress(path, start=2, steps=6, epoch_steps=2.0, batch=8, every=2)
    assert [row["step"] for row in read_rows(path)] == [2, 4]


def test_disk_full_while_logging():
    progress = Progress(None, start=0, steps=2, epoch_steps=1.0, batch=1, every=1)
    progress.file = open("/dev/full", "a", buffering=1)  # noqa: SIM115
    with pytest.raises(RunError, match="cannot write /dev/full"):
        progress.log(1, [{"loss": 0.0, "accuracy": 0.0}])
    with pytest.raises(OSError):
        progress.file.close()


def sums(confusion, calibration):
    confusion = np.asarray(confusion, float)
    return {
        "count": confusion.sum(),
        "loss": 3.0,
        "correct": np.trace(confusion),
        "top5": confusion.sum(),
        "by_class": [confusion.sum(1), np.diag(confusion)],
        "pairs": [pair for pair in np.ndindex(confusion.shape) for _ in range(int(confusion[pair]))] or [[-1, -1]],
        "calibration": np.asarray(calibration, float),
    }


def test_evaluate_adds_sums_and_divides_once():
    parts = [
        sums([[2, 0], [1, 0]], [[3, 0], [1.5, 0], [2, 0]]),
        sums([[0, 1], [0, 2]], [[0, 3], [0, 2.4], [0, 2]]),
    ]
    found = evaluate(lambda variables, batch: parts[batch], None, range(2))
    assert found["count"] == 6
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["loss"] == pytest.approx(1.0)
    np.testing.assert_allclose(found["per_class_accuracy"], [2 / 3, 2 / 3])
    np.testing.assert_array_equal(found["confusion"], [[0, 0, 2], [0, 1, 1], [1, 0, 1], [1, 1, 2]])
    np.testing.assert_array_equal(confusion_matrix(found["confusion"], 2), [[2, 1], [1, 2]])
    # Bin 1: confidence 0.5 against accuracy 2/3; bin 2: 0.8 against 2/3; each holds half of the examples.
    assert found["calibration_error"] == pytest.approx((abs(1.5 - 2) + abs(2.4 - 2)) / 6)


@pytest.mark.parametrize(("classes", "file"), [(1000, "matrix"), (1001, "counts")])
def test_confusion_file(tmp_path, classes, file):
    """The matrix up to 1,000 classes, else the pairs that occurred: 5,000 classes would be 150 MB."""
    names = [f"class {c}" for c in range(classes)]
    confusion = np.asarray([[0, 0, 9], [3, 5, 2], [999, 0, 4]])
    write_confusion(tmp_path, confusion, names)
    kept = json.loads((tmp_path / "confusion.json").read_text())
    assert kept["classes"] == names
    assert kept["most_confused"] == [["class 999", "class 0", 4], ["class 3", "class 5", 2]]
    if file == "matrix":
        np.testing.assert_array_equal(kept["confusion"], confusion_matrix(confusion, classes))
    else:
        assert kept["counts"] == confusion.tolist() and "confusion" not in kept


def test_without_examples():
    """A class without examples has no accuracy; a split without any is refused."""
    found = summarize(sums([[2, 1], [0, 0]], [[3], [2], [2]]))
    assert np.isnan(found["per_class_accuracy"][1])
    with pytest.raises(ValueError, match="no examples"):
        evaluate(lambda variables, batch: {}, None, [])
    with pytest.raises(ValueError, match="no examples"):
        summarize(sums([[0, 0], [0, 0]], [[0], [0], [0]]))
