"""Batches from a split: an endless seeded stream to train on, and every example exactly once to evaluate on.

The stream is the same whether a split is in memory or decoded on the fly: epoch `e` is a permutation drawn from
(seed, e), epochs follow each other without a gap, and batch `s` starts at position s * batch. So each example
appears once per epoch, batches are always full, and a checkpoint only has to keep the position.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from typing import Any, Protocol

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from resnet_jax.parallel import Mode, batch_sharding, make_mesh, place, replicated, shard_batch
from train.chunks import CHUNK_LAYOUT, Chunk, take_rows
from train.data.sources import Arrays, Encoded, Example, collate, decode_threads, image_shape
from train.errors import UsageError

Batch = dict[str, Any]

PART = 16  # most examples per task of a decoding thread
# A small validation split makes evaluation batches no smaller than this: other splits would take too many of them.
MIN_EVAL_BATCH = 128


class Batches(Protocol):
    """An endless iterator of device batches whose position can be saved and restored."""

    position: int

    def __next__(self) -> Batch: ...

    def example(self, position: int) -> Example:
        """Decode the example at a position of the stream: a pure function of it, so any thread may call it."""
        ...

    def state(self) -> dict[str, Any]:
        """Return the position in the stream, for a checkpoint."""
        return {"position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved position."""
        self.position = int(state["position"])


@lru_cache(maxsize=8)  # two epochs of each bucket of `train.detect`
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `count` examples in one epoch, int64 [count]."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def stream_indices(count: int, seed: int, start: int, size: int) -> np.ndarray:
    """Examples at positions `start` .. `start + size - 1` of the stream, int64 [size]."""
    positions = np.arange(start, start + size)
    epochs, offsets = np.divmod(positions, count)
    parts = [epoch_order(count, seed, int(e))[offsets[epochs == e]] for e in np.unique(epochs)]
    return np.concatenate(parts)


def stream_example(source: Arrays | Encoded, seed: int, position: int) -> Example:
    """The example at one position of the stream, decoded here."""
    epoch, offset = divmod(position, len(source))
    index = int(epoch_order(len(source), seed, epoch)[offset])
    if isinstance(source, Arrays):
        return source[index]
    return source.example(index, np.random.default_rng([seed, position, 1]))


def train_batches(source: Arrays | Encoded, *, batch: int, seed: int, mesh: Mesh, mode: Mode = "jit") -> Batches:
    """The training stream of a split, laid out over the mesh; `batch` is the global batch size.

    Raises:
      UsageError: a batch not divisible by the number of devices, or larger than the split.
    """
    check_batch(batch, mesh.size, len(source))
    if isinstance(source, Arrays):
        return ResidentBatches(source, batch=batch, seed=seed, mesh=mesh, mode=mode)
    return StreamedBatches(source, batch=batch, seed=seed, mesh=mesh, mode=mode)


def check_batch(batch: int, devices: int, count: int | None = None) -> None:
    """Check that a batch is divisible by the number of devices, and not larger than `count` training images.

    Raises:
      UsageError: it is not divisible, or it is larger.
    """
    if batch < 1 or batch % devices:
        raise UsageError(f"a batch of {batch} is not divisible by {devices} devices: choose a multiple of {devices}")
    if count is not None and batch > count:
        raise UsageError(f"a batch of {batch} is larger than the {count} training images: choose a smaller --batch")


