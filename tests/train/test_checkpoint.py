"""Checkpoints: exact round trips, different device counts, damage, different models, failing disks."""

import _thread
import shutil
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_jax.parallel import make_mesh, replicated
from tests.reference.nets import tiny_state, tiny_tx
from train.checkpoint import Checkpoints
from train.errors import RunError, UsageError
from train.state import digest

TX = tiny_tx()
STEPS = (1, 2, 3, 4)
# Orbax's reads of a damaged file report to an event loop that their failure has closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def states():
    """Four states on 2 devices, with a moving average."""
    mesh = make_mesh(jax.devices()[:2])
    first = tiny_state(TX, ema=True)
    later = [first.replace(step=first.step + i, params=jax.tree.map(lambda p, i=i: p + i, first.params)) for i in STEPS]
    return [jax.device_put(state, replicated(mesh)) for state in later]


def assert_equal(a, b):
    a, b = (state.replace(key=jax.random.key_data(state.key)) for state in (a, b))
    jax.tree.map(partial(np.testing.assert_array_equal, strict=True), a, b)


def save(path, states, **options):
    checkpoints = Checkpoints(path, **options)
    for state, accuracy in zip(states, (0.5, 0.9, 0.7, 0.6), strict=False):
        checkpoints.save(state, {"position": 16 * int(state.step)}, {"validation_accuracy": accuracy})
    checkpoints.close()


@pytest.fixture(scope="module")
def all_saved(states, tmp_path_factory):
    """Folder of checkpoints 1 to 4."""
    path = tmp_path_factory.mktemp("checkpoints")
    save(path, states, keep_last=4)
    return path


@pytest.fixture
def folder(all_saved, tmp_path, request):
    """A copy of these checkpoints, or of the steps that the test names."""
    for step in getattr(request, "param", STEPS):
        shutil.copytree(all_saved / str(step), tmp_path / str(step))
    return tmp_path


only_first = pytest.mark.parametrize("folder", [[1]], indirect=True)


def largest(checkpoint):
    return max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(checkpoint):
    data = bytearray(largest(checkpoint).read_bytes())
    data[len(data) // 2] ^= 1
    largest(checkpoint).write_bytes(data)


def test_round_trip_is_exact_and_goes_to_one_device(folder, states):
    checkpoints = Checkpoints(folder)
    one = jax.device_put(tiny_state(TX, seed=9, ema=True), replicated(make_mesh(jax.devices()[:1])))
    restored, iterator = checkpoints.restore(one)
    assert iterator == {"position": 64}
    assert_equal(restored, states[-1])
    assert digest(restored) == digest(states[-1])
    assert {leaf.sharding for leaf in jax.tree.leaves(restored)} == {replicated(make_mesh(jax.devices()[:1]))}


@pytest.mark.parametrize("name", ["[x]", "Photos [2026]", "a*b?", "a\\b", "gs:", "100% #1", "Ü é", "a\nb"])
def test_any_folder(tmp_path, states, name):
    """Orbax takes some names for patterns or schemes: saved, resumed, and cleaned up."""
    save(tmp_path / name / "checkpoints", states[:3], keep_last=1, keep_best=1)
    checkpoints = Checkpoints(tmp_path / name / "checkpoints", keep_last=1)
    assert checkpoints.steps == [2, 3]
    assert_equal(checkpoints.resume(states[0])[0], states[2])
    checkpoints.close()
    assert [p.name for p in tmp_path.rglob("manifest.ocdbt")]
    assert {p.name for p in (tmp_path / name / "checkpoints").iterdir()} == {"2", "3"}


def test_64_bits(tmp_path, states):
    """What a process with JAX_ENABLE_X64 saved, also before states were kept in float32, any process reads."""
    wide = {"float32": np.float64, "int32": np.int64}
    with jax.enable_x64(True):
        widened = jax.tree.map(lambda x: x.astype(wide.get(str(x.dtype), x.dtype)), states[0].opt_state)
        save(tmp_path, [states[0].replace(opt_state=widened)])
    restored, _ = Checkpoints(tmp_path, writes=False).restore(states[1])
    assert_equal(restored, states[0])


def test_key_of_a_different_implementation(tmp_path, states):
    """Reading does not need it; resuming is refused, with the setting that helps."""
    key = jax.random.key(1, impl="rbg")
    save(tmp_path, [states[0].replace(key=key)])
    arrays, _ = Checkpoints(tmp_path, writes=False).read()
    assert jax.random.key_impl(arrays["key"]) == jax.random.key_impl(key)
    with pytest.raises(UsageError, match="by rbg, this process by threefry2x32: set JAX_DEFAULT_PRNG_IMPL=rbg"):
        Checkpoints(tmp_path, writes=False).restore(states[0])
    restored, _ = Checkpoints(tmp_path, writes=False).restore(states[1].replace(key=key))
    assert_equal(restored, states[0].replace(key=key))


def test_keeps_the_last_and_the_best(tmp_path, states):
    save(tmp_path, states, keep_last=1, keep_best=1)
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=1)
    assert checkpoints.steps == [2, 4]
    assert checkpoints.best == 2
    restored, _ = checkpoints.restore(states[0], step=2)
    assert_equal(restored, states[1])


def test_reading_changes_nothing(folder, states):
    """An older checkpoint by its step leaves the newer ones, and a reader leaves another process's save in progress."""
    (folder / "5.orbax-checkpoint-tmp").mkdir()
    reader = Checkpoints(folder, writes=False)
    restored, _ = reader.restore(states[0], step=reader.best)
    reader.close()
    assert_equal(restored, states[1])
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2", "3", "4", "5.orbax-checkpoint-tmp"]


