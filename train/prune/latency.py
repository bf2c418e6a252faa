"""How long networks take to classify a batch, side by side in one process."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.tree import PyTree
from train.runtime import compiler_options
from train.timing import interleaved, ratio, summary

WARMUP = 3


def latency(
    models: Mapping[str, tuple[nn.Module, PyTree]],
    image_shape: Sequence[int],
    *,
    batches: Sequence[int] = (1, 64),
    steps: int = 20,
    repeats: int = 10,
    plain: bool = True,
) -> dict[str, dict[str, Any]]:
    """Time the forward passes of (model, variables) on images (H, W, C), taking turns.

    Args:
      models: by name; the first is what the others are compared with.
      steps: timed calls of a block.
      repeats: blocks of each model, two or more.
      plain: the models compute by XLA alone, not by the kernels of `train.from_config.make_kernels`.

    Returns:
      By batch, as a string for JSON, and by name: `train.timing.summary` in milliseconds a batch, and for all
      but the first `speedup`, the first's time over this one's: `value`, `low`, `high`.

    Raises:
      ValueError: fewer than two blocks.
    """
    found: dict[str, dict[str, Any]] = {}
    for size in batches:
        noise = np.random.default_rng(0).standard_normal((size, *image_shape), np.float32)
        runners = {name: _runner(*pair, jnp.asarray(noise), plain) for name, pair in models.items()}
        seconds = interleaved(runners, steps=steps, repeats=repeats, warmup=WARMUP)
        first = next(iter(seconds.values()))
        found[str(size)] = {name: summary(times) for name, times in seconds.items()}
        for name, times in list(seconds.items())[1:]:
            found[str(size)][name]["speedup"] = ratio(first, times)
    return found


def _runner(model: nn.Module, variables: PyTree, images: jax.Array, plain: bool) -> Callable[[], Any]:
    """A compiled forward pass, ready to be called."""
    # Variables are constants, as in train.predict: XLA may fold whatever depends on them alone.
    forward = jax.jit(
        lambda x: model.apply(variables, x, train=False),
        compiler_options=compiler_options(model.dtype, plain=plain) or None,
    )
    return lambda: forward(images)
