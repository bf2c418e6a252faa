"""A run's folder: `config.json`, `metrics.jsonl`, `checkpoints/`, `confusion.json`, `result.json`, `skipped.txt`."""

import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from resnet_jax.tree import abbreviate
from train.checkpoint import Checkpoints
from train.config import RunConfig, TrainConfig, flat, from_dict, pipeline
from train.data.sets import ImageSet
from train.errors import RunError, UsageError
from train.json_text import to_json
from train.paths import PATHS, local_path, make_folder, relocated, replace_file, same_place
from train.runtime import cpu_line
from train.sparse_file import SPARSE
from train.state import TrainState, single_precision
from train.steps import confusion_matrix, most_confused

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Run = TypeVar("Run", bound=RunConfig)

LOCK = ".lock"

# Fields that may differ between a run and its continuation: they change where and how fast it runs, never its result.
FREE_FIELDS = {"out", "mode", "data.dir", "distributed", "log_every", "eval_batch"}
FREE_FIELDS |= {"keep_last", "keep_best", "save_steps", "kernels", "cache", "log", "profile"}


MATRIX_CLASSES = 1000  # most classes whose confusion matrix is written in full
MOST_CONFUSED = 20  # pairs of classes that confusion.json names


def settle(
    config: RunConfig, preset: str, replaced: Sequence[str] = (), *, longer: bool = False
) -> tuple[Path, dict[str, Any] | None]:
    """Choose the run folder: (folder, result of the finished run that it holds, else None).

    With `longer`, a config with more epochs or steps than the run in the folder continues it.

    Raises:
      UsageError: the folder holds a run with different settings or a delivered network, or is not a local one.
    """
    out = local_path(config.out or f"runs/{preset}-seed{config.seed}")
    if (out / SPARSE).exists() and not hasattr(config, "prune"):
        raise UsageError(f"{out} is a network that train.prune delivered: train it with --init {out}, in a new --out")
    if (out / "config.json").exists() or (out / "result.json").exists():
        check_continues(out, config, replaced, longer=longer)
    result = read_result(out)
    if result is None or (longer and length_before(out, config)):
        return out, None
    print(f"{out} already holds this run, finished; its result:", file=sys.stderr)
    return out, result


def read_result(out: Path) -> dict[str, Any] | None:
    """Read a run's result.json; None if the run is not finished.

    Raises:
      UsageError: a damaged file.
    """
    path = out / "result.json"
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        return {**result}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError) as error:
        way_out = "delete it, and the command of the run writes it again from the last checkpoint"
        raise UsageError(f"{path} cannot be read ({error}): {way_out}") from None


def read_config(out: Path, kind: type[Run]) -> tuple[Run, dict[str, Any]]:
    """Read (config, the whole of config.json: preset, classes, image_shape, versions) of a run folder.

    The kind `RunConfig` reads what the runs of all pipelines share.

    Raises:
      UsageError: not a run folder, a run of a different pipeline than `kind`, or a damaged file.
    """
    try:
        saved = json.loads((out / "config.json").read_text())
        if not isinstance(saved, dict) or "config" not in saved:
            raise UsageError(f"{out} is not a run folder: its config.json does not describe a run")
        theirs, ours = saved.get("pipeline", "train"), pipeline(kind)
        if theirs != ours and kind is not RunConfig:
            raise UsageError(f"{out} is a run of {theirs}, not of {ours}")
        saved["config"].setdefault("steps_per_call", 1)  # runs before this field
        for name, path in relocated(flat(saved["config"]), out, saved).items():
            group, _, last = name.rpartition(".")
            (saved["config"][group] if group else saved["config"])[last] = path
        return from_dict(kind, saved["config"]), saved
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{out} is not a run folder: it has no config.json") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{out / 'config.json'} cannot be read: {error}") from None


def refuse_own_model(
    run: str | Path, saved: Mapping[str, Any], way_out: str = "pass it here too, load(run, model=...)"
) -> None:
    """Refuse a run with this config.json if its model was passed to `run()`, so that its config does not describe it.

    Raises:
      UsageError: it was; the message ends in `way_out`.
    """
    if "model" in saved.get("replaced", []):
        raise UsageError(f"{run} trained a model that was passed to run(): {way_out}")


