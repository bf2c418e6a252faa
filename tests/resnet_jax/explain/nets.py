"""Networks whose explanations are known."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.explain import Network

KEY = jax.random.key(0)
IMAGES = jax.random.normal(jax.random.key(1), (8, 8, 8, 3)) + 0.5


class Corner(nn.Module):
    """Linear in the rows and columns of the map's top left quadrant; the rest is multiplied by 0."""

    @nn.compact
    def __call__(self, x):
        return x.at[:, x.shape[1] // 2 :].set(0).at[:, :, x.shape[2] // 2 :].set(0)


class CornerNet(nn.Module):
    """Convolution, ReLU, the top left quadrant, global average pooling, linear head."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), dtype=self.dtype, name="conv")(x.astype(self.dtype)))
        x = Corner(name="corner")(x)
        return nn.Dense(3, name="head")(x.mean((1, 2), dtype=jnp.float32))


def corner_network(dtype=jnp.float32) -> Network:
    """A `CornerNet` whose class 2 is the sum of its channels."""
    model = CornerNet(dtype)
    variables = model.init(KEY, IMAGES)
    head = variables["params"]["head"]
    kernel = head["kernel"].at[:, 2].set(1.0)
    return Network(model, {"params": {**variables["params"], "head": {**head, "kernel": kernel}}})


def linear(weights, images):
    """One output, the inner product with weights [H, W, C]."""
    return (weights[None] * images).sum((1, 2, 3))[:, None]


def linear_network(seed=0) -> Network:
    """A linear function with normal weights."""
    return Network(linear, jnp.asarray(np.random.default_rng(seed).normal(size=IMAGES.shape[1:]), jnp.float32))
