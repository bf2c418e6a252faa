"""Trackers: what they receive, how they resume and fail, and what the three real ones leave on disk."""

import dataclasses
import json
import struct
import threading
import time

import numpy as np
import pytest

from pretrain.config import ObjectiveConfig, PretrainConfig, ViewConfig
from pretrain.run import run as pretrain_run
from tests.reference.nets import CLASSES, Mlp
from tests.train.detect.quick_run import CONFIG as DETECT
from train import trackers as module
from train.__main__ import main
from train.config import AugmentConfig, OptimConfig, TrainConfig
from train.data import from_arrays
from train.detect.run import run as detect_run
from train.errors import UsageError
from train.loop import read_rows
from train.paths import sqlite_url
from train.prune.config import PruneConfig, PruningConfig
from train.prune.run import run as prune_run
from train.run import run
from train.trackers import Trackers, check_trackers
from train.trackers.pictures import curves, tiled
from train.trackers.writers import TRACKERS, figures_of

ROWS = [
    {"step": 1, "epoch": 0.5, "loss": 2.0, "learning_rate": 0.1},
    {"step": 2, "epoch": 1.0, "loss": 1.0, "learning_rate": 0.1},
    {"step": 2, "epoch": 1.0, "validation_loss": 3.0, "validation_accuracy": None},
    {"step": 3, "epoch": 1.5, "loss": 0.5, "learning_rate": 0.1},
]


class Fake:
    """Notes its calls; raises at the calls named in `bad`."""

    made: list["Fake"]
    bad: tuple[str, ...] = ()

    def __init__(self, run):
        self.run, self.calls, self.closed = run, [], None
        type(self).made.append(self)
        self.check("start")

    def check(self, name):
        if name in self.bad:
            raise OSError(28, "No space left on device")

    def scalars(self, step, figures):
        self.check("scalars")
        self.calls.append((step, figures))

    def image(self, step, name, pixels):
        self.check("image")
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[-1] == 3
        self.calls.append((step, name))

    def histograms(self, step, values):
        self.check("histograms")
        self.calls.append((step, {name: x.shape for name, x in values.items()}))

    def finish(self, result):
        self.closed = (result,)


@pytest.fixture
def fake(monkeypatch):
    """The class of the tracker `fake`, whose package is installed."""
    kind = type("OneFake", (Fake,), {"made": []})
    monkeypatch.setattr(module, "curves", lambda rows: np.zeros((2, 2, 3), np.uint8))  # drawing takes its time
    monkeypatch.setitem(TRACKERS, "fake", ("json", kind))
    return kind


