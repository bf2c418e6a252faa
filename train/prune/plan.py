"""What pruning adds to a supervised run: where it starts, when masks change, and what is delivered at the end."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax import mask_schedules as sparsity
from resnet_jax import scores
from resnet_jax.masks import apply_masks, check_masks, full_masks, kernels_except, sparsity_of
from resnet_jax.parallel import place, replicated
from resnet_jax.tree import PyTree
from train.checkpoint import Checkpoints
from train.data.batches import stream_indices
from train.errors import RunError, UsageError
from train.from_config import make_model
from train.prune.config import AT_ONCE, CHANNELS, PruneConfig, network_shape
from train.prune.deliver import SPARSE, deliver, stacked
from train.prune.scoring import check_patterns, in_step, prune_at_once, pruned_share, recalibrate, select
from train.prune.sparse_file import is_sparse_file, load_sparse
from train.run import Plan, Setup
from train.run_folder import load_state, write_json
from train.state import TrainState, init_variables
from train.weights import dense_variables, load_masks

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
            check_patterns(params, config=p, model=model)
            if p.structure == CHANNELS:
                full = select(found, 0.0, None, config=p, model=model)
            else:
                # Whether there is something to prune, and the structure divides it, shows here.
                jax.eval_shape(lambda: select(found, p.final, None, config=p, model=model))
                full = full_masks(params, kernels_except(p.exclude))
        if p.masks is not None:  # arrays where these are, too
            full = jax.tree.map(lambda f, m: jnp.ones(m.shape or f.shape, bool), full, masks_of(config, params))
        return full if given is None else jax.tree.map(jnp.logical_and, full, given)

    def remask(steps: int, model: nn.Module) -> sparsity.MaskSchedule | None:
        end = max(round(p.end * steps), 1)
        begin = min(round(p.begin * steps), end - 1)
        if p.schedule == "gradual":
            return sparsity.gradual(in_step(p, model), final=p.final, begin_step=begin, end_step=end, every=p.every)
        if p.schedule == "acdc":
            begin = max(begin, 1)  # schedules look at the masks after a step
            return sparsity.alternating(in_step(p, model), final=p.final, begin_step=begin, end_step=end, every=p.every)
        if p.schedule in ("rigl", "set"):
            grow = "gradient" if p.schedule == "rigl" else "random"
            prunable = kernels_except(p.exclude)
            return sparsity.rigl(end_step=end, every=p.every, fraction=p.fraction, grow=grow, prunable=prunable)
        return None

    def begin(state: TrainState, setup: Setup) -> TrainState:
        last = None if before is None else load_state(before)
        state = state if last is None else restarted(state, last, setup, dense)
        model = make_model(config, setup.model.num_classes)
        dense_variables(dense, host(state.variables))  # what there will be to compare with
        current = pruned_share(state.masks, state.params, config=p, model=model)
        if p.final < current - 1e-6:
            raise UsageError(f"--prune.sparsity {p.final:g} is less than the {current:.4g} that is pruned already: "
                             "choose more, or free what is pruned with --dense")  # fmt: skip
        if p.schedule == "acdc" and current > 0:
            raise UsageError("--prune.schedule acdc frees what is pruned already: say so with --dense")
        untouched = setup.measure(state.variables, "validation")
        if p.schedule in AT_ONCE:
            state = masked(state, chosen_masks(last or state, state.masks, setup, model), setup)
        else:  # what the schedule would end in if nothing were trained
            found = select(scores.magnitude(state.params), p.final, state.masks, config=p, model=model)
            with usage_errors():
                check_masks(found, state.params)
        if p.recalibrate:
            state = recalibrated(state, setup, model)
        pruned = setup.measure(state.variables, "validation")
        figures = {
            "sparsity": float(sparsity_of(state.masks)),
            "validation_accuracy_before_pruning": untouched["accuracy"],
            "validation_accuracy_before_training": pruned["accuracy"],
        }
        if jax.process_index() == 0:
            write_json(setup.out / START, figures)
        return state

    def finish(state: TrainState, setup: Setup, test: dict[str, Any]) -> dict[str, Any]:
        try:
            check_masks(state.masks, state.params)
        except ValueError as error:
            raise RunError(f"{error}; {setup.out} keeps its checkpoints") from None
        variables = host(state.variables)
        compared = place(dense_variables(dense, variables), replicated(setup.mesh))
        found = {
            "dense_accuracy": setup.measure(compared, "test")["accuracy"],
            "pruned_accuracy": test["accuracy"],
            "sparsity": float(sparsity_of(state.masks)),
            **deliver(state, setup, pruning_of(setup)),
        }
        if p.structure == CHANNELS:
            model = make_model(config, setup.model.num_classes)
            found["channels_pruned"] = pruned_share(state.masks, state.params, config=p, model=model)
        if p.values == "int8":  # the file is not the network that was measured
            rounded, _, _ = load_sparse(setup.out / SPARSE)
            found["file_accuracy"] = setup.measure(place(rounded, replicated(setup.mesh)), "test")["accuracy"]
        return found

    return Plan(source=source, masks=masks, remask=remask, begin=begin, finish=finish)


def host(tree: PyTree) -> PyTree:
    """NumPy copies."""
    return jax.device_get(tree)


def pruning_of(setup: Setup) -> PruneConfig:
    """The run's config as it was settled, channel statistics and all."""
    assert isinstance(setup.config, PruneConfig)
    return setup.config


