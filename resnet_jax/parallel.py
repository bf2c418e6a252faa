"""One step, three compilers: `jit` with shardings, `pmap`, or `shard_map`, over a mesh with one axis of devices.

A step is `step(state, batch, *, axis_name=None)`; it returns (state, metrics), or sums in evaluation. Under `jit` it
sees the whole batch and `axis_name` is None; under the other two it sees its shard's part, and `vary` and `mean_over`
make its gradients those of the whole batch. The same step gives the same state in all three.
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
"""The compilers of a step."""


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the one axis `AXIS` over `devices` (all of them, on all hosts, if None)."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def place(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Arrays, the same in every process, laid out as one global array each; typed keys too."""

    def put(x: Any) -> jax.Array:
        if jax.dtypes.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)


def axis_of(mode: Mode) -> str | None:
    """The `axis_name` that a step and its model need in this mode: None under `jit`."""
    if mode not in get_args(Mode):
        raise ValueError(f"unknown mode {mode!r}; choose one of {', '.join(get_args(Mode))}")
    return None if mode == "jit" else AXIS


def shard_batch(batch: PyTree, mesh: Mesh, *, mode: Mode = "jit") -> PyTree:
    """Lay arrays [B, ...] out over the mesh as a step compiled in `mode` takes them.

    On several hosts each passes its own B / hosts examples. `pmap` takes [D, B / D, ...].

    Raises:
      ValueError: B is not divisible by the number of devices (of this host).
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
    compiler_options: dict[str, Any] | None = None,
) -> Callable[[PyTree, PyTree], PyTree]:
    """Compile `step(state, batch, *, axis_name)` for the mesh; the state is replicated and (with `donate`) consumed.

    Whatever the step returns must be the same on every device, as a new state, averaged metrics or sums are.
    The batch must be laid out by `shard_batch` in the same mode. `compiler_options` are XLA's, by name; `{}` is the
    same as None. The result's `lower` and `trace` are those of `jax.jit`.
    """
    step = partial(step, axis_name=axis_of(mode))
    donate_argnums = (0,) if donate else ()
    if mode == "pmap":
        if compiler_options:
            raise ValueError("pmap takes no compiler options; use mode jit or shard_map")
        local = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
        devices = local if jax.process_count() == 1 else None
        return jax.pmap(
            step, axis_name=AXIS, in_axes=(None, 0), out_axes=None, donate_argnums=donate_argnums, devices=devices
        )
    if mode == "shard_map":
        specs = (PartitionSpec(), PartitionSpec(AXIS))
        step = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    shardings = (replicated(mesh), batch_sharding(mesh))
    return jax.jit(
        step,
        in_shardings=shardings,
        out_shardings=replicated(mesh),
        donate_argnums=donate_argnums,
        compiler_options=compiler_options or None,
    )


def vary(tree: PyTree, axis_name: str | None) -> PyTree:
    """Mark replicated arrays as each shard's own before `grad`.

    `shard_map` would otherwise sum the gradient over shards by itself, and a `mean_over` after it would then train
    with gradients that are too large by the number of devices, silently.
    """
    if axis_name is None:
        return tree

    def cast(x: jax.Array) -> jax.Array:
        # Whatever varies already cannot be cast, and need not be.
        return x if axis_name in varying_axes(x) else jax.lax.pcast(x, axis_name, to="varying")

    return jax.tree.map(cast, tree)


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The axes of `shard_map` over which an array may differ; none under `jit` and `pmap`."""
    kind = getattr(jax.typeof(x), "manual_axis_type", None)
    return kind.varying if kind else frozenset()


def mean_over(tree: PyTree, axis_name: str | None) -> PyTree:
    """The mean over shards (themselves means over equal parts of the batch); the tree itself under `jit`."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def sum_over(tree: PyTree, axis_name: str | None) -> PyTree:
    """The sum over shards; the tree itself under `jit`."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def all_rows(tree: PyTree, axis_name: str | None) -> PyTree:
    """The whole batch's rows, the same on every device, of arrays [B, ...] that hold each shard's own.

    A sum over shards that hold zeros elsewhere: under `shard_map` what `all_gather` returns counts as each device's
    own, and could not be part of a state. No gradient should flow through it; see `resnet_jax.contrastive` for that.
    """
    if axis_name is None:
        return tree
    shards, shard = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)

    def rows(x: jax.Array) -> jax.Array:
        zeros = vary(jnp.zeros((shards, *x.shape), x.dtype), axis_name)
        whole = jax.lax.psum(jax.lax.dynamic_update_index_in_dim(zeros, x, shard, 0), axis_name)
        return whole.reshape(-1, *x.shape[1:]).astype(x.dtype)

    return jax.tree.map(rows, tree)