def write(out, rows, name="metrics.jsonl"):
    out.mkdir(exist_ok=True)
    (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def tracked(out, name, *, start=0, rows=ROWS, result=None, say=lambda line: None):
    """A run from step `start`, whose folder has the rows up to it, with `rows`, pictures and histograms after it."""
    write(out, [row for row in ROWS if row["step"] <= start])
    trackers = Trackers([name], say)
    trackers.start(out, start, {"optim.lr": 0.1, "widths": (1, 2), "init": None, "model": "resnet8"})
    trackers.images(start + 1, "images", np.linspace(0, 1, 4 * 8 * 8).reshape(4, 8, 8, 1))
    for row in rows:
        trackers.row(row)
        if "validation_loss" in row:
            trackers.histograms(row["step"], {"head/kernel": np.arange(200.0), "none": np.zeros((0, 2))})
    trackers.finish(result)


# ---- what trackers receive ----


def test_names_and_pictures():
    assert figures_of(ROWS[0]) == {"train/epoch": 0.5, "train/loss": 2.0, "train/learning_rate": 0.1}
    assert figures_of(ROWS[2]) == {"validation/epoch": 1.0, "validation/loss": 3.0}
    picture = tiled(np.full((9, 8, 8, 1), 0.5))
    assert picture.shape == (2 * 66, 8 * 66, 3) and picture[30, 30, 0] == 128
    assert tiled(np.zeros((2, 100, 70, 3))).shape == (102, 2 * 72, 3)


def test_curves():
    pytest.importorskip("matplotlib")
    assert curves([]) is None
    assert curves(ROWS).shape == (240, 1020, 3)


def test_calls_in_order(fake, tmp_path):
    tracked(tmp_path, "fake", start=2, rows=ROWS[3:], result={"test_accuracy": 0.5, "out": "x", "nan": float("nan")})
    (one,) = fake.made
    assert one.run.settings == {"optim.lr": 0.1, "widths": "(1, 2)", "init": "None", "model": "resnet8"}
    assert one.run.step == 2 and [*one.run.rows] == ROWS[:3]
    assert one.calls[:2] == [(3, "images"), (3, figures_of(ROWS[3]))]
    assert one.calls[2:] == [(3, "curves")] and one.closed == ({"test_accuracy": 0.5},)


def test_histograms_are_of_copies(fake, tmp_path):
    """The next step reuses the memory of the parameters; large arrays are sampled."""
    trackers, array = Trackers(["fake"]), np.ones((3, 100_000), np.float32)
    assert module._sample(array).shape == (60_000,)
    sample = module._sample(array[0, :10])
    array[:] = 2
    assert sample.sum() == 10
    assert module._sample(np.array([1.0, np.nan])).tolist() == [1.0]
    trackers.start(tmp_path, 0, {})
    trackers.finish(None)
    assert fake.made[0].closed == (None,)


# ---- failures ----


@pytest.mark.parametrize("at", ["start", "scalars", "image", "histograms"])
def test_one_that_fails_is_left_out(at, fake, tmp_path, monkeypatch):
    """It says so once; the others go on."""
    well = type("Well", (Fake,), {"made": []})
    monkeypatch.setitem(TRACKERS, "well", ("json", well))
    fake.bad = (at,)
    lines, write_all = [], Trackers(["fake", "well"], lambda line: lines.append(line))
    write_all.start(tmp_path, 0, {})
    for row in ROWS * 3:
        write_all.row(row)
        write_all.images(1, "images", np.zeros((1, 8, 8, 3)))
        write_all.histograms(1, {"w": np.ones(3)})
    write_all.finish({})
    assert lines == [
        "note: --log fake is left out from now on, the run goes on: OSError: [Errno 28] No space left on device"
    ]
    assert well.made[0].closed == ({},) and fake.made[0].closed is None
    assert len(well.made[0].calls) >= 3 * 3 * len(ROWS)


@pytest.mark.parametrize("limit", ["PENDING", "PATIENCE"])
def test_one_that_hangs_is_left_out(limit, fake, tmp_path, monkeypatch):
    monkeypatch.setattr(module, limit, 3 if limit == "PENDING" else 0.05)
    go_on, lines = threading.Event(), []
    fake.scalars = lambda self, step, figures: go_on.wait(10)
    trackers = Trackers(["fake"], lines.append)
    trackers.start(tmp_path, 0, {})
    for _ in range(8):
        trackers.row(ROWS[0])
    trackers.finish(None)
    go_on.set()
    reason = "it is 3 entries behind" if limit == "PENDING" else "it does not end"
    assert lines == [f"note: --log fake is left out from now on, the run goes on: {reason}"]


def test_curves_that_cannot_be_drawn(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "curves", lambda rows: 1 / 0)
    lines = []
    tracked(tmp_path, "fake", result={}, say=lines.append)
    assert lines == ["note: the curves of the run are not drawn: ZeroDivisionError: division by zero"]
    assert fake.made[0].closed == ({},)


def test_refused_before_the_run(tmp_path, monkeypatch, fails):
    line = fails(2, main, ["--log", "tensorbord", "--out", str(tmp_path / "run")])
    assert "unknown tracker 'tensorbord': did you mean tensorboard?" in line
    monkeypatch.setitem(TRACKERS, "mlflow", ("no_such_package", Fake))
    with pytest.raises(UsageError, match=r'--log mlflow needs no_such_package: pip install -e "\.\[mlflow\]"'):
        check_trackers(["mlflow"])
    # The folder that W&B leaves where it was started is not the package.
    (tmp_path / "no_such_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="needs no_such_package"):
        check_trackers(["mlflow"])
    assert not (tmp_path / "run").exists()


# ---- runs ----


@pytest.fixture(scope="module")
def dataset():
    """Four classes that a mean tells apart."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, 120)
    images = rng.integers(0, 32, (120, 8, 8, 3)) + 64 * labels[:, None, None, None]
    return from_arrays(images.astype(np.uint8), labels, classes=["a", "b", "c", "d"])


def config(out, **options):
    pixels = AugmentConfig(mean=(0.3, 0.3, 0.3), std=(0.2, 0.2, 0.2), flip=True)
    fields = {"batch": 24, "steps": 12, "eval_every": 1, "log_every": 2, "eval_batch": 24, "kernels": "plain"}
    return TrainConfig(out=str(out), augment=pixels, optim=OptimConfig(lr=1e-2), **(fields | options))


def steps_of(tracker, name):
    return [step for step, figures in tracker.calls if name in figures]


@pytest.mark.usefixtures("one_device")
def test_run_and_resume(fake, dataset, tmp_path):
    """Trackers change neither the result nor metrics.jsonl, and may be added to a run that resumes."""
    whole = run(config(tmp_path / "plain"), model=Mlp(), dataset=dataset)

    def stop(state):
        raise KeyboardInterrupt

    # 4 steps in an epoch: it stops after step 6, whose row is dropped, as the checkpoint is that of step 5.
    stopped = config(tmp_path / "run", save_steps=5, log=("fake", "fake"), steps_per_call=3, profile="6:7")
    with pytest.raises(KeyboardInterrupt):
        run(stopped, model=Mlp(), dataset=dataset, hooks=[(6, stop)])
    resumed = run(dataclasses.replace(stopped, profile=None), model=Mlp(), dataset=dataset)
    assert resumed["params_digest"] == whole["params_digest"]
    first, second = fake.made
    assert first.closed == (None,) and second.closed[0]["test_accuracy"] == whole["test_accuracy"]
    assert first.calls[0] == (1, "images") and second.calls[0] == (6, "images")
    assert steps_of(first, "train/loss") == [2, 4, 6] and second.run.step == 5
    assert [row["step"] for row in second.run.rows] == [2, 4, 4]
    assert steps_of(second, "train/loss") == [6, 8, 10, 12] and steps_of(second, "validation/loss") == [8, 12]
    histogram = next(figures for step, figures in second.calls if step == 8 and "parameters/in/kernel" in figures)
    assert histogram["parameters/in/kernel"] == (192 * 16,)
    assert first.run.settings["optim.lr"] == 0.01
    rows = [read_rows(tmp_path / name / "metrics.jsonl") for name in ("plain", "run")]
    assert [row.keys() for row in rows[0]] == [row.keys() for row in rows[1]]
    # The trace was begun, and is written though the run was stopped.
    assert [*(tmp_path / "run" / "profile").rglob("*.xplane.pb")]


@pytest.mark.usefixtures("one_device")
def test_other_hosts_write_nothing(fake, dataset, tmp_path, monkeypatch):
    from train.session import Session

    fit = Session.fit

    def as_second_host(self, *arguments, **options):
        self.main = False
        return fit(self, *arguments, **options)

    monkeypatch.setattr(Session, "fit", as_second_host)
    run(config(tmp_path, steps=2, log=("fake",), profile="1:1"), model=Mlp(), dataset=dataset)
    assert not fake.made and not (tmp_path / "profile").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_the_same_for_all_pipelines(fake, dataset, tmp_path):
    views = ViewConfig(min_scale=0.6, jitter=(0, 0, 0, 0), mean=(0.3, 0.3, 0.3), std=(0.2, 0.2, 0.2))
    shared = {"batch": 24, "steps": 6, "eval_every": 1, "log_every": 2, "eval_batch": 24, "log": ("fake",)}
    objective = ObjectiveConfig(projector=(16, 8))
    pretrain_run(
        PretrainConfig(out=str(tmp_path / "pretrained"), augment=views, objective=objective, **shared),
        model=Mlp(),
        dataset=dataset,
    )
    pruning = PruningConfig(sparsity=0.5, epochs=1, every=2)
    prune_run(
        PruneConfig(**vars(config(tmp_path / "pruned", log=("fake",))), prune=pruning), model=Mlp(), dataset=dataset
    )
    detect_run(
        dataclasses.replace(DETECT, out=str(tmp_path / "detected"), steps=1, log_every=1, log=("fake",)), test=False
    )
    pretrained, dense, pruned, detected = fake.made
    assert [one.run.out.name for one in fake.made] == ["pretrained", "dense", "pruned", "detected"]
    assert any(call[1] == "views" for call in pretrained.calls)
    assert all(any(call[1] == "images" for call in one.calls) for one in (dense, pruned, detected))
    assert "validation/ap50" in "".join(str(call) for call in detected.calls)
    assert "effective_rank" in "".join(str(call) for call in pretrained.calls)
    assert pruned.closed[0]["sparsity"] == pytest.approx(0.5, abs=0.01)


# ---- what the real ones leave on disk ----


def records(path, header):
    """The records of a .wandb file: a log in blocks of 32 KiB, where a record may be split; the last may be cut."""
    data, at, parts = path.read_bytes(), header, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        if at + 7 + size > len(data):
            return
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield parts
            parts = b""


def test_tensorboard_events(tmp_path):
    """Written by tensorboardX, read as the records that they are; a resumed run says what is trained again."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    lines = []
    tracked(tmp_path, "tensorboard", say=lines.append)
    tracked(tmp_path, "tensorboard", start=2, rows=ROWS[3:], result={"test_accuracy": 0.5}, say=lines.append)
    assert lines == []
    runs = []
    for file in sorted((tmp_path / "tensorboard").iterdir()):
        data, at, events = file.read_bytes(), 0, []
        while at < len(data):
            (size,) = struct.unpack("<Q", data[at : at + 8])
            events.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + size]))
            at += 16 + size
        runs.append(events)
    first, second = ([(e.step, v.tag) for e in events for v in e.summary.value] for events in runs)
    assert first[:2] == [(0, "_hparams_/session_start_info"), (1, "images")]
    assert [step for step, tag in first if tag == "train/loss"] == [1, 2, 3]
    assert (2, "parameters/head/kernel") in first and (2, "parameters/none") not in first
    assert runs[1][1].session_log.status == event_pb2.SessionLog.START and runs[1][1].step == 3
    assert [step for step, tag in second if tag == "train/loss"] == [3]
    assert second[-2:] == [(3, "result/test_accuracy"), (3, "_hparams_/session_end_info")]


