"""A workload that compiles at once, to test the measuring itself."""

from dataclasses import replace

import jax.numpy as jnp

from resnet_jax.parallel import mean_over
from train.bench import BenchConfig
from train.bench.tasks import Workload, batch_of

TINY = {
    "model": "resnet8",
    "image_size": 8,
    "batch": 16,
    "kernels": "plain",
    "steps": 2,
    "repeats": 2,
    "warmup": 1,
    "peak": 0.1,
    "shares": False,
}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items() if name != "shares"]


def tiny(**fields):
    return BenchConfig(**{**TINY, **fields})


def toy(**fields):
    return tiny(**{"task": "toy", **fields})


def scaled(state, batch, *, axis_name=None):
    return batch["image"].astype(jnp.float32) / 255 + state["params"][0]


def toy_step(state, batch, *, axis_name=None):
    """The mean pixel, added to the parameters."""
    mean = mean_over(scaled(state, batch).mean(), axis_name)
    return {"params": state["params"] + mean}, {"loss": mean}


def train_toy(config):
    return Workload(
        step=toy_step,
        state={"params": jnp.zeros(1000)},
        batch=batch_of(config, "image", "label"),
        flops=1e3,
        parameters=1000,
        carried=True,
        parts={"augmentation": scaled, "optimizer": None},
    )


def predict_toy(config):
    return Workload(
        step=scaled,
        state={"params": jnp.zeros(1000)},
        batch=batch_of(config, "image"),
        flops=1e3,
        parameters=1000,
        rows=True,
        parts={"preprocessing": scaled, "forward": None},
    )


def prune_toy(config):
    return replace(train_toy(config), variants={"dense": train_toy(config), "every": train_toy(config)})


TOY = {"toy": train_toy, "predict": predict_toy, "prune": prune_toy}
