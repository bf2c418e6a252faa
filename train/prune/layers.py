"""Weights and multiply-adds of a network, layer by layer, and how many of each pruning kept."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.tree import PyTree, count, leaves

Row = dict[str, Any]


def layer_table(model: nn.Module, variables: PyTree, masks: PyTree, image_shape: Sequence[int]) -> list[Row]:
    """Make one row per convolution and dense layer, in the order of the forward pass, without computing anything.

    Multiply-adds of one image (H, W, C) by convention: taps that fall on padding count, biases do not.

    Returns:
      Rows of `path` (of the kernel, as in `resnet_jax.tree.leaves`), `shape`, `parameters` (of the kernel), `kept`
      (parameters that the mask keeps), `sparsity` in [0, 1], `prunable` (whether its mask is not a 0-d True), `macs`,
      and `nonzero_macs` (those with kept weights).

    Raises:
      ValueError: a mask whose shape differs from its kernel's.
      KeyError: masks of a different network.
    """
    kernels, masked = leaves(variables["params"]), leaves(masks)
    rows = []
    for path, positions in _output_positions(model, variables, image_shape).items():
        shape, mask = kernels[path].shape, np.asarray(masked[path])
        kept, parameters = int(np.count_nonzero(np.broadcast_to(mask, shape))), math.prod(shape)
        rows.append(
            {
                "path": path,
                "shape": list(shape),
                "parameters": parameters,
                "kept": kept,
                "sparsity": 1 - kept / parameters,
                "prunable": mask.ndim > 0,
                # Every weight, grouped or not, is used once at each position of its output.
                "macs": parameters * positions,
                "nonzero_macs": kept * positions,
            }
        )
    return rows


def _output_positions(model: nn.Module, variables: PyTree, image_shape: Sequence[int]) -> dict[str, int]:
    """Count the uses of each kernel in the forward pass of one image: height times width of its layer's output."""
    positions: dict[str, int] = {}

    def record(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        result = call(*args, **kwargs)
        # Count any module that owns a kernel as a layer, whichever way it is computed.
        if context.method_name == "__call__" and context.module.has_variable("params", "kernel"):
            path = "/".join((*context.module.path, "kernel"))
            positions[path] = positions.get(path, 0) + math.prod(result.shape[1:-1])
        return result

    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with nn.intercept_methods(record):
        jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, images)
    return positions


def totals(rows: Sequence[Row], variables: PyTree) -> dict[str, Any]:
    """Sum up `parameters`, `kept_parameters`, `sparsity`, `macs` and `nonzero_macs` over the whole network.

    Biases and norms are parameters and always count as kept; `sparsity` is the pruned share of all prunable kernels, 0
    if there are none.
    """
    parameters = count(variables["params"])
    size, kept = (sum(row[name] for row in rows if row["prunable"]) for name in ("parameters", "kept"))
    return {
        "parameters": parameters,
        "kept_parameters": parameters - sum(row["parameters"] - row["kept"] for row in rows),
        "sparsity": 1 - kept / size if size else 0.0,
        "macs": sum(row["macs"] for row in rows),
        "nonzero_macs": sum(row["nonzero_macs"] for row in rows),
    }


def text(rows: Sequence[Row]) -> str:
    """Format the rows as a table for a terminal 100 columns wide, with sums in the last line; MACs in millions."""
    names = ("parameters", "kept", "macs", "nonzero_macs")
    sums = {name: sum(row[name] for row in rows) for name in names}
    last = {"path": "all of these", "shape": [], "sparsity": 1 - sums["kept"] / sums["parameters"], **sums}
    lines: list[Sequence[str]] = [("layer", "shape", "weights", "kept", "sparsity", "MMACs", "kept")]
    for row in [*rows, last]:
        weights, macs = [f"{row[name]:,}" for name in names[:2]], [f"{row[name] / 1e6:,.3f}" for name in names[2:]]
        shape = "x".join(map(str, row["shape"]))
        lines.append((short(row["path"]), shape, *weights, f"{row['sparsity']:.1%}", *macs))
    return aligned(lines, "<<")


def short(path: str) -> str:
    """Name of a layer: the path of its kernel without `/kernel`."""
    return path.removesuffix("/kernel")


def aligned(lines: Sequence[Sequence[str]], edges: str = "") -> str:
    """Align lines of equal length in columns, two spaces apart: left where `edges` has <, otherwise right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    forms = [f"{{:{edge}{width}}}" for edge, width in zip(edges.ljust(len(widths), ">"), widths, strict=True)]
    return "\n".join(
        "  ".join(form.format(cell) for form, cell in zip(forms, line, strict=True)).rstrip() for line in lines
    )
