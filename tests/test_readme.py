"""The documentation is correct: its Python runs, its commands parse, its tables are complete, its links exist."""

import importlib
import re
import shlex
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import pytest
from PIL import Image

from pretrain import bench as pretrain_bench
from pretrain import presets as pretrain_presets
from pretrain.config import PretrainConfig
from pretrain.objectives import OBJECTIVES
from resnet_jax.explain import METHODS
from resnet_jax.scores import SCORES
from train.bench import config as bench_config
from train.cli import parse
from train.config import OptimConfig, TrainConfig
from train.explain.__main__ import parsed as explain_parsed
from train.explain.config import VIEW_NAMES
from train.presets import PRESETS
from train.prune import presets as prune_presets
from train.prune.config import PruneConfig, Schedule
from train.run import run
from train.search import config as search_config

# For each program: its presets, the default one, and the class of its configs.
KINDS = {
    "train": (PRESETS, "digits", TrainConfig),
    "pretrain": (pretrain_presets.PRESETS, "digits_simclr", PretrainConfig),
    "train.search": (search_config.PRESETS, "digits", search_config.SearchConfig),
    "train.prune": (prune_presets.PRESETS, "digits_prune", PruneConfig),
    "train.bench": (bench_config.PRESETS, "step", bench_config.BenchConfig),
    "pretrain.bench": (pretrain_bench.OPTIONS["presets"], "step", bench_config.BenchConfig),
}
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PRETRAINING = (ROOT / "docs" / "pretraining.md").read_text()
EXPLANATION = (ROOT / "docs" / "explanation.md").read_text()
PRUNING = (ROOT / "docs" / "pruning.md").read_text()
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
BOXES = (ROOT / "docs" / "boxes.md").read_text()
DETECTION = (ROOT / "docs" / "detection.md").read_text()
TRAINING = (ROOT / "docs" / "training.md").read_text()
SEARCH = (ROOT / "docs" / "search.md").read_text()
TRACKING = (ROOT / "docs" / "tracking.md").read_text()
OBJECTIVES_PAGE = (ROOT / "docs" / "objectives.md").read_text()


def blocks(language, page=README):
    return re.findall(rf"```{language}\n(.*?)```", page, re.S)


def executed(page):
    """The names after the Python of a page has run."""
    namespace = {}
    for block in blocks("python", page):
        exec(block, namespace)
    return namespace


