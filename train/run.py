"""A supervised run from a config to a result: read it from top to bottom."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from resnet_jax.losses import LOSSES
from resnet_jax.mask_schedules import MaskSchedule
from resnet_jax.parallel import axis_of, compile_step, make_mesh, place, replicated
from resnet_jax.tree import PyTree, count
from train.checkpoint import Checkpoints
from train.config import TrainConfig, check, check_images
from train.data.batches import Batches, batch_like, check_batch, eval_batches, padded, train_batches
from train.data.sets import Dataset
from train.errors import RunError, UsageError
from train.from_config import (
    compute_dtype,
    eval_augment,
    make_kernels,
    make_model,
    make_state,
    make_tx,
    open_measured,
    read_data,
    step_options,
    trained_part,
)
from train.loop import Hook, Progress, evaluate, fit
from train.run_folder import discard_start, environment, settle, write_config, write_json
from train.runtime import compile_in, compiler_options, join_hosts, keep_compiled, say, xla_options
from train.state import TrainState, digest
from train.steps import eval_step, train_step
from train.weights import load_masks, load_weights, widths_of

Config = TypeVar("Config", bound=TrainConfig)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a run has made ready, for the hooks of a `Plan`."""

    config: TrainConfig
    out: Path
    dataset: Dataset
    mesh: Mesh
    model: nn.Module
    steps: int
    stream: Batches
    measure: Callable[[Any, str], dict[str, Any]]  # (variables, split) -> figures; the test split is for `finish`


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What pruning (`train.prune`) adds to a supervised run.

    Attributes:
      source: weights to start from, in place of the config's `init`; None is a random start.
      masks: (params, masks of the source or None, model) -> masks at the start, as arrays where they will change.
      remask: (steps of the run, model) -> the schedule in the step.
      begin: (state, setup) -> the state to train, unless a checkpoint is there to go on from.
      during: setup -> hooks for `train.loop.fit`.
      finish: (state, setup, figures of the test split) -> what the result has in addition.
    """

    source: Path | None
    masks: Callable[[PyTree, PyTree | None, nn.Module], PyTree | None]
    remask: Callable[[int, nn.Module], MaskSchedule | None] = lambda steps, model: None
    begin: Callable[[TrainState, Setup], TrainState] = lambda state, setup: state
    during: Callable[[Setup], Sequence[Hook]] = lambda setup: ()
    finish: Callable[[TrainState, Setup, dict[str, Any]], dict[str, Any]] = lambda state, setup, test: {}


def fine_tuning(config: TrainConfig) -> Plan:
    """Start from `--init`, if there is one; what is pruned there stays so, but for `--dense`."""
    source = None if config.init is None else Path(config.init)
    return Plan(source=source, masks=lambda params, masks, model: masks)


def run(config: TrainConfig, preset: str = "custom", plan: Plan | None = None) -> dict[str, Any]:
    """Train, select on validation, look at the test split once; the result is also in `out`/result.json.

    Run again with the same `out`, it goes on from the newest good checkpoint; a finished run only returns its result.

    Raises:
      UsageError: what the user can mend. RunError: what stopped a run.
    """
    # ---- where ----
    check(config)
    config = with_widths(config)
    plan = plan or fine_tuning(config)
    out, finished = settle(config, preset)
    if finished:
        return finished
    join_hosts(config.distributed)
    main_process = jax.process_index() == 0
    keep_compiled(config.cache)
    mesh = make_mesh()

    # ---- data: opened here, read further down, while the steps compile ----
    began = time.perf_counter()
    config, dataset = open_measured(config)
    check_batch(config.batch, mesh.size, len(dataset.train))
    check_images(config, dataset.image_shape, mesh.size)
    if len(dataset.classes) < 2:
        raise UsageError(
            f"{dataset.name} has one class alone: training needs two or more, a folder one subfolder of images for each"
        )
    reading = time.perf_counter() - began

    # ---- model, optimizer, state ----
    epoch_steps = len(dataset.train) / config.batch
    steps = config.steps or max(int(config.epochs * epoch_steps), 1)
    kernels, remark = make_kernels(config.kernels, config.mode, compute_dtype(config.dtype))
    model = make_model(config, len(dataset.classes), axis_of(config.mode), kernels, drop_path=config.drop_path)
    tx, schedule = make_tx(config.optim, steps, epoch_steps, trainable=trained_part(config))

    def start(variables: dict[str, PyTree]) -> dict[str, PyTree]:
        return variables if plan.source is None else load_weights(plan.source, variables)

    def masks(params: PyTree) -> PyTree | None:
        given = None if plan.source is None or config.dense else load_masks(plan.source, params)
        return plan.masks(params, given, model)

    state = place(make_state(config, model, tx, dataset.image_shape, start, masks), replicated(mesh))
    library = "oneDNN" if kernels else "XLA"
    say(f"{config.model}: {count(state.params):,} parameters on {mesh.size} {jax.devices()[0].device_kind} "
         f"({config.mode}, {jnp.dtype(model.dtype).name}, convolutions by {library})")  # fmt: skip
    if remark:
        say(f"slower than it could be: {remark}")

    # ---- steps, compiled in a thread of their own ----
    needed = {} if config.mode == "pmap" else compiler_options(model.dtype, plain=not kernels)
    compiled_for = partial(compile_step, mesh=mesh, mode=config.mode)
    step = compiled_for(
        partial(train_step, **step_options(config, model, tx), remask=plan.remask(steps, model)),
        compiler_options={**needed, **xla_options(config.xla)} or None,
    )
    judge = compiled_for(
        partial(eval_step, model=model, preprocess=eval_augment(config.augment), loss=LOSSES[config.loss]),
        donate=False,
        compiler_options=needed or None,
    )
    shapes = jax.eval_shape(lambda: state)
    train_like = batch_like(config.batch, dataset.image_shape)
    eval_like = batch_like(padded(config.eval_batch, mesh), dataset.image_shape, valid=True)
    compiler = ThreadPoolExecutor(1)
    try:
        compiling = [
            compile_in(compiler, step, shapes, train_like, pmap=config.mode == "pmap", xla=config.xla),
            compile_in(compiler, judge, shapes.variables, eval_like, pmap=config.mode == "pmap", xla=config.xla),
        ]
        began = time.perf_counter()
        dataset = read_data(config, dataset)
        reading += time.perf_counter() - began
        (step, compile_seconds), (judge, _) = (task() for task in compiling)
    finally:
        compiler.shutdown(wait=False, cancel_futures=True)
    stream = train_batches(dataset.train, batch=config.batch, seed=config.seed, mesh=mesh, mode=config.mode)
    say(f"{dataset.name}: {', '.join(f'{len(s):,} {n}' for n, s in dataset.splits.items())} images, "
         f"{len(dataset.classes)} classes, read in {reading:.1f} s")  # fmt: skip

    # ---- run folder and checkpoints ----
    if main_process:
        write_config(out, preset, config, dataset)
    checkpoints = Checkpoints(out / "checkpoints", keep_last=config.keep_last, keep_best=config.keep_best)

    def measure(variables: Any, split: str) -> dict[str, Any]:
        batches = eval_batches(dataset.splits[split], batch=config.eval_batch, mesh=mesh, mode=config.mode)
        return evaluate(judge, variables, batches)

    setup = Setup(
        config=config,
        out=out,
        dataset=dataset,
        mesh=mesh,
        model=model,
        steps=steps,
        stream=stream,
        measure=measure,
    )
    restored = checkpoints.resume(state)
    if restored is None:
        try:
            state = plan.begin(state, setup)
        except UsageError:
            checkpoints.close()
            if main_process:  # the mended command finds the folder free
                discard_start(out)
            raise
    else:
        state, position = restored
        stream.restore(position)
        say(f"going on from step {int(state.step)}")

    # ---- loop ----
    progress = Progress(
        out / "metrics.jsonl" if main_process else None,
        start=int(state.step),
        steps=steps,
        epoch_steps=epoch_steps,
        batch=config.batch,
        every=config.log_every,
        extra=lambda number: {"learning_rate": float(schedule(number - 1))},
        silent=not main_process,
    )

    def validate(state: TrainState) -> None:
        began = time.perf_counter()
        number = int(state.step)
        found = measure(state.variables, "validation")
        row = {f"validation_{name}": found[name] for name in ("accuracy", "loss", "calibration_error")}
        progress.row({"step": number, "epoch": round(number / epoch_steps, 4), **row})
        progress.say(f"step {number}: validation accuracy {found['accuracy']:.4f}, loss {found['loss']:.4f}")
        checkpoints.save(state, stream.state(), {"validation_accuracy": found["accuracy"]})
        progress.pause(time.perf_counter() - began)

    hooks = [*plan.during(setup), (max(round(config.eval_every * epoch_steps), 1), validate)]
    if config.save_steps:
        hooks.append((config.save_steps, lambda state: checkpoints.save(state, stream.state())))
    began = time.perf_counter()
    try:
        state = fit(step, state, stream, steps=steps, hooks=hooks, log=progress.log)
        checkpoints.wait()
    except RunError as error:
        kept = checkpoints.steps
        where = f"; {out} keeps checkpoint {kept[-1]}" if kept else ""
        raise RunError(f"{error}{where}") from None
    finally:
        progress.close()
    seconds = time.perf_counter() - began

    # ---- the end: one look at the test split ----
    chosen = state
    if config.select == "best" and checkpoints.best is not None:
        chosen, _ = checkpoints.restore(state, step=checkpoints.best) or (state, {})
    validation, test = measure(chosen.variables, "validation"), measure(chosen.variables, "test")
    checkpoints.close()
    result = {
        "preset": preset,
        "dataset": dataset.name,
        "model": config.model,
        "seed": config.seed,
        "steps": steps,
        "epochs": round(steps / epoch_steps, 3),
        "selected_step": int(chosen.step),
        "test_accuracy": test["accuracy"],
        "test_top5_accuracy": test["top5_accuracy"],
        "test_loss": test["loss"],
        "test_calibration_error": test["calibration_error"],
        "test_images": test["count"],
        "test_per_class_accuracy": [round(float(a), 4) for a in test["per_class_accuracy"]],
        "validation_accuracy": validation["accuracy"],
        "seconds": round(seconds, 2),
        "compile_seconds": round(compile_seconds, 2),
        "images_per_second": round(progress.images_per_second, 1),
        "parameters": count(state.params),
        "params_digest": digest(chosen),
        **plan.finish(chosen, setup, test),
        "out": str(out),
        **environment(),
    }
    if main_process:
        write_json(out / "confusion.json", {"classes": dataset.classes, "confusion": test["confusion"].tolist()})
        write_json(out / "result.json", result)
    return result


def with_widths(config: Config) -> Config:
    """The config with the widths of the run that it starts from, a pruned network's, where it names none itself."""
    if config.init is None or config.widths:
        return config
    model, widths = widths_of(Path(config.init))
    return dataclasses.replace(config, widths=widths) if model == config.model else config
