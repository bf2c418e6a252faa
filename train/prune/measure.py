"""Measure what pruning did to a network: accuracy, bytes, multiply-adds, latency, and the sensitivity of each layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from train.errors import UsageError
from train.from_config import eval_augment, load_data, make_kernels, make_model
from train.loop import evaluate
from train.prune.config import CHANNELS, PruneConfig, network_shape
from train.prune.deliver import COMPACT, stacked
from train.prune.layers import Row, layer_table, totals
from train.report import collect
from train.run_folder import load_state, read_config
from train.runtime import compiler_options
from train.steps import eval_step
from train.timing import interleaved, ratio, summary
from train.weights import dense_variables, load_masks

Report = dict[str, Any]

EVAL_BATCH = 500
WARMUP = 3


@dataclass(frozen=True, kw_only=True)
class Network:
    """One side of a comparison: `accuracy` in [0, 1], `stored_bytes` of the file that holds it."""

    model: nn.Module
    variables: PyTree
    masks: PyTree
    accuracy: float
    stored_bytes: int


def measure(
    run: Path, *, shares: Sequence[float] = (), images: int = 1000, steps: int = 20, repeats: int = 10
) -> Report:
    """Report on a finished run: accuracy, bytes, multiply-adds and latency before and after, layer by layer.

    Args:
      shares: sparsities for `sensitivity`, which is not measured if this is empty.
      images: number of validation images for `sensitivity`.
      steps, repeats: arguments of `latency`, which is not measured with 0 steps.

    Raises:
      UsageError: `run` is not a finished run of pruning.
    """
    config, saved = read_config(run, PruneConfig)
    if "prune" not in saved["config"]:
        raise UsageError(f"{run} is a run of training, not of pruning: python -m train.prune {run}")
    result = collect(run)
    kernels, _ = make_kernels(config.kernels)
    model = make_model(config, len(saved["classes"]), None, kernels)
    shape = network_shape(config.augment.resized_crop, saved["image_shape"])

    # "Before" is the network that the run started from, or trained first.
    state = load_state(run)
    source = run / "dense" if config.init is None else Path(config.init).expanduser()
    dense = dense_variables(source, {"params": state.params, "batch_stats": state.batch_stats})
    masks = load_masks(source, dense["params"])
    before = Network(
        model=model,
        variables=dense,
        masks=no_masks(dense["params"]) if masks is None else masks,
        accuracy=result["dense_accuracy"],
        stored_bytes=result["dense_bytes"],
    )
    # "After" is the delivered network, which is smaller if channels were removed.
    if config.prune.structure == CHANNELS:
        state = load_state(run / COMPACT)
        model = model.clone(widths=read_config(run / COMPACT, PruneConfig)[0].widths)
    after = Network(
        model=model,
        variables=state.variables,
        masks=state.masks,
        accuracy=result["pruned_accuracy"],
        stored_bytes=result["pruned_bytes"],
    )

    # Timing and sensitivity take minutes, so both are optional.
    times = curves = None
    if steps:
        pair = {"before": (before.model, dense), "after": (after.model, after.variables)}
        times = latency(pair, shape, steps=steps, repeats=repeats, plain=not kernels)
    if shares:
        accuracy_of = _validation(config, before.model, dense, images, not kernels)
        paths = [path for path, x in leaves(dense["params"]).items() if is_kernel(path, x)]
        curves = {
            "split": "validation",
            "images": images,
            "baseline": accuracy_of(dense["params"]),
            "sparsities": list(shares),
            "accuracy": sensitivity(accuracy_of, dense["params"], paths, shares),
        }
    about = {name: result[name] for name in ("preset", "dataset", "model", "seed", "out")}
    return {"run": about, **describe(before, after, shape, latency=times, sensitivity=curves)}


def _validation(
    config: PruneConfig, model: Any, variables: dict[str, PyTree], images: int, plain: bool
) -> Callable[[PyTree], float]:
    """Make params -> accuracy on the first images of the validation split, compiled once."""
    split = load_data(config).validation
    wanted = range(min(images, len(split)))
    batches = []
    for start in range(0, len(wanted), EVAL_BATCH):
        batch = {name: jnp.asarray(x) for name, x in stacked(split, wanted[start : start + EVAL_BATCH]).items()}
        batches.append({**batch, "valid": jnp.ones(len(batch["label"]), bool)})
    step = partial(eval_step, model=model, preprocess=eval_augment(config.augment), loss=LOSSES[config.loss])
    program = jax.jit(step, compiler_options=compiler_options(model.dtype, plain=plain))
    return lambda params: evaluate(program, {**variables, "params": params}, batches)["accuracy"]


def describe(
    before: Network,
    after: Network,
    image_shape: Sequence[int],
    *,
    latency: Mapping[str, Mapping[str, Any]] | None = None,
    sensitivity: Mapping[str, Any] | None = None,
) -> Report:
    """Describe both networks for `train.prune.report`, ready for JSON; images are (H, W, C).

    Args:
      latency: result of `latency` for models named `before` and `after`.
      sensitivity: `sparsities`; `accuracy`, the result of `sensitivity` for them; `baseline`, the accuracy of the
        network before on the same images.

    Returns:
      `before` and `after`: `accuracy`, `bytes`, `train.prune.layers.totals`, and the median `latency_ms` by batch.
      `layers`: rows of `layer_table` for the network before, with the weights and multiply-adds that are left after
      (kept by the mask or, if the network has become smaller, still there). `latency` and `sensitivity`, unchanged.
    """
    sides, tables = {}, []
    for name, net in (("before", before), ("after", after)):
        rows = layer_table(net.model, net.variables, net.masks, image_shape)
        tables.append(rows)
        sides[name] = {
            "accuracy": net.accuracy,
            "bytes": net.stored_bytes,
            **totals(rows, net.variables),
            "latency_ms": {batch: times[name]["step_ms"] for batch, times in (latency or {}).items()},
        }
    return {**sides, "layers": _left(*tables), "latency": latency, "sensitivity": sensitivity}


def _left(before: Sequence[Row], after: Sequence[Row]) -> list[Row]:
    """Rows of the network before, with what remains of each layer after; zeros for a layer that was removed."""
    left = {row["path"]: row for row in after}
    gone = {"kept": 0, "prunable": True, "nonzero_macs": 0}
    rows = [{**row, **{name: left.get(row["path"], gone)[name] for name in gone}} for row in before]
    return [{**row, "sparsity": 1 - row["kept"] / row["parameters"]} for row in rows]


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
        noise = np.random.default_rng(0).standard_normal((size, *image_shape), np.float32)
        runners = {name: _runner(*pair, jnp.asarray(noise), plain) for name, pair in models.items()}
        seconds = interleaved(runners, steps=steps, repeats=repeats, warmup=WARMUP)
        first, *others = seconds
        found[str(size)] = {name: summary(times) for name, times in seconds.items()}
        for name in others:
            found[str(size)][name]["speedup"] = ratio(seconds[first], seconds[name])
    return found


def _runner(model: nn.Module, variables: PyTree, images: jax.Array, plain: bool) -> Callable[[], Any]:
    """Make a compiled forward pass, ready to call."""
    # Variables are constants, as in train.predict, so XLA can fold what depends only on them.
    options = compiler_options(model.dtype, plain=plain)
    forward = jax.jit(lambda x: model.apply(variables, x, train=False), compiler_options=options)
    return lambda: forward(images)


def sensitivity(
    evaluate: Callable[[PyTree], float], params: PyTree, paths: Sequence[str], sparsities: Sequence[float]
) -> dict[str, list[float]]:
    """Measure accuracy by path, at each sparsity in [0, 1], with only that leaf pruned by magnitude, not retrained.

    As in https://arxiv.org/abs/1608.08710 section 3.2, with single weights. `evaluate(params)` is called
    len(paths) * len(sparsities) times, always with the same shapes and dtypes: compile it once.

    Raises:
      ValueError: a path that is not in `params`, a sparsity outside [0, 1].
    """
    kernels = leaves(params)
    if missing := [path for path in paths if path not in kernels]:
        raise ValueError(f"no parameters at {', '.join(missing)}; there are {', '.join(kernels)}")

    def accuracy(path: str, sparsity: float) -> float:
        pruned = prune_smallest(kernels[path], sparsity)
        return float(evaluate(map_with_path(lambda at, leaf: pruned if at == path else leaf, params)))

    return {path: [accuracy(path, sparsity) for sparsity in sparsities] for path in paths}


def prune_smallest(kernel: jax.Array, sparsity: float) -> jax.Array:
    """Set the round(sparsity * size) smallest weights to zero; of tied weights, keep those with the lower index.

    Raises:
      ValueError: a sparsity outside [0, 1].
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be in [0, 1], got {sparsity}")
    values = np.array(kernel)
    kept = values.size - round(sparsity * values.size)
    largest_first = np.argsort(-np.abs(values), axis=None, kind="stable")
    values.reshape(-1)[largest_first[kept:]] = 0
    return jnp.asarray(values)
