"""The start of a training after, or during, pruning: its masks, and the changes before the first step."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.channels import channel_groups
from resnet_jax.losses import LOSSES
from resnet_jax.masks import apply_masks, check_masks, kernels_except, sparsity_of
from resnet_jax.resnet import ResNet
from resnet_jax.tree import PyTree, is_kernel, leaves
from train.checkpoint import Checkpoints
from train.data.batches import stream_indices
from train.data.sources import collate
from train.errors import UsageError
from train.from_config import network_shape
from train.loop import Hook
from train.paths import local_path
from train.prune.config import AT_ONCE, CHANNELS, PruningConfig
from train.prune.scoring import (
    Channels,
    Target,
    Weights,
    bind_score,
    neutral_forward,
    per_example_loss,
    prune_at_once,
    recalibrate,
)
from train.run import Training
from train.run_folder import load_state, write_json
from train.runtime import run_once
from train.session import Session
from train.sparse_file import is_sparse_file
from train.state import TrainState, init_variables
from train.weights import load_masks

START = "start.json"  # figures measured before the training after pruning
REWIND = "rewind"  # the dense run's early weights


@contextmanager
def usage_errors() -> Iterator[None]:
    """Raise the library's `ValueError`s about a config as `UsageError`s."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from None


def make_target(p: PruningConfig, model: Any, params: PyTree) -> Target:
    """Find what the config prunes in these parameters (or their shapes), and how.

    Raises:
      UsageError: a pattern that matches nothing (the message lists some of the names), or channels that cannot be
        removed, because the model is not a `ResNet` or none are left.
    """
    channels = p.structure == CHANNELS
    if channels and not isinstance(model, ResNet):
        raise UsageError(f"--prune.structure channels needs a ResNet, not {type(model).__name__}: prune single weights")
    try:
        groups = channel_groups(model, params) if channels else ()
    except ValueError as error:
        raise UsageError(f"--prune.structure channels: {error}") from None
    names = [g.name for g in groups] if channels else [path for path, x in leaves(params).items() if is_kernel(path, x)]
    for pattern in p.exclude:
        if pattern not in PruningConfig().exclude and not any(re.search(pattern, name) for name in names):
            raise UsageError(f"--prune.exclude {pattern} matches none of the names {', '.join(names[:3])}, ...")
    names = [name for name in names if not any(re.search(pattern, name) for pattern in p.exclude)]
    if channels and not names:
        raise UsageError("no channels to prune: none can be removed, or --prune.exclude matches all of them")
    if channels:
        return Channels(
            groups=[g for g in groups if g.name in names],
            scope="global" if p.scope == "global" else "uniform",
            round_to=p.round_to,
        )
    shares = p.by_layer
    for pattern in shares:
        if not any(re.search(pattern, name) for name in names):
            raise UsageError(f"--prune.layers {pattern} matches no prunable kernel: {', '.join(names[:3])}, ...")
    layers = {name: next((s for pattern, s in shares.items() if re.search(pattern, name)), p.final) for name in names}
    return Weights(
        prunable=kernels_except(p.exclude),
        scope=p.scope,
        structure=p.structure,
        layers=layers if shares else {},
        final=p.final,
    )


def start_masks(p: PruningConfig, target: Target, params: PyTree, given: PyTree | None) -> PyTree:
    """Make the masks at step 0, as arrays where pruning will change them; `given` are those of the initial network.

    Raises:
      UsageError: nothing to prune, a structure that does not fit the model, or the errors of `named_masks`.
    """
    with usage_errors():
        full = jax.eval_shape(lambda: target.select(params, p.final))
    if p.masks is not None:  # arrays where the named masks are arrays, too
        full = jax.tree.map(lambda f, m: m if m.ndim else f, full, named_masks(p.masks, params))
    full = jax.tree.map(lambda x: jnp.ones(x.shape, bool), full)
    return full if given is None else jax.tree.map(jnp.logical_and, full, given)


def prune_start(
    training: Training, state: TrainState, model: nn.Module, target: Target, *, dense: Path, before: Path | None
) -> TrainState:
    """Prepare the state to train: choose masks if pruning comes first, and recalibrate batch statistics if configured.

    Args:
      model: without the training's axis and compute kernels.
      dense: the run whose early weights a level may rewind to.
      before: run of the previous level, if this one does not start from its weights.

    Raises:
      UsageError: a sparsity below the present one, scores that are not finite, a leaf that would lose all its weights.
    """
    session = training.session
    p = session.config.prune
    deciding = state
    if before is not None:
        deciding = load_state(before)
        state = restarted(session, state, deciding, model, dense)

    current = target.share(state.masks)
    if p.final < current - 1e-6:
        raise UsageError(f"--prune.sparsity {p.final:g} is less than the {current:.4g} already pruned: "
                         "choose a higher one, or unprune the network with --dense")  # fmt: skip
    if p.schedule == "acdc" and current > 0:
        raise UsageError("--prune.schedule acdc frees weights that are already pruned: confirm with --dense")

    # Measure accuracy before and after pruning, to show what pruning alone costs.
    untouched = training.measure(state.variables, "validation")
    batches = first_batches(session)
    chosen = chosen_masks(training, model, target, deciding, state.masks, batches)
    if p.schedule in AT_ONCE:
        state = masked(state, session.place(chosen))
    if p.recalibrate:
        params, stats = jax.device_get((state.variables["params"], state.batch_stats))
        stats = recalibrate(params, stats, batches, model=model, preprocess=training.pieces.preprocess)
        state = state.replace(batch_stats=session.place(stats))
        if state.ema is not None:
            state = state.replace(ema={**state.ema, "batch_stats": session.place(stats)})
    pruned = training.measure(state.variables, "validation")

    figures = {
        "sparsity": float(sparsity_of(state.masks)),
        "validation_accuracy_before_pruning": untouched["accuracy"],
        "validation_accuracy_before_training": pruned["accuracy"],
    }
    if session.main:
        write_json(session.out / START, figures)
    return state


