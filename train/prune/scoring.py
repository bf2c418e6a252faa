"""Masks from scores: what is selected, scores inside a step or from training images, and recomputed statistics."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax import scores
from resnet_jax.augment import Augment, preprocess_batch
from resnet_jax.channels import ChannelGroup, channel_masks, channel_scores, kept_channels
from resnet_jax.mask_schedules import MaskFn
from resnet_jax.masks import Scope, apply_masks, make_masks, sparsity_of
from resnet_jax.tree import Predicate, PyTree, is_kernel, leaves, map_with_path
from train.runtime import compiler_options
from train.state import forward
from train.steps import Loss

LARGE = 2.0**20


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """Pruning of weights: single ones, N:M patterns or blocks.

    Attributes:
      prunable, scope, structure: see `resnet_jax.masks.make_masks`.
      layers: final sparsity of each prunable path, which replaces the scope if it is not empty.
      final: final sparsity of the network, in [0, 1); `layers` follow its progress.
    """

    prunable: Predicate = is_kernel
    scope: Scope = "global"
    structure: str = "unstructured"
    layers: Mapping[str, float] = field(default_factory=dict)
    final: float

    def select(self, found: PyTree, sparsity: Any, masks: PyTree | None = None) -> PyTree:
        """Make masks from scores shaped like the parameters; what `masks` prune stays pruned.

        Args:
          sparsity: share to prune, in [0, 1]; may be traced.

        Raises:
          ValueError: nothing is prunable, or the structure does not fit the model.
        """
        done = {path: share * sparsity / self.final if self.final else share for path, share in self.layers.items()}
        return make_masks(
            found,
            done or sparsity,
            prunable=self.prunable,
            scope=self.scope,
            structure=self.structure,
            masks=masks,
        )

    def share(self, masks: PyTree) -> float:
        """Share of the prunable weights that is pruned, as `sparsity` counts it."""
        return float(sparsity_of([mask for path, mask in leaves(masks).items() if self.prunable(path, mask)]))


@dataclass(frozen=True, kw_only=True, eq=False)
class Channels:
    """Pruning of whole channels, see `resnet_jax.channels.channel_masks`; methods as in `Weights`."""

    groups: Sequence[ChannelGroup]
    scope: Literal["global", "uniform"] = "global"
    round_to: int = 8

    def select(self, found: PyTree, sparsity: Any, masks: PyTree | None = None) -> PyTree:
        made = channel_masks(
            channel_scores(found, self.groups),
            sparsity,
            groups=self.groups,
            params=found,
            scope=self.scope,
            round_to=self.round_to,
            masks=masks,
        )
        # Single weights of the remaining channels may have been pruned before.
        return made if masks is None else jax.tree.map(jnp.logical_and, made, masks)

    def share(self, masks: PyTree) -> float:
        kept = kept_channels(jax.device_get(masks), self.groups).values()
        return float(1 - sum(k.sum() for k in kept) / sum(k.size for k in kept))


Target = Weights | Channels


def in_step(score: str, target: Target) -> MaskFn:
    """Make the scoring and selection that a schedule calls inside the step."""
    scored: dict[str, Callable[..., PyTree]] = {
        "magnitude": lambda params, grads, key: scores.magnitude(params),
        "random": lambda params, grads, key: scores.random(params, key=key),
        "norm_scale": lambda params, grads, key: scores.norm_scale(params),
        # On the step's own batch: https://arxiv.org/abs/1906.10771 with one minibatch.
        "taylor": lambda params, grads, key: jax.tree.map(lambda w, g: jnp.square(w * g), params, grads),
    }

    def make(params: PyTree, grads: PyTree, masks: PyTree, key: jax.Array, sparsity: jax.Array) -> PyTree:
        return target.select(scored[score](params, grads, key), sparsity, masks)

    return make


def prune_at_once(
    params: PyTree, masks: PyTree, *, score: Callable[[PyTree], PyTree], target: Target, final: float, rounds: int = 1
) -> PyTree:
    """Prune to the share `final`, starting from `masks`, in this number of rounds of scoring.

    Raises:
      ValueError: the errors of the target's `select` and of the score.
    """
    already, select = target.share(masks), jax.jit(target.select)
    # Every round keeps the same share of the remaining weights, so that the last one reaches the final sparsity.
    for number in range(1, rounds + 1):
        sparsity = 1 - (1 - already) * ((1 - final) / (1 - already)) ** (number / rounds)
        masks = select(score(apply_masks(params, masks)), jnp.float32(sparsity), masks)
    return masks


def bind_score(name: str, **offered: Any) -> Callable[[PyTree], PyTree]:
    """Bind those of the arguments that this score takes, which leaves a function of the parameters."""
    taken = inspect.signature(scores.SCORES[name]).parameters
    return partial(scores.SCORES[name], **{key: value for key, value in offered.items() if key in taken})


def per_example_loss(model: nn.Module, stats: PyTree, loss: Loss, preprocess: Augment) -> scores.Loss:
    """Make (params, batch) -> losses [B] on images that are normalised but not augmented, with running statistics."""

    def losses(params: PyTree, batch: Any) -> jax.Array:
        images = preprocess_batch(preprocess, batch["image"])
        logits, _ = forward(model, {"params": params, "batch_stats": stats}, images)
        return loss(logits, jax.nn.one_hot(batch["label"], logits.shape[-1]))

    return losses


def neutral_forward(model: nn.Module, stats: PyTree, image_shape: Sequence[int]) -> Callable[[PyTree], jax.Array]:
    """Make the network's forward pass on an image of ones, with norms and biases neutral, as SynFlow requires."""
    still = {"bias": 0.0, "scale": 1.0, "mean": 0.0, "var": 1.0}

    def neutral(path: str, x: jax.Array) -> jax.Array:
        name = path.rsplit("/", 1)[-1]
        return jnp.full_like(x, still[name]) if name in still else x

    def outputs(params: PyTree) -> Any:
        variables = {"params": map_with_path(neutral, params), "batch_stats": map_with_path(neutral, stats)}
        return forward(model, variables, jnp.ones((1, *image_shape)))[0]

    return outputs


def recalibrate(
    params: PyTree, stats: PyTree, batches: Iterable[Any], *, model: nn.Module, preprocess: Augment
) -> PyTree:
    """Measure the network's batch statistics again, as a mean over batches of training images that are not augmented.

    The old statistics have no influence: the new ones start at zero and are divided by the sum of the weights that the
    decay gives to the batches.
    """

    @partial(jax.jit, compiler_options=compiler_options(getattr(model, "dtype", jnp.float32)))
    def updated(params: PyTree, starts: Sequence[PyTree], batch: Any) -> list[PyTree]:
        images = preprocess_batch(preprocess, batch["image"])
        return [forward(model, {"params": params, "batch_stats": stats}, images, train=True)[1] for stats in starts]

    # What remains of the second start, too large for the images to round it, is the decay of norms of any momentum.
    found = [jax.tree.map(partial(jnp.full_like, fill_value=start), stats) for start in (0, LARGE)]
    for batch in batches:
        found = updated(params, found, batch)
    return jax.tree.map(lambda low, high: low / (1 - (high - low) / LARGE), *found)
