"""A run's folder: what it was made from, who uses it, where it lies, going on for longer."""

import dataclasses
import fcntl
import json
import os
import shutil
import unicodedata
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests.reference.nets import Mlp, tiny, tiny_state, tiny_tx
from tests.train.test_run import Interrupted
from train.checkpoint import Checkpoints
from train.config import AugmentConfig, DataConfig, OptimConfig, TrainConfig
from train.data import load as load_data
from train.errors import LostHostError, RunError, UsageError
from train.from_config import make_state
from train.json_text import to_json
from train.loop import evaluate, read_rows
from train.paths import local_path, same_place
from train.predict import load as predict
from train.prune.config import PruneConfig, of_run
from train.report import collect, run_name
from train.run import run
from train.run_folder import LOCK, lock, read_config, settle, unlocked, write_json
from train.runtime import all_hosts
from train.sparse_file import save_sparse

pytestmark = pytest.mark.usefixtures("one_device")

CLASSES = ("apple", "pear", "plum", "quince")


@pytest.fixture
def photos(tmp_path):
    """A folder of 4 classes of 9 images, 8x8."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(9):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / f"photos/{name}/{i}.png")
    return tmp_path / "photos"


def config_of(photos, out, **options):
    statistics = AugmentConfig(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    fields = {"steps": 4, "batch": 4, "eval_batch": 8, "augment": statistics, "optim": OptimConfig(lr=0.01)}
    return TrainConfig(out=str(out), data=DataConfig(name=f"folder:{photos}"), **fields | options)


def interrupted(config):
    """Start a run that stops after its second step, with a checkpoint of it."""

    def stop(state):
        raise Interrupted

    with pytest.raises(Interrupted):
        run(config, model=Mlp(), hooks=[(3, stop)])


def other_class(photos):
    (photos / "apple").rename(photos / "zapple")


def more_images(photos):
    shutil.copy(photos / "pear/0.png", photos / "pear/9.png")


def other_images(photos):
    """As many of every class."""
    (photos / "pear/0.png").rename(photos / "pear/00.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_class, r"different classes \(4: apple -> pear, pear -> plum, plum -> quince, ...\): restore"),
        (more_images, r"different \w+ images \(\d+ -> \d+\): restore them, .* --init"),
        (other_images, r"different \w+ images \(other names or labels\): restore them"),
    ],
)
def test_resumes_only_on_the_images_that_it_was_made_from(photos, tmp_path, change, message):
    config = config_of(photos, tmp_path / "run", save_steps=2)
    interrupted(config)
    change(photos)
    with pytest.raises(UsageError, match=message):
        run(config, model=Mlp())


def test_resumes_where_its_images_have_moved_in_another_form_of_their_names(photos, tmp_path, capsys):
    """As between macOS and Linux; a path that is typed in a different way is the same path."""
    forms = [photos / "pear" / f"{unicodedata.normalize(form, 'ü')}.png" for form in ("NFC", "NFD")]
    (photos / "pear/0.png").rename(forms[0])
    interrupted(config_of(photos, tmp_path / "run", save_steps=2))
    forms[0].rename(forms[1])
    run(config_of(f"{tmp_path}/./photos/", tmp_path / "run", save_steps=2), model=Mlp())
    assert "resuming from step 2" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["run", "file"])
@pytest.mark.parametrize("other", [CLASSES, CLASSES[::-1]])
def test_head_of_other_classes_is_not_taken(tmp_path, capsys, other, source):
    """As many of them, in the right shapes."""
    tx = tiny_tx()
    before = tiny_state(tx)
    config = TrainConfig(init=str(tmp_path))
    write_json(tmp_path / "config.json", {"config": dataclasses.asdict(config), "classes": CLASSES})
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(before, {})
    checkpoints.close()
    file = tmp_path / "sparse.safetensors"
    save_sparse(file, before.variables, before.masks, metadata={"classes": json.dumps(CLASSES)})
    given = tmp_path if source == "run" else file
    state = make_state(TrainConfig(seed=5), tiny(), tx, (8, 8, 3), given, classes=other)
    message = "has other classes (4: apple, pear, plum, ...): the head starts from random weights"
    assert (message in capsys.readouterr().err) == (other != CLASSES)
    before, after = before.params, state.params
    np.testing.assert_array_equal(before["stem"]["conv"]["kernel"], after["stem"]["conv"]["kernel"])
    assert np.array_equal(before["head"]["kernel"], after["head"]["kernel"]) == (other == CLASSES)


def test_folder_in_use_is_refused(photos, tmp_path):
    """By a different process; the same one may try again after a failure, and leaves no lock."""
    config, path = config_of(photos, tmp_path / "run", save_steps=2), tmp_path / "run" / LOCK
    interrupted(config)
    assert not path.exists()
    path.write_text("process 7 on elsewhere")
    with path.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="is in use by process 7 on elsewhere: wait for its end"):
            run(config, model=Mlp())
    run(config, model=Mlp())
    steps = [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert steps == sorted(steps)
    assert not path.exists()


def test_lock(tmp_path):
    """Held for the length of a run; twice by the same process."""
    with unlocked():
        lock(tmp_path)
        lock(tmp_path)
        assert f"process {os.getpid()} on" in (tmp_path / LOCK).read_text()
        with (tmp_path / LOCK).open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not list(tmp_path.iterdir())


def test_file_systems_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with unlocked():
        lock(tmp_path)
    assert not list(tmp_path.iterdir())


def test_goes_on_for_longer(photos, tmp_path, capsys):
    """A finished run keeps its optimizer's state and its first result; with less it is a different run."""
    short = config_of(photos, tmp_path / "run", keep_last=5)
    run(short, model=Mlp())
    with pytest.raises(UsageError, match="different settings"):
        run(config_of(photos, tmp_path / "run", steps=3), model=Mlp())
    longer = config_of(photos, tmp_path / "run", steps=6, keep_last=5)
    result = run(longer, model=Mlp())
    assert result["steps"] == 6
    said = capsys.readouterr().err
    assert "resuming from step 4" in said
    assert "this run had 4 steps: its schedule now spans 6 steps, so the learning rate goes on at 0.0025" in said
    assert json.loads((tmp_path / "run/result-4.json").read_text())["steps"] == 4
    assert json.loads((tmp_path / "run/config.json").read_text())["config"]["steps"] == 6
    assert run(longer, model=Mlp())["params_digest"] == result["params_digest"]


