"""A search, from its config to the best one found; read it from top to bottom."""

import contextlib
import dataclasses
import gc
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

import train.run
from train.cli import start
from train.config import TrainConfig, flat
from train.config_file import replaced
from train.errors import DivergedError, RunError, UsageError
from train.paths import local_path
from train.run_folder import FREE_FIELDS
from train.runtime import cpu_only, say
from train.search.config import SearchConfig, checked_space, run_config
from train.search.report import deliver, progress_line
from train.search.storage import LIVES, Search, hold, load_optuna, one_at_a_time, open_study, release, storage_error
from train.spaces import Choice, Integers, LogUniform, Space, as_text, contains

Train = Callable[..., dict[str, Any]]
WAIT_SECONDS = 1.0


def run(config: SearchConfig, preset: str = "custom") -> dict[str, Any]:
    """Run trials until `config.trials` are finished, and deliver the best one's config; continue what is in `out`.

    The objective is the accuracy on the validation split; the test split is never evaluated.

    Raises:
      UsageError: an error that the user can fix. RunError: the search stopped; finished trials are kept.
    """
    began = time.perf_counter()
    search = open_search(config, preset)
    with storage_error(search.out), one_at_a_time(search.out):
        search.study.set_user_attr("starts", [*search.study.user_attrs.get("starts", []), round(time.time(), 1)])
    with storage_error(search.out), helpers(config, preset):
        work(search)
    with storage_error(search.out), one_at_a_time(search.out):
        result = deliver(search)
    return {**result, "seconds": round(time.perf_counter() - began, 1)}


def open_search(config: SearchConfig, preset: str) -> Search:
    """Check a search's config and open its storage.

    Raises:
      UsageError: a range or field is wrong, or the folder holds something else.
    """
    space, base = checked_space(config, preset), run_config(config)
    out = local_path(config.out or f"runs/{preset}-search")
    settings = {
        "preset": preset,
        "config": {name: value for name, value in flat(base).items() if name not in FREE_FIELDS},
        "ranges": {name: as_text(span) for name, span in space.items()},
        "stop": config.stop,
    }
    study = open_study(out, settings, make_pruner(config.stop))
    return Search(study=study, out=out, preset=preset, base=base, space=space, trials=config.trials)


def make_pruner(stop: str) -> Any:
    """Make the rule that stops trials early: by the best validation accuracy so far, see `SearchConfig.stop`."""
    pruners = load_optuna().pruners
    if stop == "halving":
        return pruners.SuccessiveHalvingPruner()
    return pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=2) if stop == "median" else pruners.NopPruner()


def work(search: Search, train: Train | None = None) -> None:
    """Train one trial after the other until all are finished, also those that other processes leave behind."""
    while (claimed := claim(search)) is not None:
        if claimed == "wait":
            time.sleep(WAIT_SECONDS)
            continue
        trial, file = claimed
        try:
            run_trial(search, trial, train or train_run)
        finally:
            with one_at_a_time(search.out):
                release(search.out, trial.number, file)


def train_run(*args: Any, **options: Any) -> dict[str, Any]:
    """Train a network, see `train.run.run`, and drop what JAX has compiled for it."""
    try:
        return train.run.run(*args, **options)
    finally:
        jax.clear_caches()
        gc.collect()


def claim(search: Search) -> Any:
    """Take the next trial: (trial, held file); "wait" while other processes train the last ones; None at the end.

    A trial that was interrupted comes first. New ones are numbered from 0 and drawn with a sampler that depends only
    on the seed, the number and the finished trials, so a search that was stopped goes on as if it had not been.
    """
    optuna, study, out = load_optuna(), search.study, search.out
    states = optuna.trial.TrialState
    with one_at_a_time(out):
        trials = study.get_trials(deepcopy=False)
        living = 0
        for trial in (trial for trial in trials if trial.state == states.RUNNING):
            file = hold(out, trial.number)
            if file is None:
                living += 1
                continue
            restarts, lost = (trial.user_attrs.get(name, 0) + 1 for name in ("restarts", "lost"))
            if lost >= LIVES:
                study.tell(trial.number, state=states.FAIL)
                release(out, trial.number, file)
                continue
            study.sampler = sampler(search.base.seed, trial.number)
            resumed = optuna.trial.Trial(study, trial._trial_id)
            resumed.set_user_attr("restarts", restarts)
            resumed.set_user_attr("lost", lost)
            suggest(resumed, search.space)
            say(f"trial {trial.number} was interrupted: it goes on")
            return resumed, file
        number = sum(trial.state != states.WAITING for trial in trials)
        if number >= search.trials:
            return "wait" if living else None
        if not trials:
            study.enqueue_trial(first_values(search))
        # Hold the number before the trial exists, so that no process takes it for an interrupted one.
        file = hold(out, number)
        study.sampler = sampler(search.base.seed, number)
        trial = study.ask()
        suggest(trial, search.space)
        return trial, file


