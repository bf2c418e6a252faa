"""The work of a step: floating-point operations by convention and as XLA counts them, and what they say of speed.

By convention only convolutions and dense layers count, two operations a multiply-add, with the taps that fall on
padding. Training is three forward passes less the gradient for the images, which nobody asks for.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations by convention: `flops`, those of them that fall on padding, and those of the first convolution."""

    flops: float = 0.0
    padding: float = 0.0
    first: float = 0.0

    def scaled(self, factor: float) -> "Work":
        return Work(flops=factor * self.flops, padding=factor * self.padding, first=factor * self.first)


def count(f: Callable[..., Any], *example: Any) -> Work:
    """The work of `f(*example)`, arrays or their shapes; nothing is computed."""
    ops = list(_operations(jax.make_jaxpr(f)(*example).jaxpr))
    convolutions = [flops for name, flops, _ in ops if name == "conv_general_dilated"]
    total, padding = sum(flops for _, flops, _ in ops), sum(missed for _, _, missed in ops)
    return Work(flops=total, padding=padding, first=convolutions[0] if convolutions else 0.0)


def forward(model: nn.Module, image_size: int) -> Work:
    """The work of classifying one image [image_size, image_size, 3]."""
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    variables = jax.eval_shape(lambda key: model.init(key, jnp.zeros(images.shape), train=False), jax.random.key(0))
    return count(lambda v, x: model.apply(v, x, train=False), variables, images)


def training(forward: Work) -> Work:
    """The work of a forward and backward pass, from that of the forward pass."""
    # The first convolution's padding is a small part, and that of its image gradient the same.
    padding = 3 * forward.padding - forward.padding * (forward.first / forward.flops if forward.flops else 0)
    return Work(flops=3 * forward.flops - forward.first, padding=padding)


def _operations(jaxpr: Jaxpr) -> Iterator[tuple[str, float, float]]:
    """(primitive, operations, operations on padding) of every convolution and product, in order."""
    eqn: Any
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "conv_general_dilated":
            out, kernel = eqn.outvars[0].aval, eqn.invars[1].aval
            flops = 2.0 * out.size * kernel.size / kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            yield name, flops, flops * (1 - _taps_inside(eqn))
        elif name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = eqn.invars[0].aval
            yield name, 2.0 * eqn.outvars[0].aval.size * math.prod(left.shape[axis] for axis in contracted), 0.0
        elif name == "cond":
            branches = [list(_operations(branch.jaxpr)) for branch in params["branches"]]
            yield from max(branches, key=lambda ops: sum(flops for _, flops, _ in ops))
        else:
            times = params["length"] if name == "scan" else 1
            for inner in _inner(params):
                yield from ((n, times * flops, times * missed) for n, flops, missed in _operations(inner))


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _taps_inside(eqn: Any) -> float:
    """Share of a convolution's taps that fall on the image, not on the padding around it."""
    numbers, share = eqn.params["dimension_numbers"], 1.0
    image, kernel, out = (v.aval.shape for v in (*eqn.invars[:2], eqn.outvars[0]))
    axes = zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
    for i, (a, k, o) in enumerate(axes):
        first = np.arange(out[o])[:, None] * eqn.params["window_strides"][i] - eqn.params["padding"][i][0]
        tap = first + np.arange(kernel[k])[None] * eqn.params["rhs_dilation"][i]
        hole = tap % eqn.params["lhs_dilation"][i] != 0
        last = (image[a] - 1) * eqn.params["lhs_dilation"][i]
        share *= float(((tap >= 0) & (tap <= last) & ~hole).mean())
    return share


def figures(
    work: Work | None, compiled: Any, *, images: int, devices: int, seconds: float, ceilings: dict[str, Any]
) -> dict[str, Any]:
    """Work per image, by convention and by XLA's count, and how near to the ceilings a step of `seconds` comes.

    XLA counts one device's program after optimisation. `mfu` holds the conventional count against the peak; `bound`
    compares the operations per byte that XLA would move with what the ceilings have to offer.
    """
    cost = compiled.cost_analysis() or {}
    xla_flops = cost.get("flops", 0.0) * devices / images or None
    xla_bytes = cost.get("bytes accessed", 0.0) * devices / images or None
    found: dict[str, Any] = {
        "analytic_flops_per_image": work and work.flops,
        "xla_flops_per_image": xla_flops,
        "xla_bytes_per_image": xla_bytes,
    }
    if work is None or not work.flops:
        return {"work": found, "mfu": None}
    peak = ceilings["peak_tflops"] * 1e12
    achieved = work.flops * images / seconds
    found["achieved_tflops"] = achieved / 1e12
    if xla_flops:
        found |= {"ratio": xla_flops / work.flops, "explained": _explained(xla_flops / work.flops, work)}
    if xla_bytes:
        found["intensity_flops_per_byte"] = work.flops / xla_bytes
        found["ridge_flops_per_byte"] = peak / (ceilings["copy_gb_s"] * 1e9)
        enough = found["intensity_flops_per_byte"] >= found["ridge_flops_per_byte"]
        found["bound"] = "compute" if enough else "memory"
    return {"work": found, "mfu": achieved / peak}


def _explained(ratio: float, work: Work) -> str:
    padding = work.padding / work.flops
    rest = ratio - (1 - padding)
    told = f"XLA leaves out the {padding:.1%} of the conventional count that are taps on padding"
    if rest < 0:
        return f"{told}, and {-rest:.1%} more: what it hands to libraries or computes otherwise is not in its count"
    added = "norms, activations, pooling and, where the step has them, augmentation, loss and optimizer"
    return f"{told}, and adds {rest:.1%} for {added}"