def batch_like(
    batch: int, image_shape: tuple[int, int, int], *, valid: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global batch (with `valid` for evaluation), to compile a step before images are read."""
    like = {
        "image": jax.ShapeDtypeStruct((batch, *image_shape), np.uint8),
        "label": jax.ShapeDtypeStruct((batch,), np.int32),
        "valid": jax.ShapeDtypeStruct((batch,), np.bool_),
    }
    return like if valid else {name: like[name] for name in ("image", "label")}


def padded(batch: int, mesh: Mesh) -> int:
    """Round a batch up to a multiple of the number of devices, as evaluation does."""
    return -(-batch // mesh.size) * mesh.size


def eval_batch_size(wanted: int, validation: int, largest: int) -> int:
    """The batch size to compile an evaluation for: `wanted`, or less where that would mostly be padding.

    Splits of `validation` (evaluated again and again) to `largest` images share it; see `MIN_EVAL_BATCH`.
    """
    return min(wanted, max(validation, MIN_EVAL_BATCH), largest)


class ResidentBatches(Batches):
    """Batches gathered on the device from a split stored there as uint8: the host only draws indices."""

    def __init__(self, source: Arrays, *, batch: int, seed: int, mesh: Mesh, mode: Mode) -> None:
        self.source, self.batch, self.seed = source, batch, seed
        self.position = 0
        # pmap takes this host's devices only, and needs a device axis before the example axis.
        self.local = mode == "pmap"
        mesh = make_mesh(mesh.local_devices) if self.local else mesh
        self.devices, self.sharding = mesh.size, batch_sharding(mesh)
        arrays = {"image": source.images, "label": source.labels.astype(np.int32)}
        self.arrays = place(arrays, replicated(mesh))
        self.take = jax.jit(take_rows, out_shardings=self.sharding)

    def __next__(self) -> Batch:
        indices = self._indices(1)
        if self.local:
            indices = _own_part(indices).reshape(self.devices, -1)
        return self.take(self.arrays, place(indices, self.sharding))

    def example(self, position: int) -> Example:
        return stream_example(self.source, self.seed, position)

    def chunk(self, count: int, most: int) -> Chunk:
        """The next `count` batches, for `train.chunks.many_steps` with up to `most` steps."""
        rows = np.zeros((most, self.batch), np.int32)
        rows[:count] = self._indices(count).reshape(count, -1)
        indices = place(rows, NamedSharding(self.sharding.mesh, CHUNK_LAYOUT["indices"]))
        return {"arrays": self.arrays, "indices": indices, "count": np.int32(count)}

    def _indices(self, batches: int) -> np.ndarray:
        indices = stream_indices(len(self.source), self.seed, self.position, batches * self.batch).astype(np.int32)
        self.position += batches * self.batch
        return indices


def _own_part(indices: np.ndarray) -> np.ndarray:
    """This process's contiguous part of a global batch."""
    return np.split(indices, jax.process_count())[jax.process_index()]


class StreamedBatches(Batches):
    """Batches decoded by Grain's threads, up to `ahead` batches before the step needs them."""

    def __init__(self, source: Encoded, *, batch: int, seed: int, mesh: Mesh, mode: Mode) -> None:
        self.source, self.batch, self.seed, self.mesh = source, batch, seed, mesh
        self.mode: Mode = mode
        self.threads, own = decode_threads(image_shape(source)), batch // jax.process_count()
        self.ahead = max(2, -(-self.threads * math.gcd(own, PART) // own))
        self.restore({"position": 0})

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.iterator = iter(decoded_ahead(self.example, self.batch, self.threads, start=self.position))

    def example(self, position: int) -> Example:
        return stream_example(self.source, self.seed, position)

    def __next__(self) -> Batch:
        self.position += self.batch
        return shard_batch(next(self.iterator), self.mesh, mode=self.mode)


def eval_batches(source: Arrays | Encoded, *, batch: int, mesh: Mesh, mode: Mode = "jit") -> Iterator[Batch]:
    """Yield every example of a split exactly once: `valid` bool [B] is False on rows that pad the last batch.

    `batch` is rounded up to a multiple of the number of devices.

    Raises:
      UsageError: `batch` is smaller than 1.
    """
    if batch < 1:
        raise UsageError(f"a batch must hold at least one image, got {batch}")
    batch = padded(batch, mesh)
    count = len(source)
    steps = -(-count // batch)

    def example(position: int) -> Example:
        return {**source[min(position, count - 1)], "valid": np.bool_(position < count)}

    if isinstance(source, Arrays):
        for step in range(steps):
            positions = _own_part(np.arange(step * batch, (step + 1) * batch))
            rows = np.minimum(positions, count - 1)
            part = {"image": source.images[rows], "label": source.labels[rows].astype(np.int32)}
            yield shard_batch({**part, "valid": positions < count}, mesh, mode=mode)
    else:
        for part in decoded_ahead(example, batch, decode_threads(image_shape(source)), steps=steps):
            yield shard_batch(part, mesh, mode=mode)


class EvalBatches:
    """The batches of `eval_batches`, to iterate again and again; those of a split in memory stay on the device."""

    def __init__(self, source: Arrays | Encoded, *, batch: int, mesh: Mesh, mode: Mode = "jit") -> None:
        self.source = source
        self.batches = partial(eval_batches, source, batch=batch, mesh=mesh, mode=mode)
        self.kept: list[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self.kept is None and isinstance(self.source, Arrays):
            self.kept = list(self.batches())
        return self.batches() if self.kept is None else iter(self.kept)


def valid_rows(outputs: Iterable[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Concatenate arrays [B, ...] of several batches by name, without the rows where `valid`, bool [B], is False."""
    parts = []
    for output in outputs:
        rows = {name: np.asarray(x) for name, x in output.items()}
        valid = rows.pop("valid")
        parts.append({name: x[valid] for name, x in rows.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def decoded_ahead(
    example: Callable[[int], Example], batch: int, threads: int, *, start: int = 0, steps: int = 2**40
) -> grain.IterDataset:
    """Decode this process's part of each global batch of `example(start)`, `example(start + 1)`, ... ahead of use.

    A thread receives several examples per task: for single small images, dispatching costs more than decoding.
    """
    own = batch // jax.process_count()
    size = math.gcd(own, PART)
    first = start + jax.process_index() * own

    def part(number: int) -> Batch:
        step, row = divmod(number * size, own)
        return collate([example(first + step * batch + row + i) for i in range(size)])

    def whole(parts: Batch) -> Batch:
        return {name: x.reshape(-1, *x.shape[2:]) for name, x in parts.items()}

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * own // size, threads))
    parts = grain.MapDataset.range(steps * own // size).map(part).to_iter_dataset(options)
    return parts.batch(own // size, drop_remainder=True).map(whole)
