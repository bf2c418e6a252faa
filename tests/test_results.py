"""The tables of the documentation are those of the run files."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from results import __main__ as results
from results import figures
from results.tables import TABLES
from tests.test_readme import KINDS
from train.cli import parse
from train.detect.presets import PRESETS
from train.errors import RunError, UsageError

PAGES = {page: (results.ROOT / page).read_text() for page in results.PAGES}


@pytest.mark.parametrize("page", PAGES)
def test_pages_agree_with_the_run_files(page):
    assert results.written(PAGES[page]) == PAGES[page], "run python -m results"


def test_every_table_is_in_a_page():
    assert {name for text in PAGES.values() for _, name, _ in results.REGION.findall(text)} == set(TABLES)


def test_wrong_figures_are_found_and_written(tmp_path, monkeypatch, capsys):
    for page, text in PAGES.items():
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text(text)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    results.main(["--check"])
    for page, right, wrong in (("README.md", "| 91.21 %", "| 91.31 %"), ("docs/speed.md", "| 814 ms", "| 815 ms")):
        assert right in PAGES[page]
        (tmp_path / page).write_text(PAGES[page].replace(right, wrong))
    with pytest.raises(RunError, match=r"README\.md, docs/speed\.md differ from the run files"):
        results.main(["--check"])
    results.main([])
    assert capsys.readouterr().out.splitlines()[-1] == "written: README.md, docs/speed.md"
    assert {page: (tmp_path / page).read_text() for page in PAGES} == PAGES


def test_unknown_tables_and_runs_are_refused():
    with pytest.raises(UsageError, match="there is no table 'nothing'; choose one of presets"):
        results.written("<!-- table: nothing -->\n<!-- end -->")
    with pytest.raises(UsageError, match=r"results/digits/seed9\.json cannot be read"):
        figures.run("digits/seed9")
    with pytest.raises(UsageError, match="there is no file results/nothing"):
        figures.runs("nothing*")


def commands_of(script, folder, *words):
    """The commands of a script's Python, which a stand-in writes down, as lists of words."""
    shutil.copytree(results.ROOT / "results", folder / "results", ignore=shutil.ignore_patterns("*.json", "*.png"))
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$*" >> {folder}/commands\n')
    python.chmod(0o755)
    environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", str(folder / "results" / script), *words], env=environment, check=True)
    return [line.split() for line in (folder / "commands").read_text().splitlines()]


def test_cpu_script_runs_commands_that_parse(tmp_path):
    commands = [words[1:] for words in commands_of("cifar10_cpu.sh", tmp_path, "data")]
    runs = [words for words in commands if words[0] in KINDS and not {"report", "curve"} & {*words}]
    assert len(runs) == 24 and sum("torch_train" in words[0] for words in commands) == 3
    # One command for each set of flags, as parsing takes a while.
    for program, *words in {re.sub(r"[^ ]*[\d/][^ ]*", "", " ".join(words)): words for words in runs}.values():
        presets, default, _ = KINDS[program]
        if program == "train.prune" and "/" in words[0]:  # a run, which does not exist here
            del words[0]
        parse(program, presets, words, default=default)
    script = ["bash", str(tmp_path / "results" / "cifar10_cpu.sh"), "data", "nothing"]
    refused = subprocess.run(script, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and refused.stderr.startswith("error: nothing is not one of ten_epochs")


def test_detection_script_runs_commands_that_parse(tmp_path):
    commands = commands_of("gpu_detect.sh", tmp_path, "data", "none", "backbone.safetensors")
    runs = [words[2:] for words in commands if words[:2] == ["-m", "train.detect"] and words[2] != "report"]
    assert [words[0] for words in runs] == ["bccd_fasterrcnn"] * 2 + ["raccoon_fasterrcnn"] * 2
    configs = [parse("train.detect", PRESETS, words, default="bccd_fasterrcnn")[1] for words in runs]
    assert [config.model for config in configs] == ["resnet18", "resnet50"] * 2
    assert [config.init for config in configs] == [None, "backbone.safetensors"] * 2
    assert sum(words[0].endswith("torchvision_detect.py") for words in commands) == 4
    assert commands[-1][:1] == ["results/detection_speed.py"]


@pytest.mark.slow
def test_detectors_are_timed_against_torchvision(tmp_path):
    pytest.importorskip("torchvision")
    out = tmp_path / "speed.json"
    script = [sys.executable, results.ROOT / "results" / "detection_speed.py", out, "--small", "--seconds", "0.1"]
    subprocess.run([*script, "--threads", "1"], check=True)
    result = json.loads(out.read_text())
    assert [row["task"] for row in result["rows"]] == [
        *("nms_1000", "nms_2000", "roi_align", "roi_align_gradient", "predict", "train", "predict", "train")
    ]
    for row in result["rows"]:
        assert row["time_over_torchvision"]["low"] < row["time_over_torchvision"]["high"]
        ours, theirs = row["first_result"]["ours"], row["first_result"]["torchvision"]
        if row["task"] != "train":  # training draws samples
            assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
def test_torchvision_trains_on_our_images(tmp_path):
    pytest.importorskip("torchvision")
    path, flags = results.ROOT / "results" / "torchvision_detect.py", "bccd_fasterrcnn --minutes 0.02"
    script = [sys.executable, path, *flags.split()]
    sizes = [
        "--data.name",
        "shapes",
        "--data.min-size",
        "32",
        "--data.max-size",
        "32",
        "--features",
        "8",
        "--hidden",
        "8",
    ]
    subprocess.run([*script, "--out", tmp_path / "run.json", *sizes], check=True)
    result = json.loads((tmp_path / "run.json").read_text())
    assert result["steps"] > 0 and 0 <= result["test_ap"] <= result["test_ap50"] <= 1
    assert result["test_images"] and {"torch", "torchvision", "jax"} <= {*result["versions"]} and result["command"]
    refused = subprocess.run([*script, "--out", "x", "--width", "8"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and refused.stderr.startswith("error: only Faster R-CNN on all stages")
