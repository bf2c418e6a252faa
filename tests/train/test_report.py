"""Publishing a run: one file, one picture. The page is tested in test_report_page."""

import json
from pathlib import Path

import pytest
from PIL import Image

from train.report import collect, run_name
from train.report.__main__ import main

HISTORY = [
    {"step": 10, "epoch": 1.0, "loss": 1.5, "accuracy": 0.4, "grad_norm": 1.0, "learning_rate": 0.1},
    {"step": 10, "epoch": 1.0, "validation_accuracy": 0.5, "validation_loss": 1.4},
    {"step": 20, "epoch": 2.0, "loss": 1.0, "accuracy": 0.6, "grad_norm": 1.0, "learning_rate": 0.1},
    {"step": 20, "epoch": 2.0, "validation_accuracy": 0.7, "validation_loss": 1.1},
]


@pytest.fixture
def finished(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text('{"test_accuracy": 0.7, "seed": 0}')
    (tmp_path / "run" / "config.json").write_text('{"config": {"batch": 128}}')
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HISTORY))
    return tmp_path / "run"


def test_json_and_picture(finished, tmp_path):
    main([str(finished), "--json", str(tmp_path / "kept.json")])
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert kept == collect(finished) == {"test_accuracy": 0.7, "seed": 0, "config": {"batch": 128}, "history": HISTORY}
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    main([str(finished), str(tmp_path / "kept.json"), "--picture", str(tmp_path / "curve.png")])
    with Image.open(tmp_path / "curve.png") as image:
        colours = {tuple(pixel[:3]) for _, pixel in image.convert("RGB").getcolors(1 << 20)}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # both runs' curves are there


@pytest.mark.parametrize("paths, names", [
    (("a/run", "b/run/", "c/net.v2", "kept.json", "/d/other/."), ["a/run", "b/run", "net.v2", "kept", "other"]),
    (("a/run", "/a/run"), ["run", "run"]),
    (("1/digits/seed0", "2/digits/seed0", "seed0"), ["1/digits/seed0", "2/digits/seed0", "/seed0"]),
    (("a/x.json", "b/x", "c/x.json"), ["a/x", "b/x", "c/x"]),
    (("a/x.json", "a/x"), ["x.json", "x"]),
])  # fmt: skip
def test_runs_of_one_name_are_told_apart(paths, names, monkeypatch):
    monkeypatch.chdir("/")
    assert [run_name(Path(path), [*map(Path, paths)]) for path in paths] == names


def test_without_matplotlib(finished, tmp_path, monkeypatch, fails):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    line = fails(2, main, [str(finished), "--picture", str(tmp_path / "curve.png")])
    assert 'pip install -e ".[plot]"' in line


def test_refusals(finished, fails):
    nowhere, folder = finished / "nowhere" / "x.json", finished.parent
    line = fails(2, main, [str(finished), "--json", str(nowhere)])
    assert line.endswith(f"cannot write {nowhere}: {nowhere.parent} is not a folder")
    assert f"cannot write {folder}: it is a folder" in fails(2, main, [str(finished), "--json", str(folder)])
    (folder / "list.json").write_text("not json")
    line = fails(2, main, [str(finished / "result.json"), "--picture", str(folder / "x.png")])
    assert "result.json holds no run: pass a run folder, or a file that train.report --json wrote" in line
    assert "list.json cannot be read: " in fails(2, main, [str(folder / "list.json"), "--json", "x.json"])
    assert "--json takes one run" in fails(2, main, [str(finished), str(finished), "--json", "x.json"])
    for missing in ("metrics.jsonl", "result.json"):
        (finished / missing).unlink()
        assert f"holds no finished run: {missing} is missing" in fails(2, main, [str(finished), "--json", "x.json"])