def masked(state: TrainState, masks: PyTree) -> TrainState:
    """Set the masks of a state and apply them to its weights and their moving average."""
    state = state.replace(masks=masks, params=apply_masks(state.params, masks))
    if state.ema is None:
        return state
    return state.replace(ema={**state.ema, "params": apply_masks(state.ema["params"], masks)})


def chosen_masks(
    training: Training,
    model: nn.Module,
    target: Target,
    deciding: TrainState,
    masks: PyTree,
    batches: Iterable[Any],
) -> PyTree:
    """Choose the masks to reach, on the host: those that the config names, or by scores of `deciding`.

    For schedules that prune inside the step: those that they would reach without any training, by magnitude.

    Raises:
      UsageError: scores that are not finite, a leaf that would lose all its weights.
    """
    session = training.session
    config, p = session.config, session.config.prune
    params, stats, masks = jax.device_get((deciding.params, deciding.batch_stats, masks))
    preprocess = training.pieces.preprocess
    with usage_errors():
        if p.masks is not None:
            chosen = jax.tree.map(jnp.logical_and, masks, named_masks(p.masks, params))
        else:
            if p.start == "random" and p.needs_images:  # random weights have no statistics yet
                stats = recalibrate(params, stats, batches, model=model, preprocess=preprocess)
            shape = network_shape(config, session.dataset.image_shape)
            score = bind_score(
                p.score if p.schedule in AT_ONCE else "magnitude",
                loss=per_example_loss(model, stats, LOSSES[config.loss], preprocess),
                batches=batches,
                forward=neutral_forward(model, stats, shape),
                key=jax.random.fold_in(jax.random.key(config.seed), 2),
            )
            chosen = prune_at_once(params, masks, score=score, target=target, final=p.final, rounds=p.scoring_rounds)
        check_masks(chosen, params)
    return chosen


def named_masks(name: str, params: PyTree) -> PyTree:
    """Load the masks that `--prune.masks` names, for these parameters.

    Raises:
      UsageError: no such masks, or masks of a different model.
    """
    path = local_path(name)
    if not path.exists():
        raise UsageError(f"--prune.masks {path}: no such run or file")
    if path.is_file() and not is_sparse_file(path):
        raise UsageError(f"--prune.masks {path} is not a sparse file, or is damaged")
    masks = load_masks(path, params)
    if masks is None:
        raise UsageError(f"--prune.masks {path} prunes nothing")
    return masks


def first_batches(session: Session[Any]) -> Sequence[dict[str, np.ndarray]]:
    """Load the first training batches of the run, the same on every host; empty if pruning uses no images."""
    config, source = session.config, session.dataset.train
    if not config.prune.needs_images:
        return ()
    wanted = stream_indices(len(source), config.seed, 0, config.prune.batches * config.batch)
    starts = range(0, len(wanted), config.batch)
    return [collate([source[int(i)] for i in wanted[at : at + config.batch]]) for at in starts]


def rewind_step(session: Session[Any], epochs: float) -> int:
    """Step of the dense run whose weights are saved for rewinding."""
    return round(epochs * session.epoch_steps)


def keep_early_weights(session: Session[Any], state: TrainState, epochs: float) -> list[Hook]:
    """Make the hooks that save the dense run's weights after `epochs`; those of step 0 are saved immediately.

    Raises:
      UsageError: the dense run ends before then.
    """
    step = rewind_step(session, epochs)
    if step >= session.steps:
        raise UsageError(f"--prune.rewind-epochs {epochs:g} is not before the end of the dense run")

    def keep(state: TrainState) -> None:
        if int(state.step) == step:
            checkpoints = Checkpoints(session.out / REWIND, keep_last=1)
            checkpoints.save(state, session.stream.state())
            checkpoints.close()

    keep(state)
    return [(step, keep)] if step else []


def restarted(session: Session[Any], state: TrainState, last: TrainState, model: nn.Module, dense: Path) -> TrainState:
    """Make the state that a level starts from: the dense run's early state, or fresh weights, with the previous masks.

    Raises:
      UsageError: the dense run did not save its early weights.
    """
    config, p = session.config, session.config.prune
    so_far = jax.device_get(state.masks)
    if not config.dense:
        so_far = jax.tree.map(jnp.logical_and, so_far, jax.device_get(last.masks))
    if p.restart == "rewind":
        checkpoints = Checkpoints(dense / REWIND, writes=False)
        restored = checkpoints.restore(state)
        checkpoints.close()
        if restored is None or int(restored[0].step) != rewind_step(session, p.rewind_epochs):
            raise UsageError(f"{dense} did not save the early weights to rewind to: choose a different --out")
        state, position = restored
        session.stream.restore(position)
    else:
        # A fresh seed; rewinding to step 0 would reuse the dense run's initial weights.
        key = jax.random.fold_in(jax.random.key(config.seed), 1)
        shape = network_shape(config, session.dataset.image_shape)
        fresh = run_once(partial(init_variables, model, image_shape=shape), key)
        state = state.replace(**session.place(fresh))
        if state.ema is not None:
            state = state.replace(ema=session.place(fresh))
    return masked(state, session.place(so_far))
