"""The tables of the documentation are those of the run files."""

import os
import re
import shutil
import subprocess

import pytest

from results import __main__ as results
from results import figures
from results.tables import TABLES
from tests.test_readme import KINDS
from train.cli import parse
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


def test_cpu_script_runs_commands_that_parse(tmp_path):
    """A stand-in for Python writes down the commands."""
    shutil.copytree(results.ROOT / "results", tmp_path / "results", ignore=shutil.ignore_patterns("*.json", "*.png"))
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/commands\n')
    python.chmod(0o755)
    script = ["bash", str(tmp_path / "results" / "cifar10_cpu.sh"), "data"]
    environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"}
    subprocess.run(script, env=environment, check=True)
    commands = [line.split()[1:] for line in (tmp_path / "commands").read_text().splitlines()]
    runs = [words for words in commands if words[0] in KINDS and not {"report", "curve"} & {*words}]
    assert len(runs) == 24 and sum("torch_train" in words[0] for words in commands) == 3
    # One command for each set of flags, as parsing takes a while.
    for program, *words in {re.sub(r"[^ ]*[\d/][^ ]*", "", " ".join(words)): words for words in runs}.values():
        presets, default, _ = KINDS[program]
        if program == "train.prune" and "/" in words[0]:  # a run, which does not exist here
            del words[0]
        parse(program, presets, words, default=default)
    refused = subprocess.run([*script, "nothing"], env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and refused.stderr.startswith("error: nothing is not one of ten_epochs")
