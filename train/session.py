"""The part that every pipeline's run shares, from the folder that it is kept in to the common keys of its result.

A run opens a session, turns its config into pieces, and then compiles, resumes, fits and finishes:

    session = open_session(config, preset)
    if session.finished is not None:
        return session.finished
    step, evaluations = session.compile(train_step, [(eval_step, shapes)], state)
    state = session.resume(state)
    state = session.fit(step, state, validate=validate, schedule=schedule)
    return session.finish(figures)
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from resnet_jax.parallel import compile_step, make_mesh, place, replicated
from train.checkpoint import METRIC, Checkpoints
from train.config import RunConfig
from train.data.batches import Batches, batch_like, check_batch, padded, train_batches
from train.data.sets import Dataset
from train.errors import RunError, UsageError
from train.from_config import compute_dtype, make_kernels, open_measured, read_data, with_statistics
from train.loop import Hook, Progress, fit
from train.optim import Schedule
from train.run_folder import discard_start, environment, settle, write_config, write_json
from train.runtime import compile_in, compiler_options, join_hosts, keep_compiled, say, xla_options
from train.state import TrainState

Config = TypeVar("Config", bound=RunConfig)
# state -> (a row of metrics.jsonl, a line for people)
Validate = Callable[[Any], tuple[dict[str, float], str]]


def open_session(
    config: Config, preset: str = "custom", *, dataset: Dataset | None = None, replaced: Sequence[str] = ()
) -> "Session[Config]":
    """The session of a run: its folder settled, the hosts joined, the data opened.

    Args:
      dataset: images to use instead of those that the config names.
      replaced: names of the pieces that were passed to the run as objects; the folder's config.json keeps them.

    Raises:
      UsageError: the folder holds a different run; data that cannot be read, or do not fit the batch.
    """
    out, finished = settle(config, preset, replaced)
    if finished is not None:
        return Session(config, preset, out, finished, replaced)
    join_hosts(config.distributed)
    keep_compiled(config.cache)
    session = Session(config, preset, out, None, replaced)
    session.open_data(dataset)
    return session


class Session(Generic[Config]):
    """A run in progress.

    Attributes:
      config: the run's, with channel statistics filled in.
      out: the run's folder.
      finished: the result of a run that the folder holds already; nothing below exists then.
      main: whether this process writes the folder.
      mesh, dataset, epoch_steps, steps: devices, images, steps of an epoch (a fraction) and of the whole run.
      kernels, dtype: fields of a model that choose its compute kernels, and the dtype that it computes in.
      stream, checkpoints: the training data and the saved states; after `compile` and `resume`.
      resumed: whether `resume` found a checkpoint.
      last_row: what `validate` last returned; empty before that.
    """

    mesh: Mesh
    dataset: Dataset
    stream: Batches
    checkpoints: Checkpoints
    resumed = False
    last_row: dict[str, float]

    def __init__(
        self, config: Config, preset: str, out: Path, finished: dict[str, Any] | None, replaced: Sequence[str]
    ) -> None:
        self.config, self.preset, self.out, self.finished, self.replaced = config, preset, out, finished, replaced
        self.last_row = {}

    def open_data(self, dataset: Dataset | None) -> None:
        """Open the images and derive from their number how long the run is; `compile` reads them."""
        config, self.main, self.mesh = self.config, jax.process_index() == 0, make_mesh()
        began = time.perf_counter()
        if dataset is None:
            self.config, self.dataset = open_measured(config)
        else:
            self.config, self.dataset = with_statistics(config, dataset), dataset
        self.reading = time.perf_counter() - began
        check_batch(config.batch, self.mesh.size, len(self.dataset.train))
        self.epoch_steps = len(self.dataset.train) / config.batch
        self.steps = config.steps or max(int(config.epochs * self.epoch_steps), 1)
        self.dtype = compute_dtype(config.dtype)
        # A model that was passed in computes with what its author chose.
        self.kernels: dict[str, Any] = {}
        self.remark = ""
        if "model" not in self.replaced:
            self.kernels, self.remark = make_kernels(config.kernels, config.mode, self.dtype)

    def announce(self, what: str) -> None:
        """Say what is trained (`resnet20: 272,474 parameters`), on which devices and how it is computed."""
        library = "oneDNN" if self.kernels else "XLA"
        device = f"{self.mesh.size} {jax.devices()[0].device_kind}"
        say(f"{what} on {device} ({self.config.mode}, {jnp.dtype(self.dtype).name}, convolutions by {library})")
        if self.remark:
            say(f"note: oneDNN is not used: {self.remark}")

    def place(self, tree: Any) -> Any:
        """A tree of arrays, whole on every device."""
        return place(tree, replicated(self.mesh))

    def compile(
        self, step: Callable[..., Any], evaluations: Sequence[tuple[Callable[..., Any], Any]], state: TrainState
    ) -> tuple[Callable[..., Any], list[Callable[..., Any]]]:
        """(the compiled train step, the compiled evaluations); images are read meanwhile.

        Args:
          step: `(state, batch, *, axis_name) -> (state, metrics)`.
          evaluations: pairs of `(x, batch, *, axis_name) -> arrays` and the shapes of `x`.
          state: the state to start from.
        """
        config, pmap, shape = self.config, self.config.mode == "pmap", self.dataset.image_shape
        compiled_for = partial(compile_step, mesh=self.mesh, mode=config.mode)
        options = {} if pmap else compiler_options(self.dtype, plain=not self.kernels)
        train_like = batch_like(config.batch, shape)
        eval_like = batch_like(padded(config.eval_batch, self.mesh), shape, valid=True)

        # Programs compile in a thread of their own: XLA leaves Python's lock alone, and so does decoding images.
        compiler = ThreadPoolExecutor(1)
        try:
            program = compiled_for(step, compiler_options={**options, **xla_options(config.xla)} or None)
            shapes = jax.eval_shape(lambda: state)
            tasks = [compile_in(compiler, program, shapes, train_like, pmap=pmap, xla=config.xla)]
            for evaluation, example in evaluations:
                program = compiled_for(evaluation, donate=False, compiler_options=options or None)
                tasks.append(compile_in(compiler, program, example, eval_like, pmap=pmap))
            began = time.perf_counter()
            self.dataset = read_data(config, self.dataset)
            self.reading += time.perf_counter() - began
            (train, self.compile_seconds), *others = (task() for task in tasks)
        finally:
            compiler.shutdown(wait=False, cancel_futures=True)

        self.stream = train_batches(
            self.dataset.train, batch=config.batch, seed=config.seed, mesh=self.mesh, mode=config.mode
        )
        counts = ", ".join(f"{len(split):,} {name}" for name, split in self.dataset.splits.items())
        classes = len(self.dataset.classes)
        say(f"{self.dataset.name}: {counts} images, {classes} classes, read in {self.reading:.1f} s")
        return train, [program for program, _ in others]

    def resume(self, state: Any) -> Any:
        """The state of the newest good checkpoint, or `state` as it is; notes in the folder what this run is."""
        if self.main:
            write_config(self.out, self.preset, self.config, self.dataset, self.replaced)
        keep_best = getattr(self.config, "keep_best", 0)
        self.checkpoints = Checkpoints(self.out / "checkpoints", keep_last=self.config.keep_last, keep_best=keep_best)
        restored = self.checkpoints.resume(state)
        if restored is None:
            return state
        state, position = restored
        self.stream.restore(position)
        self.resumed = True
        say(f"going on from step {int(state.step)}")
        return state

    @contextmanager
    def undone_if_refused(self) -> Iterator[None]:
        """Around what may refuse a run before its first step: the corrected command then finds the folder free."""
        try:
            yield
        except UsageError:
            self.checkpoints.close()
            if self.main and not self.resumed:
                discard_start(self.out)
            raise

    def fit(
        self,
        step: Callable[..., Any],
        state: Any,
        *,
        validate: Validate,
        schedule: Schedule,
        hooks: Sequence[Hook] = (),
        shown: Sequence[str] = ("loss", "accuracy"),
        validate_first: bool = False,
    ) -> Any:
        """Train to the end, with checkpoints; `validate` is called after every `eval_every` epochs.

        Args:
          schedule: learning rate by step, for metrics.jsonl.
          hooks: further ones, called before `validate`; see `train.loop.fit`.
          shown: the metrics that people see.
          validate_first: also before the first step of a run that starts here.

        Raises:
          RunError: what stopped the run, and the checkpoint that is kept.
        """
        config = self.config
        progress = Progress(
            self.out / "metrics.jsonl" if self.main else None,
            start=int(state.step),
            steps=self.steps,
            epoch_steps=self.epoch_steps,
            batch=config.batch,
            every=config.log_every,
            extra=lambda number: {"learning_rate": float(schedule(number - 1))},
            shown=shown,
            silent=not self.main,
        )

        def save(state: TrainState, metrics: dict[str, float] | None = None) -> None:
            self.checkpoints.save(state, self.stream.state(), metrics)

        def watch(state: Any) -> None:
            began = time.perf_counter()
            number = int(state.step)
            row, line = validate(state)
            self.last_row = row
            progress.row({"step": number, "epoch": round(number / self.epoch_steps, 4), **row})
            progress.say(f"step {number}: {line}")
            save(state, {METRIC: row[METRIC]} if METRIC in row else None)
            progress.pause(time.perf_counter() - began)

        every = [(max(round(config.eval_every * self.epoch_steps), 1), watch)]
        if config.save_steps:
            every.append((config.save_steps, save))
        if validate_first and not self.resumed:
            watch(state)
        began = time.perf_counter()
        try:
            state = fit(step, state, self.stream, steps=self.steps, hooks=[*hooks, *every], log=progress.log)
            self.checkpoints.wait()
        except RunError as error:
            kept = self.checkpoints.steps
            where = f"; {self.out} keeps checkpoint {kept[-1]}" if kept else ""
            raise RunError(f"{error}{where}") from None
        finally:
            progress.close()
        self.seconds = time.perf_counter() - began
        self.images_per_second = progress.images_per_second
        return state

    def finish(self, figures: dict[str, Any]) -> dict[str, Any]:
        """The result: the keys that every run's has, and the pipeline's `figures`; written to `out`/result.json."""
        self.checkpoints.close()
        config = self.config
        result = {
            "preset": self.preset,
            "dataset": self.dataset.name,
            "model": config.model,
            "seed": config.seed,
            "steps": self.steps,
            "epochs": round(self.steps / self.epoch_steps, 3),
            **figures,
            "seconds": round(self.seconds, 2),
            "compile_seconds": round(self.compile_seconds, 2),
            "images_per_second": round(self.images_per_second, 1),
            "out": str(self.out),
            **environment(),
        }
        if self.main:
            write_json(self.out / "result.json", result)
        return result
