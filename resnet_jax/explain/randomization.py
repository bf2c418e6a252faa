"""Cascading randomization: a method whose maps do not change with the weights does not explain them.

Adebayo et al. 2018, https://arxiv.org/abs/1810.03292.
"""

from collections.abc import Callable, Iterator

import jax

from resnet_jax.explain.network import Network
from resnet_jax.keys import Key


def cascade(network: Network, images: jax.Array, *, key: Key) -> Iterator[tuple[str, Network]]:
    """Yield (name, network) with the parameters initialised again from the top to this module, cumulatively.

    Modules are those directly under the network, last first. All networks have the same structure, so a compiled
    method is compiled once. Batch statistics stay.

    Raises:
      ValueError: the model is a function.
    """
    raise NotImplementedError


def randomization(
    method: Callable[[Network], jax.Array], network: Network, images: jax.Array, *, key: Key
) -> dict[str, jax.Array]:
    """Return the rank correlation [B] of `method(network)` with the map of each network of `cascade`, by name."""
    raise NotImplementedError


def rank_correlation(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return Spearman's rank correlation of maps [B, H, W], [B] in [-1, 1]."""
    raise NotImplementedError


def ssim(a: jax.Array, b: jax.Array, *, window: int = 7) -> jax.Array:
    """Return the structural similarity of maps in [0, 1], [B, H, W] to [B] in [-1, 1]."""
    raise NotImplementedError
