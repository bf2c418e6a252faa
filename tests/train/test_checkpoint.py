"""Checkpoints: exact round trips, different device counts, damage, different models, failing disks."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_jax.parallel import make_mesh, replicated
from tests.reference.nets import batch_of, tiny, tiny_state, tiny_tx
from train.checkpoint import Checkpoints
from train.errors import RunError, UsageError
from train.state import digest
from train.steps import train_step

TX = tiny_tx()
# Orbax's reads of a damaged file report to an event loop that their failure has closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def states(images):
    """Four successive states on 8 devices, with a moving average."""
    step = jax.jit(lambda s, b: train_step(s, b, model=tiny(), tx=TX, ema_decay=0.9))
    state = jax.device_put(tiny_state(TX, ema=True), replicated(make_mesh()))
    made = []
    for _ in range(4):
        state, _ = step(state, batch_of(images))
        made.append(state)
    return made


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


def saved(path, states, accuracies=(0.5, 0.9, 0.7, 0.6), **options):
    checkpoints = Checkpoints(path, **options)
    for state, accuracy in zip(states, accuracies, strict=False):
        checkpoints.save(state, {"position": 16 * int(state.step)}, {"validation_accuracy": accuracy})
    checkpoints.close()
    return Checkpoints(path, **options)


def damage(checkpoint):
    """Flip one byte in the largest file: what a bad disk does."""
    largest = max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 0xFF
    largest.write_bytes(data)


def test_round_trip_is_exact_and_goes_to_one_device(tmp_path, states):
    checkpoints = saved(tmp_path, states)
    one = jax.device_put(tiny_state(TX, seed=9, ema=True), replicated(make_mesh(jax.devices()[:1])))
    restored, iterator = checkpoints.restore(one)
    assert iterator == {"position": 64}
    assert_equal(restored, states[-1])
    assert digest(restored) == digest(states[-1])
    assert {leaf.sharding for leaf in jax.tree.leaves(restored)} == {replicated(make_mesh(jax.devices()[:1]))}


def test_keeps_the_last_and_the_best(tmp_path, states):
    checkpoints = saved(tmp_path, states, keep_last=1, keep_best=1)
    assert checkpoints.steps == [2, 4]
    assert checkpoints.best == 2
    restored, _ = checkpoints.restore(states[0], step=2)
    assert_equal(restored, states[1])


def test_reading_changes_nothing(tmp_path, states):
    """An older checkpoint by its step leaves the newer ones, and a reader leaves another process's save in progress."""
    saved(tmp_path, states).close()
    (tmp_path / "5.orbax-checkpoint-tmp").mkdir()
    before = sorted(p.name for p in tmp_path.iterdir())
    reader = Checkpoints(tmp_path, writes=False)
    restored, _ = reader.restore(states[0], step=reader.best)
    reader.close()
    assert_equal(restored, states[1])
    assert sorted(p.name for p in tmp_path.iterdir()) == before == ["2", "3", "4", "5.orbax-checkpoint-tmp"]


def test_unmeasured_checkpoints_are_no_candidates_for_best(tmp_path, states):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(states[0], {}, {"validation_accuracy": 0.1})
    checkpoints.save(states[1], {})
    checkpoints.wait()
    assert checkpoints.best == 1


def test_nothing_saved(tmp_path, states):
    assert Checkpoints(tmp_path).restore(states[0]) is None
    assert Checkpoints(tmp_path).best is None


def test_saving_a_step_twice_keeps_the_first(tmp_path, states):
    checkpoints = saved(tmp_path, states[:1])
    checkpoints.save(states[0], {"position": 0})
    checkpoints.wait()
    assert checkpoints.restore(states[0])[1] == {"position": 16}


def test_later_changes_do_not_reach_a_checkpoint_in_progress(tmp_path, images):
    """The step donates the state that is still being written."""
    step = jax.jit(lambda s, b: train_step(s, b, model=tiny(), tx=TX)[0], donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)
    state = step(tiny_state(TX), batch_of(images))
    want = digest(state)
    checkpoints.save(state, {})
    for _ in range(5):
        state = step(state, batch_of(images))
    restored, _ = checkpoints.restore(state)
    assert digest(restored) == want


