"""Comparing two configs, and the gate."""

import json
import time
from pathlib import Path

import pytest

from tests.train.bench.toy import TOY, toy
from train.bench import bench, compare
from train.bench.__main__ import main
from train.bench.compare import verdict
from train.bench.table import render


@pytest.fixture(scope="module")
def compared():
    """Of the toy step: a batch of 16, and one of 32 that keeps its state."""
    return bench(toy(versus="--batch 32 --no-donate"), tasks=TOY)


def test_versus_measures_both(compared):
    versus = compared["versus"]
    assert (compared["batch"], versus["result"]["batch"]) == (16, 32)
    steps, rates = versus["step_ms_ratio"], versus["images_per_second_ratio"]
    assert steps["value"] == pytest.approx(compared["step_ms"] / versus["result"]["step_ms"])
    assert rates["value"] == pytest.approx(0.5 / steps["value"])
    assert " as fast as B" in versus["verdict"] and versus["verdict"] in render(compared)


def test_state_is_donated_by_default(compared):
    assert compared["memory"]["aliased_bytes"] > 0
    assert compared["versus"]["result"]["memory"]["aliased_bytes"] == 0


def test_verdict():
    assert verdict({"value": 1.32, "low": 1.28, "high": 1.36}) == "A is 1.32x (1.28-1.36) as fast as B"
    assert verdict({"value": 1.01, "low": 0.97, "high": 1.05}).startswith("no difference beyond noise")


# ---- the gate -----------------------------------------------------------------------------------------------------


def sleeper(seconds, calls=None):
    def run():
        if calls is not None:
            calls.append(seconds)
        time.sleep(seconds)

    return run


def test_gate_fails_what_is_slower_twice_and_passes_the_rest(capsys):
    calls = []
    runners = {
        "same": (sleeper(0.004), sleeper(0.004)),
        "slowed": (sleeper(0.008, calls), sleeper(0.004)),
        "slow as ever": (sleeper(0.008), sleeper(0.004)),
    }
    limits = {"same": 1.0, "slowed": 1.0, "slow as ever": 2.0}
    found = compare.judged(runners.__getitem__, list(runners), limits, steps=3, repeats=5, warmup=1)
    assert {name: one["passed"] for name, one in found.items()} == {"same": True, "slowed": False, "slow as ever": True}
    assert found["slowed"]["measured"] == 2 and len(calls) == 2 * (1 + 5 * (1 + 3))
    assert "slowed: ours takes " in capsys.readouterr().err


def test_gate_forgives_one_bad_measurement(monkeypatch):
    measured = iter([{"value": 2.0, "low": 1.9, "high": 2.1}, {"value": 1.0, "low": 0.9, "high": 1.1}])
    monkeypatch.setattr(compare, "ratio", lambda a, b: next(measured))
    runners = {"eval": (sleeper(0), sleeper(0))}
    found = compare.judged(runners.__getitem__, ["eval"], {"eval": 1.0}, steps=1, repeats=2, warmup=1)
    assert found["eval"]["passed"] and found["eval"]["measured"] == 2


@pytest.fixture
def stubbed(tmp_path, monkeypatch):
    """A gate's file with plain steps of 3 ms; `stubbed.seconds` is what ours take."""

    class Stub:
        seconds, path = 0.003, tmp_path / "plain.py"

    class Ours:
        def __init__(self, *_):
            self.stepper = sleeper(Stub.seconds)

    Stub.path.write_text("import time\nPIPELINES = {n: lambda batch: lambda: time.sleep(0.003) for n in ('a', 'b')}\n")
    monkeypatch.setattr(compare, "OURS", {"a": lambda config: None, "b": lambda config: None})
    monkeypatch.setattr(compare, "prepare", Ours)
    return Stub


def test_gate_by_command_line(stubbed, fails, capsys, tmp_path):
    line = ["--gate", str(stubbed.path), "--steps", "3", "--repeats", "5"]
    assert "write them with --gate-record" in fails(2, main, line)
    main([*line, "--gate-record"])
    limits = json.loads((tmp_path / "gate.json").read_text())
    assert set(limits) == {"cpu plain"} and set(limits["cpu plain"]) == {"a", "b"}
    main(line)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(one["passed"] for one in result["gate"]["pipelines"].values())
    stubbed.seconds = 0.006
    said = fails(1, main, line)
    assert "a takes " in said and "b takes " in said and "more than 15% slower than" in said


def test_limits_of_another_kind_of_device_do_not_count(stubbed, fails, tmp_path):
    (tmp_path / "gate.json").write_text('{"gpu plain": {"a": 1.0, "b": 1.0}}')
    assert "has no limit on cpu plain for a, b: write them with" in fails(2, main, ["--gate", str(stubbed.path)])
    (tmp_path / "gate.json").write_text('["gpu"]')
    assert "cannot read the limits" in fails(2, main, ["--gate", str(stubbed.path)])


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (None, "is not a Python file"),
        ("1 / 0", "cannot be loaded: ZeroDivisionError"),
        ("x = 1", "does not define PIPELINES"),
        ("PIPELINES = {'trian': None}", "unknown pipeline 'trian': did you mean train?"),
    ],
)
def test_broken_gates(program, said, tmp_path, fails):
    path = tmp_path / "plain.py"
    if program is not None:
        path.write_text(program)
    assert said in fails(2, main, ["--gate", str(path)])


def test_the_projects_gate_can_be_held_against():
    """Every pipeline has a counterpart, and a limit that was recorded."""
    plain = compare.load_gate(Path(__file__).parents[2] / "reference" / "plain_step.py", record=False)
    assert set(plain.pipelines) == set(compare.OURS)
    for limits in plain.limits.values():
        assert set(limits) == set(plain.pipelines) and all(0 < limit < 1.1 for limit in limits.values())
