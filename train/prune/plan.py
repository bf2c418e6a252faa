"""What pruning adds to a supervised run: where it starts, when masks change, and what is delivered at the end."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax import scores, sparsity
from resnet_jax.masks import apply_masks, check_masks, full_masks, kernels_except, sparsity_of
from resnet_jax.parallel import place, replicated
from resnet_jax.tree import PyTree
from train.batches import stream_indices
from train.build import make_model
from train.checkpoint import Checkpoints
from train.errors import UsageError
from train.prune.config import AT_ONCE, CHANNELS, PruneConfig, network_shape
from train.prune.deliver import deliver, stacked
from train.prune.scoring import in_step, prune_at_once, pruned_share, recalibrate, select
from train.run import Plan, Setup
from train.runs import load_state, write_json
from train.state import TrainState, init_variables
from train.weights import load_masks, load_weights

START = "start.json"  # what was measured before the training after pruning
REWIND = "rewind"  # the dense run's early weights


@contextmanager
def usage_errors() -> Iterator[None]:
    """What the library finds wrong with a config is the user's to mend."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from None


def plan_of(config: PruneConfig, dense: Path, *, source: Path | None, before: Path | None = None) -> Plan:
    """The plan of one training after, or while, pruning.

    Args:
      dense: the trained run, or weights, that the pruned network is compared with.
      source: what to start from; None is random weights.
      before: where a level of iterative pruning does not go on from the level before: that level's run, whose weights
        say what is pruned now.
    """
    p = config.prune

    def masks(params: PyTree, given: PyTree | None, model: nn.Module) -> PyTree:
        found = scores.magnitude(params)
        with usage_errors():
            if p.structure == CHANNELS:
                full = select(found, 0.0, None, config=p, model=model)
            else:
                # Whether there is something to prune, and the structure divides it, shows here.
                jax.eval_shape(lambda: select(found, p.final, None, config=p, model=model))
                full = full_masks(params, kernels_except(p.exclude))
        return full if given is None else jax.tree.map(jnp.logical_and, full, given)

    def remask(steps: int, model: nn.Module) -> sparsity.Remask | None:
        begin, end = round(p.begin * steps), max(round(p.end * steps), 1)
        if p.schedule == "gradual":
            return sparsity.gradual(in_step(p, model), final=p.final, begin=begin, end=end, every=p.every)
        if p.schedule == "acdc":
            return sparsity.alternating(in_step(p, model), final=p.final, begin=begin, end=end, every=p.every)
        if p.schedule in ("rigl", "set"):
            grow = "gradient" if p.schedule == "rigl" else "random"
            return sparsity.rigl(end=end, every=p.every, fraction=p.fraction, grow=grow)
        return None

    def begin(state: TrainState, setup: Setup) -> TrainState:
        state = state if before is None else restarted(state, load_state(before), setup, config, dense)
        model = make_model(config, setup.model.num_classes)
        current = pruned_share(state.masks, config=p, model=model)
        if p.final < current - 1e-6:
            raise UsageError(f"--prune.sparsity {p.final:g} is less than the {current:.4g} that is pruned already: "
                             "choose more, or free what is pruned with --dense")  # fmt: skip
        untouched = setup.measure(state.variables, "validation")
        if p.schedule in AT_ONCE:
            deciding = state if before is None else load_state(before)
            state = masked(state, chosen_masks(deciding, state.masks, setup, config, model), setup)
        else:  # what the schedule would end in if nothing were trained
            found = select(scores.magnitude(state.params), p.final, state.masks, config=p, model=model)
            with usage_errors():
                check_masks(found, state.params)
        if p.recalibrate:
            stats = recalibrate(state.params, state.batch_stats, images_of(setup, config), config=config, model=model)
            state = state.replace(batch_stats=place(stats, replicated(setup.mesh)))
        pruned = setup.measure(state.variables, "validation")
        if jax.process_index() == 0:
            sides = {"validation_accuracy_before_pruning": untouched, "validation_accuracy_before_training": pruned}
            figures = {name: found["accuracy"] for name, found in sides.items()}
            write_json(setup.out / START, {"sparsity": float(sparsity_of(state.masks)), **figures})
        return state

    def finish(state: TrainState, setup: Setup, test: dict[str, Any]) -> dict[str, Any]:
        with usage_errors():
            check_masks(state.masks, state.params)
        like = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
        compared = place(load_weights(dense, like), replicated(setup.mesh))
        return {
            "dense_accuracy": setup.measure(compared, "test")["accuracy"],
            "pruned_accuracy": test["accuracy"],
            "sparsity": float(sparsity_of(state.masks)),
            **(deliver(state, setup, config) if jax.process_index() == 0 else {}),
        }

    return Plan(source=source, masks=masks, remask=remask, begin=begin, finish=finish)