def truncate(checkpoint):
    largest = max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])


@pytest.mark.parametrize(
    "harm",
    [
        damage,
        truncate,
        lambda checkpoint: (checkpoint / "state" / "manifest.ocdbt").unlink(),
        lambda checkpoint: shutil.rmtree(checkpoint / "state"),
    ],
    ids=["bit flip", "truncated", "no manifest", "no state"],
)
def test_damaged_newest_falls_back_and_says_so(tmp_path, states, capsys, harm):
    saved(tmp_path, states, keep_last=3)
    harm(tmp_path / "4")
    harm(tmp_path / "3")
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    restored, iterator = checkpoints.resume(states[0])
    assert_equal(restored, states[1])
    assert iterator == {"position": 32}
    said = capsys.readouterr().err
    assert "checkpoint 4 in" in said and "checkpoint 3 in" in said and "older checkpoint 2" in said
    assert len(said.splitlines()) == 3
    # The run goes on from there and saves those steps anew.
    checkpoints.save(states[2], {"position": 48})
    checkpoints.wait()
    assert checkpoints.steps == [2, 3]


def test_silent_damage_is_found_by_checksum(tmp_path, states, monkeypatch, capsys):
    checkpoints = saved(tmp_path, states[:2])
    load = checkpoints._orbax.load

    def load_with_one_bit_off(step, like):
        arrays = load(step, like)
        if step == 2:
            arrays["params"]["head"]["bias"] = arrays["params"]["head"]["bias"] + np.float32(1e-7)
        return arrays

    monkeypatch.setattr(checkpoints._orbax, "load", load_with_one_bit_off)
    restored, _ = checkpoints.restore(states[0])
    assert int(restored.step) == 1
    assert "its checksum differs" in capsys.readouterr().err


def test_all_damaged(tmp_path, states):
    saved(tmp_path, states[:1])
    damage(tmp_path / "1")
    with pytest.raises(UsageError, match=r"every checkpoint in .* is damaged; choose a different --out to start again"):
        Checkpoints(tmp_path).restore(states[0])


def test_partial_save_is_ignored_and_cleaned(tmp_path, states):
    """What a killed save leaves behind is a folder under a temporary name."""
    saved(tmp_path, states[:1])
    (tmp_path / "2.orbax-checkpoint-tmp-0").mkdir()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps == [1]
    assert checkpoints.restore(states[0])[1] == {"position": 16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.replace(params={**s.params, "more": jnp.zeros(3)}), "params/more is only in this run"),
        (lambda s: s.replace(opt_state=optax.adam(0.1).init(s.params)), "opt_state.* is only in"),
        (
            lambda s: s.replace(params={**s.params, "head": {"kernel": jnp.zeros((16, 7)), "bias": jnp.zeros(7)}}),
            r"params/head/bias has shape \(4,\) there, \(7,\) in this run",
        ),
    ],
)
def test_checkpoint_of_another_model(tmp_path, states, change, message):
    checkpoints = saved(tmp_path, states[:1])
    with pytest.raises(UsageError, match="comes from a different model or optimizer: " + message):
        checkpoints.restore(change(states[0]))


def test_disk_that_refuses(tmp_path, states, monkeypatch):
    """The error names the folder and what is kept; the checkpoint before stays good."""
    checkpoints = saved(tmp_path, states[:1])

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints._orbax, "save_async", full)
    with pytest.raises(RunError, match=r"cannot write a checkpoint .*No space left.*newest one kept is step 1"):
        checkpoints.save(states[1], {})
    assert_equal(Checkpoints(tmp_path).restore(states[0])[0], states[0])


def test_disk_without_room(tmp_path, states, monkeypatch):
    """A disk that is too full is not even tried."""
    checkpoints = saved(tmp_path, states[:1])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(RunError, match="it needs 0 MB and 0 MB are free; the newest one kept is step 1"):
        checkpoints.save(states[1], {})
    assert checkpoints.steps == [1]
