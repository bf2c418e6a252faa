"""One step, three compilers: `jit` with shardings, `pmap` or `shard_map`, over a one-dimensional mesh of devices.

A step is `step(state, batch, *, axis_name=None)`, which returns (state, metrics), or sums in evaluation. Under `jit` it
sees the whole batch and `axis_name` is None. Under the other two it sees one shard of the batch, and `vary` and
`mean_over` make its gradients those of the whole batch. All three give the same state.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from resnet_jax.tree import PyTree

AXIS = "data"
Mode = Literal["jit", "pmap", "shard_map"]
"""Name of the compiler of a step."""


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Build a mesh with the single axis `AXIS` over `devices` (None means all devices of all hosts)."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding in which each device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding that splits the leading axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def place(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Place arrays or typed keys, which are equal in all processes, as global arrays with this sharding."""

    def put(x: Any) -> jax.Array:
        if jax.dtypes.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)


def axis_of(mode: Mode) -> str | None:
    """Return the `axis_name` of a step and its model in this mode, None under `jit`; ValueError for an unknown mode."""
    if mode not in get_args(Mode):
        raise ValueError(f"unknown mode {mode!r}; choose one of {', '.join(get_args(Mode))}")
    return None if mode == "jit" else AXIS


def shard_batch(batch: PyTree, mesh: Mesh, *, mode: Mode = "jit") -> PyTree:
    """Lay out arrays [B, ...] over the mesh in the form that a step compiled in `mode` takes.

    With several hosts, each passes its own B / hosts examples. For `pmap` the result is [D, B / D, ...].

    Raises:
      ValueError: B is not divisible by the number of local devices D.
    """
    local = mesh.local_mesh.size
    sharding = batch_sharding(mesh)

    def lay_out(x: Any) -> jax.Array:
        if x.shape[0] % local:
            raise ValueError(f"a batch of {x.shape[0]} is not divisible by {local} devices")
        if mode == "pmap":
            return x.reshape((local, x.shape[0] // local, *x.shape[1:]))
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(lay_out, batch)


def compile_step(
    step: Callable[..., PyTree],
    *,
    mesh: Mesh,
    mode: Mode = "jit",
    donate: bool = True,
    rows: bool = False,
    layout: PyTree = PartitionSpec(AXIS),  # noqa: B008, immutable
    compiler_options: dict[str, Any] | None = None,
) -> Callable[[PyTree, PyTree], PyTree]:
    """Compile `step(state, batch, *, axis_name)` for the mesh; the state is replicated and, with `donate`, consumed.

    Everything the step returns must be equal on all devices, such as a new state, averaged metrics or sums. The batch
    must be laid out by `shard_batch` in the same mode. The result has the `lower` and `trace` of `jax.jit`.

    Args:
      rows: the step returns the batch's rows instead, such as logits [B, K], and each device keeps its own.
      layout: partition of the batch, one for all arrays or a tree of them; other ones need `jit` or `shard_map`.
      compiler_options: XLA options by name; `{}` is the same as None.

    Raises:
      ValueError: the mode is unknown, or is `pmap`, which takes no compiler options and no layout.
    """
    step = partial(step, axis_name=axis_of(mode))
    donate_argnums = (0,) if donate else ()
    if mode == "pmap":
        if compiler_options:
            raise ValueError("pmap takes no compiler options; use mode jit or shard_map")
        if layout != PartitionSpec(AXIS):
            raise ValueError("pmap splits the first axis of every array; use mode jit or shard_map")
        devices = list(mesh.devices.flat) if jax.process_count() == 1 else None
        axes: dict[str, Any] = {"in_axes": (None, 0), "out_axes": 0 if rows else None}
        return jax.pmap(step, axis_name=AXIS, **axes, donate_argnums=donate_argnums, devices=devices)
    out = batch_sharding(mesh) if rows else replicated(mesh)
    if mode == "shard_map":
        step = jax.shard_map(step, mesh=mesh, in_specs=(PartitionSpec(), layout), out_specs=out.spec)
    return jax.jit(
        step,
        in_shardings=(replicated(mesh), jax.tree.map(lambda spec: NamedSharding(mesh, spec), layout)),
        out_shardings=out,
        donate_argnums=donate_argnums,
        compiler_options=compiler_options or None,
    )


def vary(tree: PyTree, axis_name: str | None) -> PyTree:
    """Mark replicated arrays as varying over shards, before `grad`.

    Otherwise `shard_map` sums the gradient over shards itself, and `mean_over` of that sum is silently too large by a
    factor of the number of devices.
    """
    if axis_name is None:
        return tree

    def cast(x: jax.Array) -> jax.Array:
        # Arrays that already vary cannot be cast again.
        return x if axis_name in varying_axes(x) else jax.lax.pcast(x, axis_name, to="varying")

    return jax.tree.map(cast, tree)


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Return the axes of `shard_map` over which an array may differ; none under `jit` and `pmap`."""
    kind = getattr(jax.typeof(x), "manual_axis_type", None)
    return kind.varying if kind else frozenset()


def vary_like(tree: PyTree, like: PyTree) -> PyTree:
    """Mark arrays as varying over each axis over which any array of `like` does, as the carry of a loop must be."""
    for axis in frozenset().union(*map(varying_axes, jax.tree.leaves(like))):
        tree = vary(tree, axis)
    return tree


def mean_over(tree: PyTree, axis_name: str | None) -> PyTree:
    """Average over shards, each of which holds a mean over its equal part of the batch; the identity under `jit`."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def sum_over(tree: PyTree, axis_name: str | None) -> PyTree:
    """Sum over shards; the identity under `jit`."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def all_rows(tree: PyTree, axis_name: str | None) -> PyTree:
    """Gather the rows of the whole batch, equal on all devices, from arrays [B, ...] split over shards.

    This sums over shards that hold zeros elsewhere: under `shard_map`, the result of `all_gather` counts as varying and
    could not be part of a state. No gradient should flow through it; `resnet_jax.contrastive` gathers with gradients.
    """
    if axis_name is None:
        return tree
    shards, shard = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)

    def rows(x: jax.Array) -> jax.Array:
        zeros = vary(jnp.zeros((shards, *x.shape), x.dtype), axis_name)
        whole = jax.lax.psum(jax.lax.dynamic_update_index_in_dim(zeros, x, shard, 0), axis_name)
        return whole.reshape(-1, *x.shape[1:]).astype(x.dtype)

    return jax.tree.map(rows, tree)
