"""Masks from a network and its config: scores, inside a step or from training images, and the selection by them."""

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax import scores
from resnet_jax.augment import Augment, preprocess_batch
from resnet_jax.channels import ChannelGroup, channel_groups, channel_masks, channel_scores, kept_channels
from resnet_jax.layers import BatchNorm
from resnet_jax.mask_schedules import MaskFn
from resnet_jax.masks import apply_masks, kernels_except, make_masks, sparsity_of
from resnet_jax.tree import Predicate, PyTree, is_kernel, leaves, map_with_path
from train.prune.config import CHANNELS, PruningConfig
from train.runtime import compiler_options
from train.state import forward
from train.steps import Loss

ROUNDS_OF_SYNFLOW = 100  # https://arxiv.org/abs/2006.05467


def select(found: PyTree, sparsity: Any, masks: PyTree | None, *, config: PruningConfig, model: nn.Module) -> PyTree:
    """Select masks by the config's structure, scope and exclusions, from scores shaped like the parameters.

    Args:
      sparsity: share to prune, in [0, 1]; may be traced.
      masks: the present masks; what they prune stays pruned. None means nothing is pruned yet.

    Raises:
      ValueError: nothing is prunable, a structure or a pattern that does not fit the model.
    """
    if config.structure == CHANNELS:
        groups = prunable_groups(model, found, config)
        made = channel_masks(
            channel_scores(found, groups),
            sparsity,
            groups=groups,
            params=found,
            scope="global" if config.scope == "global" else "uniform",
            round_to=config.round_to,
            masks=masks,
        )
    else:
        made = make_masks(
            found,
            _by_layer(found, sparsity, config) if config.layers else sparsity,
            prunable=prunable_leaves(config),
            scope=config.scope,
            structure=config.structure,
            masks=masks,
        )
    return made if masks is None else jax.tree.map(jnp.logical_and, made, masks)


def prunable_leaves(config: PruningConfig) -> Predicate:
    """Predicate of the kernels that match none of the exclusions."""
    return kernels_except(config.exclude)


def prunable_groups(model: Any, params: PyTree, config: PruningConfig) -> list[ChannelGroup]:
    """Groups of channels whose names match none of the exclusions; `params` may be their shapes."""
    groups = channel_groups(model, params)
    return [g for g in groups if not any(re.search(pattern, g.name) for pattern in config.exclude)]


def _by_layer(found: PyTree, sparsity: Any, config: PruningConfig) -> dict[str, Any]:
    """Sparsities by path: each layer's final sparsity, scaled by the overall progress towards the final sparsity."""
    prunable = prunable_leaves(config)
    paths = [path for path, x in leaves(found).items() if prunable(path, x)]
    for pattern in config.by_layer:
        if not any(re.search(pattern, path) for path in paths):
            raise ValueError(f"--prune.layers {pattern} matches no prunable kernel: {', '.join(paths[:3])}, ...")
    final = {
        path: next((share for pattern, share in config.by_layer.items() if re.search(pattern, path)), config.final)
        for path in paths
    }
    return {path: share * sparsity / config.final if config.final else share for path, share in final.items()}


def in_step(config: PruningConfig, model: nn.Module) -> MaskFn:
    """Make the scoring and selection that a schedule calls inside the step."""
    scored: dict[str, Callable[..., PyTree]] = {
        "magnitude": lambda params, grads, key: scores.magnitude(params),
        "random": lambda params, grads, key: scores.random(params, key=key),
        "norm_scale": lambda params, grads, key: scores.norm_scale(params),
        # On the step's own batch: https://arxiv.org/abs/1906.10771 with one minibatch.
        "taylor": lambda params, grads, key: jax.tree.map(lambda w, g: jnp.square(w * g), params, grads),
    }
    score = scored[config.score]

    def make(params: PyTree, grads: PyTree, masks: PyTree, key: jax.Array, sparsity: jax.Array) -> PyTree:
        return select(score(params, grads, key), sparsity, masks, config=config, model=model)

    return make


