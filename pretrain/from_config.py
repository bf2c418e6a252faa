"""Build the pieces of a pretraining run from its config, for `pretrain.run` and for scripts."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from pretrain.config import PretrainConfig, ViewConfig
from pretrain.heads import MLP, Network, Prototypes
from pretrain.objectives import Objective
from pretrain.state import PretrainState, init_pretrain_state
from pretrain.views import view
from resnet_jax.augment import Augment
from resnet_jax.tree import PyTree
from train.errors import UsageError
from train.from_config import compute_dtype, draw_variables, make_model


def make_views(config: ViewConfig) -> tuple[Augment, ...]:
    """Make the config's views, large ones first: from images scaled to [0, 1] to normalised ones."""
    assert config.mean is not None and config.std is not None, "with_statistics fills them in"
    options: dict[str, Any] = {name: getattr(config, name) for name in ("flip", "jitter", "grayscale", "mean", "std")}

    def make(count: int, size: int | None, scale: tuple[float, float]) -> list[Augment]:
        pairs: list[dict[str, Any]] = [
            {"blur": config.blur[v % 2], "solarize": config.solarize[v % 2]} for v in range(count)
        ]
        return [view(size, scale=scale, **pair, **options) for pair in pairs]

    large = make(config.views, config.resized_crop, (config.min_scale, 1.0))
    return (*large, *make(config.small_views, config.small_crop, config.small_scale))


def make_network(
    config: PretrainConfig,
    objective: Objective,
    axis_name: str | None = None,
    kernels: dict[str, Any] | None = None,
    *,
    encoder: nn.Module | None = None,
) -> Network:
    """Make the network: the config's encoder, or the given one, with the objective's heads.

    `axis_name`, `kernels`: see `train.from_config.make_model`.
    """
    mlp = partial(MLP, dtype=compute_dtype(config.dtype), axis_name=axis_name if config.sync_bn else None)
    o = objective
    return Network(
        encoder=encoder or make_model(config, None, axis_name, kernels),
        projector=mlp(o.projector, norm=o.norm, last_norm=o.last_norm, activation=o.activation),
        predictor=mlp(o.predictor) if o.predictor else None,
        prototypes=Prototypes(o.prototypes) if o.prototypes else None,
    )


def make_momentum(objective: Objective, steps: int) -> Callable[[jax.Array], Any] | None:
    """Target network's momentum by step: constant, or rising to 1 along half a cosine; None if there is no target."""
    start = objective.target
    if start is None:
        return None
    if objective.momentum_schedule == "constant":
        return lambda step: jnp.asarray(start, jnp.float32)
    # BYOL, https://arxiv.org/abs/2006.07733
    return lambda step: 1 - (1 - start) * (jnp.cos(math.pi * step / steps) + 1) / 2


def make_probe_tx(config: PretrainConfig, steps: int) -> optax.GradientTransformation:
    """The online probe's optimizer: Adam, whose steps do not depend on the scale of the features, on a cosine to 0."""
    return optax.adam(optax.cosine_decay_schedule(config.probe_lr, steps))


def init_network(
    config: PretrainConfig, network: Network, image_shape: tuple[int, int, int]
) -> tuple[dict[str, PyTree], jax.Array]:
    """Draw (the network's random variables, the run's key) from the config's seed.

    Raises:
      UsageError: the encoder does not return pooled features.
    """
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    try:
        return draw_variables(config, network, init_key, image_shape), run_key
    except ValueError as error:
        raise UsageError(f"{config.model} cannot be pretrained: {error}") from None


def make_pretrain_state(
    config: PretrainConfig,
    objective: Objective,
    network: Network,
    tx: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    classes: int,
) -> PretrainState:
    """Make the state at step 0, with random variables."""
    variables, key = init_network(config, network, image_shape)
    features = variables["params"]["projector"]["fc1"]["kernel"].shape[0]
    return init_pretrain_state(
        variables, objective, tx, make_probe_tx(config, 1), key, features=features, classes=classes
    )


def step_options(
    config: PretrainConfig,
    objective: Objective,
    network: Network,
    tx: optax.GradientTransformation,
    views: Sequence[Augment],
    steps: int,
    epoch_steps: float,
) -> dict[str, Any]:
    """Static arguments of `contrastive_step`."""
    return {
        "model": network,
        "tx": tx,
        "probe_tx": make_probe_tx(config, steps),
        "views": views,
        "objective": objective,
        "momentum": make_momentum(objective, steps),
        "frozen_prototypes": round(config.objective.frozen_prototypes * epoch_steps),
    }
