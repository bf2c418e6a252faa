"""Evaluation of a pretrained encoder: `python -m pretrain.evaluate RUN [--protocol NAME ...] [--data SET]`.

Each protocol has its own name in the result, because their figures differ and are not comparable:

- `knn`: weighted nearest neighbours on frozen features (k and T of the run, 200 and 0.1), no training;
- `linear`: an offline linear probe on frozen features, with the learning rate chosen on validation;
- `finetune_1`, `finetune_10`, `finetune_100`: the whole network trained further on that percentage of the labels by the
  supervised pipeline; `scratch_1`, `scratch_10`, `scratch_100`: the same from random weights, for comparison.

On a different set from the one the encoder was pretrained on, these measure transfer. Each protocol evaluates the test
split once.
"""

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from pretrain.config import PretrainConfig
from pretrain.features import Extractor, FrozenAccuracy
from pretrain.run import evaluate_features
from pretrain.steps import feature_step
from resnet_jax.parallel import axis_of, compile_step, make_mesh, place, replicated
from resnet_jax.tree import PyTree
from train.cli import start
from train.config import SEEDS, AugmentConfig, DataConfig, OptimConfig, TrainConfig
from train.data.batches import eval_batch_size
from train.data.sets import Dataset, known_labels, share_of
from train.errors import OneLineParser, UsageError, unknown
from train.from_config import compute_dtype, eval_augment, make_kernels, make_model, open_data, read_data
from train.json_text import to_json
from train.paths import local_path
from train.ranges import check_ranges
from train.run import run as train_run
from train.run_folder import environment, read_config, read_result, refuse_own_model, write_json
from train.runtime import compiler_options, keep_compiled, say
from train.state import init_variables
from train.weights import ENCODER, load_weights

FROZEN = ("knn", "linear")
TRAINED = tuple(f"{way}_{percent}" for way in ("finetune", "scratch") for percent in (1, 10, 100))
MIN_SCALE = 0.2  # smallest fraction of the area that the crops of fine-tuning keep
UPDATES = 300  # minimum per fine-tuning: an epoch of 1 % of a small set is a single update


