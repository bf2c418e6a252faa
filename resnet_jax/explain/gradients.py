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
    guided = _guide(program)
    if guided is program:
        raise ValueError("guided backprop needs a network with ReLUs")
    outputs = core.jaxpr_as_fun(guided)
    return _gradient(lambda images: outputs(images)[0], images, target)


def _gradient(outputs: Callable[[jax.Array], jax.Array], images: jax.Array, target: Target) -> jax.Array:
    return jax.grad(lambda x: target(outputs(x)).sum())(images).astype(jnp.float32)


@jax.custom_vjp
def _guided_relu(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0)


def _guided_backward(positive: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (jnp.where(positive & (gradient > 0), gradient, 0),)


_guided_relu.defvjp(lambda x: (_guided_relu(x), x > 0), _guided_backward)


def _guide(program: Any) -> Any:
    """Replace each ReLU in a program, and in the programs that its equations call; the same object if there is none."""
    if isinstance(program, core.ClosedJaxpr) and program.jaxpr is not program:  # since jax 0.12 it may hold itself
        inner = _guide(program.jaxpr)
        return program if inner is program.jaxpr else program.replace(jaxpr=inner)
    if isinstance(program, tuple):
        parts = tuple(_guide(part) for part in program)
        return program if all(a is b for a, b in zip(parts, program, strict=True)) else parts
    if not isinstance(program, core.Jaxpr):
        return program
    zeros = _zeros(program)
    equations = [_guide_equation(equation, zeros) for equation in program.eqns]
    same = all(a is b for a, b in zip(equations, program.eqns, strict=True))
    return program if same else program.replace(eqns=equations)


def _guide_equation(equation: core.JaxprEqn, zeros: set[core.Var]) -> core.JaxprEqn:
    if _is_relu(equation, zeros):
        (x,) = (x for x in equation.invars if not _is_zero(x, zeros))
        rule = jax.make_jaxpr(_guided_relu)(x.aval)
        return rule.eqns[0].replace(invars=[x], outvars=equation.outvars)
    if equation.primitive.name.startswith("custom_"):
        return equation  # it has a derivative rule of its own
    parameters = {name: _guide(value) for name, value in equation.params.items()}
    same = all(parameters[name] is value for name, value in equation.params.items())
    return equation if same else equation.replace(params=parameters)


def _is_relu(equation: core.JaxprEqn, zeros: set[core.Var]) -> bool:
    """Whether it is the maximum of something and 0, or a call of only that, as `jax.nn.relu` is."""
    if equation.primitive.name == "max":
        return sum(_is_zero(x, zeros) for x in equation.invars) == 1
    name = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr"}.get(equation.primitive.name, "")
    inner = equation.params.get(name)
    if inner is None:
        return False
    zeros = _zeros(inner)
    others = [equation for equation in inner.eqns if not zeros.issuperset(equation.outvars)]
    return len(others) == 1 and _is_relu(others[0], zeros)


def _zeros(program: Any) -> set[core.Var]:
    """Variables that are 0: `shard_map` casts the 0 of a ReLU to an array that varies over shards."""
    zeros: set[core.Var] = set()
    for equation in program.eqns:
        is_cast = equation.primitive.name in ("pvary", "pcast", "convert_element_type")
        if is_cast and all(_is_zero(x, zeros) for x in equation.invars):
            zeros.update(equation.outvars)
    return zeros


def _is_zero(x: Any, zeros: set[core.Var]) -> bool:
    return bool(np.all(x.val == 0)) if isinstance(x, core.Literal) else x in zeros
