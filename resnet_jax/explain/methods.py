"""All methods by name, with one signature."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from resnet_jax.explain import cam, gradients, perturbation
from resnet_jax.explain.maps import upsample
from resnet_jax.explain.network import Network
from resnet_jax.explain.targets import Target
from resnet_jax.keys import Key


class Method(Protocol):
    """`(network, images, target, *, key, layer) -> heat map`, float32 [B, H, W]; larger values mean more evidence.

    `key` is unused where nothing is random (elsewhere ValueError if it is None), and so is `layer` where the method has
    none. Further keywords are the options of the method's own function. Compile a method with
    `jax.jit(method, static_argnames="layer")`, after fixing its options with `functools.partial`.
    """

    def __call__(
        self,
        network: Network,
        images: jax.Array,
        target: Target,
        *,
        key: Key | None = None,
        layer: str | None = None,
        **options: Any,
    ) -> jax.Array: ...


def random(network: Network, images: jax.Array, target: Target, *, key: Key) -> jax.Array:
    """Return a heat map of uniform noise in [0, 1): what the scores of a method are to be compared with."""
    return jax.random.uniform(key, images.shape[:3], jnp.float32)


def _method(
    function: Callable[..., jax.Array],
    finish: Callable[[jax.Array, Network, tuple[int, ...]], jax.Array] = lambda heat, network, size: heat,
    passed: tuple[str, ...] = (),
) -> Method:
    """Give a function the common signature: pass it those of `key` and `layer` that it takes, and finish its result."""

    def method(network, images, target, *, key=None, layer=None, **options):
        if "key" in passed and key is None:
            raise ValueError(f"{function.__name__} draws at random: it needs a key")
        given = {"key": key, "layer": layer}
        result = function(network, images, target, **{name: given[name] for name in passed}, **options)
        return finish(result, network, images.shape[1:3])

    method.__doc__ = function.__doc__
    return method


def _strongest(attribution: jax.Array, network: Network, size: tuple[int, ...]) -> jax.Array:
    """How much a pixel matters: the largest absolute value over the colours."""
    return jnp.abs(attribution).max(-1)


def _summed(attribution: jax.Array, network: Network, size: tuple[int, ...]) -> jax.Array:
    """How much a pixel contributes to the score: the sum over the colours."""
    return attribution.sum(-1)


def _placed(maps: jax.Array, network: Network, size: tuple[int, ...]) -> jax.Array:
    """A map as large as the images, each of its positions at the pixel that it sees most of."""
    return upsample(maps, size, first=network.first_center)


def _score_cam(network: Network, images: jax.Array, target: Target, layer: str | None, **options: Any) -> jax.Array:
    return cam.score_cam(network, images, target, layer, first=network.first_center, **options)


METHODS: dict[str, Method] = {
    "saliency": _method(gradients.saliency, _strongest),
    "input_x_gradient": _method(gradients.input_x_gradient, _summed),
    "smooth_grad": _method(gradients.smooth_grad, _strongest, ("key",)),
    "integrated_gradients": _method(gradients.integrated_gradients, _summed),
    "guided_backprop": _method(gradients.guided_backprop, _strongest),
    "grad_cam": _method(cam.grad_cam, _placed, ("layer",)),
    "grad_cam_plus_plus": _method(cam.grad_cam_plus_plus, _placed, ("layer",)),
    "hires_cam": _method(cam.hires_cam, _placed, ("layer",)),
    "layer_cam": _method(cam.layer_cam, _placed, ("layer",)),
    "score_cam": _method(_score_cam, _placed, ("layer",)),
    "eigen_cam": _method(cam.eigen_cam, _placed, ("layer",)),
    "occlusion": _method(perturbation.occlusion),
    "rise": _method(perturbation.rise, passed=("key",)),
    "random": _method(random, passed=("key",)),
}
"""Methods by name; `random` is the reference for the scores of the others."""
