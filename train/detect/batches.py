"""Batches of an object set: an endless seeded stream to train on, and every image exactly once to evaluate on.

A batch holds images of one bucket, as a dict of

- `image` uint8 [B, H, W, 3], padded with 0 on the right and below to the bucket's size,
- `size` int32 [B, 2], the true (height, width) in it,
- `boxes` float32 [B, M, 4] (x1, y1, x2, y2) in its pixels, `labels` int32 [B, M], -1 where a row is padding,
- `crowd` bool [B, M], objects that are neither trained on nor counted against a detector,
- `id` int32 [B], the image's position in the split, `scale` float32 [B], pixels here per pixel of the original,

and in evaluation `valid` bool [B], False on rows that pad the last batch of a bucket.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from resnet_jax.parallel import Mode, shard_batch
from train.data.batches import Batch, Batches, check_batch, decoded_ahead, padded, stream_indices
from train.data.sources import Example, decode_threads
from train.detect.layout import Layout
from train.detect.objects import Objects
from train.errors import UsageError


class BucketBatches(Batches):
    """The training stream: a pure function of (seed, position), so that a checkpoint only has to keep the position.

    Bucket b is drawn from with frequency n_b / N, the one whose batches are most overdue first. Inside a bucket,
    epochs of its images follow each other without a gap, each in an order drawn from (seed, bucket, epoch).
    `position` counts images, and is a multiple of `batch`, the global batch size.

    Raises:
      UsageError: a batch not divisible by the number of devices, or larger than the split.
    """

    def __init__(self, source: Objects, *, batch: int, seed: int, mesh: Mesh, mode: Mode = "jit") -> None:
        check_batch(batch, mesh.size, len(source))
        self.source, self.batch, self.mesh = source, batch, mesh
        self.mode: Mode = mode
        self.members = bucket_members(source)
        self.order, self.before = bucket_schedule([len(members) for members in self.members])
        words = [np.random.SeedSequence([seed, bucket]).generate_state(1) for bucket in range(len(self.members))]
        self.seeds = [int(word[0]) for word in words]
        self.threads = threads_for(source)
        self.restore({"position": 0})

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.iterator = iter(decoded_ahead(self.example, self.batch, self.threads, start=self.position))

    def start(self, step: int) -> tuple[int, int]:
        """(bucket, position in that bucket's own stream) at which batch number `step` begins."""
        rounds, place = divmod(step, len(self.order))
        bucket = int(self.order[place])
        # In a round of N batches, a bucket of n images is drawn from n times.
        return bucket, (rounds * len(self.members[bucket]) + int(self.before[place])) * self.batch

    def example(self, position: int) -> Example:
        step, row = divmod(position, self.batch)
        bucket, start = self.start(step)
        members = self.members[bucket]
        return self.source[int(members[stream_indices(len(members), self.seeds[bucket], start + row, 1)[0]])]

    def __next__(self) -> Batch:
        self.position += self.batch
        return shard_batch(next(self.iterator), self.mesh, mode=self.mode)


def bucket_members(source: Objects) -> list[np.ndarray]:
    """Positions of the images of each bucket of the layout, in order; empty where a split has none."""
    return [np.flatnonzero(source.bucket == bucket) for bucket in range(len(source.layout.buckets))]


def bucket_schedule(counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Order the buckets of N = sum(counts) batches: (bucket, how often it came before), int64 [N] each.

    Each step takes the bucket with the largest deficit, its share of the steps so far less its batches so far; ties go
    to the lower index. Deficits stay above -1, so after N steps all are 0, and the schedule repeats.
    """
    shares, taken = np.array(counts), np.zeros(len(counts), np.int64)
    total = int(shares.sum())
    order, before = np.zeros(total, np.int64), np.zeros(total, np.int64)
    for step in range(total):
        order[step] = bucket = int(np.argmax((step + 1) * shares - total * taken))
        before[step] = taken[bucket]
        taken[bucket] += 1
    return order, before


def batch_like(layout: Layout, bucket: int, batch: int, *, valid: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global batch of a bucket (with `valid` for evaluation), to compile a step before images are read."""
    shapes = {
        "image": ((*layout.buckets[bucket], 3), np.uint8),
        "size": ((2,), np.int32),
        "boxes": ((layout.rows, 4), np.float32),
        "labels": ((layout.rows,), np.int32),
        "crowd": ((layout.rows,), np.bool_),
        "id": ((), np.int32),
        "scale": ((), np.float32),
        **({"valid": ((), np.bool_)} if valid else {}),
    }
    return {name: jax.ShapeDtypeStruct((batch, *shape), dtype) for name, (shape, dtype) in shapes.items()}


def threads_for(source: Objects) -> int:
    """Number of threads that make batches ahead of use: one if all is in memory."""
    return 1 if source.pixels is not None else decode_threads(source.layout.buckets[-1])


class EvalBatches:
    """Batches with each image of a split exactly once, bucket by bucket, to iterate again and again.

    `batch` is rounded up to a multiple of the number of devices.

    Raises:
      UsageError: `batch` is smaller than 1.
    """

    def __init__(self, source: Objects, *, batch: int, mesh: Mesh, mode: Mode = "jit") -> None:
        if batch < 1:
            raise UsageError(f"a batch must hold at least one image, got {batch}")
        self.source, self.batch, self.mesh = source, padded(batch, mesh), mesh
        self.mode: Mode = mode

    @cached_property
    def rows(self) -> np.ndarray:
        """Position in the split of each row of all batches, int64 [steps, batch]; -1 - position on rows that pad."""
        steps = []
        for members in filter(len, bucket_members(self.source)):
            missing = -len(members) % self.batch
            steps.append(np.concatenate([members, np.full(missing, -1 - members[-1])]).reshape(-1, self.batch))
        return np.concatenate(steps)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Batch]:
        rows = self.rows.ravel()

        def example(position: int) -> Example:
            row = int(rows[position])
            return {**self.source[row if row >= 0 else -1 - row], "valid": np.bool_(row >= 0)}

        for part in decoded_ahead(example, self.batch, threads_for(self.source), steps=len(self)):
            yield shard_batch(part, self.mesh, mode=self.mode)
