"""The state of pretraining: the state of training, with the objective's memory and the online probe."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from pretrain.objectives import Objective
from resnet_jax.tree import PyTree
from train.state import TrainState, digest_of, init_state

TARGET_PARTS = ("encoder", "projector", "prototypes")


class PretrainState(TrainState):
    """The state between steps of pretraining: the fields of `TrainState`, with the `params` of a `heads.Network`.

    Attributes:
      ema: None, or the target network {"params", "batch_stats"}: encoder, projector and prototypes.
      memory: state that the objective keeps: `queue`, `center`, or nothing.
      probe: the online linear probe: `params` {"kernel", "bias"} and its `opt_state`.
    """

    memory: PyTree
    probe: PyTree

    @property
    def variables(self) -> dict[str, PyTree]:
        """Variables of the trained network; `ema` is the target network here, not an average to evaluate."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    def encoder(self, *, target: bool = False) -> dict[str, PyTree]:
        """The encoder's variables {"params", "batch_stats"}, from the trained network or from the target."""
        network = self.ema if target else self.variables
        assert network is not None, "this objective has no target network"
        return encoder_of(network)


def encoder_of(variables: dict[str, PyTree]) -> dict[str, PyTree]:
    """The encoder's part of a network's variables; it may have no batch statistics."""
    return {name: tree.get("encoder", {}) for name, tree in variables.items()}


def target_of(variables: dict[str, PyTree]) -> dict[str, PyTree]:
    """The part of a network's variables that its target network has as well."""
    return {name: {p: tree[p] for p in TARGET_PARTS if p in tree} for name, tree in variables.items()}


def init_pretrain_state(
    variables: dict[str, PyTree],
    objective: Objective,
    tx: optax.GradientTransformation,
    probe_tx: optax.GradientTransformation,
    key: jax.Array,
    *,
    features: int,
    classes: int,
    masks: PyTree | None = None,
) -> PretrainState:
    """Make the state at step 0 from a network's `variables`.

    Args:
      key: random key of the run.
      features, classes: numbers of inputs and outputs of the online probe, which starts at zero.
    """
    memory_key, run_key = jax.random.split(key)
    plain = init_state(variables, tx, run_key, masks=masks)
    # Copy, because donated buffers must not appear twice in a state.
    target = None if objective.target is None else jax.tree.map(jnp.copy, target_of(variables))
    weights = {"kernel": jnp.zeros((features, classes)), "bias": jnp.zeros(classes)}
    return PretrainState(
        **{**vars(plain), "ema": target},
        memory=objective.init_memory(memory_key),
        probe={"params": weights, "opt_state": probe_tx.init(weights)},
    )


def pretrain_digest(state: PretrainState) -> str:
    """sha256 over the state except the optimizer's, step and key: equal digests mean bit-equal runs."""
    names = ("params", "batch_stats", "masks", "ema", "memory", "probe")
    return digest_of({name: getattr(state, name) for name in names})


def probe_logits(probe: Any, features: jax.Array) -> jax.Array:
    """Logits [B, K] of the online probe on features [B, F]."""
    return features @ probe["params"]["kernel"] + probe["params"]["bias"][None]
