"""A run of pruning, from config to result: the dense run, the training after or during pruning, the delivery."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from resnet_jax import mask_schedules
from resnet_jax.masks import check_masks, sparsity_of
from train.config import TrainConfig
from train.config import check as check_training
from train.errors import RunError
from train.from_config import make_model, make_state
from train.loop import Hook
from train.prune.config import CHANNELS, PruneConfig, PruningConfig, check, dense_config, retraining
from train.prune.deliver import SPARSE, deliver
from train.prune.scoring import in_step, prunable_leaves, pruned_share
from train.prune.sparse_file import load_sparse
from train.prune.start import keep_early_weights, prune_start, start_masks
from train.run import Training, make_pieces, start_state, with_widths
from train.run_folder import load_state, read_config, settle
from train.runtime import join_hosts, say
from train.session import open_session
from train.state import TrainState
from train.weights import dense_variables

DENSE = "dense"


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
    check_training(config)
    config = with_widths(config)
    own = {name: piece for name, piece in own.items() if piece is not None}
    out, finished = settle(retraining(config), preset, list(own))
    if finished is not None:
        return finished
    join_hosts(config.distributed)
    config = dataclasses.replace(config, out=str(out))
    if config.init is None:
        dense = out / DENSE
        say(f"training the dense network in {dense}")
        train_dense(config, preset, dense, own, hooks)
    else:
        dense = Path(config.init).expanduser()
    train_all = train_levels if config.prune.schedule == "iterative" else train_once
    result = train_all(config, preset, dense, own, hooks)
    say(f"accuracy on test: dense {result['dense_accuracy']:.2%}, {result['sparsity']:.1%} pruned "
        f"{result['pruned_accuracy']:.2%}; {result['dense_bytes']:,} bytes became {result['pruned_bytes']:,}: "
        f"{result['pruned_file']}")  # fmt: skip
    return result


def train_dense(config: PruneConfig, preset: str, out: Path, own: dict[str, Any], hooks: Sequence[Hook]) -> None:
    """Train the dense run, which saves its early weights if pruning will rewind to them."""
    session = open_session(dense_config(config, out), preset, **own)
    if session.finished is not None:
        return
    pieces = make_pieces(session)
    state = session.place(start_state(session, pieces))
    training = Training(session, pieces, state)
    state = session.resume(state)
    if config.prune.schedule == "iterative" and config.prune.restart == "rewind":
        hooks = [*hooks, *keep_early_weights(session, state, config.prune.rewind_epochs)]
    state = training.fit(state, hooks)
    session.finish(training.figures(training.selected(state)))


def train_once(
    config: PruneConfig, preset: str, dense: Path, own: dict[str, Any], hooks: Sequence[Hook]
) -> dict[str, Any]:
    """Prune and train once."""
    source = dense if config.prune.start == "trained" else None
    say(f"pruning to {config.prune.final:.1%} ({config.prune.schedule}) and training in {config.out}")
    return train_pruned(config, preset, dense, own, hooks, source=source)


def train_levels(
    config: PruneConfig, preset: str, dense: Path, own: dict[str, Any], hooks: Sequence[Hook]
) -> dict[str, Any]:
    """Prune and train in levels that each prune the same share of what remains; the last is in the run's own folder."""
    p, previous, result = config.prune, dense, {}
    # Levels divide what remains to be pruned, so measure what the dense run already lacks.
    already = 0.0
    if not config.dense and (dense / "checkpoints").is_dir():
        state, (_, saved) = load_state(dense), read_config(dense, TrainConfig)
        model = own.get("model") or make_model(config, len(saved["classes"]))
        already = pruned_share(state.masks, state.params, config=p, model=model)
    for number in range(1, p.levels + 1):
        level = dataclasses.replace(config, dense=config.dense and number == 1)
        if number < p.levels:
            share = 1 - (1 - already) * ((1 - p.final) / (1 - already)) ** (number / p.levels)
            pruning = dataclasses.replace(p, sparsity=share)
            level = dataclasses.replace(level, out=f"{config.out}/level{number}", prune=pruning)
        say(f"level {number} of {p.levels}: pruning to {level.prune.final:.1%}, {p.restart}, in {level.out}")
        goes_on = p.restart == "finetune"
        result = train_pruned(
            level,
            preset,
            dense,
            own,
            hooks,
            source=previous if goes_on else None,
            before=None if goes_on else previous,
        )
        previous = Path(str(level.out))
    return result


