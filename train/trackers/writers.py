"""What a tracker is, and those of TensorBoard, Weights & Biases and MLflow."""

import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from train.paths import sqlite_url

Row = dict[str, Any]
PROJECT = "resnet-jax"  # name of W&B's project, and of MLflow's experiment
BINS = 64  # of a histogram
WAIT = 5.0  # seconds between writes to MLflow


def figures_of(row: Row) -> dict[str, float]:
    """The figures of a row of metrics.jsonl by the name that trackers show: `train/loss`, `validation/accuracy`."""
    group = "train" if "learning_rate" in row else "validation"
    figures = {name: x for name, x in row.items() if name != "step" and isinstance(x, int | float) and math.isfinite(x)}
    return {f"{group}/{name.removeprefix('validation_')}": float(x) for name, x in figures.items()}


@dataclass(frozen=True, kw_only=True)
class Started:
    """A run that starts or resumes.

    Attributes:
      out: its folder; the trackers write to a folder in it with their own names.
      step: number of steps that it has done.
      settings: its hyper-parameters, flat.
      rows: the rows of its metrics.jsonl up to `step`.
    """

    out: Path
    step: int
    settings: dict[str, Any]
    rows: Sequence[Row]


class Tracker(Protocol):
    """A tracker of one run; it is made from a `Started`, and what it raises ends it, not the run."""

    def scalars(self, step: int, figures: dict[str, float]) -> None:
        """Write figures by name, such as `train/loss`."""

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Write a picture, uint8 [H, W, 3]."""

    def histograms(self, step: int, values: dict[str, np.ndarray]) -> None:
        """Write the distribution of arrays by name; their values are finite."""

    def finish(self, result: dict[str, float] | None) -> None:
        """Close the run with the figures of its result; None if it was stopped."""


class TensorBoard:
    """Event files in `tensorboard/`: `tensorboard --logdir RUN`."""

    def __init__(self, run: Started) -> None:
        self.summary = import_module("tensorboardX.summary")
        self.event = import_module("tensorboardX.proto.event_pb2")
        folder = run.out.resolve() / "tensorboard"
        folder.mkdir(exist_ok=True)
        old = len(list(folder.glob("events.*")))
        # tensorboardX's usual writer has a thread whose errors cannot be caught; this one writes at once.
        events = import_module("tensorboardX.event_file_writer")
        self.writer = events.EventsWriter(str(folder / "events"), f".{old:04d}")
        if old:  # what was written after the checkpoint is trained again: TensorBoard drops it
            restart = self.event.SessionLog(status=self.event.SessionLog.START)
            self._write(run.step + 1, session_log=restart)
        else:
            for row in run.rows:
                self.scalars(row["step"], figures_of(row))
        self.step = run.step
        _, begin, self.end = self.summary.hparams(run.settings, {})
        self._write(run.step, summary=begin)

    def _write(self, step: int, **content: Any) -> None:
        self.writer.write_event(self.event.Event(wall_time=time.time(), step=step, **content))
        self.writer.flush()

    def _add(self, step: int, values: Sequence[Any]) -> None:
        self.step = step
        self._write(step, summary=self.summary.Summary(value=[value for made in values for value in made.value]))

    def scalars(self, step: int, figures: dict[str, float]) -> None:
        self._add(step, [self.summary.scalar(name, value) for name, value in figures.items()])

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._add(step, [self.summary.image(name, pixels, dataformats="HWC")])

    def histograms(self, step: int, values: dict[str, np.ndarray]) -> None:
        self._add(step, [self.summary.histogram(name, x, BINS) for name, x in values.items()])

    def finish(self, result: dict[str, float] | None) -> None:
        if result is not None:
            self.scalars(self.step, {f"result/{name}": value for name, value in result.items()})
            self._write(self.step, summary=self.end)
        self.writer.close()


class WandB:
    """An offline run of Weights & Biases in `wandb/`: `wandb sync RUN/wandb/offline-run-*` uploads it.

    W&B cannot resume an offline run. A resumed one replaces it, under the same id, and starts with `run.rows`.
    """

    def __init__(self, run: Started) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self.wandb = import_module("wandb")
        old = sorted((run.out / "wandb").glob("offline-run-*"))
        quiet = {"silent": True, "console": "off", "disable_git": True, "save_code": False, "x_disable_stats": True}
        self.run = self.wandb.init(
            mode="offline",
            dir=str(run.out),
            project=PROJECT,
            name=run.out.resolve().name,
            id=next((file.stem.removeprefix("run-") for folder in old for file in folder.glob("run-*.wandb")), None),
            config=run.settings,
            settings=self.wandb.Settings(reinit="create_new", **quiet),
        )
        for row in run.rows:
            self.scalars(row["step"], figures_of(row))
        for folder in old:
            if folder.resolve() != Path(self.run.dir).resolve().parent:
                shutil.rmtree(folder)

    def scalars(self, step: int, figures: dict[str, float]) -> None:
        self.run.log(figures, step=step)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self.run.log({name: self.wandb.Image(pixels)}, step=step)

    def histograms(self, step: int, values: dict[str, np.ndarray]) -> None:
        made = {name: self.wandb.Histogram(np_histogram=np.histogram(x, BINS)) for name, x in values.items()}
        self.run.log(made, step=step)

    def finish(self, result: dict[str, float] | None) -> None:
        self.run.summary.update(result or {})
        self.run.finish(exit_code=int(result is None))


class MLflow:
    """A run in a store of its own in `mlflow/`: `mlflow ui --backend-store-uri sqlite:///RUN/mlflow/mlflow.db`.

    A resumed run goes on in it, without the points that the store already has. MLflow has no histograms.
    """

    def __init__(self, run: Started) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        folder = run.out.resolve() / "mlflow"
        folder.mkdir(exist_ok=True)
        self.entities = import_module("mlflow.entities")
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it reports every table
        self.client = import_module("mlflow.tracking").MlflowClient(tracking_uri=sqlite_url(folder / "mlflow.db"))
        if experiment := self.client.get_experiment_by_name(PROJECT):
            number = experiment.experiment_id
        else:
            number = self.client.create_experiment(PROJECT, artifact_location=(folder / "artifacts").as_uri())
        found = self.client.search_runs([number], max_results=1)
        self.last: dict[str, int] = {}  # the last step of each figure in the store
        if found:
            self.id = found[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
            for name in found[0].data.metrics:
                self.last[name] = max(point.step for point in self.client.get_metric_history(self.id, name))
        else:
            self.id = self.client.create_run(number, run_name=run.out.resolve().name).info.run_id
            params = [self.entities.Param(name, str(value)) for name, value in run.settings.items()]
            for at in range(0, len(params), 100):
                self.client.log_batch(self.id, params=params[at : at + 100])
        self.points: list[Any] = []  # not written yet, as each transaction takes 14 ms
        self.written = time.monotonic()
        for row in run.rows:
            self.scalars(row["step"], figures_of(row))

    def _write(self) -> None:
        for at in range(0, len(self.points), 1000):  # the most that MLflow takes at once
            self.client.log_batch(self.id, metrics=self.points[at : at + 1000])
        self.points, self.written = [], time.monotonic()

    def scalars(self, step: int, figures: dict[str, float]) -> None:
        new = {name: value for name, value in figures.items() if step > self.last.get(name, -1)}
        self.last |= dict.fromkeys(new, step)
        now = round(time.time() * 1000)
        self.points += [self.entities.Metric(name, value, now, step) for name, value in new.items()]
        if time.monotonic() - self.written > WAIT:
            self._write()

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self.client.log_image(self.id, pixels, artifact_file=f"{name}-{step}.png")

    def histograms(self, step: int, values: dict[str, np.ndarray]) -> None:
        self._write()

    def finish(self, result: dict[str, float] | None) -> None:
        self.scalars(max(self.last.values(), default=0), {f"result/{name}": x for name, x in (result or {}).items()})
        self._write()
        self.client.set_terminated(self.id, "FAILED" if result is None else "FINISHED")


TRACKERS: dict[str, tuple[str, Callable[[Started], Tracker]]] = {
    "tensorboard": ("tensorboardX", TensorBoard),
    "wandb": ("wandb", WandB),
    "mlflow": ("mlflow", MLflow),
}
"""Trackers by the name that `--log` takes, which is also that of their extra: (the package they need, factory)."""
