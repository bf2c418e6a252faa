"""A run's folder: `config.json`, `metrics.jsonl`, `checkpoints/`, `confusion.json`, `result.json`."""

import contextlib
import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.tree import PyTree
from train.checkpoint import Checkpoints
from train.config import RunConfig, TrainConfig, flat, from_dict
from train.data.sets import Dataset
from train.errors import RunError, UsageError
from train.from_config import make_model, make_state, make_tx, trained_part
from train.state import TrainState

Run = TypeVar("Run", bound=RunConfig)

# Fields that may differ between a run and its continuation: they change where and how fast, never what.
FREE_FIELDS = {"out", "mode", "data.dir", "distributed", "log_every", "eval_batch"}
FREE_FIELDS |= {"keep_last", "keep_best", "save_steps", "kernels", "cache"}


def settle(config: RunConfig, preset: str) -> tuple[Path, dict[str, Any] | None]:
    """(the run's folder, the result of a run that it holds and that has ended, else None).

    Raises:
      UsageError: the folder holds a run with other settings.
    """
    out = Path(config.out or f"runs/{preset}-seed{config.seed}").expanduser()
    finished = finished_result(out, config)
    if finished:
        print(f"{out} holds this run, finished; its result:", file=sys.stderr)
    elif (out / "config.json").exists():
        check_continues(out, config)
    return out, finished


def read_config(out: Path, kind: type[Run]) -> tuple[Run, dict[str, Any]]:
    """(config, the whole of config.json: preset, classes, image_shape, versions) of a run's folder.

    Raises:
      UsageError: no run there, one of another pipeline than `kind`, or a damaged file.
    """
    try:
        saved = json.loads((out / "config.json").read_text())
        if (theirs := pipeline_of(out)) != pipeline(kind):
            raise UsageError(f"{out} is a run of {theirs}, not of {pipeline(kind)}")
        return from_dict(kind, saved["config"]), saved
    except FileNotFoundError:
        raise UsageError(f"{out} is no run's folder: it has no config.json") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{out / 'config.json'} cannot be read: {error}") from None


def pipeline(kind: type[RunConfig]) -> str:
    """The program that a kind of config belongs to: `train`, `pretrain`."""
    return kind.__module__.split(".")[0]


def pipeline_of(out: Path) -> str:
    """The program whose run a folder holds; `train` where nothing says so."""
    try:
        return json.loads((out / "config.json").read_text()).get("pipeline", "train")
    except (OSError, ValueError, AttributeError):
        return "train"


def write_config(out: Path, preset: str, config: RunConfig, dataset: Dataset) -> None:
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
        "pipeline": pipeline(type(config)),
        "preset": preset,
        "config": dataclasses.asdict(config),
        "classes": dataset.classes,
        "image_shape": dataset.image_shape,
        **environment(),
    }
    write_json(out / "config.json", described)


def discard_start(out: Path) -> None:
    """Take back `write_config`, for a run that was refused before its first checkpoint."""
    (out / "config.json").unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it is not there, or holds something after all
        (out / "checkpoints").rmdir()


def check_continues(out: Path, config: RunConfig) -> None:
    """Make sure that a config is the one that a run's folder was made for, but for `FREE_FIELDS`."""
    saved, wanted = flat(read_config(out, type(config))[0]), flat(config)
    # Measured statistics are not the user's to repeat.
    measured = {n for n in ("augment.mean", "augment.std") if wanted[n] is None}
    differing = [n for n in wanted if n not in FREE_FIELDS | measured and saved.get(n) != wanted[n]]
    if differing:
        changes = ", ".join(f"{n} {saved.get(n)} -> {wanted[n]}" for n in differing)
        raise UsageError(f"{out} holds a run with other settings ({changes}); choose another --out")


def finished_result(out: Path, config: RunConfig) -> dict[str, Any] | None:
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
    """The variables that a run is used with; see `load_state`."""
    return load_state(run).variables


def load_state(run: Path) -> TrainState:
    """The state that a run ended in, its masks too: of its last checkpoint, or of the best where it says so.

    Raises:
      UsageError: no run of training there, or none with a good checkpoint.
    """
    config, saved = read_config(run, TrainConfig)
    if not (run / "checkpoints").is_dir():
        raise UsageError(f"{run} has no checkpoints yet")
    model = make_model(config, len(saved["classes"]))
    # The optimizer's state has the same shapes however long the run was.
    tx, _ = make_tx(config.optim, 1, 1.0, trainable=trained_part(config))
    # Shapes are enough to restore into: nothing is initialised.
    shapes = jax.eval_shape(lambda: make_state(config, model, tx, tuple(saved["image_shape"])))
    key, shapes = jax.random.key(config.seed), shapes.replace(key=None)
    state = jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), shapes).replace(key=key)
    checkpoints = Checkpoints(run / "checkpoints", writes=False)
    restored = checkpoints.restore(state, step=checkpoints.best if config.select == "best" else None)
    checkpoints.close()
    if restored is None:
        raise UsageError(f"{run} has no checkpoints yet")
    return restored[0]


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
