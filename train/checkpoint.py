"""Checkpoints: the state, the position in the data, and a checksum, in one Orbax step folder.

Saving copies the state on the devices and returns; a thread fetches the copy and writes it. A checkpoint is renamed
into place once it is complete, so a run that is killed while saving keeps the earlier ones; one that is damaged later
is detected by its checksum and skipped.
"""

import json
import re
import shutil
import sys
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.masks import pack, unpack
from resnet_jax.parallel import place
from resnet_jax.tree import PyTree, leaves, map_with_path
from train.errors import RunError, UsageError
from train.state import TrainState


class Checkpoints:
    """The checkpoints of one run, under `root`: the newest `keep_last`, and the best `keep_best` by validation.

    `metric` is the validation figure that tells which are the best: the higher, the better. Pass `writes=False` for
    read-only access: the run itself may be in the middle of a save.

    Raises (from every method that writes):
      RunError: the disk is full or cannot be written to; earlier checkpoints are kept.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep_last: int = 2,
        keep_best: int = 1,
        metric: str = "validation_accuracy",
        writes: bool = True,
    ) -> None:
        from orbax.checkpoint import v1 as ocp

        policies = ocp.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics[metric], n=keep_best, keep_checkpoints_without_metrics=False
        )
        self.root, self.metric = root.resolve(), metric
        _check_metrics(self.root)
        self._link: tempfile.TemporaryDirectory[str] | None = None
        folder = self.root
        # Orbax takes a path for a pattern in places, and `gs:` for a scheme: then it gets a link with a plain name.
        if not re.fullmatch(r"[\w/.,=+@%# -]*", str(self.root), re.ASCII) and (writes or self.root.is_dir()):
            self.root.mkdir(parents=True, exist_ok=True)
            self._link = tempfile.TemporaryDirectory(prefix="checkpoints-")
            folder = Path(self._link.name) / "link"
            folder.symlink_to(self.root, target_is_directory=True)
        self._orbax = ocp.training.Checkpointer(
            folder,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep_last), best]),
            cleanup_tmp_directories=writes,
        )
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Any = None

    @property
    def steps(self) -> list[int]:
        """Saved steps, oldest first."""
        return sorted(c.step for c in self._orbax.checkpoints)

    @property
    def best(self) -> int | None:
        """The saved step with the highest `metric` (ties go to the newest); None if none was measured."""
        measured = [(c.metrics[self.metric], c.step) for c in self._orbax.checkpoints if c.metrics]
        return max(measured)[1] if measured else None

    def save(self, state: TrainState, iterator: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Start saving `state` and the iterator's state; `metrics` may hold the run's `metric`.

        This waits for the checkpoint before, if it is still being written, and raises its error.
        """
        self.wait()
        if int(state.step) in self.steps:
            return
        # A copy, because the next step donates the state's buffers.
        copy = _copy({**_fields(state), "key": jax.random.key_data(state.key)})
        metadata = {"iterator": iterator, "key": str(jax.random.key_impl(state.key))}
        if jax.process_count() == 1:
            self._pending = self._thread.submit(lambda: self._write(copy, metadata, metrics).result())
            return
        # Orbax's hosts meet in collectives, whose order among those of the steps must be the same on all of them.
        try:
            self._pending = self._write(copy, metadata, metrics)
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Block until the checkpoint in progress is on disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except Exception as error:
                raise self._failed(error) from error

    def _write(self, fields: dict[str, PyTree], metadata: dict[str, Any], metrics: dict[str, float] | None) -> Any:
        """Start writing the copied fields of a state, with its masks packed into bits; the result waits for the end."""
        step = int(fields["step"])
        arrays = jax.device_get({**fields, "masks": pack(fields["masks"])})
        needed, free = sum(a.nbytes for a in jax.tree.leaves(arrays)), shutil.disk_usage(self.root).free
        if free < needed:
            raise OSError(f"it needs {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free")
        metadata = {**metadata, "checksum": _checksum(arrays)}
        return self._orbax.save_async(step, arrays, metrics=metrics, custom_metadata=metadata, force=True)

    def restore(self, like: TrainState, *, step: int | None = None) -> tuple[TrainState, dict[str, Any]] | None:
        """Load (state, iterator state) of the newest good checkpoint, or of `step`; None if there is none.

        `like` is a state with the same shapes and the desired layout, on any number of devices. Masks come from the
        checkpoint: restoring a sparse one into a dense state makes it sparse.

        Raises:
          UsageError: the checkpoint comes from a different model or optimizer, or every one is damaged.
        """
        found = self.read(step=step)
        if found is None:
            return None
        arrays, iterator = found
        # Masks may differ: they come from the checkpoint.
        saved, wanted = leaves(arrays), leaves({**_fields(like), "masks": arrays["masks"]})
        other = f"checkpoint {self.root / str(int(arrays['step']))} comes from a different model or optimizer"
        for path in sorted(saved.keys() ^ wanted.keys()):
            raise UsageError(f"{other}: {path} is only in {'the checkpoint' if path in saved else 'this run'}")
        for path, leaf in wanted.items():
            if saved[path].shape != leaf.shape:
                raise UsageError(f"{other}: {path} has shape {saved[path].shape} there, {leaf.shape} in this run")
        theirs, ours = (str(jax.random.key_impl(key)) for key in (arrays["key"], like.key))
        if theirs != ours:
            raise UsageError(
                f"checkpoint {self.root / str(int(arrays['step']))} draws its random numbers by {theirs}, this process "
                f"by {ours}: set JAX_DEFAULT_PRNG_IMPL={theirs} to go on"
            )

        # Orbax returns plain containers, and optimizer states are named tuples: match them leaf by leaf. A process
        # with 64 bits may have saved float64.
        def restored(path: str, leaf: Any) -> Any:
            return place(saved[path] if path == "key" else saved[path].astype(leaf.dtype), leaf.sharding)

        return type(like)(**map_with_path(restored, _fields(like))), iterator

    def read(self, *, step: int | None = None) -> tuple[PyTree, dict[str, Any]] | None:
        """Like `restore`, without a state to restore into: the saved fields by name, as NumPy arrays.

        Containers are plain dicts and lists; masks are unpacked, and the key is typed.

        Raises:
          UsageError: every checkpoint is damaged.
        """
        self.wait()
        steps = self.steps if step is None else [step]
        for candidate in reversed(steps):
            try:
                # In the thread, where Ctrl-C cannot end up in Orbax, which takes it for a damaged file.
                alone = jax.process_count() == 1
                found = self._thread.submit(self._load, candidate).result() if alone else self._load(candidate)
            except Exception as error:  # a damaged file can raise anything
                reason = " ".join(str(error).split())[:160]
                print(f"warning: checkpoint {candidate} in {self.root} is damaged ({reason})", file=sys.stderr)
                continue
            if candidate != steps[-1]:
                print(f"warning: using the older checkpoint {candidate} instead", file=sys.stderr)
            return found
        if steps:
            raise UsageError(f"every checkpoint in {self.root} is damaged; choose a different --out to start again")
        return None

    def resume(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Restore to continue training: also removes damaged newer checkpoints, which new ones would collide with."""
        restored = self.restore(like)
        if restored is not None:
            for step in self.steps:
                if step > int(restored[0].step):
                    shutil.rmtree(self.root / str(step), ignore_errors=True)
            self._orbax.reload()
        return restored

    def close(self) -> None:
        self.wait()
        self._thread.shutdown()
        self._orbax.close()
        if self._link is not None:
            self._link.cleanup()

    def _load(self, step: int) -> tuple[PyTree, dict[str, Any]]:
        files = [self.root / str(step) / "state" / name for name in ("manifest.ocdbt", "_METADATA")]
        missing = [file.name for file in files if not file.is_file()]
        if missing:  # Orbax would log at length
            raise ValueError(f"{missing[0]} is missing")
        metadata = self._orbax.metadata(step)
        if metadata.metadata is None:
            raise ValueError("its index cannot be read")
        arrays = self._orbax.load(step, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), metadata.metadata))
        # The checksum covers the leaves in the state's own order, which plain containers lose (an optimizer's named
        # tuple is a dict here) and Orbax's index keeps.
        saved = leaves(arrays)
        ordered = [saved[path] for path in _order(files[1]) if path in saved]
        if _checksum(ordered) != metadata.custom_metadata["checksum"]:
            raise ValueError("its checksum differs")
        arrays["masks"] = unpack(arrays["masks"], arrays["params"])
        # Older checkpoints do not name the implementation of their key, whose size says it.
        impl = metadata.custom_metadata.get("key") or {2: "threefry2x32", 4: "rbg"}[arrays["key"].size]
        arrays["key"] = jax.random.wrap_key_data(arrays["key"], impl=impl)
        return arrays, metadata.custom_metadata["iterator"]

    def _failed(self, error: Exception | str) -> RunError:
        kept = f"the newest one kept is step {self.steps[-1]}" if self.steps else "none was saved before"
        return RunError(f"cannot write a checkpoint to {self.root}: {error}; {kept}")


def _check_metrics(root: Path) -> None:
    """Check the files of validation accuracies, which Orbax reads as soon as it opens the folder.

    Raises:
      UsageError: a damaged one.
    """
    for file in root.glob("*/metrics/metrics"):
        with suppress(OSError):  # a run that is training removes old checkpoints
            try:
                json.loads(file.read_text())
            except ValueError:
                way_out = "delete that folder, and the checkpoint has no accuracy, but keeps its weights"
                raise UsageError(f"the file in {file.parent} is damaged: {way_out}") from None


def _order(index: Path) -> list[str]:
    """The paths of a checkpoint's leaves, in the order in which the state was flattened."""
    entries = json.loads(index.read_text())["tree_metadata"].values()
    return ["/".join(part["key"] for part in entry["key_metadata"]) for entry in entries]


@jax.jit
def _copy(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.copy, tree)


def _fields(state: TrainState) -> dict[str, PyTree]:
    """The fields of a state by name."""
    return {name: getattr(state, name) for name in state.__dataclass_fields__}


def _checksum(arrays: PyTree) -> int:
    value = 0
    for leaf in jax.tree.leaves(arrays):
        value = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), value)
    return value
