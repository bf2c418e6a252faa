"""Comparing two configs, and the gate."""

import json
import os
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.train.bench.toy import TOY, tiny, toy
from train.bench import bench, compare
from train.bench.__main__ import main
from train.bench.compare import verdict
from train.bench.table import render
from train.bench.work import usable_cores

pytestmark = pytest.mark.usefixtures("quick_measuring")


@pytest.fixture(scope="module")
def compared(quick_measuring):
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


def ratios(*lows):
    """A stand-in for `ratio`: each measurement's low end; the value is 10 % above."""
    measured = iter(lows)
    return lambda a, b: {"value": 1.1 * (low := next(measured)), "low": low, "high": 1.2 * low}


@pytest.mark.parametrize(
    ("lows", "limit", "passed"),
    [
        ([1.1], 1.0, True),  # within the tolerance
        ([1.2, 1.2, 1.2], 1.0, False),
        ([1.2, 1.2, 1.1], 1.0, True),  # two bad measurements
        ([1.9], 2.0, True),  # as slow as ever
        ([1.2], None, True),  # to be recorded
    ],
)
def test_gate_fails_what_is_slower_every_time(lows, limit, passed, monkeypatch, capsys):
    monkeypatch.setattr(compare, "ratio", ratios(*lows))
    calls = []
    runners = {"ours": lambda: calls.append(1), "plain": lambda: None}
    found = compare.judged("eval", runners, limit, tiny())
    assert (found["passed"], found["limit"], found["measured"]) == (passed, limit, len(lows))
    assert len(calls) == len(lows) * (1 + 2 * (1 + 2))
    assert "eval: ours takes 1." in capsys.readouterr().err or limit == 2


@pytest.fixture
def stubbed(tmp_path, monkeypatch):
    """A gate's file with plain steps that take no time; `stubbed.lows` is what is measured."""

    class Stub:
        lows, path = (1.0,) * 4, tmp_path / "plain.py"

    Stub.path.write_text("PIPELINES = {n: lambda batch: lambda: None for n in ('a', 'b')}\n")
    monkeypatch.setattr(compare, "OURS", {"a": lambda config: None, "b": lambda config: None})
    monkeypatch.setattr(compare, "prepare", lambda *_: SimpleNamespace(stepper=lambda: None))
    monkeypatch.setattr(compare, "ratio", lambda a, b: ratios(*Stub.lows)(a, b))
    return Stub


def test_gate_by_command_line(stubbed, fails, capsys, tmp_path):
    line = ["--gate", str(stubbed.path), "--steps", "1", "--repeats", "2"]
    assert "has no limit on cpu plain for a, b: write them with --gate-record" in fails(2, main, line)
    main([*line, "--gate-record"])
    assert json.loads((tmp_path / "gate.json").read_text()) == {"cpu plain": {"a": 1.1, "b": 1.1}}
    main(line)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(one["passed"] for one in result["gate"]["pipelines"].values())
    stubbed.lows = (2.0,)
    said = fails(1, main, line)
    assert "a (2.20x" in said and "b (2.20x" in said and "more than 15% slower than" in said


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot keep a process on a core")
def test_gate_runs_on_one_core_and_frees_the_others(stubbed, monkeypatch, capsys):
    before, seen = os.sched_getaffinity(0), []
    monkeypatch.setattr(compare, "prepare", lambda *_: SimpleNamespace(stepper=lambda: seen.append(usable_cores())))
    main(["--gate", str(stubbed.path), "--steps", "1", "--repeats", "2", "--gate-record"])
    assert set(seen) == {1} and os.sched_getaffinity(0) == before


def test_limits_of_another_kind_of_device_do_not_count(stubbed, fails, tmp_path):
    (tmp_path / "gate.json").write_text('{"gpu plain": {"a": 1.0, "b": 1.0}}')
    assert "has no limit on cpu plain for a, b: write them with" in fails(2, main, ["--gate", str(stubbed.path)])


@pytest.mark.parametrize(
    ("program", "said"), [(None, "No such file"), ("1 / 0", "ZeroDivisionError"), ("x = 1", "KeyError: 'PIPELINES'")]
)
def test_broken_gates(program, said, tmp_path, fails):
    path = tmp_path / "plain.py"
    if program is not None:
        path.write_text(program)
    line = fails(2, main, ["--gate", str(path)])
    assert "cannot be loaded" in line and said in line


def test_the_projects_gate_can_be_held_against():
    """Every pipeline has a counterpart, and a limit that was recorded."""
    reference = Path(__file__).parents[2] / "reference"
    plain = runpy.run_path(str(reference / "plain_step.py"))["PIPELINES"]
    assert set(plain) == set(compare.OURS)
    for limits in json.loads((reference / "gate.json").read_text()).values():
        assert set(limits) == set(plain) and all(0 < limit < 1.1 for limit in limits.values())
