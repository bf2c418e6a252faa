"""Tiny networks and states that the tests share, so that each is compiled once."""

from functools import partial
from typing import Any

import jax
import numpy as np

from resnet_jax.layers import CifarStem
from resnet_jax.resnet import BasicBlock, ResNet
from train.optim import make_optimizer, make_schedule
from train.runtime import known_options
from train.state import TrainState, init_state, init_variables

CLASSES = 4

# Of a test that compiles more than it computes: XLA's older emitters, where this jaxlib has them, in half the time.
QUICK = known_options({"xla_cpu_use_fusion_emitters": False})
quick_jit = partial(jax.jit, compiler_options=QUICK)


def tiny(**options: Any) -> ResNet:
    """Two stages of one block, 8 and 16 channels, for 8x8 images."""
    return ResNet((1, 1), BasicBlock, num_classes=CLASSES, width=8, stem=CifarStem, **options)


def tiny_tx(lr: float = 0.1, steps: int = 100) -> Any:
    schedule = make_schedule("cosine", peak=lr, steps=steps, warmup=2)
    return make_optimizer("sgd", schedule, nesterov=True, weight_decay=1e-3)


def tiny_state(tx: Any, seed: int = 0, channels: int = 3, **options: Any) -> TrainState:
    init_key, key = jax.random.split(jax.random.key(seed))
    return init_state(init_variables(tiny(), init_key, (8, 8, channels)), tx, key, **options)


def batch_of(images: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
    return {"image": images[0], "label": images[1]}
