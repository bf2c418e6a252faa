"""A search with a stand-in for training: its trials, interruptions, several processes, and what it leaves."""

import dataclasses
import itertools
import json
import math
import time
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from train.cli import parse
from train.errors import DivergedError, UsageError
from train.presets import PRESETS
from train.search import config as search_config
from train.search import run as search_run
from train.search.storage import LIVES

FIELDS = {"eval_every": 1.0, "epochs": 4.0, "range": ("batch=fixed", "optim.weight_decay=fixed")}


class Training:
    """In place of `train.run.run`: accuracy is best at a rate of 0.1, and `interrupt` may raise after a validation."""

    def __init__(self, interrupt=lambda number, epoch: None):
        self.interrupt, self.configs = interrupt, []

    def __call__(self, config, preset, *, validated, test):
        assert test is False and preset == "digits"
        self.configs.append(config)
        number = int(config.out[-3:])
        if config.optim.lr > 0.8:
            raise DivergedError("loss at step 1 is not finite")
        accuracy = math.exp(-((math.log10(config.optim.lr) + 1) ** 2))
        for epoch in (1, 2, 3, 4):
            validated({"step": 20 * epoch, "epoch": float(epoch), "validation_accuracy": accuracy * epoch / 4})
            self.interrupt(number, epoch)
        return {"validation_accuracy": accuracy}


@pytest.fixture
def search(tmp_path, monkeypatch, capsys):
    """`search(trials=6, ...)` runs a search in one folder: (result, what it printed)."""

    def run(training=None, **fields):
        training = training or Training()
        monkeypatch.setattr(search_run, "train_run", training)
        config = dataclasses.replace(search_config.PRESETS["digits"](), out=str(tmp_path / "s"), **(FIELDS | fields))
        try:
            return search_run.run(config, "digits"), capsys.readouterr().err
        finally:
            run.configs = training.configs

    return run


def rates(folder):
    return [row["values"]["optim.lr"] for row in json.loads((folder / "search.json").read_text())["rows"]]


def interrupted_at(number, epoch):
    def interrupt(*now):
        if now == (number, epoch):
            raise KeyboardInterrupt

    return Training(interrupt)


@pytest.mark.filterwarnings("error")
def test_search_improves_on_a_bad_start(search, tmp_path):
    start = dataclasses.replace(PRESETS["digits"]().optim, lr=0.001)
    result, shown = search(trials=10, optim=start)
    rows = json.loads((tmp_path / "s" / "search.json").read_text())["rows"]
    assert sum(result["trials"].values()) == len(rows) == len(search.configs) == 10
    assert result["first"]["values"] == {"optim.lr": 0.001}
    assert result["best"]["accuracy"] > 0.9 > 0.1 > result["first"]["accuracy"]
    assert result["best"]["accuracy"] == max(row["accuracy"] for row in rows if row["outcome"] == "complete")
    assert result["importance"] == {"optim.lr": 1.0}
    assert result["trials"]["stopped early"] and {row["epochs"] for row in rows} > {4.0}
    assert f"best on validation: trial {result['best']['trial']}" in shown
    assert len([line for line in shown.splitlines() if line.startswith("trial ")]) == 11  # and the table's header
    # The file is one for `--config`, and trains the same run elsewhere.
    preset, config = parse("train", PRESETS, ["--config", str(tmp_path / "s" / "best.json")], default="finetune")
    trained = search.configs[result["best"]["trial"]]
    assert preset == "digits" and config == dataclasses.replace(trained, out=None)
    if find_spec("matplotlib"):  # the extra plot, which CI installs on the newest interpreter
        assert (tmp_path / "s" / "search.png").stat().st_size > 10_000
    assert {path.name for path in (tmp_path / "s").iterdir() if path.name.startswith(".")} == {".lock"}


def test_interrupted_search_goes_on_as_if_it_had_not_been(search, tmp_path, monkeypatch):
    # A second passes from one look at the clock to the next.
    monkeypatch.setattr(search_run, "time", SimpleNamespace(perf_counter=itertools.count().__next__, time=time.time))
    whole, _ = search(trials=6, stop="none")
    (tmp_path / "s").rename(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        search(interrupted_at(3, 2), trials=6, stop="none")
    assert len(search.configs) == 4
    result, shown = search(trials=6, stop="none")
    assert "trial 3 was interrupted: it goes on" in shown
    assert len(search.configs) == 3  # trials 3 to 5, the first of them in the folder of the interrupted one
    assert rates(tmp_path / "s") == rates(tmp_path / "whole")
    assert result["best"]["values"] == whole["best"]["values"] and result["starts"] == 2
    rows = json.loads((tmp_path / "s" / "search.json").read_text())["rows"]
    assert [row["restarts"] for row in rows] == [0, 0, 0, 1, 0, 0]
    assert rows[3]["seconds"] == rows[2]["seconds"] + 2  # the two validations before the interruption
    search(trials=5, stop="none")  # fewer than are finished: nothing is trained
    assert search.configs == []


def test_trial_that_ends_every_process_fails_alone(search):
    for _ in range(LIVES):
        with pytest.raises(KeyboardInterrupt):
            search(Lost(), trials=3)
    result, _ = search(trials=3)
    assert result["trials"]["failed"] == 1 and sum(result["trials"].values()) == 3


class Lost(Training):
    """Trial 1 ends the process before its first validation."""

    def __call__(self, config, preset, **options):
        if config.out.endswith("001"):
            self.configs.append(config)
            raise KeyboardInterrupt
        return super().__call__(config, preset, **options)


def test_two_processes_share_the_trials_and_do_not_overshoot(search, tmp_path, monkeypatch):
    """The second works while the first is in the middle of trial 0, and waits for it at the end."""
    second = Training()

    class Waits(Exception):
        pass

    def wait(seconds):
        raise Waits

    def interrupt(number, epoch):
        if epoch == 2:
            config = dataclasses.replace(search_config.PRESETS["digits"](), out=str(tmp_path / "s"), trials=4, **FIELDS)
            with monkeypatch.context() as patch, pytest.raises(Waits):
                patch.setattr(search_run.time, "sleep", wait)
                search_run.work(search_run.open_search(config, "digits"), second)  # as a helper does

    first = Training(interrupt)
    result, _ = search(first, trials=4)
    assert [len(first.configs), len(second.configs)] == [1, 3] and result["starts"] == 1
    assert sum(result["trials"].values()) == 4


def test_wrong_trial_is_named_and_goes_on_when_it_can(search):
    def refuse(number, epoch):
        raise UsageError("the disk is full")

    with pytest.raises(UsageError, match=r"^trial 0 \(optim.lr 0.1\): the disk is full$"):
        search(Training(refuse), trials=1)
    result, _ = search(trials=1)
    assert result["trials"] == {"complete": 1}


def test_start_outside_of_its_range_is_drawn(search):
    result, shown = search(trials=1, range=(*FIELDS["range"], "optim.lr=0.2:0.3"))
    assert "note: optim.lr 0.1 is not in its range, 0.2:0.3: the first trial draws it" in shown
    assert 0.2 <= result["first"]["values"]["optim.lr"] <= 0.3
