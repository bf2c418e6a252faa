"""A workload that compiles at once, to test the measuring itself."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.parallel import mean_over
from train.bench import BenchConfig
from train.bench.tasks import Workload, batch_of
from train.state import init_variables

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


def quick_variables(model, key, image_shape):
    """Variables as `train.state.init_variables` makes them, without compiling anything."""
    shapes = jax.eval_shape(partial(init_variables, model, image_shape=image_shape), key)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)


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
    parts = {"preprocessing": scaled, "forward": None}
    batch = batch_of(config, "image")
    return replace(train_toy(config), step=scaled, batch=batch, carried=False, rows=True, parts=parts)


def prune_toy(config):
    return replace(train_toy(config), variants={"dense": train_toy(config), "every": train_toy(config)})


TOY = {"toy": train_toy, "predict": predict_toy, "prune": prune_toy}
