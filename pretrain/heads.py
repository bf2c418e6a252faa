"""Heads on the encoder during pretraining (projector, predictor, prototypes); they are discarded afterwards."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax.contrastive import unit
from resnet_jax.layers import BatchNorm
from train.state import train_argument

Outputs = dict[str, jax.Array]


class MLP(nn.Module):
    """Dense layers, with a norm and an activation after each except the last: [B, D] to [B, sizes[-1]].

    Attributes:
      sizes: output sizes of the layers; the last layer returns the embeddings, float32.
      norm: whether layers have a norm between them; MoCo v2 and DINO leave it out.
      last_norm: norm after the last layer: None, `affine`, or `plain`, which has no scale and no bias, so the output is
        standardised.
      activation: the function between layers.
      dtype: type of the matrix products; parameters and norms are float32.
      axis_name: mesh axis that the batch is split over, for statistics of the whole batch; None under `jit`.
    """

    sizes: Sequence[int]
    norm: bool = True
    last_norm: str | None = None
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        if self.last_norm not in (None, "affine", "plain"):
            raise ValueError(f"last_norm must be None, 'affine' or 'plain', got {self.last_norm!r}")

        norm = partial(BatchNorm, use_running_average=not train, axis_name=self.axis_name)
        last = len(self.sizes)
        for i, size in enumerate(self.sizes, start=1):
            kind = self.last_norm if i == last else "affine" if self.norm else None
            # A norm subtracts the mean, so a bias before it would have no effect.
            x = nn.Dense(size, use_bias=kind is None, dtype=self.dtype, name=f"fc{i}")(x)
            if kind is not None:
                affine = kind == "affine"
                x = norm(use_scale=affine, use_bias=affine, name=f"norm{i}")(x.astype(jnp.float32))
            if i < last:
                x = self.activation(x)
        return x.astype(jnp.float32)


class Prototypes(nn.Module):
    """Cosines [B, count] between embeddings [B, D] and learned directions: SwAV's prototypes, DINO's last layer.

    The directions are the kernel's columns, normalised to length 1 in each call. SwAV's code
    (https://arxiv.org/abs/2006.09882) normalises the parameters before each step; DINO's uses weight normalisation with
    the gain fixed at 1.
    """

    count: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.count), jnp.float32)
        return jnp.matmul(unit(x), unit(kernel.T).T, precision="highest")


class Network(nn.Module):
    """An encoder with heads: images [B, H, W, C] to embeddings by name, float32.

    `features` [B, F] are the encoder's output, which is kept after pretraining; `projection` [B, D] is the projector's
    output for them; `prediction` [B, D] and `scores` [B, K] are those of the predictor and the prototypes for the
    projection, where the network has them.

    Raises:
      ValueError: the encoder does not end at pooled features [B, F].
    """

    encoder: Any
    projector: Any
    predictor: Any = None
    prototypes: Any = None

    def __call__(self, images: jax.Array, *, train: bool, predict: bool = True) -> Outputs:
        """`predict=False` skips the predictor, which target networks do not have."""
        features = self.encoder(images, **train_argument(self.encoder, train))
        if features.ndim != 2:
            raise ValueError(
                f"the encoder returns {features.shape}, not pooled features [B, F]: build it with num_classes=None"
            )
        outputs = {"features": features.astype(jnp.float32)}
        outputs["projection"] = self.projector(outputs["features"], train=train)
        if self.predictor is not None and predict:
            outputs["prediction"] = self.predictor(outputs["projection"], train=train)
        if self.prototypes is not None:
            outputs["scores"] = self.prototypes(outputs["projection"])
        return outputs