def test_nothing_saved(tmp_path, states):
    assert Checkpoints(tmp_path).restore(states[0]) is None
    assert Checkpoints(tmp_path).best is None


@only_first
def test_saving_again(folder, states):
    """A step saved twice keeps the first; a checkpoint without a measurement is not a candidate for the best."""
    checkpoints = Checkpoints(folder)
    checkpoints.save(states[0], {"position": 0})
    checkpoints.wait()
    assert checkpoints.restore(states[0])[1] == {"position": 16}
    checkpoints.save(states[1], {})
    checkpoints.wait()
    assert checkpoints.best == 1


def test_later_changes_do_not_reach_a_checkpoint_in_progress(tmp_path):
    """The step donates the state that is still being written."""
    step = jax.jit(lambda s: s.replace(params=jax.tree.map(lambda p: p + 1, s.params)), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)
    state = step(tiny_state(TX))
    want = digest(state)
    checkpoints.save(state, {})
    for _ in range(5):
        state = step(state)
    restored, _ = checkpoints.restore(state)
    assert digest(restored) == want


@pytest.mark.parametrize(
    "harm",
    [
        flip_a_bit,
        lambda checkpoint: largest(checkpoint).write_bytes(largest(checkpoint).read_bytes()[:100]),
        lambda checkpoint: (checkpoint / "state" / "manifest.ocdbt").unlink(),
        lambda checkpoint: shutil.rmtree(checkpoint / "state"),
    ],
    ids=["bit flip", "truncated", "no manifest", "no state"],
)
def test_damaged_newest_falls_back_and_says_so(folder, states, capsys, harm):
    harm(folder / "4")
    harm(folder / "3")
    checkpoints = Checkpoints(folder, keep_last=2)
    restored, iterator = checkpoints.resume(states[0])
    assert_equal(restored, states[1])
    assert iterator == {"position": 32}
    said = capsys.readouterr().err
    assert "checkpoint 4 in" in said and "checkpoint 3 in" in said and "older checkpoint 2" in said
    assert len(said.splitlines()) == 3
    # The run goes on from there and saves those steps again.
    checkpoints.save(states[2], {"position": 48})
    checkpoints.wait()
    assert checkpoints.steps == [2, 3]


def test_silent_damage_is_found_by_checksum(folder, states, monkeypatch, capsys):
    checkpoints = Checkpoints(folder)
    load = checkpoints._orbax.load

    def load_with_one_bit_off(step, like):
        arrays = load(step, like)
        if step == 4:
            arrays["params"]["head"]["bias"] = np.nextafter(arrays["params"]["head"]["bias"], np.float32(9))
        return arrays

    monkeypatch.setattr(checkpoints._orbax, "load", load_with_one_bit_off)
    restored, _ = checkpoints.restore(states[0])
    assert int(restored.step) == 3
    assert "its checksum differs" in capsys.readouterr().err


@only_first
def test_all_damaged(folder, states):
    flip_a_bit(folder / "1")
    with pytest.raises(UsageError, match=r"every checkpoint in .* is damaged; choose a different --out to start again"):
        Checkpoints(folder).restore(states[0])


def test_damaged_metrics_are_named(tmp_path, states):
    """Orbax reads them all as soon as it opens the folder; the weights are good without them."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(states[0], {}, {"validation_accuracy": 0.5})
    checkpoints.close()
    metrics = next(tmp_path.glob("*/metrics"))
    (metrics / "metrics").write_text("")
    for writes in (True, False):
        with pytest.raises(UsageError, match=f"the file in {metrics} is damaged: delete that folder"):
            Checkpoints(tmp_path, writes=writes)
    shutil.rmtree(metrics)
    checkpoints = Checkpoints(tmp_path)
    assert_equal(checkpoints.restore(states[0])[0], states[0])
    assert checkpoints.best is None
    checkpoints.close()


@only_first
def test_partial_save_is_ignored_and_cleaned(folder, states):
    """What a killed save leaves behind is a folder under a temporary name."""
    (folder / "2.orbax-checkpoint-tmp-0").mkdir()
    checkpoints = Checkpoints(folder)
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
def test_checkpoint_of_another_model(all_saved, states, change, message):
    checkpoints = Checkpoints(all_saved, writes=False)
    with pytest.raises(UsageError, match="comes from a different model or optimizer: " + message):
        checkpoints.restore(change(states[0]))


@only_first
def test_ctrl_c_while_it_reads(folder, states, monkeypatch):
    """Orbax takes any exception for a damaged file: an interrupted start must not cost the checkpoint."""
    checkpoints = Checkpoints(folder)
    load = checkpoints._orbax.load

    def interrupted(*args):
        try:
            _thread.interrupt_main()
            time.sleep(0.2)
        except BaseException:
            raise ValueError("incompatible handler") from None
        return load(*args)

    monkeypatch.setattr(checkpoints._orbax, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.resume(states[0])
    assert_equal(Checkpoints(folder).restore(states[0])[0], states[0])


@only_first
def test_disk_that_refuses(folder, states, monkeypatch):
    """The error names the folder and what is kept; the checkpoint before stays good."""
    checkpoints = Checkpoints(folder)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints._orbax, "save_async", full)
    checkpoints.save(states[1], {})
    with pytest.raises(RunError, match=r"cannot write a checkpoint .*No space left.*newest one kept is step 1"):
        checkpoints.save(states[2], {})
    assert_equal(Checkpoints(folder).restore(states[0])[0], states[0])
    # A disk that is too full is not even tried.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    checkpoints.save(states[1], {})
    with pytest.raises(RunError, match="it needs 0 MB and 0 MB are free; the newest one kept is step 1"):
        checkpoints.wait()
    assert checkpoints.steps == [1]