def train_pruned(
    config: PruneConfig,
    preset: str,
    dense: Path,
    own: dict[str, Any],
    hooks: Sequence[Hook],
    *,
    source: Path | None,
    before: Path | None = None,
) -> dict[str, Any]:
    """Train once, after or during pruning, and deliver.

    Args:
      dense: the trained run, or weights, that the pruned network is compared with.
      source: the run or weights to start from; None means random weights.
      before: run of the previous level of iterative pruning, if this one does not start from its weights: they only
        decide what is pruned now.
    """
    session = open_session(retraining(config), preset, **own)
    if session.finished is not None:
        return session.finished
    pieces = make_pieces(session)
    # Scores and masks are computed outside the training's mesh axis, so with a model without it or special kernels.
    model = own.get("model") or make_model(config, len(session.dataset.classes))
    p = session.config.prune

    masks = partial(start_masks, p, model)
    state = session.place(
        make_state(session.config, pieces.model, pieces.tx, session.dataset.image_shape, source, masks)
    )
    remask = make_remask(p, model, session.steps)
    training = Training(session, dataclasses.replace(pieces, remask=remask), state)
    state = session.resume(state)
    if not session.resumed:
        state = prune_start(training, state, model, dense=dense, before=before)
    state = training.fit(state, hooks)
    figures = training.figures(state)
    pruning = pruning_figures(training, state, model, dense)
    return session.finish({**figures, "pruned_accuracy": figures["test_accuracy"], **pruning})


def make_remask(p: PruningConfig, model: nn.Module, steps: int) -> mask_schedules.MaskSchedule | None:
    """Make the schedule that changes masks inside the step of a training of `steps`; None if they do not change."""
    end = max(round(p.end * steps), 1)
    begin = min(round(p.begin * steps), end - 1)
    dates: dict[str, Any] = {"begin_step": begin, "end_step": end, "every": p.every}
    if p.schedule == "gradual":
        return mask_schedules.gradual(in_step(p, model), final=p.final, **dates)
    if p.schedule == "acdc":
        begin = max(begin, 1)  # schedules see the masks after a step
        return mask_schedules.alternating(
            in_step(p, model), final=p.final, begin_step=begin, end_step=end, every=p.every
        )
    if p.schedule in ("rigl", "set"):
        grow = "gradient" if p.schedule == "rigl" else "random"
        return mask_schedules.rigl(
            end_step=end, every=p.every, fraction=p.fraction, grow=grow, prunable=prunable_leaves(p)
        )
    return None


def pruning_figures(training: Training, state: TrainState, model: nn.Module, dense: Path) -> dict[str, Any]:
    """Figures of pruning for the result: the dense accuracy, the sparsity, and those of `deliver`.

    Raises:
      RunError: pruned weights are not zero, which is a bug in this program.
    """
    session = training.session
    p = session.config.prune
    try:
        check_masks(state.masks, state.params)
    except ValueError as error:
        raise RunError(f"{error}; {session.out} keeps its checkpoints") from None
    compared = session.place(dense_variables(dense, jax.device_get(state.variables)))
    figures = {
        "dense_accuracy": training.measure(compared, "test")["accuracy"],
        "sparsity": float(sparsity_of(state.masks)),
        **deliver(session, model, state, training.pieces.preprocess),
    }
    if p.structure == CHANNELS:
        figures["channels_pruned"] = pruned_share(state.masks, state.params, config=p, model=model)
    if p.values == "int8":  # rounded weights differ from the network measured above
        rounded, _, _ = load_sparse(session.out / SPARSE)
        figures["file_accuracy"] = training.measure(session.place(rounded), "test")["accuracy"]
    return figures
