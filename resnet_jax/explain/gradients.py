"""Attributions by gradients: each is float32 [B, H, W, C], as large as the images."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from resnet_jax.explain.network import Network
from resnet_jax.explain.sampling import total
from resnet_jax.explain.targets import Target
from resnet_jax.keys import Key


def saliency(network: Network, images: jax.Array, target: Target) -> jax.Array:
    """Return the gradient of the score with respect to the images, https://arxiv.org/abs/1312.6034."""
    return _gradient(network.outputs, images, target)


def input_x_gradient(
    network: Network, images: jax.Array, target: Target, *, baseline: float | jax.Array = 0.0
) -> jax.Array:
    """Return (images - baseline) times the gradient, https://arxiv.org/abs/1605.01713."""
    return (images - baseline) * saliency(network, images, target)


def smooth_grad(
    network: Network,
    images: jax.Array,
    target: Target,
    *,
    key: Key,
    samples: int = 32,
    noise: float = 0.15,
    chunk: int = 4,
) -> jax.Array:
    """Return the mean gradient over noisy copies, https://arxiv.org/abs/1706.03825.

    The standard deviation of the noise is `noise` times each image's range; `chunk` copies are computed at once.
    """
    spread = noise * (images.max((1, 2, 3), keepdims=True) - images.min((1, 2, 3), keepdims=True))

    def sample(key: Key) -> jax.Array:
        return saliency(network, images + spread * jax.random.normal(key, images.shape), target)

    return total(sample, jax.random.split(key, samples), chunk) / samples


def integrated_gradients(
    network: Network,
    images: jax.Array,
    target: Target,
    *,
    baseline: float | jax.Array = 0.0,
    steps: int = 50,
    chunk: int = 4,
) -> jax.Array:
    """Integrate the gradient on the line from a baseline to the images, https://arxiv.org/abs/1703.01365.

    The attributions of an image sum to its score minus the baseline's (`trust.completeness_error`), up to the error of
    Gauss-Legendre quadrature with `steps` points, `chunk` of them at once.
    """
    points, weights = np.polynomial.legendre.leggauss(steps)
    line = jnp.asarray((points + 1) / 2, jnp.float32), jnp.asarray(weights / 2, jnp.float32)

    def sample(point: tuple[jax.Array, jax.Array]) -> jax.Array:
        share, weight = point
        return weight * saliency(network, baseline + share * (images - baseline), target)

    return (images - baseline) * total(sample, line, chunk)


def guided_backprop(network: Network, images: jax.Array, target: Target) -> jax.Array:
    """Return the gradient where each ReLU also stops negative gradients, https://arxiv.org/abs/1412.6806.

    The rule of ReLU is replaced in the traced program, so any network will do, function or module. The map looks like
    the edges of the image whatever the weights are (`randomization`), so do not use it to judge a network.

    Raises:
      ValueError: the network has no ReLU.
    """
    program = jax.make_jaxpr(network.outputs)(images)
    replaced: list[Any] = []

    def outputs(images: jax.Array) -> jax.Array:
        return _evaluate(program.jaxpr, program.consts, [images], replaced)[0]

    result = _gradient(outputs, images, target)
    if not replaced:
        raise ValueError("guided backprop needs a network with ReLUs")
    return result


def _gradient(outputs: Callable[[jax.Array], jax.Array], images: jax.Array, target: Target) -> jax.Array:
    return jax.grad(lambda x: target(outputs(x)).sum())(images).astype(jnp.float32)


@jax.custom_vjp
def _guided_relu(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0)


def _guided_backward(positive: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (jnp.where(positive & (gradient > 0), gradient, 0),)


_guided_relu.defvjp(lambda x: (_guided_relu(x), x > 0), _guided_backward)


def _inner(equation: core.JaxprEqn) -> core.Jaxpr | None:
    """The program of a call without a derivative rule of its own, or of a `custom_jvp`."""
    name = {"jit": "jaxpr", "pjit": "jaxpr", "checkpoint": "jaxpr", "custom_jvp_call": "call_jaxpr"}
    inner = equation.params.get(name.get(equation.primitive.name, ""))
    return getattr(inner, "jaxpr", inner)


def _is_relu(equation: core.JaxprEqn) -> bool:
    """Whether it is the maximum of something and 0, or a call of only that, as `jax.nn.relu` is."""
    if equation.primitive.name == "max":
        return any(isinstance(x, core.Literal) and np.all(x.val == 0) for x in equation.invars)
    inner = _inner(equation)
    return inner is not None and len(inner.eqns) == 1 and _is_relu(inner.eqns[0])


def _evaluate(jaxpr: core.Jaxpr, consts: Any, inputs: list[Any], replaced: list[Any]) -> list[Any]:
    """Evaluate a program with `_guided_relu` in place of each ReLU, and list those in `replaced`."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

    def read(x: Any) -> Any:
        return x.val if isinstance(x, core.Literal) else values[x]

    for equation in jaxpr.eqns:
        arguments, inner = [read(x) for x in equation.invars], _inner(equation)
        if _is_relu(equation):
            replaced.append(equation)
            x = next(read(x) for x in equation.invars if not isinstance(x, core.Literal))
            results = [_guided_relu(x)]
        elif inner is not None and equation.primitive.name != "custom_jvp_call":
            closed = equation.params["jaxpr"]
            results = _evaluate(inner, getattr(closed, "consts", ()), arguments, replaced)
        else:
            rules, parameters = equation.primitive.get_bind_params(equation.params)
            results = equation.primitive.bind(*rules, *arguments, **parameters)
            results = results if equation.primitive.multiple_results else [results]
        values.update(zip(equation.outvars, results, strict=True))
    return [read(x) for x in jaxpr.outvars]