def test_moved_runs(photos, tmp_path, monkeypatch):
    """Paths in the config are found relative to the run, and a run named `.` has a name."""
    monkeypatch.chdir(tmp_path)
    run(config_of("photos", "runs/a", steps=1), model=Mlp())
    out = tmp_path / "runs/a"
    saved = json.loads((out / "config.json").read_text())
    saved["config"] |= {"init": "runs/dense"}
    (out / "config.json").write_text(json.dumps(saved))
    (tmp_path / "runs/dense").mkdir()
    shutil.move(tmp_path / "runs", tmp_path / "archive")
    moved = tmp_path / "archive/a"
    (tmp_path / "elsewhere").mkdir()
    for where in (tmp_path, tmp_path / "elsewhere"):
        monkeypatch.chdir(where)
        config, _ = read_config(moved, TrainConfig)
        assert same_place(config.init, tmp_path / "archive/dense")
        assert where == tmp_path or same_place(config.data.name, f"folder:{photos}")
    monkeypatch.chdir(moved)
    assert of_run(Path(".")).out == f"{moved}-pruned"
    assert of_run(Path("../a/")).out == "../a-pruned"
    assert isinstance(of_run(moved), PruneConfig)


@pytest.mark.parametrize("path", ["gs://bucket/run", "s3://bucket/run", Path("gs://bucket/run")])
def test_remote_folders_are_refused_at_once(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is not a local folder"):
        local_path(path)
    with pytest.raises(UsageError, match="is not a local folder"):
        run(TrainConfig(out=str(path)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "reason"), [("n" * 300, "too long"), ("loop", "Too many levels"), ("loop/x", "levels")]
)
def test_paths_that_the_system_does_not_take(name, reason, tmp_path, monkeypatch):
    """In every place that takes one."""
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    for use in (
        local_path,
        lambda path: run(TrainConfig(out=path)),
        lambda path: run(TrainConfig(out="x", init=path)),
        lambda path: predict(path),
        lambda path: load_data(f"folder:{path}"),
        lambda path: load_data("digits", dir=path),
    ):
        with pytest.raises(UsageError, match=f"^{name}: .*{reason}"):
            use(name)
    assert os.listdir() == ["loop"]


def test_folders_that_hold_no_run(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"file is not a run folder: it has no config\.json"):
        read_config(tmp_path / "file", TrainConfig)
    for content in ("[]", '{"architecture": "resnet18"}', '"config"'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UsageError, match=r"is not a run folder: its config\.json does not describe a run"):
            read_config(tmp_path, TrainConfig)


@pytest.mark.parametrize("content", ['{"preset": "cus', "[1]", "\0\0"])
def test_damaged_result(content, tmp_path):
    config = TrainConfig(out=str(tmp_path), steps=4)
    write_json(tmp_path / "config.json", {"config": dataclasses.asdict(config)})
    (tmp_path / "result.json").write_text(content)
    for steps in (4, 6):  # its result, or going on for longer
        with pytest.raises(UsageError, match=r"result\.json cannot be read .*: delete it, and the command"):
            settle(dataclasses.replace(config, steps=steps), "custom", longer=True)


def test_paths_of_users_of_a_different_machine(tmp_path):
    """Where the run is used, they are not there."""
    config = TrainConfig(out="~alice-of-elsewhere/run", init="~alice-of-elsewhere/dense")
    write_json(tmp_path / "config.json", {"config": dataclasses.asdict(config), "cwd": "/"})
    assert read_config(tmp_path, TrainConfig)[0].init == "~alice-of-elsewhere/dense"
    assert not same_place("~alice-of-elsewhere/a", "~/a")


def test_sets_in_folders_are_paths_too(tmp_path, monkeypatch):
    """They are found where the run has moved with them, like images in class folders."""
    for kind in ("folder:", "coco:", "voc:", "yolo:"):
        out = tmp_path / kind[:-1] / "a"
        out.mkdir(parents=True)
        config = TrainConfig(out=str(out), data=dataclasses.replace(TrainConfig().data, name=f"{kind}photos"))
        write_json(out / "config.json", {"config": dataclasses.asdict(config), "cwd": str(out.parent)})
        (out.parent / "photos").mkdir()
        monkeypatch.chdir(tmp_path)
        assert same_place(read_config(out, TrainConfig)[0].data.name, f"{kind}{out.parent / 'photos'}")
        assert not same_place(f"{kind}photos", "photos")


def test_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/run/") == tmp_path / "run"
    with pytest.raises(UsageError, match="no such user"):
        local_path("~nobody-of-this-name/run")


def test_names_of_runs_in_a_picture():
    runs = [Path("a/lr=0.1"), Path("a/lr=0.2"), Path("b/lr=0.1")]
    assert [run_name(path, runs) for path in runs] == ["a/lr=0.1", "lr=0.2", "b/lr=0.1"]
    assert run_name(Path("."), [Path(".")]) == Path.cwd().name


def test_json_is_json(photos, tmp_path):
    """A class without test images has no accuracy."""
    assert to_json({"a": [float("nan"), np.float32("inf"), np.arange(2)], "b": (1.5, None, True)}) == (
        '{"a": [null, null, [0, 1]], "b": [1.5, null, true]}'
    )
    for file in list((photos / "apple").iterdir())[1:]:
        file.unlink()
    result = run(config_of(photos, tmp_path / "run", steps=1), model=Mlp())
    assert np.isnan(result["test_per_class_accuracy"][0])

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    for file in (tmp_path / "run").glob("*.json*"):
        for line in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
            json.loads(line, parse_constant=refuse)
    assert collect(tmp_path / "run")["test_per_class_accuracy"][0] is None


def test_run_that_ends_in_infinity_fails(photos, tmp_path):
    """In the last update, whose loss was still finite."""
    optim = OptimConfig(lr=1e20, schedule="constant", weight_decay=1e30)
    with pytest.raises(RunError, match="the parameters after step 1 are not finite: lower the learning rate"):
        run(config_of(photos, tmp_path / "run", steps=1, optim=optim), model=Mlp())
    assert not (tmp_path / "run/result.json").exists()


def test_run_whose_network_overflows_at_the_end_fails(photos, tmp_path, monkeypatch):
    """Its parameters are finite, but what it computes is not."""

    def overflowing(*arguments):
        return {**evaluate(*arguments), "loss": float("inf")}

    monkeypatch.setattr("train.run.evaluate", overflowing)
    with pytest.raises(RunError, match="the validation loss at step 1 is not finite"):
        run(config_of(photos, tmp_path / "run", steps=1), model=Mlp())
    assert not (tmp_path / "run/result.json").exists()


class Coordinator:
    """JAX's client as the first of two hosts sees it; the second one has said `other`, or has gone if that is None."""

    def __init__(self, other):
        self.values, self.other = {}, other

    def key_value_set(self, key, value):
        assert key not in self.values
        self.values[key] = value

    def wait_at_barrier(self, name, milliseconds):
        if self.other is None:
            raise jax.errors.JaxRuntimeError("ABORTED: a task has died\nmore")

    def blocking_key_value_get(self, key, milliseconds):
        return self.values[key] if key.endswith("/0") else self.other


def test_all_hosts_fail_with_the_error_of_one(monkeypatch):
    """The other host's line, as if it had come from there; own errors stay as they are."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def meet(other, error=None):
        monkeypatch.setattr("train.runtime._coordinator", lambda: Coordinator(other))
        with all_hosts():
            if error:
                raise error

    meet("-")
    with pytest.raises(UsageError, match="host 1 failed: there is no folder photos"):
        meet("UsageError: there is no folder photos")
    with pytest.raises(RunError, match="host 1 failed: KeyError"):
        meet("KeyError: ")
    with pytest.raises(LostHostError, match=r"a different host has stopped or cannot be reached \(ABORTED: a task has"):
        meet(None)
    for other in ("-", "UsageError: theirs", None):
        with pytest.raises(RunError, match=r"^mine$"):
            meet(other, RunError("mine"))
