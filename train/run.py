"""A supervised run from a config to a result: read it from top to bottom."""

import dataclasses
import json
import os
import platform
import sys
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from resnet_jax import augment as aug
from resnet_jax.losses import LOSSES
from resnet_jax.mix import mix
from resnet_jax.parallel import axis_of, compile_step, make_mesh, place, replicated
from resnet_jax.resnet import MODELS
from resnet_jax.tree import count, is_head
from train.batches import eval_batches, train_batches
from train.checkpoint import Checkpoints
from train.config import AugmentConfig, TrainConfig, check, flat, from_dict
from train.data import Arrays, Dataset, load
from train.errors import RunError, UsageError
from train.loop import Progress, evaluate, fit
from train.optim import Schedule, make_optimizer, make_schedule
from train.state import TrainState, digest, init_state, init_variables
from train.steps import eval_step, train_step
from train.weights import load_weights

# Fields that may differ between a run and its continuation: they change where and how fast, never what.
FREE_FIELDS = {"out", "mode", "data.dir", "distributed", "log_every", "eval_batch"}
FREE_FIELDS |= {"keep_last", "keep_best", "save_steps"}


def run(config: TrainConfig, preset: str = "custom") -> dict[str, Any]:
    """Train, select on validation, look at the test split once; the result is also in `out`/result.json.

    Run again with the same `out`, it goes on from the newest good checkpoint; a finished run only returns its result.

    Raises:
      UsageError: what the user can mend. RunError: what stopped a run.
    """
    # ---- where ----
    check(config)
    join_hosts(config.distributed)
    out = Path(config.out or f"runs/{preset}-seed{config.seed}").expanduser()
    if finished := _finished(out, preset, config):
        print(f"{out} holds this run, finished; its result:", file=sys.stderr)
        return finished
    main_process = jax.process_index() == 0
    mesh = make_mesh()

    # ---- data ----
    began = time.perf_counter()
    dataset = load_data(config)
    config = with_statistics(config, dataset)
    stream = train_batches(dataset.train, batch=config.batch, seed=config.seed, mesh=mesh, mode=config.mode)
    _say(f"{dataset.name}: {', '.join(f'{len(s):,} {n}' for n, s in dataset.splits.items())} images, "
         f"{len(dataset.classes)} classes, read in {time.perf_counter() - began:.1f} s")  # fmt: skip

    # ---- model, optimizer, state ----
    epoch_steps = len(dataset.train) / config.batch
    steps = config.steps or max(int(config.epochs * epoch_steps), 1)
    model = make_model(config, len(dataset.classes), axis_of(config.mode))
    tx, schedule = make_tx(config, steps, epoch_steps)
    state = place(fresh_state(config, model, tx, dataset.image_shape), replicated(mesh))
    _say(f"{config.model}: {count(state.params):,} parameters on {mesh.size} {jax.devices()[0].device_kind} "
         f"({config.mode}, {jnp.dtype(model.dtype).name})")  # fmt: skip

    # ---- run folder and checkpoints ----
    if main_process:
        _write_config(out, preset, config, dataset)
    checkpoints = Checkpoints(out / "checkpoints", keep_last=config.keep_last, keep_best=config.keep_best)
    restored = checkpoints.restore(state)
    if restored is not None:
        state, position = restored
        stream.restore(position)
        _say(f"going on from step {int(state.step)}")

    # ---- steps ----
    compiled_for = partial(compile_step, mesh=mesh, mode=config.mode)
    step = compiled_for(
        partial(train_step, **step_options(config, model, tx)),
        compiler_options=dict(_xla_option(option) for option in config.xla) or None,
    )
    judge = compiled_for(
        partial(eval_step, model=model, preprocess=eval_augment(config.augment), loss=LOSSES[config.loss]),
        donate=False,
    )

    def measure(variables: Any, split: str) -> dict[str, Any]:
        batches = eval_batches(dataset.splits[split], batch=config.eval_batch, mesh=mesh, mode=config.mode)
        return evaluate(judge, variables, batches)

    # ---- loop ----
    start = int(state.step)
    progress = Progress(
        out / "metrics.jsonl" if main_process else None,
        start=start,
        steps=steps,
        epoch_steps=epoch_steps,
        batch=config.batch,
        every=config.log_every,
        silent=not main_process,
    )

    def log(number: int, metrics: dict[str, float]) -> None:
        progress.log(number, metrics | {"learning_rate": float(schedule(number - 1))})

    def validate(state: TrainState) -> None:
        began = time.perf_counter()
        number = int(state.step)
        found = measure(state.variables, "validation")
        row = {f"validation_{name}": found[name] for name in ("accuracy", "loss", "calibration_error")}
        progress.row({"step": number, "epoch": round(number / epoch_steps, 4), **row})
        progress.say(f"step {number}: validation accuracy {found['accuracy']:.4f}, loss {found['loss']:.4f}")
        checkpoints.save(state, stream.state(), {"validation_accuracy": found["accuracy"]})
        progress.pause(time.perf_counter() - began)

    hooks = [(max(round(config.eval_every * epoch_steps), 1), validate)]
    if config.save_steps:
        hooks.append((config.save_steps, lambda state: checkpoints.save(state, stream.state())))
    began = time.perf_counter()
    compiled: list[float] = []

    def timed(state: TrainState, batch: Any) -> Any:
        if compiled:
            return step(state, batch)
        before = time.perf_counter()
        try:
            result = step(state, batch)  # the first call traces and compiles before it returns
        except jax.errors.JaxRuntimeError as error:
            if config.xla and "option" in str(error):
                raise UsageError(f"--xla {' '.join(config.xla)}: {error}") from None
            raise
        compiled.append(time.perf_counter() - before)
        return result

    try:
        state = fit(timed, state, stream, steps=steps, hooks=hooks, log=log)
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
        "compile_seconds": round(sum(compiled), 2),
        "images_per_second": round(progress.images_per_second, 1),
        "parameters": count(state.params),
        "params_digest": digest(chosen),
        "out": str(out),
        **environment(),
    }
    if main_process:
        _write(out / "confusion.json", {"classes": dataset.classes, "confusion": test["confusion"].tolist()})
        _write(out / "result.json", result)
    return result


