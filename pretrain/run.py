"""A run of pretraining from a config to a result: read it from top to bottom."""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from pretrain.build import init_network, make_network, make_pretrain_state, make_views, step_options
from pretrain.config import PretrainConfig, check, check_images, make_objective
from pretrain.features import Extractor, Features, FrozenAccuracy, frozen_accuracy
from pretrain.health import collapse_step, health, verdict
from pretrain.knn import knn_accuracy
from pretrain.state import PretrainState, encoder_of, pretrain_digest, probe_logits
from pretrain.steps import contrastive_step, feature_step, view_step
from resnet_jax.parallel import axis_of, compile_step, make_mesh, place, replicated
from resnet_jax.torch_weights import to_torch
from resnet_jax.tree import PyTree, count
from train.checkpoint import Checkpoints
from train.data.batches import batch_like, check_batch, padded, train_batches
from train.errors import RunError
from train.from_config import compute_dtype, eval_augment, make_kernels, make_tx, open_measured, read_data
from train.loop import Hook, Progress, fit, read_rows
from train.run_folder import environment, settle, write_config, write_json
from train.runtime import compile_in, compiler_options, join_hosts, keep_compiled, say, xla_options
from train.weights import ENCODER

HEALTH_IMAGES = 2048  # validation images that the health of representations is measured on
SHOWN = ("loss", "probe_accuracy", "projection_std")