@pytest.mark.slow
def test_tensorboard_reads_them(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="tensorboard")
    tracked(tmp_path, "tensorboard")
    tracked(tmp_path, "tensorboard", start=2, rows=ROWS[3:], result={"test_accuracy": 0.5})
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0, "scalars": 0, "histograms": 0})
    events.Reload()
    assert [(point.step, point.value) for point in events.Scalars("train/loss")] == [(1, 2.0), (2, 1.0), (3, 0.5)]
    assert [point.step for point in events.Scalars("validation/loss")] == [2]
    assert events.Histograms("parameters/head/kernel")[0].histogram_value.num == 200
    assert [point.step for point in events.Images("images")] == [1, 3]
    assert events.PluginTagToContent("hparams")
    # A run that was not tracked before starts with all of its rows.
    tracked(tmp_path / "later", "tensorboard", start=2, rows=ROWS[3:])
    events = reader.EventAccumulator(str(tmp_path / "later" / "tensorboard"))
    events.Reload()
    assert [point.step for point in events.Scalars("train/loss")] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_offline_files(tmp_path, capfd):
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason="needs the extra wandb")
    # Of two sessions in one second, W&B adds a number to the name of the second folder, but not to that of its file.
    before = tmp_path / "wandb" / "offline-run-20260101_000000-abc123-1" / "run-abc123.wandb"
    before.parent.mkdir(parents=True)
    before.touch()
    lines = []
    tracked(tmp_path, "wandb", start=2, rows=ROWS[3:], result={"test_accuracy": 0.5}, say=lines.append)
    assert lines == []
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert file != before and file.name == before.name, "it is the same run"
    # W&B's own process closes the file, some time after the run's end.
    found, deadline = [], time.monotonic() + 600
    while not any(record.HasField("exit") for record in found):
        assert time.monotonic() < deadline, "the file was not closed"
        time.sleep(0.05)
        found = [pb.Record.FromString(data) for data in records(file, 7)]
    history = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.HasField("history")
    ]
    losses = [(row["_step"], row["train/loss"]) for row in history if "train/loss" in row]
    assert losses == [(1, 2.0), (2, 1.0), (3, 0.5)]
    assert [row["validation/loss"] for row in history if "validation/loss" in row] == [3.0]
    assert sum(any(name.startswith("images") for name in row) for row in history) == 1
    (settings,) = [record.run for record in found if record.HasField("run")][:1]
    assert {item.key: item.value_json for item in settings.config.update}["optim.lr"] == "0.1"
    summary = [item for record in found for item in record.summary.update]
    assert ("test_accuracy", "0.5") in [(item.key or item.nested_key[0], item.value_json) for item in summary]
    assert capfd.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_local_store(tmp_path, capfd):
    tracking = pytest.importorskip("mlflow.tracking", reason="needs the extra mlflow")
    lines = []
    tracked(tmp_path / "a run", "mlflow", say=lines.append)
    tracked(tmp_path / "a run", "mlflow", start=2, rows=ROWS[3:], result={"test_accuracy": 0.5}, say=lines.append)
    assert lines == []
    folder = tmp_path / "a run" / "mlflow"
    assert [*tmp_path.iterdir()] == [tmp_path / "a run"]  # and no a%20run
    client = tracking.MlflowClient(tracking_uri=sqlite_url(folder / "mlflow.db"))
    experiment = client.get_experiment_by_name("resnet-jax")
    (one,) = client.search_runs([experiment.experiment_id])
    assert one.info.status == "FINISHED" and one.info.run_name == "a run"
    assert one.data.params["optim.lr"] == "0.1" and one.data.metrics["result/test_accuracy"] == 0.5
    history = client.get_metric_history(one.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 2.0), (2, 1.0), (3, 0.5)]
    assert len(client.get_metric_history(one.info.run_id, "validation/loss")) == 1
    assert {path.name for path in folder.rglob("*.png")} >= {"images-1.png", "images-3.png"}
    assert capfd.readouterr().err == ""
