"""Every notebook runs from top to bottom and is stored without outputs."""

import json
from pathlib import Path

import pytest

PICTURES = {
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


CHECKS = {"quickstart": quickstart, "pretraining": pretraining, "pruning": pruning}
NOTEBOOKS = sorted((Path(__file__).parent.parent / "colab").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs(path, tmp_path, tfds_dir, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name} {cell['id']}", "exec"), namespace)
    CHECKS[path.stem](namespace)
    for picture in PICTURES[path.stem]:
        assert (tmp_path / "runs" / picture).stat().st_size > 5_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_holds_no_outputs(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs") and not cell.get("execution_count")