def prune_at_once(
    params: PyTree,
    stats: PyTree,
    masks: PyTree,
    *,
    config: PruningConfig,
    model: nn.Module,
    loss: Loss,
    preprocess: Augment,
    batches: Iterable[Any],
    image_shape: Sequence[int],
    key: jax.Array,
) -> PyTree:
    """Prune to the config's final sparsity, starting from `masks`, in the config's number of rounds of scoring.

    Args:
      loss, preprocess, batches: for scores that depend on data: `(logits, soft labels) -> losses`, the normalisation of
        images, and batches of training images and labels.
      image_shape: shape of the network's inputs, for scores that use an image of ones.

    Raises:
      ValueError: the errors of `select`, or scores that are not finite.
    """
    rounds = config.rounds or (ROUNDS_OF_SYNFLOW if config.score == "synflow" else 1)
    already = pruned_share(masks, params, config=config, model=model)
    chosen = jax.jit(partial(select, config=config, model=model))
    # Each score declares the arguments that it needs: pass only those.
    function: Any = scores.SCORES[config.score]
    offered: dict[str, Any] = {
        "loss": per_example_loss(model, stats, loss, preprocess),
        "batches": batches,
        "forward": neutral_forward(model, stats, image_shape),
        "key": key,
    }
    taken = inspect.signature(function).parameters
    given = {name: value for name, value in offered.items() if name in taken}
    # Every round keeps the same share of the remaining weights, so that the last one reaches the final sparsity.
    for number in range(1, rounds + 1):
        sparsity = 1 - (1 - already) * ((1 - config.final) / (1 - already)) ** (number / rounds)
        masks = chosen(function(apply_masks(params, masks), **given), jnp.float32(sparsity), masks)
    return masks


def pruned_share(masks: PyTree, params: PyTree, *, config: PruningConfig, model: nn.Module) -> float:
    """Share of the prunable weights, or channels, that is already pruned, as `config.sparsity` counts it."""
    if config.structure != CHANNELS:
        prunable, held = prunable_leaves(config), leaves(masks)
        return float(sparsity_of([held[path] for path, x in leaves(params).items() if prunable(path, x)]))
    kept = kept_channels(masks, prunable_groups(model, params, config))
    return float(1 - sum(k.sum() for k in kept.values()) / sum(k.size for k in kept.values()))


def check_patterns(params: PyTree, *, config: PruningConfig, model: nn.Module) -> None:
    """Refuse a pattern from the user that matches nothing.

    Raises:
      ValueError: there is such a pattern; the message lists some of the names.
    """
    channels = config.structure == CHANNELS
    groups: list[ChannelGroup] = list(channel_groups(model, params)) if channels else []  # type: ignore[arg-type]
    names = [g.name for g in groups] or [path for path, x in leaves(params).items() if is_kernel(path, x)]
    for pattern in config.exclude:
        if pattern not in PruningConfig().exclude and not any(re.search(pattern, name) for name in names):
            raise ValueError(f"--prune.exclude {pattern} matches none of the names {', '.join(names[:3])}, ...")


def per_example_loss(model: nn.Module, stats: PyTree, loss: Loss, preprocess: Augment) -> scores.Loss:
    """Make (params, batch) -> losses [B] on images that are normalised but not augmented, with running statistics."""

    def losses(params: PyTree, batch: Any) -> jax.Array:
        images = preprocess_batch(preprocess, batch["image"])
        logits, _ = forward(model, {"params": params, "batch_stats": stats}, images)
        return loss(logits, jax.nn.one_hot(batch["label"], logits.shape[-1]))

    return losses


def neutral_forward(model: nn.Module, stats: PyTree, image_shape: Sequence[int]) -> Callable[[PyTree], jax.Array]:
    """Make the network's forward pass on an image of ones, with norms and biases neutral, as SynFlow requires."""
    neutral = map_with_path(lambda path, x: jnp.full_like(x, path.endswith("/var")), stats)
    images = jnp.ones((1, *image_shape))

    def outputs(params: PyTree) -> Any:
        still = {"bias": 0.0, "scale": 1.0}
        last = lambda path: path.rsplit("/", 1)[-1]  # noqa: E731
        params = map_with_path(
            lambda path, x: jnp.full_like(x, still[last(path)]) if last(path) in still else x, params
        )
        return forward(model, {"params": params, "batch_stats": neutral}, images)[0]

    return outputs


def recalibrate(
    params: PyTree, stats: PyTree, batches: Iterable[Any], *, model: nn.Module, preprocess: Augment
) -> PyTree:
    """Measure the network's batch statistics again, as a mean over batches of training images that are not augmented.

    The old statistics have no influence: the new ones start at zero and are divided by the sum of the weights that the
    decay gives to the batches.
    """

    @partial(jax.jit, compiler_options=compiler_options(getattr(model, "dtype", jnp.float32)))
    def updated(params: PyTree, stats: PyTree, batch: Any) -> PyTree:
        images = preprocess_batch(preprocess, batch["image"])
        return forward(model, {"params": params, "batch_stats": stats}, images, train=True)[1]

    start, count = jax.tree.map(jnp.zeros_like, stats), 0
    for batch in batches:
        start, count = updated(params, start, batch), count + 1
    share = 1 - BatchNorm.keywords["momentum"] ** count
    return jax.tree.map(lambda x: x / share, start)