def pipeline_of(out: Path) -> str:
    """The program whose run a folder holds; `train` where nothing says so."""
    try:
        return json.loads((out / "config.json").read_text()).get("pipeline", "train")
    except (OSError, ValueError, AttributeError):
        return "train"


def claim(
    out: Path, config: RunConfig, dataset: ImageSet, replaced: Sequence[str] = (), *, longer: bool = False
) -> None:
    """Create a run's folder, or check that it holds this run, and lock it, see `lock`.

    Raises:
      UsageError: it holds a different run or one of different images, a different process uses it, or it cannot be
        created.
    """
    if (out / "config.json").exists():
        check_same_images(out, config, dataset)
        check_continues(out, config, replaced, longer=longer)
    elif any((out / "checkpoints").glob("*")):
        raise UsageError(f"{out} holds checkpoints but no config.json; choose a different --out")
    make_folder(out, "cannot create the run folder")
    lock(out)


_locks: dict[Path, tuple[int, int]] = {}  # the locked folders: file descriptor, and the thread that locked it


def lock(out: Path) -> None:
    """Lock a run folder until `unlocked` ends, or the process; does nothing on file systems without locks.

    Raises:
      UsageError: a different process has locked it.
    """
    path = out.resolve() / LOCK
    if fcntl is None or path in _locks:
        return
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UsageError(f"cannot write to the run folder {out}: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(file, 200).decode(errors="replace").strip() or "a different process"
        os.close(file)
        raise UsageError(
            f"{out} is in use by {holder}: wait for its end, stop it, or choose a different --out"
        ) from None
    except OSError:  # NFS without locks
        os.close(file)
        path.unlink(missing_ok=True)
        return
    if not (path.exists() and os.path.samestat(os.fstat(file), path.stat())):
        os.close(file)  # its holder has just removed it
        return lock(out)
    os.truncate(file, 0)
    os.write(file, f"process {os.getpid()} on {platform.node()}\n".encode())
    _locks[path] = file, threading.get_ident()


@contextmanager
def unlocked() -> Iterator[None]:
    """Unlock, at the end, the run folders that this thread locks in this block; also a decorator: `@unlocked()`."""
    try:
        yield
    finally:
        own = [path for path, (_, thread) in _locks.items() if thread == threading.get_ident()]
        for path in own:
            with suppress(OSError):
                path.unlink()
            os.close(_locks.pop(path)[0])


def write_config(out: Path, preset: str, config: RunConfig, dataset: ImageSet, replaced: Sequence[str] = ()) -> None:
    """Record a run in its folder, unless it is recorded there already.

    If this config continues it for longer, its result is kept as result-STEPS.json.
    """
    if (out / "config.json").exists():
        if length_before(out, config) is None:
            return
        if result := read_result(out):
            os.replace(out / "result.json", out / f"result-{result.get('steps', 'before')}.json")
    described = {
        "pipeline": pipeline(type(config)),
        "preset": preset,
        "config": dataclasses.asdict(config),
        "replaced": list(replaced),
        "classes": dataset.classes,
        "images": dataset.images,
        "image_shape": dataset.image_shape,
        "cwd": os.getcwd(),
        **environment(),
    }
    write_json(out / "config.json", described)


def write_skipped(out: Path, dataset: ImageSet) -> None:
    """List the files that the dataset leaves out, with the reasons, in skipped.txt; without any, write no file."""
    if dataset.passed_over:
        lines = "".join(f"{line}\n" for line in dataset.passed_over)
        try:
            (out / "skipped.txt").write_text(lines, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise RunError(f"cannot write {out / 'skipped.txt'}: {error}") from None


def length_before(out: Path, config: RunConfig) -> str | None:
    """The length of the run in a folder, such as `30 epochs`, if this config differs in a larger one; else None."""
    before, _ = read_config(out, type(config))
    if before.steps and config.steps:
        return f"{before.steps:,} steps" if config.steps > before.steps else None
    longer = not before.steps and not config.steps and config.epochs > before.epochs
    return f"{before.epochs:g} epochs" if longer else None


def check_same_images(out: Path, config: RunConfig, dataset: ImageSet) -> None:
    """Check that a run in a folder was made from these classes and images.

    Raises:
      UsageError: they differ; the message says in what.
    """
    _, saved = read_config(out, type(config))
    ways = f"restore them, choose a different --out, or start a new run from these weights with --init {out}"
    before, now = list(saved.get("classes", dataset.classes)), list(dataset.classes)
    if before != now:
        names = f"{abbreviate(before)} -> {abbreviate(now)}"
        if len(before) == len(now):
            names = abbreviate([f"{a} -> {b}" for a, b in zip(before, now, strict=True) if a != b])
        raise UsageError(f"{out} was made from different classes ({names}): {ways}")
    theirs, ours = saved.get("images", {}), dataset.images
    for split in (split for split in ours if split in theirs and theirs[split] != ours[split]):
        counts = [images[split]["count"] for images in (theirs, ours)]
        change = f"{counts[0]:,} -> {counts[1]:,}" if counts[0] != counts[1] else "other names or labels"
        raise UsageError(f"{out} was made from different {split} images ({change}): {ways}")


def check_continues(out: Path, config: RunConfig, replaced: Sequence[str] = (), *, longer: bool = False) -> None:
    """Check that a run folder was created with this config (except `FREE_FIELDS`) and these pieces.

    With `longer`, the config may have more epochs or steps.

    Raises:
      UsageError: settings or pieces differ.
    """
    theirs, whole = read_config(out, type(config))
    saved, wanted = flat(theirs), flat(config)
    # The command need not repeat what was measured or chosen.
    measured = ("augment.mean", "augment.std", "steps_per_call", "data.buckets")
    free = FREE_FIELDS | {name for name in measured if wanted.get(name) in (None, ())}
    free |= {n for n in PATHS if saved.get(n) and wanted.get(n) and same_place(saved[n], wanted[n])}
    if longer and length_before(out, config):
        free |= {"epochs", "steps"}
    changes = [f"{n} {saved[n]} -> {wanted[n]}" for n in wanted if n not in free and saved[n] != wanted[n]]
    if changes:
        listed = ", ".join(changes)
        raise UsageError(f"{out} holds a run with different settings ({listed}); choose a different --out")
    if sorted(before := whole.get("replaced", [])) != sorted(replaced):
        names = f"{', '.join(before) or 'nothing'} -> {', '.join(replaced) or 'nothing'}"
        raise UsageError(f"{out} holds a run with different pieces passed to run() ({names}); choose a different out")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON atomically, see `replace_file`."""
    replace_file(path, f"{to_json(content, indent=1)}\n".encode())


def write_confusion(out: Path, confusion: np.ndarray, classes: Sequence[str]) -> None:
    """Write confusion.json from the `confusion` of `train.steps.summarize`.

    It holds the names of the `classes`; `most_confused`, the most frequent errors as [true class, predicted class,
    count], by name; and the matrix `confusion`, true class by row, or, as that is quadratic in the number of classes,
    for more than `MATRIX_CLASSES` of them `counts`: [true class, predicted class, count] of the pairs that occurred.
    """
    worst = most_confused(confusion, MOST_CONFUSED).tolist()
    content = {"classes": classes, "most_confused": [[classes[t], classes[p], n] for t, p, n in worst]}
    if len(classes) <= MATRIX_CLASSES:
        content["confusion"] = confusion_matrix(confusion, len(classes)).tolist()
    else:
        content["counts"] = confusion.tolist()
    write_json(out / "confusion.json", content)


def load_state(run: Path, kind: type[Any] = TrainConfig) -> TrainState:
    """Load a run's final state as NumPy arrays: its last checkpoint, or its best if the run selects that.

    The optimizer's state is in plain containers.

    Raises:
      UsageError: it is not a run with this kind of config, or it has no good checkpoint.
    """
    config, _ = read_config(run, kind)
    if not (run / "checkpoints").is_dir():
        raise UsageError(f"{run} has no checkpoints yet")
    checkpoints = Checkpoints(run / "checkpoints", metric=config.metric, writes=False)
    found = checkpoints.read(step=checkpoints.best if config.select == "best" else None)
    checkpoints.close()
    if found is None:
        raise UsageError(f"{run} has no checkpoints yet")
    return TrainState(**single_precision(found[0]))


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