def first_values(search: Search) -> dict[str, Any]:
    """Values of the first trial: those of the config as it was given, except fields outside their range."""
    values = {name: flat(search.base)[name] for name in search.space}
    outside = [name for name, value in values.items() if not contains(search.space[name], value)]
    for name in outside:
        say(f"note: {name} {values[name]} is not in its range, {as_text(search.space[name])}: the first trial draws it")
    return {name: value for name, value in values.items() if name not in outside}


def sampler(seed: int, number: int) -> Any:
    """Make the sampler of one trial: five random ones, then tree-structured Parzen estimators.

    Bergstra et al. 2011, https://papers.nips.cc/paper/4443-algorithms-for-hyper-parameter-optimization.
    """
    own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    return load_optuna().samplers.TPESampler(seed=own, n_startup_trials=5)


def suggest(trial: Any, space: Space) -> None:
    """Draw a trial's values, unless it has them."""
    for name, span in space.items():
        if isinstance(span, Choice):
            trial.suggest_categorical(name, span.values)
        elif isinstance(span, Integers):
            trial.suggest_int(name, span.low, span.high, log=span.log)
        else:
            trial.suggest_float(name, span.low, span.high, log=isinstance(span, LogUniform))


class _Stopped(Exception):
    """The rule has stopped this trial early."""


def run_trial(search: Search, trial: Any, train: Train) -> None:
    """Train a trial in its run folder, trials/NUMBER, and record its outcome; keep no checkpoints.

    Raises:
      UsageError, RunError: the run was refused or stopped; the trial goes on when the search does.
    """
    states = load_optuna().trial.TrialState
    folder = search.out / "trials" / f"{trial.number:03d}"
    folder.mkdir(parents=True, exist_ok=True)
    config = trial_config(search.base, trial.params, out=str(folder))
    reported = {*search.study.get_trials(deepcopy=False)[trial.number].intermediate_values}
    before, began = trial.user_attrs.get("seconds", 0.0), time.perf_counter()

    def count_seconds() -> None:
        trial.set_user_attr("seconds", round(before + time.perf_counter() - began, 1))

    def validated(row: dict[str, Any]) -> None:
        number = max(round(row["epoch"] / config.eval_every), 1)
        with one_at_a_time(search.out):
            if number not in reported:
                trial.report(row["validation_accuracy"], number)
                reported.add(number)
            if trial.user_attrs.get("lost"):
                trial.set_user_attr("lost", 0)
            trial.set_user_attr("epochs", row["epoch"])
            count_seconds()
            stops = trial.should_prune()
        if stops:
            raise _Stopped

    value = None
    try:
        # The run's own lines go to a file.
        with (folder / "log.txt").open("a") as log, contextlib.redirect_stderr(log):
            result = train(config, search.preset, validated=validated, test=False)
        value, state, outcome = result["validation_accuracy"], states.COMPLETE, "complete"
    except _Stopped:
        state, outcome = states.PRUNED, "stopped early"
    except DivergedError:
        state, outcome = states.PRUNED, "diverged"
    except (UsageError, RunError) as error:
        values = ", ".join(f"{name} {value}" for name, value in trial.params.items())
        raise type(error)(f"trial {trial.number} ({values}): {error}") from None
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    with one_at_a_time(search.out):
        count_seconds()
        trial.set_user_attr("outcome", outcome)
        search.study.tell(trial.number, value, state)
        say(progress_line(search, trial.number))


def trial_config(base: TrainConfig, values: dict[str, Any], out: str | None) -> TrainConfig:
    """The config of a trial's run."""
    return dataclasses.replace(replaced(base, values), out=out)


@contextlib.contextmanager
def helpers(config: SearchConfig, preset: str) -> Iterator[None]:
    """Start the other workers of a search, which end when its trials are finished, or with this process.

    On CPUs the workers share out the cores.
    """
    others: list[Any] = []
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    try:
        for index in range(1, config.workers):
            # Fork would copy the locks of JAX's threads.
            others.append(multiprocessing.get_context("spawn").Process(target=_help, args=(config, preset, index)))
            others[-1].daemon = True
            others[-1].start()
        use_cores(0, config.workers)
        yield
        for process in others:
            process.join()
    finally:
        for process in others:
            process.terminate()
        if cores:
            os.sched_setaffinity(0, cores)


def _help(config: SearchConfig, preset: str, index: int) -> None:
    """Work on a search as the worker of this index."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    use_cores(index, config.workers)

    def main() -> None:
        search = open_search(config, preset)
        with storage_error(search.out):
            work(search)

    start(main)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def use_cores(index: int, count: int) -> None:
    """On CPU, keep this worker of several to its share of the cores; call it before JAX starts its threads."""
    if count > 1 and cpu_only() and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) >= count:
            os.sched_setaffinity(0, cores[index::count])
