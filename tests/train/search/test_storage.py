"""Storage that cannot be used, a search of something else, a missing extra: one line each."""

import dataclasses
import sqlite3
import sys
from contextlib import closing

import pytest

from train.config import TrainConfig
from train.errors import RunError, UsageError
from train.search import storage
from train.search.__main__ import main
from train.search.config import SearchConfig, run_config
from train.search.storage import DATABASE, check_settings, locked_means, open_study

SETTINGS = {"preset": "digits", "config": {"epochs": 4, "widths": (8,)}, "ranges": {"optim.lr": "0:1"}, "stop": "none"}


@pytest.fixture
def words(tmp_path):
    return ["digits", "--out", str(tmp_path / "s")]


@pytest.mark.parametrize("name", ["s", "a b", "a%20b", "a#b", "\N{LATIN SMALL LETTER U WITH DIAERESIS}", "a{b}"])
def test_study_keeps_its_settings(name, tmp_path):
    open_study(tmp_path / name, SETTINGS, None)
    assert {path.name for path in (tmp_path / name).iterdir()} == {DATABASE, ".lock"}
    assert open_study(tmp_path / name, SETTINGS, None).user_attrs["settings"]["stop"] == "none"
    with pytest.raises(UsageError, match=r"different settings \(epochs 4 -> 5\); choose a different --out"):
        open_study(tmp_path / name, SETTINGS | {"config": {"epochs": 5, "widths": (8,)}}, None)


@pytest.mark.parametrize(
    "changes, listed",
    [
        ({"preset": "finetune"}, "preset digits -> finetune"),
        ({"stop": "median"}, "stop none -> median"),
        ({"ranges": {"optim.lr": "0:2"}}, "optim.lr 0:1 -> 0:2"),
        ({"ranges": {"batch": "32,64"}}, "batch fixed -> 32,64, optim.lr 0:1 -> fixed"),
    ],
)
def test_changed_settings_are_listed(changes, listed, tmp_path):
    with pytest.raises(UsageError) as refusal:
        check_settings(tmp_path, SETTINGS, SETTINGS | changes)
    assert f"({listed}); choose a different --out" in str(refusal.value)


def test_settings_of_later_versions_do_not_count(tmp_path):
    check_settings(tmp_path, SETTINGS, SETTINGS | {"config": SETTINGS["config"] | {"new": 1}})


def test_locked_database(words, tmp_path, fails, monkeypatch):
    open_study(tmp_path / "s", SETTINGS, None)
    monkeypatch.setattr(storage, "LOCK_SECONDS", 0.05)
    with closing(sqlite3.connect(tmp_path / "s" / DATABASE)) as other:
        other.execute("BEGIN EXCLUSIVE")
        line = fails(2, main, words)
        assert "search.db: database is locked; end the program that uses it, or choose a different --out" in line
        study = open_study(tmp_path / "other", SETTINGS, None)
    message = "database is locked; run the same command again"
    with closing(sqlite3.connect(tmp_path / "other" / DATABASE)) as another, pytest.raises(RunError, match=message):
        another.execute("BEGIN EXCLUSIVE")
        with locked_means(RunError, tmp_path):
            study.ask()


def test_foreign_files(words, tmp_path, fails):
    (tmp_path / "s").mkdir()
    path = tmp_path / "s" / DATABASE
    path.write_text("nothing of SQLite" * 100)
    assert "search.db is not the database of a search: move it away" in fails(2, main, words)
    path.unlink()
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE notes (text)")
    assert "search.db is not the database of a search" in fails(2, main, words)
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT count(*) FROM sqlite_master").fetchone() == (1,)  # nothing was added
    (tmp_path / "s" / "config.json").write_text("{}")
    assert "s is the folder of a run: choose a different --out" in fails(2, main, words)


def test_folder_that_cannot_be_used(tmp_path, fails):
    (tmp_path / "file").touch()
    assert "cannot use the folder" in fails(2, main, ["--out", str(tmp_path / "file" / "s")])
    assert "SQLite takes no path with a question mark" in fails(2, main, ["--out", str(tmp_path / "s?")])


def test_missing_extra(words, fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert 'a search needs Optuna: pip install -e ".[search]"' in fails(2, main, words)


REFUSED = {
    ("--range", "optim.lr=1:0.1"): "--range optim.lr=1:0.1 is empty",
    ("--range", "lr=0.1:1"): "unknown field 'lr': did you mean optim.lr? ",
    ("--trials", "0"): "--trials must be at least 1",
    ("--workers", "0"): "--workers must be at least 1",
    ("--stop", "maybe"): "choose one of median, halving, none",
    ("--optim.lr", "-1"): "--optim.lr must be at least 0",
    ("--optim.factor", "0.5"): "--optim.factor has no effect with --optim.schedule cosine",
    ("--optim.name", "optax.lion", "--range", "optim.momentum=0:0.9"): "optim.momentum has no effect",
    ("--distributed", "auto"): "a search takes no --distributed",
}


@pytest.mark.parametrize("flags", REFUSED, ids=" ".join)
def test_wrong_flags_are_refused_before_anything_runs(flags, words, tmp_path, fails):
    assert REFUSED[flags] in fails(2, main, [*words, *flags])
    assert not (tmp_path / "s").exists()


def test_fields_of_a_search_are_those_of_a_run_and_its_own(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "--trials" in shown and "--optim.lr" in shown and "handwritten digits" in shown


def test_run_takes_its_own_fields_alone():
    own = {field.name for field in dataclasses.fields(SearchConfig)} - {f.name for f in dataclasses.fields(TrainConfig)}
    assert own == {"trials", "workers", "range", "stop"}
    assert type(run_config(SearchConfig(trials=3))) is TrainConfig
