"""Pruning from a config to a result: the dense run, the training after or while pruning, what is delivered."""

import dataclasses
from pathlib import Path
from typing import Any

from train.from_config import make_model
from train.prune.config import PruneConfig, check, dense_config, retraining
from train.prune.plan import dense_plan, plan_of
from train.prune.scoring import pruned_share
from train.run import run as train_run
from train.run import with_widths
from train.run_folder import load_state, settle
from train.runtime import join_hosts, say

DENSE = "dense"


def run(config: PruneConfig, preset: str = "custom") -> dict[str, Any]:
    """Train a network unless `config.init` is one, prune it, train on, deliver; the result is in `out`/result.json too.

    The folder is that of a run of training: `train.predict`, `--init` and further pruning take it, masks and all.
    Run again with the same `out`, it goes on where it was.

    Raises:
      UsageError: what the user can mend. RunError: what stopped a run.
    """
    check(config)
    config = with_widths(config)
    out, finished = settle(retraining(config), preset)
    if finished:
        return finished
    join_hosts(config.distributed)
    if config.init is None:
        dense = out / DENSE
        say(f"training the dense network in {dense}")
        train_run(dense_config(config, dense), preset, dense_plan(config))
    else:
        dense = Path(config.init).expanduser()
    config = dataclasses.replace(config, out=str(out))
    result = _levels(config, preset, dense) if config.prune.schedule == "iterative" else _once(config, preset, dense)
    say(f"accuracy on test: dense {result['dense_accuracy']:.2%}, {result['sparsity']:.1%} pruned "
        f"{result['pruned_accuracy']:.2%}; {result['dense_bytes']:,} bytes became {result['pruned_bytes']:,}: "
        f"{result['pruned_file']}")  # fmt: skip
    return result


def _once(config: PruneConfig, preset: str, dense: Path) -> dict[str, Any]:
    source = dense if config.prune.start == "trained" else None
    say(f"pruning to {config.prune.final:.1%} ({config.prune.schedule}) and training in {config.out}")
    return train_run(retraining(config), preset, plan_of(config, dense, source=source))


def _levels(config: PruneConfig, preset: str, dense: Path) -> dict[str, Any]:
    """Each level prunes the same share of what is left, the last one in the run's own folder."""
    p, previous, result = config.prune, dense, {}
    already = already_pruned(config, dense)
    for number in range(1, p.levels + 1):
        level = dataclasses.replace(config, dense=config.dense and number == 1)
        if number < p.levels:
            share = 1 - (1 - already) * ((1 - p.final) / (1 - already)) ** (number / p.levels)
            pruning = dataclasses.replace(p, sparsity=share)
            level = dataclasses.replace(level, out=f"{config.out}/level{number}", prune=pruning)
        say(f"level {number} of {p.levels}: pruning to {level.prune.final:.1%}, {p.restart}, in {level.out}")
        goes_on = p.restart == "finetune"
        plan = plan_of(level, dense, source=previous if goes_on else None, before=None if goes_on else previous)
        result = train_run(retraining(level), preset, plan)
        previous = Path(str(level.out))
    return result


def already_pruned(config: PruneConfig, dense: Path) -> float:
    """The share that is pruned where the first level starts."""
    if config.dense or not (dense / "checkpoints").is_dir():
        return 0.0
    state = load_state(dense)
    model = make_model(config, state.params["head"]["kernel"].shape[-1])
    return pruned_share(state.masks, state.params, config=config.prune, model=model)
