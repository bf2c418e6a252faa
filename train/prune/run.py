"""A run of pruning, from config to result: the dense run, the training after or during pruning, the delivery."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from resnet_jax import mask_schedules
from resnet_jax.masks import check_masks, kernels_except, sparsity_of
from resnet_jax.tree import PyTree
from train.config import TrainConfig
from train.errors import RunError
from train.from_config import make_model, make_state
from train.hub import source_path
from train.loop import Hook
from train.prune.config import PruneConfig, PruningConfig, check, check_dates, dates, dense_config, retraining
from train.prune.deliver import deliver
from train.prune.scoring import Channels, Target, in_step
from train.prune.start import keep_early_weights, make_target, prune_start, start_masks
from train.run import Training, make_pieces, start_state, with_widths
from train.run_folder import load_state, read_config, settle, unlocked
from train.runtime import join_hosts, say
from train.session import Session, open_session
from train.sparse_file import SPARSE, load_sparse
from train.state import TrainState
from train.weights import dense_variables, is_run

DENSE = "dense"


@unlocked()
def run(
    config: PruneConfig,
    preset: str = "custom",
    *,
    hooks: Sequence[Hook] = (),
    **own: Any,
) -> dict[str, Any]:
    """Train a network unless `config.init` names one, prune it, keep training, deliver; also writes `out`/result.json.

    The folder is also a run of training: `train.predict`, `--init` and further pruning take it, including the masks.
    Run again with the same `out` to resume.

    Args:
      hooks, own: your own hooks and pieces (`model`, `tx`, `objective`, `augment`, `dataset`), see `train.run.run`;
        every training uses them.

    Raises:
      UsageError: an error that the user can fix. RunError: a failure that stopped the run.
    """
    check(config)
    config = with_widths(config)
    own = {name: piece for name, piece in own.items() if piece is not None}
    out, finished = settle(retraining(config), preset, list(own))
    if finished is not None:
        return finished
    join_hosts(config.distributed)
    config = dataclasses.replace(config, out=str(out))

    def opened(config: Any) -> Session[Any]:
        return open_session(config, preset, **own)

    dense = out / DENSE if config.init is None else source_path(config.init)
    if config.freeze:
        say("only the head is trained after pruning (--freeze)")
    elif is_run(dense) and read_config(dense, TrainConfig)[0].freeze:
        say(f"{dense} trained only its head; after pruning the whole network is trained (unless --freeze is given)")
    if config.init is None:
        say(f"training the dense network in {dense}")
        train_dense(config, opened(dense_config(config, dense)), hooks)
    result = train_levels(config, dense, opened, own.get("model"), hooks)
    say(f"accuracy on test: dense {result['dense_accuracy']:.2%}, {result['sparsity']:.1%} pruned "
        f"{result['pruned_accuracy']:.2%}; {result['dense_bytes']:,} bytes became {result['pruned_bytes']:,}: "
        f"{result['pruned_file']}")  # fmt: skip
    return result


def train_dense(config: PruneConfig, session: Session[Any], hooks: Sequence[Hook]) -> None:
    """Train the dense run, which saves its early weights if pruning will rewind to them.

    Raises:
      UsageError: what cannot be pruned is refused before the time is spent.
    """
    if session.finished is not None:
        return
    p = config.prune
    check_dates(config, session.epoch_steps)
    pieces = make_pieces(session)
    state = session.place(start_state(session, pieces))
    start_masks(p, make_target(p, pieces.model, state.params), state.params, None)
    training = Training(session, pieces, state)
    state = session.resume(state)
    if p.schedule == "iterative" and p.restart == "rewind":
        hooks = [*hooks, *keep_early_weights(session, state, p.rewind_epochs)]
    state = training.fit(state, hooks)
    session.finish(training.figures(session.selected(state)))


def train_levels(
    config: PruneConfig,
    dense: Path,
    opened: Callable[[PruneConfig], Session[Any]],
    model: nn.Module | None,
    hooks: Sequence[Hook],
) -> dict[str, Any]:
    """Prune and train in levels that each prune the same share of what remains; the last is in the run's own folder.

    Every schedule except `iterative` has one level.
    """
    p, previous, result = config.prune, dense, {}
    iterative = p.schedule == "iterative"
    levels = p.levels if iterative else 1
    goes_on = p.restart == "finetune" if iterative else p.start == "trained"
    # Levels divide what remains to be pruned, so measure what the dense run already lacks.
    already = 0.0
    if levels > 1 and not config.dense and (dense / "checkpoints").is_dir():
        state, (_, saved) = load_state(dense), read_config(dense, TrainConfig)
        model = model or make_model(config, len(saved["classes"]))
        already = make_target(p, model, state.params).share(state.masks)
    for number in range(1, levels + 1):
        level = dataclasses.replace(config, dense=config.dense and number == 1)
        if number < levels:
            share = 1 - (1 - already) * ((1 - p.final) / (1 - already)) ** (number / levels)
            pruning = dataclasses.replace(p, sparsity=share)
            level = dataclasses.replace(level, out=f"{config.out}/level{number}", prune=pruning)
        how = f"{p.restart}, level {number} of {levels}" if iterative else p.schedule
        say(f"pruning to {level.prune.final:.1%} ({how}) and training in {level.out}")
        result = train_pruned(
            level,
            opened(retraining(level)),
            hooks,
            dense=dense,
            source=previous if goes_on else None,
            before=previous if iterative and not goes_on else None,
        )
        previous = Path(str(level.out))
    return result


def train_pruned(
    config: PruneConfig,
    session: Session[Any],
    hooks: Sequence[Hook],
    *,
    dense: Path,
    source: Path | None,
    before: Path | None,
) -> dict[str, Any]:
    """Train once, after or during pruning, and deliver.

    Args:
      dense: the trained run, or weights, that the pruned network is compared with.
      source: the run or weights to start from; None means random weights.
      before: run of the previous level of iterative pruning, if this one does not start from its weights: they only
        decide what is pruned now.
    """
    if session.finished is not None:
        return session.finished
    check_dates(config, session.epoch_steps)
    begin, end = dates(config.prune, session.steps)
    if config.prune.schedule == "gradual" and config.prune.every >= end - begin:
        say(f"note: everything is pruned at step {end}, because --prune.every {config.prune.every} is not below the "
            f"{end - begin} steps of gradual pruning")  # fmt: skip
    pieces = make_pieces(session)
    # Scores and masks are computed outside the training's mesh axis, so with a model without it or special kernels.
    model = session.own.get("model") or make_model(config, len(session.dataset.classes))
    p = session.config.prune

    def masks(params: PyTree, given: PyTree | None) -> PyTree:
        return start_masks(p, make_target(p, model, params), params, given)

    state = session.place(
        make_state(
            session.config,
            pieces.model,
            pieces.tx,
            session.dataset.image_shape,
            source,
            masks,
            classes=session.dataset.classes,
        )
    )
    compared = dense_variables(dense, jax.device_get(state.variables))
    target = make_target(p, model, state.params)
    training = Training(session, dataclasses.replace(pieces, remask=make_remask(p, target, session.steps)), state)
    state = session.resume(state)
    if not session.resumed:
        state = prune_start(training, state, model, target, dense=dense, before=before)
    state = training.fit(state, hooks)
    figures = training.figures(state)
    pruning = pruning_figures(training, state, model, compared)
    if isinstance(target, Channels):
        pruning["channels_pruned"] = share = target.share(state.masks)
        if p.final - share > 0.02:
            say(f"note: {share:.1%} of the channels are pruned, not {p.final:.1%}: layers keep some, in multiples "
                f"of --prune.round-to {p.round_to}")  # fmt: skip
    return session.finish({**figures, "pruned_accuracy": figures["test_accuracy"], **pruning})


def make_remask(p: PruningConfig, target: Target, steps: int) -> mask_schedules.MaskSchedule | None:
    """Make the schedule that changes masks inside the step of a training of `steps`; None if they do not change."""
    begin, end = dates(p, steps)
    when: dict[str, Any] = {"end_step": end, "every": p.every}
    if p.schedule == "gradual":
        return mask_schedules.gradual(in_step(p.score, target), final=p.final, begin_step=begin, **when)
    if p.schedule == "acdc":  # schedules see the masks after a step, so the first possible one is 1
        return mask_schedules.alternating(in_step(p.score, target), final=p.final, begin_step=max(begin, 1), **when)
    if p.schedule in ("rigl", "set"):
        grow = "gradient" if p.schedule == "rigl" else "random"
        prunable = kernels_except(p.exclude)
        return mask_schedules.rigl(fraction=p.fraction, grow=grow, prunable=prunable, **when)
    return None


def pruning_figures(training: Training, state: TrainState, model: nn.Module, compared: PyTree) -> dict[str, Any]:
    """Figures of pruning for the result: the accuracy of the `compared` network, the sparsity, those of `deliver`.

    Raises:
      RunError: a leaf has lost all its weights.
    """
    session = training.session
    try:
        check_masks(state.masks, state.params)
    except ValueError as error:
        raise RunError(f"{error}; {session.out} keeps its checkpoints") from None
    figures = {
        "dense_accuracy": training.measure(session.place(compared), "test")["accuracy"],
        "sparsity": float(sparsity_of(state.masks)),
        **deliver(session, model, state, training.pieces.preprocess),
    }
    if session.config.prune.values == "int8":  # rounded weights differ from the network measured above
        rounded, _, _ = load_sparse(session.out / SPARSE)
        figures["file_accuracy"] = training.measure(session.place(rounded), "test")["accuracy"]
    return figures
