"""The speed of feeding a step: augmentations on the device, and input pipelines, alone and while the step trains."""

import tempfile
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from resnet_jax import augment as aug
from resnet_jax import auto_augment
from resnet_jax.keys import example_index, example_keys
from resnet_jax.parallel import place, replicated
from train.bench.config import BenchConfig
from train.bench.prepared import Stepper, compiled_for, make_batch, prepare
from train.bench.tasks import TASKS, batch_of, train_augment
from train.bench.timed import time_runners
from train.bench.work import usable_cores
from train.data import folder
from train.data.batches import Batches, ResidentBatches, StreamedBatches
from train.data.sources import decode_all
from train.runtime import say
from train.timing import Runner, summary

IMAGES = 512

Augmentations = Callable[[int], dict[str, aug.Augment]]  # by name, for images of this side


# --- augmentation -----------------------------------------------------------------------------------------------------


def augmentations(image_size: int) -> dict[str, aug.Augment]:
    """The augmentations to time, by name: single ones, and `train`, a recipe's chain."""
    return {
        "normalize": aug.normalize(),
        "random_crop": aug.random_crop(),
        "random_flip": aug.random_flip(),
        "random_resized_crop": aug.random_resized_crop(image_size),
        "color_jitter": aug.color_jitter(),
        "grayscale": aug.grayscale(),
        "solarize": aug.solarize(),
        "gaussian_blur": aug.gaussian_blur(),
        "cutout": aug.cutout(image_size // 2),
        "random_erasing": aug.random_erasing(),
        "trivial_augment": auto_augment.trivial_augment(),
        "rand_augment": auto_augment.rand_augment(),
        "train": train_augment(image_size),
    }


def augments(config: BenchConfig, mesh: Mesh, augmentations: Augmentations = augmentations) -> dict[str, Any]:
    """Images per second and microseconds per image of each augmentation on uint8 batches; the headline is `train`'s."""
    key = place(jax.random.key(0), replicated(mesh))
    batch = make_batch(batch_of(config, "image"), config, mesh)
    runners: dict[str, Runner] = {}
    for name, augment in augmentations(config.image_size).items():

        def step(key: Any, batch: Any, *, axis_name: str | None = None, augment: aug.Augment = augment) -> Any:
            index = example_index(len(batch["image"]), axis_name)
            return aug.augment_batch(augment, example_keys(key, index), batch["image"])

        runners[name] = Stepper(compiled_for(config, mesh, rows=True)(step), key, batch, carried=False)
    say(f"compiling and timing {len(runners)} augmentations")
    each, counts = time_runners(runners, config)
    table = {}
    for name, seconds in each.items():
        figures = summary(seconds)
        rate = config.batch / (figures["step_ms"] / 1e3)
        table[name] = {"images_per_second": rate, "us_per_image": 1e6 / rate, **figures}
    return {
        "task": config.task,
        "batch": config.batch,
        "image_size": config.image_size,
        "mode": config.mode,
        "images_per_second": table["train"]["images_per_second"],
        "step_ms": table["train"]["step_ms"],
        "augments": table,
        "counts": {"augmentations": counts},
    }


# --- input ------------------------------------------------------------------------------------------------------------


def inputs(config: BenchConfig, mesh: Mesh) -> dict[str, Any]:
    """Images per second of each pipeline and of a plain loop, and the share of a training step spent waiting for each.

    `resident` gathers on the device, `encoded` decodes a folder of JPEGs in threads, `plain_pil` opens, decodes and
    resizes the same files in one thread. `wait_share` is (fed - alone) / fed, at least 0, of steps run one ahead.
    """
    size, batch = config.image_size, config.batch
    with tempfile.TemporaryDirectory() as scratch:
        files = write_jpegs(Path(scratch), IMAGES, size)
        jpeg_bytes = sum(file.stat().st_size for file in files) / len(files)
        source = folder.read(scratch, size=size)[1]["train"]
        options: dict[str, Any] = {"batch": batch, "seed": 0, "mesh": mesh, "mode": config.mode}
        encoded = StreamedBatches(source, **options)
        streams: dict[str, Batches] = {"resident": ResidentBatches(decode_all(source), **options), "encoded": encoded}
        # Untimed calls before each block use up the batches that were decoded while others were timed.
        settle = encoded.ahead + 1
        alone: dict[str, Runner] = {name: stream.__next__ for name, stream in streams.items()}
        alone["plain_pil"] = plain_loop(files, batch, size).__next__
        say("timing the pipelines alone")
        by_pipeline, counts = time_runners(alone, config, settle=settle)

        one = prepare(config, mesh, TASKS["train"](config))
        same = one.stepper.batch

        def fed(stream: Batches | None) -> Runner:
            def call() -> Any:
                one.stepper.batch = same if stream is None else next(stream)
                return one.stepper.ahead()

            return call

        steps = {"alone": fed(None), **{name: fed(stream) for name, stream in streams.items()}}
        say("timing the training step that they feed")
        with_step, fed_counts = time_runners(steps, config, fewest=2, settle=settle, ahead=True)
        encoded.iterator.close()  # its threads still read files

    pipelines: dict[str, dict[str, Any]] = {}
    for name, seconds in by_pipeline.items():
        # A batch that was decoded ahead costs nothing, and the next one more, so the rate is that of whole blocks.
        rate = batch / float(np.median(seconds.mean(1)))
        per_core = rate / (1 if name == "plain_pil" else usable_cores())
        figures = summary(seconds.mean(1))
        pipelines[name] = {"images_per_second": rate, "images_per_second_per_core": per_core, **figures}
    medians = {name: float(np.median(seconds.mean(1))) for name, seconds in with_step.items()}
    plain_rate = pipelines["plain_pil"]["images_per_second"]
    for name in streams:
        pipelines[name] |= {
            "speedup_over_plain_pil": pipelines[name]["images_per_second"] / plain_rate,
            "fed_step_ms": medians[name] * 1e3,
            "wait_share": max(0.0, (medians[name] - medians["alone"]) / medians[name]),
        }
    return {
        "task": config.task,
        "model": config.model,
        "batch": batch,
        "image_size": size,
        "mode": config.mode,
        "images_per_second": pipelines["encoded"]["images_per_second"],
        "step_ms": pipelines["encoded"]["step_ms"],
        "cores": usable_cores(),
        "jpeg_bytes": jpeg_bytes,
        "train_step_ms": medians["alone"] * 1e3,
        "pipelines": pipelines,
        "counts": {"pipelines": counts, "fed steps": fed_counts},
    }


def write_jpegs(root: Path, count: int, size: int) -> list[Path]:
    """Seeded synthetic JPEGs of quality 90, smooth with a little noise, in two class folders."""
    rng = np.random.default_rng(0)
    files = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        smooth = coarse.resize((size, size), Image.Resampling.BICUBIC)
        pixels = np.asarray(smooth, np.int16) + rng.integers(-12, 13, (size, size, 3), np.int16)
        files.append(root / f"class{number % 2}" / f"{number:05}.jpg")
        files[-1].parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(files[-1], quality=90)
    return files


def plain_loop(files: list[Path], batch: int, size: int) -> Iterator[np.ndarray]:
    """The obvious loop: open, decode and resize one file after another; yields uint8 [batch, size, size, 3]."""
    endless = cycle(files)
    while True:
        images = []
        for _ in range(batch):
            with Image.open(next(endless)) as file:
                images.append(np.asarray(file.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)))
        yield np.stack(images)