def dense_plan(config: PruneConfig) -> Plan:
    """The plan of the dense run, which keeps its early weights where pruning will rewind to them."""
    rewinds = config.prune.schedule == "iterative" and config.prune.restart == "rewind"

    def keep(state: TrainState, setup: Setup) -> None:
        if int(state.step) == rewind_steps(config, setup):
            checkpoints = Checkpoints(setup.out / REWIND, keep_last=1)
            checkpoints.save(state, setup.stream.state())
            checkpoints.close()

    def begin(state: TrainState, setup: Setup) -> TrainState:
        if rewinds and rewind_steps(config, setup) >= setup.steps:
            raise UsageError(
                f"--prune.rewind-epochs {config.prune.rewind_epochs:g} is not before the end of the dense run"
            )
        if rewinds:
            keep(state, setup)
        return state

    def during(setup: Setup) -> Sequence[tuple[int, Any]]:
        steps = rewind_steps(config, setup)
        return [(steps, partial(keep, setup=setup))] if rewinds and steps else []

    return Plan(source=None, masks=lambda params, masks, model: masks, begin=begin, during=during)


def rewind_steps(config: PruneConfig, setup: Setup) -> int:
    """The step of the dense run whose weights are kept."""
    return round(config.prune.rewind_epochs * len(setup.dataset.train) / config.batch)


def restarted(state: TrainState, last: TrainState, setup: Setup, dense: Path) -> TrainState:
    """The state that a level starts from: the dense run's early one, or fresh weights, pruned as the level before."""
    config = pruning_of(setup)
    so_far = host(state.masks)
    if not config.dense:
        so_far = jax.tree.map(jnp.logical_and, so_far, host(last.masks))
    if config.prune.restart == "rewind":
        checkpoints = Checkpoints(dense / REWIND, writes=False)
        restored = checkpoints.restore(state)
        checkpoints.close()
        if restored is None or int(restored[0].step) != rewind_steps(config, setup):
            raise UsageError(f"{dense} has not kept the early weights to rewind to: choose another --out")
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


def recalibrated(state: TrainState, setup: Setup, model: nn.Module) -> TrainState:
    """The state with batch statistics of the network that is evaluated, measured anew."""
    config, params = pruning_of(setup), host(state.variables["params"])
    stats = recalibrate(params, host(state.batch_stats), images_of(setup), config=config, model=model)
    state = state.replace(batch_stats=place(stats, replicated(setup.mesh)))
    if state.ema is None:
        return state
    return state.replace(ema={**state.ema, "batch_stats": place(stats, replicated(setup.mesh))})


def masks_of(config: PruneConfig, params: PyTree) -> PyTree:
    """The masks that `--prune.masks` names, for these parameters.

    Raises:
      UsageError: there are none, or they are another model's.
    """
    path = Path(str(config.prune.masks)).expanduser()
    if not path.exists():
        raise UsageError(f"--prune.masks {path}: no such run or file")
    if path.is_file() and not is_sparse_file(path):
        raise UsageError(f"--prune.masks {path} is no sparse file, or a damaged one")
    given = load_masks(path, params)
    if given is None:
        raise UsageError(f"--prune.masks {path} prunes nothing")
    return given


def chosen_masks(deciding: TrainState, masks: PyTree, setup: Setup, model: nn.Module) -> PyTree:
    """The masks of pruning at once, on the host: those that the config names, or by scores of the `deciding` weights.

    Raises:
      UsageError: scores that are not finite, a leaf of which nothing would be left.
    """
    config, params, masks = pruning_of(setup), host(deciding.params), host(masks)
    with usage_errors():
        if config.prune.masks is not None:
            found = jax.tree.map(jnp.logical_and, masks, masks_of(config, params))
        else:
            stats = host(deciding.batch_stats)
            if config.prune.start == "random" and config.prune.needs_images:  # statistics of nothing yet
                stats = recalibrate(params, stats, images_of(setup), config=config, model=model)
            found = prune_at_once(
                params,
                stats,
                masks,
                config=config,
                model=model,
                batches=images_of(setup) if config.prune.needs_images else (),
                image_shape=network_shape(config, setup.dataset.image_shape),
                key=jax.random.fold_in(jax.random.key(config.seed), 2),
            )
        check_masks(found, params)
    return found


def images_of(setup: Setup) -> Iterable[Any]:
    """The first training batches of the run, as NumPy arrays, the same on every host."""
    config, source = pruning_of(setup), setup.dataset.train
    wanted = stream_indices(len(source), config.seed, 0, config.prune.batches * config.batch)
    return [stacked(source, wanted[i : i + config.batch]) for i in range(0, len(wanted), config.batch)]
