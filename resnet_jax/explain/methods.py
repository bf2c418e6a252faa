"""All methods by name, with one signature."""

from typing import Protocol

import jax

from resnet_jax.explain.network import Network
from resnet_jax.explain.targets import Target
from resnet_jax.keys import Key


class Method(Protocol):
    """`(network, images, target, *, key, layer) -> heat map` float32 [B, H, W]; larger means more evidence.

    `key` is unused where nothing is random, `layer` where the method has none (None: the last map). Further keywords
    are the options of the method's own function. Compile it with `jax.jit(method, static_argnames="layer")`.
    """

    def __call__(
        self,
        network: Network,
        images: jax.Array,
        target: Target,
        *,
        key: Key,
        layer: str | None = None,
        **options,
    ) -> jax.Array: ...


METHODS: dict[str, Method] = {}
"""Methods by name; `random` is the reference for the scores in `trust`."""
# names: saliency input_x_gradient smooth_grad integrated_gradients guided_backprop grad_cam grad_cam_plus_plus hires_cam
# layer_cam score_cam eigen_cam occlusion rise random
