"""A run's folder: `config.json`, `metrics.jsonl`, `checkpoints/`, `confusion.json`, `result.json`, `skipped.txt`."""

import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from train.checkpoint import Checkpoints
from train.config import RunConfig, TrainConfig, flat, from_dict
from train.data.sets import Dataset
from train.errors import RunError, UsageError
from train.runtime import cpu_line
from train.state import TrainState
from train.steps import confusion_matrix

Run = TypeVar("Run", bound=RunConfig)

# Fields that may differ between a run and its continuation: they change where and how fast it runs, never its result.
FREE_FIELDS = {"out", "mode", "data.dir", "distributed", "log_every", "eval_batch"}
FREE_FIELDS |= {"keep_last", "keep_best", "save_steps", "kernels", "cache"}


MATRIX_CLASSES = 1000  # most classes whose confusion matrix is written in full
MOST_CONFUSED = 20  # pairs of classes that confusion.json names


def settle(config: RunConfig, preset: str, replaced: Sequence[str] = ()) -> tuple[Path, dict[str, Any] | None]:
    """Choose the run folder: (folder, result of the finished run that it holds, else None).

    Raises:
      UsageError: the folder holds a run with different settings.
    """
    out = Path(config.out or f"runs/{preset}-seed{config.seed}").expanduser()
    if (out / "config.json").exists() or (out / "result.json").exists():
        check_continues(out, config, replaced)
    if not (out / "result.json").exists():
        return out, None
    print(f"{out} already holds this run, finished; its result:", file=sys.stderr)
    return out, json.loads((out / "result.json").read_text())


def read_config(out: Path, kind: type[Run]) -> tuple[Run, dict[str, Any]]:
    """Read (config, the whole of config.json: preset, classes, image_shape, versions) of a run folder.

    Raises:
      UsageError: not a run folder, a run of a different pipeline than `kind`, or a damaged file.
    """
    try:
        saved = json.loads((out / "config.json").read_text())
        theirs, ours = saved.get("pipeline", "train"), pipeline(kind)
        if theirs != ours:
            raise UsageError(f"{out} is a run of {theirs}, not of {ours}")
        return from_dict(kind, saved["config"]), saved
    except FileNotFoundError:
        raise UsageError(f"{out} is not a run folder: it has no config.json") from None
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


def claim(out: Path, config: RunConfig, replaced: Sequence[str] = ()) -> None:
    """Create a run's folder, or check that it holds this run.

    Raises:
      UsageError: it holds a different run, or cannot be created.
    """
    if (out / "config.json").exists():
        check_continues(out, config, replaced)
    elif any((out / "checkpoints").glob("*")):
        raise UsageError(f"{out} holds checkpoints but no config.json; choose a different --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot create the run folder {out}: {error}") from None


def write_config(out: Path, preset: str, config: RunConfig, dataset: Dataset, replaced: Sequence[str] = ()) -> None:
    """Record a run in its folder, unless it is recorded there already."""
    if (out / "config.json").exists():
        return
    described = {
        "pipeline": pipeline(type(config)),
        "preset": preset,
        "config": dataclasses.asdict(config),
        "replaced": list(replaced),
        "classes": dataset.classes,
        "image_shape": dataset.image_shape,
        **environment(),
    }
    write_json(out / "config.json", described)


def write_skipped(out: Path, dataset: Dataset) -> None:
    """List the files that the dataset leaves out, with the reasons, in skipped.txt; without any, write no file."""
    if dataset.passed_over:
        lines = "".join(f"{line}\n" for line in dataset.passed_over)
        try:
            (out / "skipped.txt").write_text(lines, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise RunError(f"cannot write {out / 'skipped.txt'}: {error}") from None


def check_continues(out: Path, config: RunConfig, replaced: Sequence[str] = ()) -> None:
    """Check that a run folder was created with this config (except `FREE_FIELDS`) and these pieces.

    Raises:
      UsageError: settings or pieces differ.
    """
    theirs, whole = read_config(out, type(config))
    saved, wanted = flat(theirs), flat(config)
    # The command need not repeat statistics that were measured.
    free = FREE_FIELDS | {name for name in ("augment.mean", "augment.std") if wanted[name] is None}
    changes = [f"{n} {saved[n]} -> {wanted[n]}" for n in wanted if n not in free and saved[n] != wanted[n]]
    if changes:
        listed = ", ".join(changes)
        raise UsageError(f"{out} holds a run with different settings ({listed}); choose a different --out")
    if sorted(before := whole.get("replaced", [])) != sorted(replaced):
        names = f"{', '.join(before) or 'nothing'} -> {', '.join(replaced) or 'nothing'}"
        raise UsageError(f"{out} holds a run with different pieces passed to run() ({names}); choose a different out")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON atomically: readers see the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error}") from None


def write_confusion(out: Path, confusion: np.ndarray, classes: Sequence[str]) -> None:
    """Write confusion.json from the `confusion` of `train.steps.summarize`.

    It holds the names of the `classes`; `most_confused`, the most frequent errors as [true class, predicted class,
    count], by name; and the matrix `confusion`, true class by row, or, as that is quadratic in the number of classes,
    for more than `MATRIX_CLASSES` of them `counts`: [true class, predicted class, count] of the pairs that occurred.
    """
    errors = confusion[confusion[:, 0] != confusion[:, 1]]
    worst = errors[np.argsort(-errors[:, 2], kind="stable")][:MOST_CONFUSED]
    content = {"classes": classes, "most_confused": [[classes[t], classes[p], n] for t, p, n in worst.tolist()]}
    if len(classes) <= MATRIX_CLASSES:
        content["confusion"] = confusion_matrix(confusion, len(classes)).tolist()
    else:
        content["counts"] = confusion.tolist()
    write_json(out / "confusion.json", content)


def load_state(run: Path) -> TrainState:
    """Load a run's final state as NumPy arrays: its last checkpoint, or its best if the run selects that.

    The optimizer's state is in plain containers.

    Raises:
      UsageError: it is not a training run, or it has no good checkpoint.
    """
    config, _ = read_config(run, TrainConfig)
    if not (run / "checkpoints").is_dir():
        raise UsageError(f"{run} has no checkpoints yet")
    checkpoints = Checkpoints(run / "checkpoints", writes=False)
    found = checkpoints.read(step=checkpoints.best if config.select == "best" else None)
    checkpoints.close()
    if found is None:
        raise UsageError(f"{run} has no checkpoints yet")
    arrays = found[0]
    return TrainState(**{**arrays, "key": jax.random.wrap_key_data(arrays["key"])})


def environment() -> dict[str, Any]:
    """Describe the environment that results depend on: command, commit, versions, devices."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    processor = cpu_line("model name").partition(":")[2].strip()
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "host": f"{processor or platform.processor() or platform.machine()}, {os.cpu_count()} cores",
    }


def _commit() -> str | None:
    """The commit of the checkout that this code is in, with a + if files differ from it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+" * bool(changed)