def evaluate(
    run: Path,
    protocols: Sequence[str] = FROZEN,
    *,
    data: DataConfig | None = None,
    epochs: float = 30,
    lr: float = 0.05,
    batch: int = 64,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate a finished run's encoder: test accuracies in [0, 1] by protocol.

    Each is written to RUN/evaluation-SET.json, with its settings, as soon as it has been measured. Protocols that train
    nothing also take a run that cannot be written to.

    Args:
      data: the set; None means the one that the encoder was pretrained on, with the same splits. Images are
        normalised as in pretraining.
      epochs, lr, batch, seed: settings of fine-tuning and of training from scratch: Nesterov SGD on a cosine schedule
        after a warm-up of a tenth of the updates, on resized crops of at least a fifth of the area, mirrored if
        pretraining did so; 300 updates or more. The batch is at most the number of labelled images.

    Raises:
      UsageError: an unknown protocol, a run that is not finished or whose encoder was passed to `run`, a set that does
        not fit the encoder, a damaged evaluation-SET.json.
    """
    for protocol in protocols:
        if protocol not in (*FROZEN, *TRAINED):
            raise unknown("protocol", protocol, (*FROZEN, *TRAINED))
    sizes = {"image_size": data.image_size if data else None, "epochs": epochs, "lr": lr, "batch": batch, "seed": seed}
    check_ranges(
        sizes,
        {"[1, inf)": "batch", "[1, 65536]": "image_size", "(0, 1000000000]": "epochs", "[0, inf)": "lr", SEEDS: "seed"},
    )
    config, saved = read_config(run, PretrainConfig)
    # A run that is continued for longer still has the encoder of before, but no result.
    if (result := read_result(run)) is None or not (run / ENCODER).is_file():
        raise UsageError(f"{run} is not finished: it has no {ENCODER if result else 'result.json'}")
    refuse_own_model(run, saved, "fine-tune it in a script, train.run.run(TrainConfig(init=...), model=...)")
    writable = os.access(run, os.W_OK)
    if not writable and set(protocols) & set(TRAINED):
        raise UsageError(f"{run} cannot be written to, and fine-tuning keeps its runs there: copy it first")
    keep_compiled(config.cache)
    if data is not None and data.name == config.data.name:
        # The same set must have the same splits: otherwise its test split would contain images seen in pretraining.
        same = config.data
        data = replace(same, dir=data.dir or same.dir, image_size=data.image_size or same.image_size)
    # These devices may lack oneDNN.
    kernels = "auto" if config.kernels == "onednn" else config.kernels
    config = replace(config, data=data or config.data, mode="jit", sync_bn=True, kernels=kernels)
    dataset = read_data(config, open_data(config))
    _check_fits(dataset, config, run, saved["image_shape"][-1])

    # Keep figures of protocols that were evaluated before in the same file.
    path = run / f"evaluation-{file_name(dataset)}.json"
    if not writable:
        say(f"note: {run} cannot be written to, so {path.name} is not written")
    source = saved["config"]["data"]["name"]
    kept: dict[str, Any] = {"pretrained_on": source, "dataset": dataset.name, "run": str(run), "figures": {}}
    if path.is_file():
        try:
            kept["figures"] = {**json.loads(path.read_text())["figures"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} cannot be read ({error!r}): delete it, and evaluate again") from None
    accuracies = {}

    def keep(protocol: str, accuracy: float, **how: Any) -> None:
        accuracies[f"{protocol}_accuracy"] = accuracy
        kept["figures"][protocol] = {"accuracy": accuracy, **how, **environment()}
        if writable:
            write_json(path, kept)

    sized = {"image_size": config.data.image_size} if config.data.image_size else {}
    # The protocols on frozen features share one pass over the splits.
    if set(protocols) & set(FROZEN):
        frozen = frozen_figures(config, run, dataset)
        if "knn" in protocols:
            how = {"neighbours": config.neighbours, "temperature": config.neighbour_temperature}
            keep("knn", frozen.knn, **how, **sized)
        if "linear" in protocols:
            keep("linear", frozen.linear, learning_rate=frozen.learning_rate, seed=config.seed, **sized)
    for protocol in (name for name in protocols if name in TRAINED):
        tuning = {"epochs": epochs, "lr": lr, "batch": batch, "seed": seed, **sized}
        keep(protocol, **train_further(run, config, dataset, protocol, tuning, result["steps"]))
    return {"pretrained_on": source, "dataset": dataset.name, "run": str(run), **accuracies, **environment()}


def train_further(
    run: Path, config: PretrainConfig, dataset: Dataset, protocol: str, tuning: dict[str, Any], pretrained_steps: int
) -> dict[str, Any]:
    """Train a network as one of `TRAINED` says, in a folder of the run: its test accuracy and settings, by name.

    The folder is named by the set and the settings, so that different ones start from scratch.
    """
    way, _, percent = protocol.partition("_")
    fraction, epochs, lr = int(percent) / 100, tuning["epochs"], tuning["lr"]
    labelled = len(share_of(known_labels(dataset.train), fraction, config.data.split_seed))
    devices = jax.device_count()
    size = max(min(tuning["batch"], labelled) // devices, 1) * devices
    steps = max(round(epochs * labelled / size), UPDATES)
    tuning = {**tuning, "batch": size}
    if way == "finetune":  # a run that has been continued for longer has a different encoder
        tuning["pretrained_steps"] = pretrained_steps
    say(f"{protocol}: {dataset.name}, {labelled:,} labelled images, {steps} updates")
    settings = "-".join(f"{name}{value:g}" for name, value in tuning.items())
    a = config.augment
    crop = a.resized_crop or min(dataset.image_shape[:2])
    shared = ("model", "width", "widths", "zero_init", "eval_batch", "dtype", "kernels", "cache")
    tuned = train_run(
        TrainConfig(
            **{name: getattr(config, name) for name in shared},
            out=str(run / f"{protocol}-{file_name(dataset)}-{settings}"),
            init=str(run / ENCODER) if way == "finetune" else None,
            data=replace(config.data, fraction=fraction * config.data.fraction),
            augment=AugmentConfig(resized_crop=crop, min_scale=MIN_SCALE, flip=a.flip, mean=a.mean, std=a.std),
            optim=OptimConfig(lr=lr, nesterov=True, weight_decay=1e-4, warmup_epochs=steps / 10 * size / labelled),
            steps=steps,
            batch=size,
            eval_every=max(steps * size / labelled / 5, 1e-3),
            seed=tuning["seed"],
        ),
        protocol,
    )
    return {"accuracy": tuned["test_accuracy"], "labelled": labelled, **tuning}


def file_name(dataset: Dataset) -> str:
    """The set's name as part of a file's."""
    return re.sub(r"[/:]+", "_", dataset.name)


def _check_fits(dataset: Dataset, config: PretrainConfig, run: Path, channels: int) -> None:
    height, width, theirs = dataset.image_shape
    if len(dataset.classes) < 2:
        raise UsageError(f"{dataset.name} has no labels to evaluate with: name a labelled set with --data")
    if theirs != channels:
        raise UsageError(f"{dataset.name} has {theirs} channels, but {run} was pretrained on {channels}")
    crop, size = config.augment.resized_crop, f"{height}x{width}"
    if crop and crop > min(height, width):
        raise UsageError(f"{dataset.name} has images of {size}, but {run} crops to {crop} pixels: pass --image-size")


def frozen_figures(config: PretrainConfig, run: Path, dataset: Dataset) -> FrozenAccuracy:
    """Compute `features.frozen_accuracy` of a run's encoder on a set."""
    mesh = make_mesh()
    kernels, _ = make_kernels(config.kernels, config.mode, compute_dtype(config.dtype))
    encoder = make_model(config, None, axis_of(config.mode), kernels)
    shapes: dict[str, PyTree] = jax.eval_shape(lambda: init_variables(encoder, jax.random.key(0), dataset.image_shape))
    variables = place(load_weights(run, shapes), replicated(mesh))
    step = compile_step(
        partial(feature_step, encoder=encoder, preprocess=eval_augment(config.augment)),
        mesh=mesh,
        donate=False,
        compiler_options=compiler_options(encoder.dtype, plain=not kernels),
    )
    counts = [len(split) for split in dataset.splits.values()]
    features = Extractor(step, eval_batch_size(config.eval_batch, max(counts), max(counts)), mesh, config.mode)
    return evaluate_features(config, features.splits(variables, dataset), len(dataset.classes))


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate; print one line per protocol on stderr and the result as JSON on stdout."""
    import argparse

    parser = OneLineParser(
        prog="python -m pretrain.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=local_path, help="the folder of a finished run of pretraining")
    add("--protocol", nargs="+", default=FROZEN, metavar="NAME", help="protocols to evaluate (default: knn linear)")
    add("--data", help="a different set from the one it was pretrained on, to measure transfer")
    add("--dir", help="the TFDS data_dir of that set")
    add("--image-size", type=int, help="resize the images of that set to this side")
    training = parser.add_argument_group("fine-tuning and training from scratch").add_argument
    training("--epochs", type=float, help="(default: 30)")
    training("--lr", type=float, help="(default: 0.05)")
    training("--batch", type=int, help="(default: 64)")
    training("--seed", type=int, help="(default: 0)")
    args = parser.parse_args(argv)
    data = DataConfig(name=args.data, dir=args.dir, image_size=args.image_size) if args.data else None
    if data is None and (args.dir, args.image_size) != (None, None):
        raise UsageError("--dir and --image-size apply only to a different set: name it with --data")
    given = {name: getattr(args, name) for name in ("epochs", "lr", "batch", "seed")}
    tuning = {name: value for name, value in given.items() if value is not None}
    if tuning and not set(args.protocol) & set(TRAINED):
        raise UsageError(f"--{next(iter(tuning))} only applies to protocols that train: {', '.join(TRAINED)}")
    result = evaluate(args.run, args.protocol, data=data, **tuning)
    transfer = "" if result["dataset"] == result["pretrained_on"] else f", pretrained on {result['pretrained_on']}"
    for name, value in result.items():
        if name.endswith("_accuracy"):
            print(f"{name.removesuffix('_accuracy')}: {value:.2%} test, {result['dataset']}{transfer}", file=sys.stderr)
    print(to_json(result))


if __name__ == "__main__":
    start(main)
