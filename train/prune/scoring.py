"""From a network and its config to masks: scores, inside a step or from training images, and what they select."""

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax import scores
from resnet_jax.augment import augment_batch
from resnet_jax.channels import ChannelGroup, channel_groups, channel_masks, channel_scores, kept_channels
from resnet_jax.keys import example_keys
from resnet_jax.layers import BatchNorm
from resnet_jax.losses import LOSSES
from resnet_jax.mask_schedules import MaskFn
from resnet_jax.masks import kernels_except, make_masks, sparsity_of
from resnet_jax.tree import PyTree, is_kernel, leaves, map_with_path
from train.from_config import eval_augment
from train.prune.config import CHANNELS, PruneConfig, PruningConfig
from train.runtime import compiler_options

ROUNDS_OF_SYNFLOW = 100  # https://arxiv.org/abs/2006.05467


def select(found: PyTree, sparsity: Any, masks: PyTree | None, *, config: PruningConfig, model: nn.Module) -> PyTree:
    """Masks by the config's structure, scope and exclusions, from scores shaped like the parameters.

    Args:
      sparsity: may be traced.
      masks: the present ones, of which nothing returns; None is none.

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
        prunable = kernels_except(config.exclude)
        made = make_masks(
            found,
            _by_layer(found, sparsity, config) if config.layers else sparsity,
            prunable=prunable,
            scope=config.scope,
            structure=config.structure,
            masks=masks,
        )
    return made if masks is None else jax.tree.map(jnp.logical_and, made, masks)


def prunable_groups(model: Any, params: PyTree, config: PruningConfig) -> list[ChannelGroup]:
    """The groups of channels whose names match none of the exclusions; `params` may be their shapes."""
    groups = channel_groups(model, params)
    return [g for g in groups if not any(re.search(pattern, g.name) for pattern in config.exclude)]


def _by_layer(found: PyTree, sparsity: Any, config: PruningConfig) -> dict[str, Any]:
    """Shares by path: on the way to the final sparsity each layer is as far as all are."""
    prunable = kernels_except(config.exclude)
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
    """Scores and selection as a schedule calls them inside the step."""
    scored: dict[str, Callable[..., PyTree]] = {
        "magnitude": lambda params, grads, key: scores.magnitude(params),
        "random": lambda params, grads, key: scores.random(params, key=key),
        "norm_scale": lambda params, grads, key: scores.norm_scale(params),
        # Of the step's own batch: https://arxiv.org/abs/1906.10771 with one minibatch.
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
    config: PruneConfig,
    model: nn.Module,
    batches: Iterable[Any],
    image_shape: Sequence[int],
    key: jax.Array,
) -> PyTree:
    """Masks at the config's final sparsity, from `masks` on, in as many rounds of scoring as it says.

    Args:
      batches: of training images and labels, for scores that look at data.

    Raises:
      ValueError: as `select`, or scores that are not finite.
    """
    p = config.prune
    rounds = p.rounds or (ROUNDS_OF_SYNFLOW if p.score == "synflow" else 1)
    already = pruned_share(masks, params, config=p, model=model)
    chosen = jax.jit(partial(select, config=p, model=model))
    function: Any = scores.SCORES[p.score]
    offered: dict[str, Any] = {
        "loss": per_example_loss(config, model, stats),
        "batches": batches,
        "forward": neutral_forward(model, stats, image_shape),
        "key": key,
    }
    taken = inspect.signature(function).parameters
    given = {name: value for name, value in offered.items() if name in taken}
    for number in range(1, rounds + 1):
        masked = jax.tree.map(lambda w, m: jnp.where(m, w, 0), params, masks)
        sparsity = 1 - (1 - already) * ((1 - p.final) / (1 - already)) ** (number / rounds)
        masks = chosen(function(masked, **given), jnp.float32(sparsity), masks)
    return masks


def pruned_share(masks: PyTree, params: PyTree, *, config: PruningConfig, model: nn.Module) -> float:
    """The share that is pruned already of what `config.sparsity` counts: prunable weights, or channels."""
    if config.structure != CHANNELS:
        prunable, held = kernels_except(config.exclude), leaves(masks)
        return float(sparsity_of([held[path] for path, x in leaves(params).items() if prunable(path, x)]))
    kept = kept_channels(masks, prunable_groups(model, params, config))
    return float(1 - sum(k.sum() for k in kept.values()) / sum(k.size for k in kept.values()))


def check_patterns(params: PyTree, *, config: PruningConfig, model: nn.Module) -> None:
    """Refuse a pattern that the user gave and that matches nothing.

    Raises:
      ValueError: that, with some of the names there are.
    """
    channels = config.structure == CHANNELS
    groups: list[ChannelGroup] = list(channel_groups(model, params)) if channels else []  # type: ignore[arg-type]
    names = [g.name for g in groups] or [path for path, x in leaves(params).items() if is_kernel(path, x)]
    for pattern in config.exclude:
        if pattern not in PruningConfig().exclude and not any(re.search(pattern, name) for name in names):
            raise ValueError(f"--prune.exclude {pattern} matches nothing: there are {', '.join(names[:3])}, ...")


def per_example_loss(config: PruneConfig, model: nn.Module, stats: PyTree) -> scores.Loss:
    """(params, batch) -> losses [B] of images that are normalised and not augmented, with running statistics."""
    preprocess = eval_augment(config.augment)

    def loss(params: PyTree, batch: Any) -> jax.Array:
        keys = example_keys(jax.random.key(0), jnp.arange(len(batch["label"])))
        images = augment_batch(preprocess, keys, batch["image"])
        logits: Any = model.apply({"params": params, "batch_stats": stats}, images, train=False)
        return LOSSES[config.loss](logits, jax.nn.one_hot(batch["label"], logits.shape[-1]))

    return loss


def neutral_forward(model: nn.Module, stats: PyTree, image_shape: Sequence[int]) -> Callable[[PyTree], jax.Array]:
    """The network on an image of ones, norms and biases doing nothing, as SynFlow asks for."""
    neutral = map_with_path(lambda path, x: jnp.full_like(x, path.endswith("/var")), stats)
    images = jnp.ones((1, *image_shape))

    def forward(params: PyTree) -> Any:
        still = {"bias": 0.0, "scale": 1.0}
        last = lambda path: path.rsplit("/", 1)[-1]  # noqa: E731
        params = map_with_path(
            lambda path, x: jnp.full_like(x, still[last(path)]) if last(path) in still else x, params
        )
        return model.apply({"params": params, "batch_stats": neutral}, images, train=False)

    return forward


def recalibrate(
    params: PyTree, stats: PyTree, batches: Iterable[Any], *, config: PruneConfig, model: nn.Module
) -> PyTree:
    """Batch statistics of the network as it is now, a mean over batches of training images that are not augmented.

    What running statistics remember of the network before pruning is forgotten: they start at zero, and the weights
    that their decay gives to the batches are made to sum to one.
    """
    preprocess = eval_augment(config.augment)

    @partial(jax.jit, compiler_options=compiler_options(model.dtype) or None)
    def updated(params: PyTree, stats: PyTree, batch: Any) -> PyTree:
        keys = example_keys(jax.random.key(0), jnp.arange(len(batch["label"])))
        images = augment_batch(preprocess, keys, batch["image"])
        _, new = model.apply({"params": params, "batch_stats": stats}, images, train=True, mutable=["batch_stats"])
        return new["batch_stats"]

    start, count = jax.tree.map(jnp.zeros_like, stats), 0
    for batch in batches:
        start, count = updated(params, start, batch), count + 1
    share = 1 - BatchNorm.keywords["momentum"] ** count
    return jax.tree.map(lambda x: x / share, start)
