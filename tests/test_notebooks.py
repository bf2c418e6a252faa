"""Every notebook runs from top to bottom and is stored without outputs."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent

PICTURES = {
    "benchmark": ["benchmark/shares.png"],
    "compose": ["compose/gradients.png"],
    "explain": ["why/methods.png", "why/dreams.png"],
    "quickstart": ["notebook/curve.png"],
    "pretraining": ["pretraining/curve.png", "pretraining/views.png"],
    "pruning": ["pruning/report.png"],
}


def quickstart(namespace):
    assert namespace["result"]["test_accuracy"] > 0.95
    assert namespace["metrics"]["accuracy"] > 0.8


def pretraining(namespace):
    result = namespace["result"]
    assert result["knn_accuracy"] > result["random_knn_accuracy"] + 0.1
    assert namespace["worth"]["finetune_10_accuracy"] > 0.8


def pruning(namespace):
    result, smaller = namespace["result"], namespace["smaller"]
    assert abs(result["sparsity"] - 0.9) < 1e-4
    assert result["pruned_accuracy"] > result["dense_accuracy"] - 0.05
    assert smaller["compact_parameters"] < 0.3 * smaller["parameters"] and smaller["pruned_accuracy"] > 0.9


def benchmark(namespace):
    assert abs(sum(namespace["result"]["shares"].values()) - 1) < 0.1
    assert "as fast as B" in namespace["compared"]["versus"]["verdict"]


def compose(namespace):
    assert namespace["curves"].shape == (60, 4)
    assert namespace["voted"] > max(0.9, namespace["single"].min())
    assert namespace["norms"][namespace["hardest"]].min() >= np.median(namespace["norms"])
    assert (namespace["logits"].argmax(-1) == namespace["digits"].test.labels).mean() > 0.9


def explain(namespace):
    scores = namespace["report"]["methods"]
    gains = {name: one["insertion"] - one["deletion"] for name, one in scores.items()}
    assert max(gains.values()) > gains["random"] + 0.1
    assert all(heat.shape == (8, 8, 8) for heat in namespace["heat"].values())
    assert namespace["dreams"].shape == (10, 8, 8, 1)


CHECKS = {
    "benchmark": benchmark,
    "compose": compose,
    "explain": explain,
    "quickstart": quickstart,
    "pretraining": pretraining,
    "pruning": pruning,
}
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))


def cells(path):
    """The cells of a notebook: (kind, text)."""
    return [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text())["cells"]]


def execute(path, folder):
    """Run the cells of a notebook in a folder, and check what they leave."""
    os.chdir(folder)
    namespace = {"__name__": "__main__"}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name} {cell['id']}", "exec"), namespace)
    CHECKS[path.stem](namespace)
    for picture in PICTURES[path.stem]:
        assert Path("runs", picture).stat().st_size > 5_000, picture


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs(path, tmp_path, command):
    """In a process of its own, on one device and with compiled code as fast as a user's."""
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    done = command("tests.test_notebooks", path, tmp_path, env={"JAX_DISABLE_MOST_OPTIMIZATIONS": "false"})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_holds_no_outputs(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs") and not cell.get("execution_count")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_opens_in_colab_and_installs_there(path):
    """Each has a badge with its own address, and the same first cell of code."""
    (_, title), (_, setup), *_ = cells(path)
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    owner_and_name = repository.removeprefix("https://github.com/")
    assert f"https://colab.research.google.com/github/{owner_and_name}/blob/main/colab/{path.name}" in title
    assert setup == cells(NOTEBOOKS[0])[1][1] and repository in setup


def test_setup_installs_on_colab_and_nowhere_else(tmp_path, monkeypatch, capsys):
    """On Colab the installation is held to the versions of jax and numpy that are there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    setup, calls = cells(NOTEBOOKS[0])[1][1], []

    def record(command, **options):
        calls.append(command)
        return subprocess.CompletedProcess(command, len(calls) == 4)

    monkeypatch.setattr(subprocess, "run", record)
    exec(setup, {})
    assert not calls and "There is no accelerator" in capsys.readouterr().out
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    exec(setup, {})
    assert calls[0][:2] == ["git", "clone"] and {"install", "-c", "constraints.txt"} <= set(calls[1])
    assert f"jax=={jax.__version__}\n" in (tmp_path / "constraints.txt").read_text()
    with pytest.raises(SystemExit, match="Colab's jax"):
        exec(setup, {})


if __name__ == "__main__":
    execute(Path(sys.argv[1]), Path(sys.argv[2]))
