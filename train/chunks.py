"""Several steps in one program, so that a small network does not wait for the host between them.

A chunk holds the indices of the examples of up to K steps, and the split that they are gathered from on the device. How
many of the K steps run is data, not part of the program: however a run is cut into chunks, by hooks or by being killed,
the same program computes every step, and the results are bit-equal.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from resnet_jax.parallel import AXIS
from resnet_jax.tree import PyTree

Chunk = dict[str, Any]
"""`arrays`: a split, {"image": uint8 [N, H, W, C], "label": int32 [N]}; `indices`: int32 [K, B], by step; `count`:
int32 scalar, how many of the K steps to run, 1 to K."""

CHUNK_LAYOUT = {"arrays": PartitionSpec(), "indices": PartitionSpec(None, AXIS), "count": PartitionSpec()}
"""How a chunk lies over the mesh, for `resnet_jax.parallel.compile_step`."""


def take_rows(arrays: dict[str, Any], indices: Any) -> dict[str, jax.Array]:
    """Gather the examples at `indices` int [B] from the arrays [N, ...] of a split."""
    return jax.tree.map(lambda x: x[indices], arrays)


def many_steps(step: Callable[..., tuple[PyTree, dict[str, jax.Array]]]) -> Callable[..., Any]:
    """Make a step of chunks from `step(state, batch, *, axis_name) -> (state, metrics)`.

    It returns the state after `count` steps and the metrics of each, stacked to [K, ...]; rows from `count` on are 0.
    """

    def steps(state: PyTree, chunk: Chunk, *, axis_name: str | None = None) -> tuple[PyTree, dict[str, jax.Array]]:
        size = len(chunk["indices"])
        # Under `jit`, the step is traced once for the shapes of its metrics and for the loop.
        one = jax.jit(partial(step, axis_name=axis_name))

        def batch(number: Any) -> dict[str, jax.Array]:
            return take_rows(chunk["arrays"], chunk["indices"][number])

        def body(number: jax.Array, carry: Any) -> Any:
            state, metrics = carry
            state, found = one(state, batch(number))
            return state, jax.tree.map(lambda rows, x: rows.at[number].set(x), metrics, found)

        _, shapes = jax.eval_shape(one, state, batch(0))
        rows = jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), shapes)
        return jax.lax.fori_loop(0, chunk["count"], body, (state, rows))

    return steps


def chunk_like(steps: int, count: int, batch: dict[str, jax.ShapeDtypeStruct]) -> Chunk:
    """Shapes of a chunk of up to `steps` steps, for a split of `count` examples and batches of these shapes."""
    size = batch["label"].shape[0]
    return {
        "arrays": {name: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype) for name, x in batch.items()},
        "indices": jax.ShapeDtypeStruct((steps, size), np.int32),
        "count": jax.ShapeDtypeStruct((), np.int32),
    }
