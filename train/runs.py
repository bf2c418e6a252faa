"""A run's folder: `config.json`, `metrics.jsonl`, `checkpoints/`, `confusion.json`, `result.json`."""

import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from resnet_jax.tree import PyTree
from train.build import make_model, make_state, make_tx
from train.checkpoint import Checkpoints
from train.config import TrainConfig, flat, from_dict
from train.data import Dataset
from train.errors import RunError, UsageError

# Fields that may differ between a run and its continuation: they change where and how fast, never what.
FREE_FIELDS = {"out", "mode", "data.dir", "distributed", "log_every", "eval_batch"}
FREE_FIELDS |= {"keep_last", "keep_best", "save_steps", "primitives", "cache"}


def read_config(out: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """(config, the whole of config.json: preset, classes, image_shape, versions) of a run's folder."""
    try:
        saved = json.loads((out / "config.json").read_text())
        return from_dict(TrainConfig, saved["config"]), saved
    except FileNotFoundError:
        raise UsageError(f"{out} is no run's folder: it has no config.json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{out / 'config.json'} cannot be read: {error}") from None


def write_config(out: Path, preset: str, config: TrainConfig, dataset: Dataset) -> None:
    """Note what this run is, or make sure that it is the one that the folder holds."""
    if (out / "config.json").exists():
        check_continues(out, config)
        return
    if (out / "checkpoints").exists():
        raise UsageError(f"{out} holds checkpoints but no config.json; choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the run's folder {out}: {error}") from None
    described = {
        "preset": preset,
        "config": dataclasses.asdict(config),
        "classes": dataset.classes,
        "image_shape": dataset.image_shape,
        **environment(),
    }
    write_json(out / "config.json", described)


def check_continues(out: Path, config: TrainConfig) -> None:
    """Make sure that a config is the one that a run's folder was made for, but for `FREE_FIELDS`."""
    saved, wanted = flat(read_config(out)[0]), flat(config)
    # Measured statistics are not the user's to repeat.
    measured = {n for n in ("augment.mean", "augment.std") if wanted[n] is None}
    differing = [n for n in wanted if n not in FREE_FIELDS | measured and saved.get(n) != wanted[n]]
    if differing:
        changes = ", ".join(f"{n} {saved.get(n)} -> {wanted[n]}" for n in differing)
        raise UsageError(f"{out} holds a run with other settings ({changes}); choose another --out")


def finished_result(out: Path, config: TrainConfig) -> dict[str, Any] | None:
    """The result of a run that this folder holds and that has ended, else None."""
    if not (out / "result.json").exists():
        return None
    check_continues(out, config)
    return json.loads((out / "result.json").read_text())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON in one piece: readers see the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error}") from None


def load_variables(run: Path) -> dict[str, PyTree]:
    """The variables that a run is used with: of its last checkpoint, or of the best where it says so."""
    config, saved = read_config(run)
    if not (run / "checkpoints").is_dir():
        raise UsageError(f"{run} has no checkpoints yet")
    model = make_model(config, len(saved["classes"]))
    # The optimizer's state has the same shapes however long the run was.
    state = make_state(config, model, make_tx(config, 1, 1.0)[0], tuple(saved["image_shape"]))
    checkpoints = Checkpoints(run / "checkpoints", writes=False)
    restored = checkpoints.restore(state, step=checkpoints.best if config.select == "best" else None)
    checkpoints.close()
    if restored is None:
        raise UsageError(f"{run} has no checkpoints yet")
    return restored[0].variables


def environment() -> dict[str, Any]:
    """What a figure depends on beside its recipe: command, commit, versions, devices."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "host": f"{_processor()}, {os.cpu_count()} cores",
    }


def _commit() -> str | None:
    """The commit of the checkout that this code is in, with a + if files differ from it; None outside of one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+" * bool(changed)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
