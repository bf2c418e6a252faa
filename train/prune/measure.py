"""Measure what pruning did to a network: accuracy, bytes, multiply-adds, latency, and the sensitivity of each layer."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.losses import LOSSES
from resnet_jax.masks import no_masks
from resnet_jax.tree import PyTree, is_kernel, leaves, map_with_path
from train.data.sources import collate
from train.errors import UsageError
from train.from_config import eval_augment, load_data, make_kernels, make_model, network_shape
from train.hub import is_hub_name, source_path
from train.loop import evaluate
from train.prune.config import CHANNELS, PruneConfig
from train.prune.deliver import COMPACT
from train.prune.layers import layer_table, totals
from train.report import collect
from train.run_folder import load_state, read_config, refuse_own_model
from train.runtime import compiler_options
from train.steps import eval_step
from train.timing import interleaved, ratio, summary
from train.weights import dense_variables, load_masks

Report = dict[str, Any]
Network = tuple[nn.Module, PyTree, PyTree]  # model, variables, masks

EVAL_BATCH = 500
WARMUP = 3


def measure(
    run: Path,
    *,
    before: Path | None = None,
    shares: Sequence[float] = (),
    images: int = 1000,
    steps: int = 20,
    repeats: int = 10,
) -> Report:
    """Report on a finished run, ready for JSON: accuracy, bytes, multiply-adds and latency, layer by layer.

    Args:
      before: the run or weights that it started from, if they are no longer where its config says.
      shares: sparsities for `sensitivity`, which is not measured if this is empty.
      images: number of validation images for `sensitivity`.
      steps, repeats: arguments of `latency`, which is not measured with 0 steps.

    Returns:
      `run`: which run it is. `before` and `after`: `accuracy`, `bytes`, those of `compare`, and the median `latency_ms`
      by batch. `layers`: those of `compare`. `latency` and `sensitivity`: None if they were not measured.

    Raises:
      UsageError: `run` is not a finished run of pruning, or its model was passed to `run`.
    """
    config, saved = read_config(run, PruneConfig)
    if "prune" not in saved["config"]:
        raise UsageError(f"{run} is a run of training, not of pruning: python -m train.prune {run}")
    refuse_own_model(run, saved, "a report needs a model that its config describes; result.json has the figures")
    result = collect(run)
    kernels, _ = make_kernels(config.kernels)
    model = make_model(config, len(saved["classes"]), None, kernels)
    shape = network_shape(config, saved["image_shape"])

    # "Before" is the network that the run started from, or trained first.
    state = load_state(run)
    source = source_path(before or config.init or run / "dense")
    if not source.exists() and not is_hub_name(source):
        raise UsageError(f"{run} was pruned from {source}, which is not there: name it with --before")
    dense = dense_variables(source, {"params": state.params, "batch_stats": state.batch_stats})
    masks = load_masks(source, dense["params"])
    network = model, dense, no_masks(dense["params"]) if masks is None else masks
    # "After" is the delivered network, which is smaller if channels were removed.
    if config.prune.structure == CHANNELS:
        state = load_state(run / COMPACT)
        model = model.clone(widths=read_config(run / COMPACT, PruneConfig)[0].widths)
    after = model, state.variables, state.masks

    # Timing and sensitivity take minutes, so both are optional.
    times = curves = None
    if steps:
        pair = {"before": network[:2], "after": after[:2]}
        times = latency(pair, shape, steps=steps, repeats=repeats, plain=not kernels)
    if shares:
        evaluated, number = _validation(config, network[0], dense, images, not kernels)
        curves = {
            "split": "validation",
            "images": number,
            "baseline": evaluated(dense["params"]),
            "sparsities": list(shares),
            "accuracy": sensitivity(evaluated, dense["params"], shares),
        }
    found = compare(network, after, shape)
    for side, key in (("before", "dense"), ("after", "pruned")):
        found[side] |= {"accuracy": result[f"{key}_accuracy"], "bytes": result[f"{key}_bytes"]}
        found[side]["latency_ms"] = {batch: timed[side]["step_ms"] for batch, timed in (times or {}).items()}
    about = {name: result[name] for name in ("preset", "dataset", "model", "seed", "out")}
    return {"run": about, **found, "latency": times, "sensitivity": curves}


def compare(before: Network, after: Network, image_shape: Sequence[int]) -> Report:
    """Compare two networks on images (H, W, C), without computing anything.

    Returns:
      `before` and `after`: `train.prune.layers.totals`. `layers`: rows of `layer_table` for the network before, with
      the weights and multiply-adds left after (kept by the mask or, if the network has become smaller, still there).
    """
    rows, left = (layer_table(*network, image_shape) for network in (before, after))
    sides = {"before": totals(rows, before[1]), "after": totals(left, after[1])}
    remaining = {row["path"]: row for row in left}
    gone = {"kept": 0, "prunable": True, "nonzero_macs": 0}
    layers = [{**row, **{name: remaining.get(row["path"], gone)[name] for name in gone}} for row in rows]
    return {**sides, "layers": [{**row, "sparsity": 1 - row["kept"] / row["parameters"]} for row in layers]}


def _validation(
    config: PruneConfig, model: Any, variables: dict[str, PyTree], images: int, plain: bool
) -> tuple[Callable[[PyTree], float], int]:
    """Make params -> accuracy on the first images of the validation split, compiled once; and the number of images."""
    split = load_data(config).validation
    number = min(images, len(split))
    batches = []
    for start in range(0, number, EVAL_BATCH):
        batch = collate([split[i] for i in range(start, min(start + EVAL_BATCH, number))])
        batches.append({**batch, "valid": np.ones(len(batch["label"]), bool)})
    step = partial(eval_step, model=model, preprocess=eval_augment(config.augment), loss=LOSSES[config.loss])
    program = jax.jit(step, compiler_options=compiler_options(model.dtype, plain=plain))
    return lambda params: evaluate(program, {**variables, "params": params}, batches)["accuracy"], number


def latency(
    models: Mapping[str, tuple[nn.Module, PyTree]],
    image_shape: Sequence[int],
    *,
    batches: Sequence[int] = (1, 64),
    steps: int = 20,
    repeats: int = 10,
    plain: bool = True,
) -> dict[str, dict[str, Any]]:
    """Time the forward passes of (model, variables) on images (H, W, C), interleaved in one process.

    Args:
      models: models by name; the first is the reference for the others.
      steps: timed calls per block.
      repeats: blocks per model, at least 2.
      plain: whether the models use XLA only, without the kernels of `train.from_config.make_kernels`.

    Returns:
      By batch, as a string for JSON, and by name: `train.timing.summary` in milliseconds per batch and, except for the
      first, `speedup`, the time of the first over this model's: `value`, `low`, `high`.

    Raises:
      ValueError: fewer than two blocks.
    """
    found: dict[str, dict[str, Any]] = {}
    for size in batches:
        noise = jnp.asarray(np.random.default_rng(0).standard_normal((size, *image_shape), np.float32))
        runners = {name: _runner(*pair, noise, plain) for name, pair in models.items()}
        first, *others = seconds = interleaved(runners, steps=steps, repeats=repeats, warmup=WARMUP)
        found[str(size)] = {name: summary(times) for name, times in seconds.items()}
        for name in others:
            found[str(size)][name]["speedup"] = ratio(seconds[first], seconds[name])
    return found


def _runner(model: nn.Module, variables: PyTree, images: jax.Array, plain: bool) -> Callable[[], Any]:
    """Make a compiled forward pass, ready to call."""
    # Variables are constants, as in a deployed program, so XLA can fold what depends only on them.
    options = compiler_options(model.dtype, plain=plain)
    forward = jax.jit(lambda x: model.apply(variables, x, train=False), compiler_options=options)
    return lambda: forward(images)


def sensitivity(
    evaluate: Callable[[PyTree], float], params: PyTree, sparsities: Sequence[float]
) -> dict[str, list[float]]:
    """Measure accuracy by kernel's path, at each sparsity in [0, 1], with only that kernel pruned by magnitude.

    Nothing is retrained, as in https://arxiv.org/abs/1608.08710 section 3.2, but with single weights.
    `evaluate(params)` is called for every kernel and sparsity, always with the same shapes and dtypes: compile it once.
    """

    def accuracy(path: str, kernel: jax.Array, sparsity: float) -> float:
        values = np.array(kernel)
        order = np.argsort(np.abs(values), axis=None, kind="stable")
        values.reshape(-1)[order[: round(sparsity * values.size)]] = 0
        return float(evaluate(map_with_path(lambda at, leaf: values if at == path else leaf, params)))

    kernels = {path: x for path, x in leaves(params).items() if is_kernel(path, x)}
    return {path: [accuracy(path, x, sparsity) for sparsity in sparsities] for path, x in kernels.items()}