def run(config: PretrainConfig, preset: str = "custom") -> dict[str, Any]:
    """Pretrain, watch on validation, say at the end what the encoder is worth; the result is in `out`/result.json.

    The encoder is left in `out`/encoder.safetensors by torchvision's names: `python -m train --init OUT` starts from
    it. Run again with the same `out`, it goes on from the newest good checkpoint.

    Raises:
      UsageError: what the user can mend. RunError: what stopped a run.
    """
    # ---- where ----
    check(config)
    out, finished = settle(config, preset)
    if finished:
        return finished
    join_hosts(config.distributed)
    main_process = jax.process_index() == 0
    keep_compiled(config.cache)
    mesh = make_mesh()

    # ---- data ----
    began = time.perf_counter()
    config, dataset = open_measured(config)
    check_batch(config.batch, mesh.size, len(dataset.train))
    check_images(config, dataset.image_shape)
    reading = time.perf_counter() - began
    classes = len(dataset.classes)

    # ---- network, optimizer, state ----
    epoch_steps = len(dataset.train) / config.batch
    steps = config.steps or max(int(config.epochs * epoch_steps), 1)
    kernels, remark = make_kernels(config.kernels, config.mode, compute_dtype(config.dtype))
    objective = make_objective(config.objective)
    network = make_network(config, objective, axis_of(config.mode), kernels)
    encoder: Any = network.encoder
    tx, schedule = make_tx(config.optim, steps, epoch_steps)
    state = place(make_pretrain_state(config, objective, network, tx, dataset.image_shape, classes), replicated(mesh))
    library = "oneDNN" if kernels else "XLA"
    parameters, heads = count(state.params["encoder"]), count(state.params) - count(state.params["encoder"])
    device = f"{mesh.size} {jax.devices()[0].device_kind}"
    say(f"{config.objective.name} with {config.model}: {parameters:,} parameters and {heads:,} in its heads, on "
        f"{device} ({config.mode}, {jnp.dtype(encoder.dtype).name}, convolutions by {library})")  # fmt: skip
    if remark:
        say(f"slower than it could be: {remark}")

    # ---- steps, compiled in a thread of their own ----
    needed = {} if config.mode == "pmap" else compiler_options(encoder.dtype, plain=not kernels)
    compiled_for = partial(compile_step, mesh=mesh, mode=config.mode)
    options = step_options(config, objective, network, tx, steps, epoch_steps)
    step = compiled_for(
        partial(contrastive_step, **options), compiler_options={**needed, **xla_options(config.xla)} or None
    )
    extractions = (
        partial(feature_step, encoder=encoder, preprocess=eval_augment(config.augment)),
        partial(view_step, encoder=encoder, views=make_views(config.augment)[:2]),
    )
    shapes = jax.eval_shape(lambda: state)
    train_like = batch_like(config.batch, dataset.image_shape)
    eval_like = batch_like(padded(config.eval_batch, mesh), dataset.image_shape, valid=True)
    compiler = ThreadPoolExecutor(1)
    try:
        compiling = [compile_in(compiler, step, shapes, train_like, pmap=config.mode == "pmap", xla=config.xla)]
        for extraction in extractions:
            compiled = compiled_for(extraction, donate=False, compiler_options=needed or None)
            compiling.append(
                compile_in(compiler, compiled, shapes.encoder(), eval_like, pmap=config.mode == "pmap", xla=config.xla)
            )
        began = time.perf_counter()
        dataset = read_data(config, dataset)
        reading += time.perf_counter() - began
        (step, compile_seconds), *others = (task() for task in compiling)
    finally:
        compiler.shutdown(wait=False, cancel_futures=True)
    features, views = (Extractor(program, config.eval_batch, mesh, config.mode) for program, _ in others)
    stream = train_batches(dataset.train, batch=config.batch, seed=config.seed, mesh=mesh, mode=config.mode)
    say(f"{dataset.name}: {', '.join(f'{len(s):,} {n}' for n, s in dataset.splits.items())} images, "
        f"{classes} classes, read in {reading:.1f} s")  # fmt: skip

    # ---- run folder and checkpoints ----
    if main_process:
        write_config(out, preset, config, dataset)
    checkpoints = Checkpoints(out / "checkpoints", keep_last=config.keep_last, keep_best=0)
    restored = checkpoints.resume(state)
    if restored is not None:
        state, position = restored
        stream.restore(position)
        say(f"going on from step {int(state.step)}")

    # ---- what is watched ----
    labelled = classes > 1
    neighbours = partial(knn_accuracy, classes=classes, k=config.neighbours, temperature=config.neighbour_temperature)
    searched = dataset.train
    if config.neighbour_images is not None and config.neighbour_images < len(searched):
        order = np.random.default_rng(0).permutation(len(searched))
        searched = searched.subset(np.sort(order[: config.neighbour_images]))
    # Sets may be ordered by class.
    order = np.random.default_rng(0).permutation(len(dataset.validation))
    looked_at = dataset.validation.subset(np.sort(order[:HEALTH_IMAGES]))

    def look(state: PretrainState) -> dict[str, float]:
        """How good and how healthy the encoder is, on validation images; without labels, how healthy."""
        variables = state.encoder(target=objective.evaluate_target)
        pair = views.arrays(variables, looked_at)
        found = health(pair["a"], pair["b"])
        if labelled:
            bank, held = features(variables, searched), features(variables, dataset.validation)
            found["validation_knn_accuracy"] = neighbours(held.features, held.labels, bank.features, bank.labels)
            found["validation_online_linear_accuracy"] = online_accuracy(state, held)
        return found

    # ---- loop ----
    history = out / "metrics.jsonl"
    progress = Progress(
        history if main_process else None,
        start=int(state.step),
        steps=steps,
        epoch_steps=epoch_steps,
        batch=config.batch,
        every=config.log_every,
        extra=lambda number: {"learning_rate": float(schedule(number - 1))},
        shown=SHOWN if labelled else ("loss", "projection_std"),
        silent=not main_process,
    )

    looks: list[dict[str, float]] = []

    def watch(state: Any) -> None:
        began = time.perf_counter()
        number = int(state.step)
        try:
            found = look(state)
        except ValueError as error:
            raise RunError(f"at step {number}: {error}") from None
        looks[:] = [found]
        progress.row({"step": number, "epoch": round(number / epoch_steps, 4), **found})
        worth_line = (
            f"validation kNN {found['validation_knn_accuracy']:.4f}, online linear "
            f"{found['validation_online_linear_accuracy']:.4f}, "
            if labelled
            else ""
        )
        progress.say(f"step {number}: {worth_line}effective rank {found['effective_rank']:.1f}")
        checkpoints.save(state, stream.state())
        progress.pause(time.perf_counter() - began)

    if restored is None:
        watch(state)  # the curve begins with random weights
    hooks: list[Hook] = [(max(round(config.eval_every * epoch_steps), 1), watch)]
    if config.save_steps:
        hooks.append((config.save_steps, lambda state: checkpoints.save(state, stream.state())))
    began = time.perf_counter()
    try:
        final: Any = fit(step, state, stream, steps=steps, hooks=hooks, log=progress.log)
        checkpoints.wait()
    except RunError as error:
        kept = checkpoints.steps
        where = f"; {out} keeps checkpoint {kept[-1]}" if kept else ""
        raise RunError(f"{error}{where}") from None
    finally:
        progress.close()
    seconds = time.perf_counter() - began
    checkpoints.close()
    variables = final.encoder(target=objective.evaluate_target)
    if main_process:
        save_file({name: np.asarray(x) for name, x in to_torch(variables).items()}, out / ENCODER)

    # ---- the end: one look at the test split, by the trained encoder and by the same with random weights ----
    accuracies: dict[str, Any] = {}
    if labelled:

        def judged(variables: dict[str, PyTree]) -> tuple[FrozenAccuracy, float]:
            train, held, test = (features(variables, dataset.splits[n]) for n in ("train", "validation", "test"))
            found = frozen_accuracy(
                train,
                held,
                test,
                classes=classes,
                neighbours=config.neighbours,
                temperature=config.neighbour_temperature,
                seed=config.seed,
            )
            return found, online_accuracy(final, test)

        trained, online = judged(variables)
        untrained = encoder_of(init_network(config, network, dataset.image_shape)[0])
        random, _ = judged(place(untrained, replicated(mesh)))
        accuracies = {
            "knn_accuracy": trained.knn,
            "linear_accuracy": trained.linear,
            "random_knn_accuracy": random.knn,
            "random_linear_accuracy": random.linear,
            "online_linear_accuracy": online,
            "validation_knn_accuracy": trained.validation_knn,
            "validation_linear_accuracy": trained.validation_linear,
            "linear_learning_rate": trained.learning_rate,
            "test_images": len(dataset.test),
        }
    last = looks[0] if looks else look(final)
    rows = read_rows(history) if main_process else []
    sentence = verdict(rows, last)
    result = {
        "preset": preset,
        "objective": config.objective.name,
        "dataset": dataset.name,
        "model": config.model,
        "seed": config.seed,
        "steps": steps,
        "epochs": round(steps / epoch_steps, 3),
        **accuracies,
        "health": {name: value for name, value in last.items() if not name.startswith("validation_")},
        "verdict": sentence,
        "collapsed_at": collapse_step(rows),
        "seconds": round(seconds, 2),
        "compile_seconds": round(compile_seconds, 2),
        "images_per_second": round(progress.images_per_second, 1),
        "parameters": parameters,
        "params_digest": pretrain_digest(final),
        "out": str(out),
        **environment(),
    }
    if labelled:
        say(f"test accuracy of the frozen encoder: kNN {trained.knn:.2%} (random weights {random.knn:.2%}), "
            f"offline linear probe {trained.linear:.2%} (random weights {random.linear:.2%})")  # fmt: skip
    else:
        say("no labels, so nothing to say of the encoder but its health: pretrain.evaluate takes a labelled set")
    say(sentence)
    if main_process:
        write_json(out / "result.json", result)
    return result


def online_accuracy(state: PretrainState, held: Features) -> float:
    """Accuracy in [0, 1] of the online probe on features of held-out images."""
    logits = probe_logits(jax.device_get(state.probe), jnp.asarray(held.features))
    return float((np.asarray(logits).argmax(-1) == held.labels).mean())