def dense_plan(config: PruneConfig) -> Plan:
    """The plan of the dense run, which keeps its early weights where pruning will rewind to them."""

    def keep(state: TrainState, setup: Setup) -> None:
        checkpoints = Checkpoints(setup.out / REWIND, keep_last=1)
        if not checkpoints.steps:
            checkpoints.save(state, setup.stream.state())
        checkpoints.close()

    def begin(state: TrainState, setup: Setup) -> TrainState:
        if rewind_steps(config, setup) == 0:
            keep(state, setup)
        return state

    def during(setup: Setup) -> Sequence[tuple[int, Any]]:
        steps = rewind_steps(config, setup)
        return [(steps, partial(keep, setup=setup))] if steps else []

    source = None if config.init is None else Path(config.init)
    return Plan(source=source, masks=lambda params, masks, model: masks, begin=begin, during=during)


def rewind_steps(config: PruneConfig, setup: Setup) -> int:
    """The step of the dense run whose weights are kept."""
    return round(config.prune.rewind_epochs * len(setup.dataset.train) / config.batch)


def restarted(state: TrainState, last: TrainState, setup: Setup, config: PruneConfig, dense: Path) -> TrainState:
    """The state that a level starts from: the dense run's early one, or fresh weights, pruned as the level before."""
    so_far = jax.tree.map(jnp.logical_and, jax.device_get(state.masks), jax.device_get(last.masks))
    if config.prune.restart == "rewind":
        checkpoints = Checkpoints(dense / REWIND, writes=False)
        restored = checkpoints.restore(state)
        checkpoints.close()
        if restored is None:
            raise UsageError(f"{dense} has no early weights to rewind to: choose another --out")
        state, position = restored
        setup.stream.restore(position)
    else:
        # Another draw than the dense run's own initial weights, which rewinding to step 0 would be.
        key = jax.random.fold_in(jax.random.key(config.seed), 1)
        fresh = init_variables(make_model(config, setup.model.num_classes), key, setup.dataset.image_shape)
        state = state.replace(**place(fresh, replicated(setup.mesh)))
        if state.ema is not None:
            state = state.replace(ema=place(fresh, replicated(setup.mesh)))
    return masked(state, so_far, setup)


def masked(state: TrainState, masks: PyTree, setup: Setup) -> TrainState:
    """The state with these masks, and its weights and their moving average masked."""
    masks = place(masks, replicated(setup.mesh))
    state = state.replace(masks=masks, params=apply_masks(state.params, masks))
    if state.ema is None:
        return state
    return state.replace(ema={**state.ema, "params": apply_masks(state.ema["params"], masks)})


def chosen_masks(deciding: TrainState, masks: PyTree, setup: Setup, config: PruneConfig, model: nn.Module) -> PyTree:
    """The masks of pruning at once: those that the config names, or by the scores of the `deciding` weights."""
    p = config.prune
    params, stats, masks = jax.device_get((deciding.params, deciding.batch_stats, masks))
    with usage_errors():
        if p.masks is not None:
            given = load_masks(Path(p.masks), params)
            if given is None:
                raise UsageError(f"--prune.masks {p.masks} prunes nothing")
            found = jax.tree.map(jnp.logical_and, masks, given)
        else:
            batches = images_of(setup, config)
            if p.start == "random":  # statistics of nothing yet
                stats = recalibrate(params, stats, batches, config=config, model=model)
            key = jax.random.fold_in(jax.random.key(config.seed), 2)
            shape = network_shape(config, setup.dataset.image_shape)
            found = prune_at_once(
                params, stats, masks, config=config, model=model, batches=batches, image_shape=shape, key=key
            )
        check_masks(found, params)
    return found


def images_of(setup: Setup, config: PruneConfig) -> list[Any]:
    """The first training batches of the run, as NumPy arrays, the same on every host."""
    source, size = setup.dataset.train, config.batch
    wanted = stream_indices(len(source), config.seed, 0, config.prune.batches * size)
    return [stacked(source, wanted[i : i + size]) for i in range(0, len(wanted), size)]
