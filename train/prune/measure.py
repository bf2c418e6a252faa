"""`python -m train.prune report RUN`: a run of pruning beside the network that it started from, measured and told."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from resnet_jax.losses import LOSSES
from resnet_jax.masks import no_masks
from resnet_jax.tree import PyTree, is_kernel, leaves
from train.errors import UsageError
from train.from_config import eval_augment, load_data, make_kernels, make_model
from train.loop import evaluate
from train.prune.config import CHANNELS, PruneConfig, network_shape
from train.prune.deliver import COMPACT, stacked
from train.prune.latency import latency
from train.prune.report import Network, Report, describe, draw, text
from train.prune.sensitivity import sensitivity
from train.report import check_picture, collect
from train.run_folder import environment, load_state, read_config, write_json
from train.runtime import compiler_options
from train.steps import eval_step
from train.weights import dense_variables, load_masks

EVAL_BATCH = 500


def measure(
    run: Path, *, shares: Sequence[float] = (), images: int = 1000, steps: int = 20, repeats: int = 10
) -> Report:
    """The report of a finished run: accuracy, bytes, multiply-adds and latency before and after, layer by layer.

    Args:
      shares: sparsities for the curve of each layer alone; none leaves the curves out.
      images: of the validation split, that these curves are measured on.
      steps, repeats: of `train.prune.latency.latency`; no steps leave the latency out.

    Raises:
      UsageError: no finished run of pruning there.
    """
    config, saved = read_config(run, PruneConfig)
    if "prune" not in saved["config"]:
        raise UsageError(f"{run} is a run of training, not of pruning: python -m train.prune {run}")
    result = collect(run)
    classes, shape = len(saved["classes"]), network_shape(config.augment.resized_crop, saved["image_shape"])
    kernels, _ = make_kernels(config.kernels)
    model = make_model(config, classes, None, kernels)
    state = load_state(run)
    source = run / "dense" if config.init is None else Path(config.init).expanduser()
    dense = dense_variables(source, {"params": state.params, "batch_stats": state.batch_stats})
    masks = load_masks(source, dense["params"])

    small, after = model, state
    if config.prune.structure == CHANNELS:
        after = load_state(run / COMPACT)
        small = model.clone(widths=read_config(run / COMPACT, PruneConfig)[0].widths)
    pair = {"before": (model, dense), "after": (small, after.variables)}
    curves = None
    if shares:
        paths = [path for path, x in leaves(dense["params"]).items() if is_kernel(path, x)]
        accuracy = _validation(config, model, dense, images, not kernels)
        curves = {
            "split": "validation",
            "images": images,
            "baseline": accuracy(dense["params"]),
            "sparsities": list(shares),
            "accuracy": sensitivity(accuracy, dense["params"], paths, shares),
        }
    report = describe(
        Network(
            model=model,
            variables=dense,
            masks=no_masks(dense["params"]) if masks is None else masks,
            accuracy=result["dense_accuracy"],
            stored_bytes=result["dense_bytes"],
        ),
        Network(
            model=small,
            variables=after.variables,
            masks=after.masks,
            accuracy=result["pruned_accuracy"],
            stored_bytes=result["pruned_bytes"],
        ),
        shape,
        latency=latency(pair, shape, steps=steps, repeats=repeats, plain=not kernels) if steps else None,
        sensitivity=curves,
    )
    return {"run": {name: result[name] for name in ("preset", "dataset", "model", "seed", "out")}, **report}


def _validation(
    config: PruneConfig, model: Any, variables: dict[str, PyTree], images: int, plain: bool
) -> Callable[[PyTree], float]:
    """params -> accuracy on the first images of the validation split, compiled once."""
    split = load_data(config).validation
    wanted = range(min(images, len(split)))
    batches = [
        {name: jnp.asarray(x) for name, x in stacked(split, wanted[i : i + EVAL_BATCH]).items()}
        for i in range(0, len(wanted), EVAL_BATCH)
    ]
    step = partial(eval_step, model=model, preprocess=eval_augment(config.augment), loss=LOSSES[config.loss])
    judge = jax.jit(step, compiler_options=compiler_options(model.dtype, plain=plain) or None)
    whole = [{**batch, "valid": jnp.ones(len(batch["label"]), bool)} for batch in batches]
    return lambda params: evaluate(judge, {**variables, "params": params}, whole)["accuracy"]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the report of a run, and write it where it is asked for."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m train.prune report", description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run of pruning")
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--picture", type=Path, help="draw it here, as .png, .svg or .pdf")
    parser.add_argument(
        "--sensitivity",
        type=float,
        nargs="*",
        metavar="SPARSITY",
        help="also prune each layer alone to these sparsities (0.5 0.8 0.9 0.95 if none is named)",
    )
    parser.add_argument("--images", type=int, default=1000, help="validation images for --sensitivity")
    parser.add_argument("--steps", type=int, default=20, help="timed calls of a block; 0 measures no latency")
    parser.add_argument("--repeats", type=int, default=10, help="blocks of each network")
    args = parser.parse_args(argv)
    if args.images < 1 or args.steps < 0 or args.repeats < 2:
        raise UsageError("--images needs 1 or more, --steps 0 or more, --repeats 2 or more")
    shares = () if args.sensitivity is None else tuple(args.sensitivity) or (0.5, 0.8, 0.9, 0.95)
    if not all(0 <= share < 1 for share in shares):
        raise UsageError(f"--sensitivity {' '.join(map(str, shares))}: sparsities are in [0, 1)")
    if args.picture:  # what cannot be drawn shows before minutes of measuring
        check_picture(args.picture)
    report = measure(args.run, shares=shares, images=args.images, steps=args.steps, repeats=args.repeats)
    print(text(report))
    if args.json:
        write_json(args.json, {**report, **environment()})
    if args.picture:
        draw(report, args.picture)
