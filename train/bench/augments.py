"""The speed of each augmentation, applied as a step applies it: to a batch of uint8 images on the device."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from resnet_jax import augment as aug
from resnet_jax import auto_augment
from resnet_jax.keys import example_index, example_keys
from resnet_jax.parallel import place, replicated
from train.bench.config import BenchConfig
from train.bench.prepared import Stepper, compiled_for, laid_out, say
from train.bench.workload import batch_of, make_batch, simclr_view, train_augment
from train.timing import Runner, interleaved, summary


def chains(image_size: int) -> dict[str, aug.Augment]:
    """What is timed, by name: single augmentations, and the chains of the recipes."""
    single: dict[str, Callable[[], aug.Augment]] = {
        "normalize": aug.normalize,
        "random_crop": aug.random_crop,
        "random_flip": aug.random_flip,
        "random_resized_crop": lambda: aug.random_resized_crop(image_size),
        "color_jitter": aug.color_jitter,
        "grayscale": aug.grayscale,
        "solarize": aug.solarize,
        "gaussian_blur": aug.gaussian_blur,
        "cutout": lambda: aug.cutout(image_size // 2),
        "random_erasing": aug.random_erasing,
        "trivial_augment": auto_augment.trivial_augment,
        "rand_augment": auto_augment.rand_augment,
    }
    view = simclr_view(image_size)

    def both(key: aug.Key, image: aug.Image) -> aug.Image:
        return jnp.concatenate([view(k, image) for k in jax.random.split(key)])

    named = {"train": train_augment(image_size), "simclr_two_views": both}
    return {name: factory() for name, factory in single.items()} | named


def augments(config: BenchConfig, mesh: Mesh) -> dict[str, Any]:
    """Images a second and microseconds an image of all `chains`, timed in turns; `train`'s come first."""
    key = place(jax.random.key(0), replicated(mesh))
    batch = laid_out(make_batch(batch_of(config, "image"), config.classes), mesh, config)
    runners: dict[str, Runner] = {}
    for name, augment in chains(config.image_size).items():

        def step(key: Any, batch: Any, *, axis_name: str | None = None, augment: aug.Augment = augment) -> Any:
            index = example_index(len(batch["image"]), axis_name)
            return aug.augment_batch(augment, example_keys(key, index), batch["image"])

        runners[name] = Stepper(compiled_for(config, mesh, rows=True)(step), key, batch, carried=False)
    say(f"compiling and timing {len(runners)} augmentations")
    timed = interleaved(runners, steps=config.steps, repeats=config.repeats, warmup=config.warmup)
    table = {}
    for name, seconds in timed.items():
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
    }
