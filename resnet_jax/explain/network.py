"""A network to explain: its outputs, and the maps of its layers, which can be read and perturbed."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax.resnet import ResNet
from resnet_jax.tree import PyTree

EXPLAINED = "explained"  # the collection of the map that is read


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Network:
    """A model and its variables as one value that `jax.jit` takes as an argument, with the variables traced.

    Images are normalized float [B, H, W, C]. A layer is the path of a submodule, such as `stage4_block2/conv1`; the
    second call of a module in one forward pass is `path#2`. `stage4` is the map that ends that stage: the output of its
    last block, or of `final` in pre-activation networks. None is the last map [B, h, w, K] of the network.

    Attributes:
      model: any Flax module whose `__call__` takes images alone, or a function `(variables, images) -> outputs`, which
        has no layers.
      variables: what the module is applied with, or the function's first argument.
    """

    model: nn.Module | Callable[[PyTree, jax.Array], jax.Array] = field(metadata={"static": True})
    variables: PyTree = None

    @property
    def first_center(self) -> float | None:
        """The pixel on which the first position of each map is centred; None if that is not known.

        It is pixel 0 in a `ResNet`: its kernels are odd and their padding is symmetric, so with a stride of 32 position
        i sees the surroundings of pixel 32 i (one pixel further where shortcuts pool, as in ResNet-D). Tiling the image
        would place its evidence half a stride too far to the right and down. Other modules may have an attribute of
        this name.
        """
        return 0.0 if isinstance(self.model, ResNet) else getattr(self.model, "first_center", None)

    def outputs(self, images: jax.Array) -> jax.Array:
        """Return float32 outputs [B, D]: logits, or the features of an encoder without a head."""
        apply: Any = self.model.apply if isinstance(self.model, nn.Module) else self.model
        return apply(self.variables, images).astype(jnp.float32)

    def layers(self, images: jax.Array) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shape and dtype of each layer's output, in the order of execution; nothing is computed.

        Raises:
          ValueError: the model is a function.
        """
        found: dict[str, jax.ShapeDtypeStruct] = {}

        def record(layer: str, y: jax.Array, module: nn.Module) -> jax.Array:
            found[layer] = jax.ShapeDtypeStruct(y.shape, y.dtype)
            return y

        jax.eval_shape(lambda variables, x: self._apply(variables, x, record), self.variables, images)
        return found

    def resolve(self, layer: str | None, images: jax.Array) -> str:
        """Return the path of a layer.

        Raises:
          ValueError: there is no such layer (the message lists them), or the model is a function.
        """
        return self.find(layer, images)[0]

    def find(self, layer: str | None, images: jax.Array) -> tuple[str, jax.ShapeDtypeStruct]:
        """Return the path of a layer, and the shape and dtype of its output.

        Raises:
          ValueError: as `resolve`.
        """
        layers = self.layers(images)
        if layer is None:
            maps = [name for name, y in layers.items() if len(y.shape) == 4]
            if not maps:
                raise ValueError("the network has no layer with a map [B, h, w, K]")
            return maps[-1], layers[maps[-1]]
        blocks = [name for name in layers if re.fullmatch(r"stage\d+_block\d+", name)]
        ends = {name.split("_")[0]: name for name in blocks}
        if blocks and "final" in layers:
            ends[blocks[-1].split("_")[0]] = "final"
        if layer not in layers and layer not in ends:
            top = [name for name in layers if "/" not in name]
            inner = [name for name in layers if "/" in name]
            more = f", and {len(inner)} inside them, such as {inner[-1]}" if inner else ""
            raise ValueError(f"no layer {layer!r}; layers: {', '.join([*top, *ends])}{more}")
        path = layer if layer in layers else ends[layer]
        return path, layers[path]

    def forward(
        self, images: jax.Array, layer: str | None = None, tap: jax.Array | float = 0.0
    ) -> tuple[jax.Array, jax.Array]:
        """Return float32 outputs [B, D] and the layer's map in its own dtype, with `tap` added to the map.

        The gradient with respect to a zero tap is the gradient with respect to the map.

        Raises:
          ValueError: as `resolve`.
        """
        path = self.resolve(layer, images)

        def perturb(name: str, y: jax.Array, module: nn.Module) -> jax.Array:
            if name == path:
                y = (y + tap).astype(y.dtype)
                module.sow(EXPLAINED, "map", y)  # as a variable it gets out of `nn.remat`, too
            return y

        outputs, found = self._apply(self.variables, images, perturb)
        return outputs.astype(jnp.float32), jax.tree.leaves(found)[0]

    def _apply(
        self, variables: PyTree, images: jax.Array, visit: Callable[[str, jax.Array, nn.Module], jax.Array]
    ) -> Any:
        """Apply the model with `visit(layer, output, module)` in place of each submodule's output, if it is an array.

        Returns the outputs, and the variables that `visit` has sown.
        """
        if not isinstance(self.model, nn.Module):
            raise ValueError("a function has no layers: give a Flax module and its variables")
        calls: dict[str, int] = {}

        def intercept(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            y, path = call(*args, **kwargs), "/".join(context.module.path)
            if context.method_name != "__call__" or not path or not isinstance(y, jax.Array):
                return y
            calls[path] = calls.get(path, 0) + 1
            return visit(path if calls[path] == 1 else f"{path}#{calls[path]}", y, context.module)

        with nn.intercept_methods(intercept):
            return self.model.apply(variables, images, mutable=[EXPLAINED])
