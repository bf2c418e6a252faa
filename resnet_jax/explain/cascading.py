"""Cascading randomization: a method whose maps do not change with the weights does not explain them.

Adebayo et al. 2018, https://arxiv.org/abs/1810.03292.
"""

from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax.explain.network import Network
from resnet_jax.keys import Key


def cascade(network: Network, images: jax.Array, *, key: Key) -> Iterator[tuple[str, Network]]:
    """Yield (name, network) with the parameters initialised again from the top to this module, cumulatively.

    Modules are those directly under the network, last first. All networks have the same structure, so a compiled
    method is compiled once. Batch statistics stay.

    Raises:
      ValueError: the model is a function.
    """
    layers = network.layers(images)
    assert isinstance(network.model, nn.Module)  # a function has no layers
    params = dict(network.variables["params"])
    fresh = jax.jit(network.model.init)(key, jnp.zeros((1, *images.shape[1:])))["params"]
    for name in reversed(dict.fromkeys(layer.split("/")[0] for layer in layers)):
        if name in params:
            params[name] = jax.tree.map(lambda new, old: new.astype(old.dtype), fresh[name], params[name])
            yield name, Network(network.model, {**network.variables, "params": dict(params)})


def randomization(
    method: Callable[[Network], jax.Array],
    network: Network,
    images: jax.Array,
    *,
    key: Key,
    compare: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> dict[str, jax.Array]:
    """Compare `method(network)` with its map of each network of `cascade`: values [B] by the name of the module.

    `compare` is `rank_correlation` unless given. A method that explains the network goes to 0 soon; guided backprop
    does not.

    Raises:
      ValueError: the model is a function.
    """
    compare, original = compare or rank_correlation, method(network)
    return {name: compare(original, method(other)) for name, other in cascade(network, images, key=key)}


def rank_correlation(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return Spearman's rank correlation of maps [B, H, W], [B] in [-1, 1]; 0 if one of them is constant."""

    def ranks(values: jax.Array) -> jax.Array:
        """Ranks whose mean is 0; equal values share the mean of theirs."""
        ordered = jnp.sort(values)
        first, last = (jnp.searchsorted(ordered, values, side=side) for side in ("left", "right"))
        return (first + last - values.size).astype(jnp.float32) / 2

    x, y = (jax.vmap(ranks)(maps.reshape(len(maps), -1)) for maps in (a, b))
    return (x * y).sum(1) * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(1) * jnp.square(y).sum(1), 1e-6))


def ssim(a: jax.Array, b: jax.Array, *, window: int = 7) -> jax.Array:
    """Return the structural similarity of maps in [0, 1], [B, H, W] to [B], https://doi.org/10.1109/TIP.2003.819861.

    Means are over squares of `window` pixels inside the maps, as in scikit-image.

    Raises:
      ValueError: the maps are smaller than a window.
    """
    if min(a.shape[1:]) < window:
        raise ValueError(f"maps of shape {a.shape[1:]} are smaller than a window of {window} pixels")

    def local(x: jax.Array) -> jax.Array:
        sums = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, window, window), (1, 1, 1), "VALID")
        return sums / window**2

    unbiased = window**2 / (window**2 - 1)
    mean_a, mean_b = local(a), local(b)
    variances = unbiased * (local(a * a) - mean_a**2 + local(b * b) - mean_b**2)
    covariance = unbiased * (local(a * b) - mean_a * mean_b)
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (luminance * (2 * covariance + c2) / (variances + c2)).mean((1, 2))