def join_hosts(distributed: str | None) -> None:
    """Make this process one of several: `auto`, or COORDINATOR:PORT,COUNT,INDEX; None stays alone.

    Raises:
      RunError: the others cannot be reached.
    """
    if distributed is None or jax.distributed.is_initialized():
        return
    address, count, index = (None, None, None) if distributed == "auto" else distributed.rsplit(",", 2)
    try:
        jax.distributed.initialize(address, count and int(count), index and int(index))
    except (RuntimeError, ValueError) as error:
        raise RunError(f"cannot join the other hosts (--distributed {distributed}): {error}") from None


# ---- from a config to the pieces: also for scripts that want a preset's pieces --------------------------------------


def load_data(config: TrainConfig) -> Dataset:
    """The config's `Dataset`."""
    fields = dataclasses.asdict(config.data)
    return load(fields.pop("name"), **fields)


def with_statistics(config: TrainConfig, dataset: Dataset) -> TrainConfig:
    """The config with channel means and deviations filled in, measured on the training split where it does not say."""
    channels = dataset.image_shape[-1]
    given = config.augment.mean, config.augment.std
    if given == (None, None):
        if not isinstance(dataset.train, Arrays):
            given = aug.IMAGENET_MEAN, aug.IMAGENET_STD
        else:
            pixels = dataset.train.images.reshape(-1, channels)
            # One pixel in so many is plenty, and the same ones every time.
            sample = pixels[:: max(len(pixels) // 4_000_000, 1)].astype(np.float64) / 255
            given = tuple(sample.mean(0).round(4).tolist()), tuple(sample.std(0).clip(1e-3).round(4).tolist())
    if None in given or any(len(values or ()) != channels for values in given):
        raise UsageError(f"--augment.mean and --augment.std need {channels} values each for images of {dataset.name}")
    return dataclasses.replace(config, augment=dataclasses.replace(config.augment, mean=given[0], std=given[1]))


def train_augment(config: AugmentConfig) -> aug.Augment:
    """The training augmentation, from uint8 scaled to [0, 1] to normalised images."""
    parts: list[aug.Augment] = []
    if config.resized_crop:
        parts.append(aug.random_resized_crop(config.resized_crop, scale=(config.min_scale, 1.0)))
    if config.crop_padding:
        parts.append(aug.random_crop(config.crop_padding, mode=config.crop_mode))
    if config.flip:
        parts.append(aug.random_flip())
    if config.rand_augment:
        parts.append(aug.rand_augment(magnitude=config.rand_augment))
    if config.trivial_augment:
        parts.append(aug.trivial_augment())
    if config.color_jitter:
        s = config.color_jitter
        parts.append(aug.color_jitter(s, s, s, s / 4))
    parts.append(_normalize(config))
    if config.cutout:
        parts.append(aug.cutout(config.cutout))
    if config.erasing:
        parts.append(aug.random_erasing(p=config.erasing))
    return aug.compose(*parts)


def eval_augment(config: AugmentConfig) -> aug.Augment:
    """What evaluation and prediction do to an image: the centre where training crops, then normalise."""
    crop = [aug.center_crop(config.resized_crop)] if config.resized_crop else []
    return aug.compose(*crop, _normalize(config))


def _normalize(config: AugmentConfig) -> aug.Augment:
    assert config.mean is not None and config.std is not None, "with_statistics fills them in"
    return aug.normalize(config.mean, config.std)


def make_model(config: TrainConfig, num_classes: int | None, axis_name: str | None = None) -> nn.Module:
    """The config's model, for the axis that its steps will be compiled with."""
    options: dict[str, Any] = {} if config.width is None else {"width": config.width}
    return MODELS[config.model](
        num_classes=num_classes,
        drop_path=config.drop_path,
        zero_init=config.zero_init,
        dtype=compute_dtype(config.dtype),
        axis_name=axis_name,
        sync_bn=config.sync_bn,
        **options,
    )


def compute_dtype(name: str) -> Any:
    """`auto` is bfloat16 where it is fast (GPU, TPU) and float32 on CPU; parameters and losses are float32 anyway."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name).type


def make_tx(config: TrainConfig, steps: int, epoch_steps: float) -> tuple[optax.GradientTransformation, Schedule]:
    """The config's optimizer and its schedule over `steps`."""
    o = config.optim
    warmup = min(round(o.warmup_epochs * epoch_steps), steps - 1)
    options = {"milestones": o.milestones, "factor": o.factor} if o.schedule == "step" else {}
    schedule = make_schedule(o.schedule, peak=o.lr, steps=steps, warmup=warmup, **options)
    tx = make_optimizer(
        o.name,
        schedule,
        momentum=o.momentum,
        nesterov=o.nesterov,
        weight_decay=o.weight_decay,
        clip_norm=o.clip_norm,
        trainable=is_head if config.freeze else None,
    )
    return tx, schedule


def fresh_state(
    config: TrainConfig, model: nn.Module, tx: optax.GradientTransformation, image_shape: tuple[int, int, int]
) -> TrainState:
    """The state at step 0: random, or from the weights that `config.init` names."""
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    variables = init_variables(model.clone(axis_name=None), init_key, image_shape)
    if config.init is not None:
        variables = load_weights(Path(config.init), variables)
    return init_state(variables, tx, run_key, ema=config.ema is not None)


def step_options(config: TrainConfig, model: nn.Module, tx: optax.GradientTransformation) -> dict[str, Any]:
    """The static arguments of `train_step`."""
    mixing = config.augment.mixup or config.augment.cutmix
    mixer = partial(mix, mixup_alpha=config.augment.mixup, cutmix_alpha=config.augment.cutmix)
    return {
        "model": model,
        "tx": tx,
        "augment": train_augment(config.augment),
        "mix": mixer if mixing else None,
        "loss": LOSSES[config.loss],
        "label_smoothing": config.label_smoothing,
        "ema_decay": config.ema,
        "accumulate": config.accumulate,
        "frozen_stats": config.freeze,
    }


def _xla_option(option: str) -> tuple[str, str | bool]:
    name, value = option.split("=", 1)
    return name, {"true": True, "false": False}.get(value.lower(), value)


def environment() -> dict[str, Any]:
    """What a figure depends on beside its recipe: versions and devices."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


# ---- the run folder -------------------------------------------------------------------------------------------------


def read_config(out: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """(config, the whole of config.json: preset, classes, image_shape, versions) of a run's folder."""
    try:
        saved = json.loads((out / "config.json").read_text())
        return from_dict(TrainConfig, saved["config"]), saved
    except FileNotFoundError:
        raise UsageError(f"{out} is no run's folder: it has no config.json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{out / 'config.json'} cannot be read: {error}") from None


def _write_config(out: Path, preset: str, config: TrainConfig, dataset: Dataset) -> None:
    """Note what this run is, or make sure that it is the one that the folder holds."""
    if (out / "config.json").exists():
        _check_continues(out, config)
        return
    if (out / "checkpoints").exists():
        raise UsageError(f"{out} holds checkpoints but no config.json; choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the run's folder {out}: {error}") from None
    described = {
        "preset": preset,
        "config": dataclasses.asdict(config),
        "classes": dataset.classes,
        "image_shape": dataset.image_shape,
        **environment(),
    }
    _write(out / "config.json", described)


def _check_continues(out: Path, config: TrainConfig) -> None:
    saved, wanted = flat(read_config(out)[0]), flat(config)
    # Measured statistics are not the user's to repeat.
    measured = {n for n in ("augment.mean", "augment.std") if wanted[n] is None}
    differing = [n for n in wanted if n not in FREE_FIELDS | measured and saved.get(n) != wanted[n]]
    if differing:
        changes = ", ".join(f"{n} {saved.get(n)} -> {wanted[n]}" for n in differing)
        raise UsageError(f"{out} holds a run with other settings ({changes}); choose another --out")


def _finished(out: Path, preset: str, config: TrainConfig) -> dict[str, Any] | None:
    if not (out / "result.json").exists():
        return None
    _check_continues(out, config)
    return json.loads((out / "result.json").read_text())


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON in one piece: readers see the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error}") from None


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, file=sys.stderr)
