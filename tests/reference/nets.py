"""Tiny networks and states that the tests share, so that each is compiled once."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np

from resnet_jax.layers import CifarStem
from resnet_jax.resnet import BasicBlock, ResNet
from train.optim import make_optimizer, make_schedule
from train.state import TrainState, init_state, init_variables

CLASSES = 4


def tiny(**options: Any) -> ResNet:
    """Two stages of one block, 8 and 16 channels, for 8x8 images."""
    fields = {"stage_sizes": (1, 1), "block": BasicBlock, "num_classes": CLASSES, "width": 8, "stem": CifarStem}
    return ResNet(**(fields | options))


class Mlp(nn.Module):
    """A network with LayerNorm and neither batch statistics nor the fields of a `ResNet`."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        x = nn.Dense(16, name="in")(images.reshape(len(images), -1))
        return nn.Dense(CLASSES, name="out")(nn.gelu(nn.LayerNorm(name="norm")(x)))


class VisionTransformer(nn.Module):
    """One block over patches of `patch` x `patch` pixels, the mean of its tokens classified."""

    patch: int = 4
    width: int = 16

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        size = (self.patch, min(self.patch, images.shape[2]))
        x = nn.Conv(self.width, size, strides=size, name="patches")(images).reshape(len(images), -1, self.width)
        x = x + self.param("places", nn.initializers.normal(0.5), x.shape[1:])[None]
        y = nn.LayerNorm(name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(y)
        y = nn.LayerNorm(name="norm2")(x)
        x = x + nn.Dense(self.width, name="down")(nn.gelu(nn.Dense(2 * self.width, name="up")(y)))
        return nn.Dense(CLASSES, name="head")(x.mean(1))


def tiny_tx(lr: float = 0.1, steps: int = 100) -> Any:
    schedule = make_schedule("cosine", peak=lr, steps=steps, warmup=2)
    return make_optimizer("sgd", schedule, nesterov=True, weight_decay=1e-3)


def tiny_state(tx: Any, seed: int = 0, channels: int = 3, model: Any = None, **options: Any) -> TrainState:
    init_key, key = jax.random.split(jax.random.key(seed))
    return init_state(init_variables(model or tiny(), init_key, (8, 8, channels)), tx, key, **options)


def batch_of(images: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
    return {"image": images[0], "label": images[1]}
