"""Chunks of steps: the same as single steps, however they are cut, and in every way of compiling them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.parallel import compile_step, make_mesh, mean_over, place, replicated, vary
from train.chunks import CHUNK_LAYOUT, chunk_like, many_steps
from train.data.batches import batch_like, train_batches
from train.data.sources import Arrays
from train.errors import RunError
from train.loop import fit
from train.state import TrainState

COUNT, BATCH, MOST = 37, 8, 5
SOURCE = Arrays(
    images=np.random.default_rng(0).integers(0, 256, (COUNT, 2, 2, 1), dtype=np.uint8), labels=np.arange(COUNT)
)


def step(state, batch, *, axis_name=None):
    """Mix every image and its label into the parameters, so that another order gives another result."""
    scores = (batch["image"].astype(jnp.float32) / 255).mean((1, 2, 3)) * jnp.cos(
        batch["label"] + vary(state.step, axis_name)
    )
    value = mean_over(scores.mean(), axis_name)
    params = {"w": state.params["w"] * 0.9 + value}
    return state.replace(step=state.step + 1, params=params), {"loss": value, "step": state.step}


def start(mesh):
    fields = dict.fromkeys(("batch_stats", "opt_state", "masks", "ema"))
    state = TrainState(step=jnp.zeros((), jnp.int32), params={"w": jnp.ones(3)}, key=jax.random.key(0), **fields)
    return place(state, replicated(mesh))


def compiled(mode, mesh):
    return compile_step(many_steps(step), mesh=mesh, mode=mode, layout=CHUNK_LAYOUT)


@pytest.fixture(scope="module")
def single():
    """The parameters after 11 single steps, and their losses."""
    mesh, losses = make_mesh(jax.devices()[:1]), []
    stream = train_batches(SOURCE, batch=BATCH, seed=1, mesh=mesh)
    state = fit(
        compile_step(step, mesh=mesh), start(mesh), stream, steps=11,
        log=lambda number, rows: losses.extend(row["loss"] for row in rows),
    )  # fmt: skip
    return np.asarray(state.params["w"]), losses


@pytest.mark.parametrize("mode", ["jit", "shard_map"])
@pytest.mark.parametrize("devices", [1, 8])
def test_equal_single_steps(mode, devices, single):
    """Steps, metrics and their numbers; a chunk ends before a hook, and one that does not divide is handled."""
    mesh = make_mesh(jax.devices()[:devices])
    stream = train_batches(SOURCE, batch=BATCH, seed=1, mesh=mesh, mode=mode)
    logged, hooked, calls = [], [], []
    program = compiled(mode, mesh)

    def counted(state, chunk):
        calls.append(int(chunk["count"]))
        return program(state, chunk)

    state = fit(
        counted,
        start(mesh),
        stream,
        steps=11,
        per_call=MOST,
        hooks=[(7, lambda state: hooked.append(int(state.step)))],
        log=lambda number, rows: logged.extend(zip(range(number - len(rows) + 1, number + 1), rows, strict=True)),
    )
    assert calls == [1, 5, 1, 4] and hooked == [7, 11]
    assert [number for number, _ in logged] == [int(row["step"]) + 1 for _, row in logged] == list(range(1, 12))
    np.testing.assert_allclose([row["loss"] for _, row in logged], single[1], rtol=1e-6)
    np.testing.assert_allclose(state.params["w"], single[0], rtol=1e-6)
    assert stream.state() == {"position": 11 * BATCH}


@pytest.mark.parametrize("cuts", [[5, 5, 1], [1] * 11, [3, 5, 2, 1]])
def test_cuts_do_not_change_a_bit(cuts):
    """The number of steps is data: every cut runs the same program."""
    mesh = make_mesh(jax.devices()[:1])
    program, results = compiled("jit", mesh), []
    for counts in ([4, 4, 3], cuts):
        stream, state = train_batches(SOURCE, batch=BATCH, seed=1, mesh=mesh), start(mesh)
        for count in counts:
            state, _ = program(state, stream.chunk(count, MOST))
        results.append(np.asarray(state.params["w"]).tobytes())
    assert results[0] == results[1]
    assert program._cache_size() == 1


def test_shapes_known_before_the_images_are_read():
    mesh = make_mesh()
    stream = train_batches(SOURCE, batch=BATCH, seed=0, mesh=mesh)
    want = jax.tree.map(lambda x: (x.shape, x.dtype), chunk_like(MOST, COUNT, batch_like(BATCH, (2, 2, 1))))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), stream.chunk(2, MOST)) == want


def test_names_the_step_that_is_not_finite():
    """Not the chunk's last one; the hook after the chunk is not called."""

    def bad(state, batch, *, axis_name=None):
        state, metrics = step(state, batch, axis_name=axis_name)
        return state, metrics | {"loss": jnp.where(state.step == 7, jnp.nan, metrics["loss"])}

    mesh, hooked = make_mesh(jax.devices()[:1]), []
    program = compile_step(many_steps(bad), mesh=mesh, layout=CHUNK_LAYOUT)
    stream = train_batches(SOURCE, batch=BATCH, seed=0, mesh=mesh)
    with pytest.raises(RunError, match="loss at step 7 is not finite"):
        fit(program, start(mesh), stream, steps=20, per_call=MOST, hooks=[(9, hooked.append)])
    assert not hooked


def test_pmap_has_no_chunks():
    with pytest.raises(ValueError, match="pmap splits the first axis of every array; use mode jit or shard_map"):
        compiled("pmap", make_mesh())
