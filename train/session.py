"""The part that the runs of all pipelines share, from the run folder to the common keys of the result.

A run opens a session, turns its config into pieces, and then compiles, resumes, fits and finishes; see `train.run`.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from resnet_jax.parallel import compile_step, make_mesh, place, replicated
from resnet_jax.tree import leaves
from train.checkpoint import Checkpoints
from train.chunks import CHUNK_LAYOUT, chunk_like, many_steps
from train.config import RunConfig, flat
from train.data.batches import (
    Batch,
    Batches,
    batch_like,
    check_batch,
    eval_batch_size,
    padded,
    train_batches,
)
from train.data.sources import collate
from train.errors import RunError, UsageError
from train.from_config import (
    compute_dtype,
    make_kernels,
    open_measured,
    read_data,
    steps_per_call,
    with_statistics,
)
from train.loop import Hook, Progress, fit
from train.optim import Schedule
from train.run_folder import (
    claim,
    environment,
    length_before,
    read_config,
    settle,
    write_config,
    write_json,
    write_skipped,
)
from train.runtime import (
    all_hosts,
    compile_in,
    compiler_options,
    join_hosts,
    keep_compiled,
    lost_host,
    say,
    xla_options,
)
from train.state import TrainState
from train.tracing import Trace, traced_steps
from train.trackers import Trackers

Config = TypeVar("Config", bound=RunConfig)
# state -> (row for metrics.jsonl, line to print)
Validate = Callable[[Any], tuple[dict[str, float], str]]
# receives the row of each validation: step, epoch and the figures
Validated = Callable[[dict[str, Any]], None]
# (state, batch) -> images by name, float [N, H, W, C], as the network receives them in the next step
See = Callable[[Any, Batch], dict[str, jax.Array]]
SEEN = 16  # images of the first batch that trackers show


def open_session(
    config: Config,
    preset: str = "custom",
    *,
    dataset: Any = None,
    longer: bool = False,
    kind: "type[Session[Any]] | None" = None,
    **own: Any,
) -> Any:
    """Open a run's session: settle its folder, join the hosts, open the data.

    Args:
      kind: the pipeline's own kind of session, if it has one.
      dataset: images to use instead of those that the config names.
      longer: let a config with more epochs or steps continue the run in its folder.
      own: pieces that were passed to the run as objects, by name, such as `model`; None means not passed. The names
        are recorded in the folder's config.json.

    Raises:
      UsageError: the folder holds a different run, or the data cannot be read or do not fit the batch size.
    """
    own = {name: piece for name, piece in own.items() if piece is not None}
    session = (kind or Session)(config, preset, own, dataset, longer=longer)
    if session.finished is None:
        join_hosts(config.distributed)
        keep_compiled(config.cache)
        session.open_data(dataset)
    return session


class Session(Generic[Config]):
    """A run in progress, on images with a label each.

    Pipelines on other sets override the methods under "the data".

    Attributes:
      config: the run's config, with channel statistics filled in.
      out: the run folder.
      finished: the result, if the folder already holds the finished run, else None; if set, no data are opened.
      own, model_name: the pieces that were passed to the run, and the name of the model that it trains.
      main: whether this process writes to the folder.
      mesh, dataset, epoch_steps, steps: devices, images, steps per epoch (not always whole) and in total.
      eval_batch: batch size of evaluations (after `compile`): the config's, or less for small splits.
      kernels, dtype: model fields that select its compute kernels, and its compute dtype.
      per_call: most steps per call of the compiled train step; see `train.chunks`.
      stream, checkpoints: the training data (after `compile`) and the saved states (after `resume`).
      trackers: where `log` writes to (after `fit` began).
      resumed: whether `resume` found a checkpoint.
      last_row: the row that `validate` returned last; empty before that.
    """

    mesh: Mesh
    dataset: Any
    stream: Batches
    checkpoints: Checkpoints
    trackers: Trackers
    resumed = False

    def __init__(self, config: Config, preset: str, own: dict[str, Any], dataset: Any, *, longer: bool = False) -> None:
        self.config, self.preset, self.own = config, preset, own
        self.replaced = [*own] if dataset is None else [*own, "dataset"]
        self.longer = longer
        self.out, self.finished = settle(config, preset, self.replaced, longer=longer)
        self.model_name = type(own["model"]).__name__ if "model" in own else config.model
        self.last_row: dict[str, float] = {}

    # ---- the data ----

    def open_set(self, dataset: Any) -> None:
        """Set `dataset`, and fill in what the config leaves to be measured; images may stay encoded."""
        if dataset is None:
            self.config, self.dataset = open_measured(self.config)
        else:
            self.config, self.dataset = with_statistics(self.config, dataset), dataset

    def read_set(self) -> None:
        """Read the images that are to be kept in memory."""
        self.dataset = read_data(self.config, self.dataset)

    def shapes(self, batch: int, *, valid: bool = False) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """All shapes that global batches of this size have, with `valid` those of evaluation."""
        return [batch_like(batch, self.dataset.image_shape, valid=valid)]

    def open_stream(self) -> Batches:
        """Start the training stream."""
        config = self.config
        return train_batches(self.dataset.train, batch=config.batch, seed=config.seed, mesh=self.mesh, mode=config.mode)

    def first_examples(self, count: int) -> Batch:
        """The next `count` examples of the training stream, for trackers to show."""
        return collate([self.stream.example(self.stream.position + row) for row in range(count)])

    # ---- the run ----

    @all_hosts()
    def open_data(self, dataset: Any) -> None:
        """Open the images and compute the number of steps from their number; `compile` reads them."""
        config, self.main, self.mesh = self.config, jax.process_index() == 0, make_mesh()
        began = time.perf_counter()
        self.open_set(dataset)
        self.reading = time.perf_counter() - began
        check_batch(config.batch, self.mesh.size, len(self.dataset.train))
        share, parts = config.batch // self.mesh.size, getattr(config, "accumulate", 1)
        if share % parts:
            raise UsageError(f"--accumulate {parts} does not divide the {share} images per device")
        self.epoch_steps = len(self.dataset.train) / config.batch
        self.steps = config.steps or max(int(config.epochs * self.epoch_steps), 1)
        traced_steps(config.profile, self.steps)
        self.dtype = compute_dtype(config.dtype)
        # A model that was passed in keeps the kernels that its author chose.
        kernels = "plain" if "model" in self.own else config.kernels
        self.kernels, self.remark = make_kernels(kernels, config.mode, self.dtype)
        # A run keeps the number that it began with, which other kernels would not choose.
        if (self.out / "config.json").exists():
            saved, _ = read_config(self.out, type(config))
            config = dataclasses.replace(config, steps_per_call=saved.steps_per_call)
        number = steps_per_call(config, self.dataset, self.kernels)
        self.config = dataclasses.replace(self.config, steps_per_call=number)
        self.per_call = 1 if config.mode == "pmap" else number

    def announce(self, what: str) -> None:
        """Print what is trained (`resnet20: 272,474 parameters`), on which devices and with which kernels."""
        library = "oneDNN" if self.kernels else "XLA"
        device = f"{self.mesh.size} {jax.devices()[0].device_kind}"
        say(f"{what} on {device} ({self.config.mode}, {jnp.dtype(self.dtype).name}, convolutions by {library})")
        if self.remark:
            say(f"note: oneDNN is not used: {self.remark}")

    def place(self, tree: Any) -> Any:
        """Replicate a tree of arrays on every device."""
        return place(tree, replicated(self.mesh))

    @all_hosts()
    def compile(
        self,
        step: Callable[..., Any],
        evaluations: Sequence[tuple[Callable[..., Any], Any]],
        state: TrainState,
        *,
        evaluated: Sequence[str] = ("validation", "test"),
    ) -> tuple[Callable[..., Any], list[Callable[..., Any]]]:
        """Compile to (train step, evaluations), while the images are read.

        Args:
          step: `(state, batch, *, axis_name) -> (state, metrics)`.
          evaluations: pairs of `(x, batch, *, axis_name) -> arrays` and the shapes of `x`.
          state: the state to start from.
          evaluated: the splits that are evaluated, whose sizes bound `eval_batch`.
        """
        if self.main:
            claim(self.out, self.config, self.dataset, self.replaced, longer=self.longer)
        # Compilation needs only the shapes of batches, which are known before the images are read.
        config, pmap = self.config, self.config.mode == "pmap"
        counts = {name: len(split) for name, split in self.dataset.splits.items()}
        largest = max(counts[name] for name in evaluated)
        self.eval_batch = eval_batch_size(config.eval_batch, counts["validation"], largest)
        compiled_for = partial(compile_step, mesh=self.mesh, mode=config.mode)
        options = {} if pmap else compiler_options(self.dtype, plain=not self.kernels)
        train_like: list[Any] = self.shapes(config.batch)
        eval_like = self.shapes(padded(self.eval_batch, self.mesh), valid=True)
        layout: dict[str, Any] = {}
        if self.per_call > 1:
            step, layout = many_steps(step), {"layout": CHUNK_LAYOUT}
            train_like = [chunk_like(self.per_call, counts["train"], like) for like in train_like]

        # Compile in a separate thread while images are decoded: both release Python's global lock.
        compiler = ThreadPoolExecutor(1)
        try:
            program = compiled_for(step, compiler_options={**options, **xla_options(config.xla)}, **layout)
            example = jax.eval_shape(lambda: state)
            tasks = [compile_in(compiler, program, example, train_like, pmap=pmap, xla=config.xla)]
            for evaluation, example in evaluations:
                program = compiled_for(evaluation, donate=False, compiler_options=options)
                tasks.append(compile_in(compiler, program, example, eval_like, pmap=pmap))
            began = time.perf_counter()
            self.read_set()
            self.reading += time.perf_counter() - began
            (train, self.compile_seconds), *others = (task() for task in tasks)
        finally:
            compiler.shutdown(wait=False, cancel_futures=True)

        # The images have been read by now, so the stream can start, and their numbers are final.
        self.stream = self.open_stream()
        listed = ", ".join(f"{len(split):,} {name}" for name, split in self.dataset.splits.items())
        classes = len(self.dataset.classes)
        say(f"{self.dataset.name}: {listed} images, {classes} classes, read in {self.reading:.1f} s")
        return train, [program for program, _ in others]

    def resume(self, state: Any) -> Any:
        """Restore the newest good checkpoint, or return `state` unchanged."""
        keep_best = getattr(self.config, "keep_best", 0)
        self.checkpoints = Checkpoints(
            self.out / "checkpoints", keep_last=self.config.keep_last, keep_best=keep_best, metric=self.config.metric
        )
        restored = self.checkpoints.resume(state)
        if restored is None:
            return state
        state, position = restored
        self.stream.restore(position)
        self.resumed = True
        say(f"resuming from step {int(state.step)}")
        return state

    def fit(
        self,
        step: Callable[..., Any],
        state: Any,
        *,
        validate: Validate,
        schedule: Schedule,
        hooks: Sequence[Hook] = (),
        see: See | None = None,
        shown: Sequence[str] = ("loss", "accuracy"),
        validate_first: bool = False,
        validated: Validated = lambda row: None,
    ) -> Any:
        """Train to the end, with checkpoints; `validate` is called after every `eval_every` epochs.

        Args:
          schedule: learning rate by step, for metrics.jsonl.
          hooks: additional hooks, called before `validate`; see `train.loop.fit`.
          see: the images that the network receives, for trackers.
          shown: names of the metrics to print.
          validate_first: also validate before the first step of a run that is not resumed.
          validated: called with the row of each validation; what it raises ends the run.

        Raises:
          RunError: the run stopped; the message says why, and which checkpoint was kept.
        """
        # Record the run only now: until here it may be refused, and the corrected command can use the folder.
        config, number = self.config, int(state.step)
        if self.longer and self.resumed and (before := length_before(self.out, config)):
            say(
                f"this run had {before}: its schedule now spans {self.steps:,} steps, so the learning rate goes "
                f"on at {float(schedule(number)):.3g}"
            )
        if self.main:
            write_config(self.out, self.preset, config, self.dataset, self.replaced)
            write_skipped(self.out, self.dataset)
        self.trackers = Trackers(config.log if self.main else (), say)
        progress = Progress(
            self.out / "metrics.jsonl" if self.main else None,
            start=int(state.step),
            steps=self.steps,
            epoch_steps=self.epoch_steps,
            batch=config.batch,
            every=config.log_every,
            extra=lambda number: {"learning_rate": float(schedule(number - 1))},
            send=self.trackers.row,
            shown=shown,
            silent=not self.main,
        )
        self.start_trackers(state, see)
        trace = self.make_trace(int(state.step))

        def save(state: TrainState, metrics: dict[str, float] | None = None) -> None:
            self.checkpoints.save(state, self.stream.state(), metrics)

        def watch(state: Any) -> None:
            began = time.perf_counter()
            number = int(state.step)
            row, line = validate(state)
            self.last_row = row
            row = {"step": number, "epoch": round(number / self.epoch_steps, 4), **row}
            progress.row(row)
            progress.say(f"step {number}: {line}")
            self.trackers.histograms(number, leaves(state.params))
            validated(row)
            save(state, {config.metric: row[config.metric]} if config.metric in row else None)
            progress.paused += time.perf_counter() - began

        # Each validation saves a checkpoint with its metric; `save_steps` adds some in between, without one.
        every = [(max(round(config.eval_every * self.epoch_steps), 1), watch)]
        if config.save_steps:
            every.append((config.save_steps, save))
        # If the run stops, name the newest checkpoint, so that the user knows where it would resume.
        ended = False
        try:
            if validate_first and not self.resumed:
                watch(state)
            began = time.perf_counter()
            state = fit(
                step,
                state,
                self.stream,
                steps=self.steps,
                per_call=self.per_call,
                hooks=[*hooks, *every],
                log=progress.log,
                trace=trace,
            )
            self.checkpoints.wait()
            ended = True
        except BaseException as error:
            # This process may continue the run, after Ctrl-C too: leave no thread behind that writes to its folder.
            if jax.process_count() == 1:
                with suppress(RunError):
                    self.checkpoints.wait()
            kept = self.checkpoints.steps
            where = f"; {self.out} keeps checkpoint {kept[-1]}" if kept else ""
            if isinstance(error, RunError):
                raise type(error)(f"{error}{where}") from None
            if jax.process_count() == 1 or not isinstance(error, jax.errors.JaxRuntimeError):
                raise
            raise lost_host(error, where) from None
        finally:
            if not ended:
                self.trackers.finish(None)
            if trace is not None:
                trace.close()
            progress.close()
        self.seconds = time.perf_counter() - began
        self.images_per_second = progress.images_per_second
        return state

    def selected(self, state: TrainState) -> TrainState:
        """The state to evaluate on the test split, as `select` says: the last one, or the best on validation."""
        if getattr(self.config, "select", "last") != "best" or self.checkpoints.best is None:
            return state
        best, _ = self.checkpoints.restore(state, step=self.checkpoints.best) or (state, {})
        return best

    def last_validation(self, state: Any, validate: Validate) -> dict[str, float]:
        """The row of `validate(state)`: that of the loop's end if it ended with this state, otherwise measured now."""
        ended = self.last_row and int(state.step) == self.steps
        return self.last_row if ended else validate(state)[0]

    def start_trackers(self, state: Any, see: See | None) -> None:
        """Start the trackers of `--log`, and show them the first images as the network receives them."""
        config, number = self.config, int(state.step)
        self.trackers.start(self.out, number, flat(config))
        if config.log and see is not None:
            # All hosts compute them, from the same arrays; only the first one shows them.
            examples = self.first_examples(min(SEEN, config.batch))
            mean, std = (np.asarray(x, np.float32) for x in (config.augment.mean, config.augment.std))
            for name, images in jax.jit(see)(state, examples).items():
                self.trackers.images(number + 1, name, np.asarray(images, np.float32) * std + mean)

    def make_trace(self, number: int) -> Trace | None:
        """Make the trace of `--profile`, unless the run has passed its first step."""
        steps = traced_steps(self.config.profile)
        if steps is None:
            return None
        if steps[0] <= number:
            say(f"note: nothing is traced, because --profile {self.config.profile} begins before step {number + 1}")
            return None
        return Trace(*steps, self.out / "profile" if self.main else None, say)

    def finish(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Return the result, the common keys and the pipeline's `figures`, and write it to `out`/result.json."""
        self.checkpoints.close()
        config = self.config
        result = {
            "preset": self.preset,
            "dataset": self.dataset.name,
            "model": self.model_name,
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
        self.trackers.finish(result)
        return result
