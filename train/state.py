"""The state of training: arrays only, so that one pytree is compiled, donated, saved and compared."""

import hashlib
from inspect import signature
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from resnet_jax.masks import no_masks
from resnet_jax.tree import PyTree, leaves


class TrainState(struct.PyTreeNode):
    """The state that a step reads and writes.

    Attributes:
      step: int32 scalar, number of updates done.
      params: float32 parameters.
      batch_stats: float32 running statistics of the norms.
      opt_state: state of the optax optimizer.
      masks: boolean tree like `params`, 0-d True where a leaf is never pruned; `params == apply_masks(params, masks)`.
      ema: None, or the moving average of {"params", "batch_stats"}.
      key: the run's typed key; steps derive their keys from it and never change it.
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    masks: PyTree
    ema: PyTree | None
    key: jax.Array

    @property
    def variables(self) -> dict[str, PyTree]:
        """The variables for inference: the moving average if there is one."""
        return self.ema or {"params": self.params, "batch_stats": self.batch_stats}


def init_variables(model: nn.Module, key: jax.Array, image_shape: tuple[int, int, int]) -> dict[str, PyTree]:
    """Initialise variables {"params", "batch_stats"} of `model` for images (H, W, C), in one compiled call."""
    images = jnp.zeros((1, *image_shape), jnp.float32)
    variables = jax.jit(lambda k: single_precision(model.init(k, images, **train_argument(model, False))))(key)
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def forward(
    model: nn.Module,
    variables: PyTree,
    images: jax.Array,
    *,
    train: bool = False,
    rngs: dict[str, jax.Array] | None = None,
    **options: Any,
) -> tuple[Any, PyTree]:
    """Apply any Flax module to images float [B, H, W, C]; returns (outputs, batch statistics afterwards).

    The module is called as `model(images, train=train, **options)`, without `train` if it does not take it. Its
    parameters are the collection "params", its running statistics "batch_stats" (empty if it has none).
    """
    stats = variables.get("batch_stats", {})
    options |= train_argument(model, train)
    if not train:
        return model.apply(variables, images, **options), stats
    outputs, updated = model.apply(variables, images, rngs=rngs, mutable=["batch_stats"], **options)
    return outputs, updated.get("batch_stats", stats)


def train_argument(model: nn.Module, train: bool) -> dict[str, Any]:
    """{"train": train} for a module that takes it, else {}."""
    return {"train": train} if "train" in signature(type(model).__call__).parameters else {}


def init_state(
    variables: dict[str, PyTree],
    tx: optax.GradientTransformation,
    key: jax.Array,
    *,
    masks: PyTree | None = None,
    ema: bool = False,
) -> TrainState:
    """Make a state at step 0. `key` is the run's key; `ema` starts a moving average at `variables`."""
    arrays = single_precision({name: variables[name] for name in ("params", "batch_stats")})
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        **arrays,
        opt_state=single_precision(tx.init(arrays["params"])),
        masks=no_masks(arrays["params"]) if masks is None else masks,
        # A copy: donated buffers must not appear twice in a state.
        ema=jax.tree.map(jnp.copy, arrays) if ema else None,
        key=key,
    )


def single_precision(tree: PyTree) -> PyTree:
    """Convert float64 to float32 and int64 to int32, which JAX makes if it is set to 64 bits; copies nothing else."""
    single = {"float64": "float32", "int64": "int32"}
    return jax.tree.map(lambda x: x.astype(single[name]) if (name := str(x.dtype)) in single else x, tree)


def like(new: PyTree, old: PyTree) -> PyTree:
    """`new` in the dtypes of `old`: with 64 bits, float64 learning rates would make all parameters float64."""
    return jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), new, old)


def digest(state: TrainState) -> str:
    """sha256 over parameters, statistics and masks: equal digests mean bit-equal runs."""
    return digest_of({"params": state.params, "batch_stats": state.batch_stats, "masks": state.masks})


def digest_of(tree: PyTree) -> str:
    """sha256 over the leaves of a tree, in the order of their paths."""
    sha = hashlib.sha256()
    for path, leaf in sorted(leaves(tree).items()):
        array = np.ascontiguousarray(leaf)
        sha.update(f"{path} {array.dtype} {array.shape}".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()
