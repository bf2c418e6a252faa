"""Class activation maps: float32 [B, h, w] >= 0, of the size of the layer whose channels they weigh.

All take the last map of the network unless `layer` names another (see `Network`), and raise ValueError if there is no
such layer (the message lists them) or its output is not a map [B, h, w, K].
"""

import jax
import jax.numpy as jnp

from resnet_jax.explain.maps import rescale, upsample
from resnet_jax.explain.network import Network
from resnet_jax.explain.targets import Target
from resnet_jax.parallel import vary_like


def grad_cam(network: Network, images: jax.Array, target: Target, layer: str | None = None) -> jax.Array:
    """Weigh each channel by the mean of its gradient, https://arxiv.org/abs/1610.02391.

    For the last map of a network with global average pooling and a linear head it is the class activation map of
    https://arxiv.org/abs/1512.04150, up to the number of positions.
    """
    maps, gradients = _map_and_gradient(network, images, target, layer)
    return jax.nn.relu((gradients.mean((1, 2), keepdims=True) * maps).sum(-1))


def grad_cam_plus_plus(network: Network, images: jax.Array, target: Target, layer: str | None = None) -> jax.Array:
    """Weigh each channel by a weighted sum of its positive gradients, https://arxiv.org/abs/1710.11063."""
    maps, gradients = _map_and_gradient(network, images, target, layer)
    # Equation 19, where the derivatives of an exponential score are powers of the score's gradient.
    square = jnp.square(gradients)
    shares = square / (2 * square + maps.sum((1, 2), keepdims=True) * square * gradients + 1e-6)
    weights = (jax.nn.relu(gradients) * shares).sum((1, 2), keepdims=True)
    return jax.nn.relu((weights * maps).sum(-1))


def hires_cam(network: Network, images: jax.Array, target: Target, layer: str | None = None) -> jax.Array:
    """Weigh each value by its own gradient, https://arxiv.org/abs/2011.08891."""
    maps, gradients = _map_and_gradient(network, images, target, layer)
    return jax.nn.relu((gradients * maps).sum(-1))


def layer_cam(network: Network, images: jax.Array, target: Target, layer: str | None = None) -> jax.Array:
    """Weigh each value by its own gradient where that is positive, https://doi.org/10.1109/TIP.2021.3089943.

    It is meant for earlier layers, whose maps are finer.
    """
    maps, gradients = _map_and_gradient(network, images, target, layer)
    return jax.nn.relu((jax.nn.relu(gradients) * maps).sum(-1))


def score_cam(
    network: Network,
    images: jax.Array,
    target: Target,
    layer: str | None = None,
    *,
    chunk: int = 16,
    align_corners: bool = False,
    first: float | None = None,
) -> jax.Array:
    """Weigh each channel by the score of the images masked with it, https://arxiv.org/abs/1910.01279; no gradients.

    The network runs once per channel, on `chunk` channels at once. For `align_corners` and `first` see `upsample`.
    """
    maps = _map(network, images, layer)

    def score(channel: jax.Array) -> jax.Array:
        mask = rescale(upsample(channel, images.shape[1:3], align_corners=align_corners, first=first))
        return target(network.outputs(images * mask[..., None]))

    scores = jax.lax.map(score, jnp.moveaxis(maps, -1, 0), batch_size=chunk)
    return jax.nn.relu((jax.nn.softmax(scores, axis=0).T[:, None, None] * maps).sum(-1))


def eigen_cam(network: Network, images: jax.Array, target: Target, layer: str | None = None) -> jax.Array:
    """Project each position on the channels' first principal component, https://arxiv.org/abs/2008.00299.

    It does not depend on the target. The component's sign is that which makes the largest value positive.
    """
    maps = _map(network, images, layer)
    positions = maps.reshape(len(maps), -1, maps.shape[-1])
    positions = positions - positions.mean(1, keepdims=True)
    left, values, _ = jnp.linalg.svd(positions, full_matrices=False)
    projection = left[..., 0] * values[:, :1]
    flip = jnp.abs(projection.min(1, keepdims=True)) > jnp.abs(projection.max(1, keepdims=True))
    return jax.nn.relu(jnp.where(flip, -projection, projection)).reshape(maps.shape[:3])


def _map(network: Network, images: jax.Array, layer: str | None) -> jax.Array:
    """The float32 map [B, h, w, K] of a layer."""
    _, maps = network.forward(images, layer)
    _check_map(layer, maps)
    return maps.astype(jnp.float32)


def _check_map(layer: str | None, output: jax.Array | jax.ShapeDtypeStruct) -> None:
    if len(output.shape) != 4:
        raise ValueError(f"the output of {layer} is not a map [B, h, w, K], but {list(output.shape)}")


def _map_and_gradient(
    network: Network, images: jax.Array, target: Target, layer: str | None
) -> tuple[jax.Array, jax.Array]:
    """The float32 map [B, h, w, K] of a layer, and the gradient of the score with respect to it."""
    path, shape = network.find(layer, images)
    _check_map(path, shape)

    def score(tap: jax.Array) -> tuple[jax.Array, jax.Array]:
        outputs, maps = network.forward(images, path, tap)
        return target(outputs).sum(), maps.astype(jnp.float32)

    # A tap that did not vary over shards would receive the sum of their gradients.
    tap = vary_like(jnp.zeros(shape.shape), (images, network.variables))
    gradients, maps = jax.grad(score, has_aux=True)(tap)
    return maps, gradients