@pytest.mark.slow
def test_python_runs(tmp_path, tfds_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(TrainConfig(out="runs/digits-seed0", width=8, steps=5, batch=64, optim=OptimConfig(lr=0.05)))
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("seven.png")
    namespace = executed(README)
    assert namespace["metrics"]["loss"].shape == ()
    assert namespace["ensemble"].step.shape == (3,)
    assert namespace["gradients"]["head"]["bias"].shape == (16, 10)


@pytest.mark.slow
def test_python_of_training_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert executed(TRAINING)["result"]["steps"] == 40
    assert "images/s in training" in capsys.readouterr().out


@pytest.mark.slow
def test_python_of_pretraining_runs():
    assert {"loss", "projection_std"} <= set(executed(PRETRAINING)["metrics"])


@pytest.mark.slow
def test_python_of_objectives_runs(tmp_path, monkeypatch, capsys):
    """The five scripts: an L1 penalty, distillation, SAM, two heads, and a whole run with pieces of one's own."""
    monkeypatch.chdir(tmp_path)
    namespace, seen = {}, {}
    for title, block in re.findall(r"^## ([^\n]*)\n.*?```python\n(.*?)```", OBJECTIVES_PAGE, re.M | re.S):
        exec(block, namespace)
        seen[title] = namespace.get("metrics")
    assert "l1" in seen["An L1 penalty: an objective on top of another"]
    assert "agreement" in seen["Distillation from a second network"]
    assert {"loss", "accuracy"} <= set(seen["SAM: two passes"])
    assert {"label_loss", "coarse_loss"} <= set(seen["Two heads and two labels"])
    assert namespace["result"]["test_accuracy"] > 0.9 and namespace["result"]["model"] == "MLP"
    assert capsys.readouterr().out.startswith("[('")


def test_python_of_pruning_runs(capsys):
    namespace = executed(PRUNING)
    assert capsys.readouterr().out == "0.90\n"
    assert namespace["loss"](namespace["params"], namespace["x"], namespace["y"]) < 0.7


@pytest.mark.slow
def test_python_of_boxes_runs():
    batch = executed(BOXES)["batch"]
    assert batch["image"].shape[0] == 8 and (batch["labels"] >= 0).any()


@pytest.mark.slow
def test_python_of_detection_runs():
    namespace = executed(DETECTION)
    assert namespace["found"].boxes.shape == (2, 100, 4)
    assert set(namespace["losses"]) == {"objectness_loss", "proposal_loss", "class_loss", "box_loss"}
    for name in ("proposals", "single", "dense"):
        assert jax.eval_shape(namespace[name].init, jax.random.key(0), namespace["images"])["params"]


def test_python_of_search_runs():
    assert executed(SEARCH)


@pytest.mark.slow
def test_tutorial_runs(tmp_path, monkeypatch, capsys):
    """Every command of the tutorial but the download, on a few small pictures and with a small network."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, level in (("church", 60), ("golf_ball", 120), ("parachute", 200)):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for number in range(1, 21):
            pixels = np.clip(rng.normal(level, 30, (40, 48, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:04}.jpg")
    small = {
        "train": "--width 8 --epochs 2 --batch 16 --augment.resized-crop 32 --data.image-size 40",
        "train.prune": "--epochs 2 --prune.epochs 1",
        "train.explain": "--count 2 --methods grad_cam",
    }
    done = []
    for line in filter(None, "\n".join(blocks("sh", TUTORIAL)).splitlines()):
        _, _, program, *words = shlex.split(line, comments=True)
        if program == "train" and "finetune" in words:  # needs a network connection
            continue
        extra = [] if words[0] == "report" else shlex.split(small.get(program, ""))
        module = program if program == "train.predict" else f"{program}.__main__"
        importlib.import_module(module).main([*words, *extra])
        done.append(program)
    assert done == [
        "train",
        "train.report",
        "train.explain",
        "train.prune",
        "train.prune",
        "train.predict",
        "train.explain",
    ]
    assert (tmp_path / "runs/small-explained/index.html").exists() and (tmp_path / "runs/photos/report.html").exists()
    capsys.readouterr()
    executed(TUTORIAL)
    assert capsys.readouterr().out.startswith("[(")


def test_tables_are_complete():
    assert re.findall(r"^\| `(\w+)` \|", README, re.M) == list(PRESETS)
    assert all(f"`{name}`" in EXPLANATION for name in {*METHODS} - {"random"} | {*VIEW_NAMES})
    for name in [*SCORES, *get_args(Schedule)]:
        assert f"`{name}`" in PRUNING, name
    methods = re.findall(r"^\| `(\w+)` \|", PRETRAINING, re.M)
    assert methods == list(pretrain_presets.DIGITS) == list(OBJECTIVES)


def commands():
    pages = README + TRAINING + PRETRAINING + PRUNING + SEARCH + TRACKING
    for line in "\n".join(blocks("sh", pages)).splitlines():
        words = shlex.split(line, comments=True)
        # A run to prune comes first, where none is trained; report and curve have parsers, and tests, of their own.
        if words[2:3] == ["train.prune"] and len(words) > 3 and (words[3] == "RUN" or "/" in words[3]):
            del words[3]
        if "--config" in words:  # a file that a run leaves
            del words[words.index("--config") : words.index("--config") + 2]
        if words[:2] == ["python", "-m"] and words[2] in KINDS and not {"report", "curve", "--help"} & {*words}:
            yield words[2:]


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_commands_parse(words):
    program, *words = words
    presets, default, kind = KINDS[program]
    preset, config = parse(program, presets, words, default=default)
    assert isinstance(config, kind) and (preset in words or preset == default)


def test_commands_of_explanation_parse():
    lines = [line for line in "\n".join(blocks("sh", README + EXPLANATION)).splitlines() if "train.explain" in line]
    assert len(lines) > 4
    for line in lines:
        run, images, config = explain_parsed(shlex.split(line, comments=True)[3:])
        assert run and config.out == "why" and not any(image.startswith("-") for image in images)


@pytest.mark.slow
def test_python_of_explanation_runs(tmp_path, tfds_dir, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    monkeypatch.chdir(tmp_path)
    run(TrainConfig(out="runs/digits-seed0", width=8, steps=5, batch=64, optim=OptimConfig(lr=0.05)))
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("seven.png")
    assert executed(EXPLANATION)["result"]["page"] == "why/index.html"


def test_links_exist():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "results" / "README.md", *ROOT.glob("docs/*.md")]
    for page in pages:
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", prose):
            assert (page.parent / link).exists(), link
    for row in re.findall(r"^\| (`\w+\.py`.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.M):
        for file in re.findall(r"\w+\.py", row):
            assert any((ROOT / package / file).exists() for package in ("resnet_jax", "train", "pretrain")), file
