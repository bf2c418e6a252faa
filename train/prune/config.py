"""Configuration of pruning: that of a supervised run, plus what to prune, when, and how to train the rest."""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from resnet_jax.masks import Scope, structure_of
from resnet_jax.scores import SCORES
from train import config as training
from train.config import TrainConfig
from train.config import check as check_training
from train.errors import UsageError, unknown
from train.ranges import check_ranges
from train.run_folder import read_config
from train.tracing import traced_steps

Schedule = Literal["one_shot", "gradual", "iterative", "rigl", "set", "acdc"]

# Scores that need only what a training step already has, for schedules that prune inside it.
IN_STEP = ("magnitude", "random", "taylor", "norm_scale")
AT_ONCE = ("one_shot", "iterative", "rigl", "set")  # schedules that score before training, on data if needed
CHANNELS = "channels"


@dataclass(frozen=True, kw_only=True)
class PruningConfig:
    """Settings of pruning and of the training after or during it."""

    sparsity: float | None = None
    """Share of the prunable weights, or channels, to remove, in [0, 1). Default: 0.9, or the sparsity of N:M."""
    score: str = "magnitude"
    """Score of importance: `magnitude`, `random`, `snip`, `taylor`, `fisher`, `synflow`; `norm_scale` for channels."""
    scope: Scope = "global"
    """Rank weights over all layers (`global`, `lamp`), or prune a share of each layer (`uniform`, `erk`)."""
    layers: tuple[str, ...] = ()
    """Sparsities of single layers, each as PATTERN=SPARSITY, in place of a scope; other layers get `sparsity`."""
    structure: str = "unstructured"
    """`unstructured`, N:M such as 2:4, blocks such as 4x1 (inputs x outputs), or `channels`."""
    exclude: tuple[str, ...] = ("stem", "head")
    """Patterns of the kernels, or with `channels` of the channel groups, that are never pruned."""
    round_to: int = 8
    """Round widths to multiples of this number when channels are pruned."""
    schedule: Schedule = "gradual"
    """`one_shot`, `gradual` (cubic), `iterative`, `rigl`, `set` or `acdc`."""
    start: Literal["trained", "random"] = "trained"
    """Prune the trained network, or prune and train from random weights by the dense run's recipe."""
    masks: str | None = None
    """Take the masks from this sparse run or file instead of scoring (with `one_shot`)."""
    epochs: float = 10
    """Epochs of training after, or during, pruning."""
    lr: float = 0.02
    """Peak learning rate of that training, which decays along a cosine."""
    begin: float = 0.0
    """First change of the masks, as a fraction of the training (`gradual`, `acdc`)."""
    end: float = 0.7
    """Last change of the masks, as a fraction of the training (`gradual`, `acdc`, `rigl`, `set`)."""
    every: int = 50
    """Steps between changes of the masks; with `acdc`, steps per phase."""
    fraction: float = 0.3
    """Initial share of each layer's weights that `rigl` and `set` replace."""
    levels: int = 5
    """Rounds of pruning and training with `iterative`."""
    restart: Literal["rewind", "reinit", "finetune"] = "rewind"
    """Where each level of `iterative` starts: the dense run's early weights, fresh weights, or the previous level's."""
    rewind_epochs: float = 1.0
    """Epochs of the dense run after which its weights are saved for rewinding."""
    rounds: int | None = None
    """Rounds of scoring in one-shot pruning; each prunes the same share of the rest. Default: 1 (`synflow`: 100)."""
    batches: int = 8
    """Number of training batches on which scores and batch statistics are measured."""
    recalibrate: bool = False
    """Measure the batch statistics again after one-shot pruning, before training."""
    values: Literal["float32", "int8"] = "float32"
    """Type of the kept weights in the sparse file."""

    @property
    def kind(self) -> str:
        """Kind of `structure`: `channels`, `n:m` or `block` (single weights too). Raises `ValueError` if unknown."""
        return CHANNELS if self.structure == CHANNELS else structure_of(self.structure)[0]

    @property
    def final(self) -> float:
        """Final sparsity, in [0, 1)."""
        if self.sparsity is not None:
            return self.sparsity
        if self.kind != "n:m":
            return 0.9
        _, n, m = structure_of(self.structure)
        return 1 - n / m

    @property
    def by_layer(self) -> dict[str, float]:
        """`layers` as pattern -> sparsity. Raises `ValueError` if one is not of that form."""
        if not all(one.rpartition("=")[0] for one in self.layers):
            raise ValueError("a pattern is missing")
        return {pattern: float(share) for pattern, _, share in (one.rpartition("=") for one in self.layers)}

    @property
    def scoring_rounds(self) -> int:
        """Rounds of one-shot pruning; SynFlow's default is from https://arxiv.org/abs/2006.05467."""
        return self.rounds or (100 if self.score == "synflow" else 1)

    @property
    def needs_images(self) -> bool:
        """Whether pruning uses training images before the training starts."""
        return self.recalibrate or (self.schedule in AT_ONCE and self.score in ("snip", "taylor", "fisher"))

    @property
    def from_scratch(self) -> bool:
        """Whether the network is trained by the dense run's recipe, not by `epochs` and `lr`."""
        return self.start == "random" or (self.schedule == "iterative" and self.restart != "finetune")


@dataclass(frozen=True, kw_only=True)
class PruneConfig(TrainConfig):
    """A run of pruning. `init` is the trained run; without it, a dense run is trained first, with the other fields."""

    prune: PruningConfig = field(default_factory=PruningConfig)


def of_run(run: Path) -> PruneConfig:
    """Make the default pruning of a trained run: its own settings, a third of its epochs, a fifth of its learning rate.

    For a run that is already pruned: the epochs and learning rate of its own pruning. What belongs to how that run
    started (`freeze`) or to where it ran (its hosts, oneDNN, its cache, its trackers) is not taken over.

    Raises:
      UsageError: `run` is not a run folder.
    """
    config, saved = read_config(run, PruneConfig)
    if "prune" in saved["config"]:
        epochs, lr = config.prune.epochs, config.prune.lr
    else:
        try:
            trained = json.loads((run / "result.json").read_text())["epochs"]
        except (OSError, ValueError, KeyError):  # not finished
            trained = config.epochs
        epochs, lr = max(round(trained / 3), 1), config.optim.lr / 5
    return dataclasses.replace(
        config,
        out=f"{run if run.name and run.name != '..' else run.resolve()}-pruned",
        init=str(run),
        select="last",
        dense=False,
        freeze=False,
        distributed=None,
        log=(),
        profile=None,
        kernels="auto" if config.kernels == "onednn" else config.kernels,
        cache="auto" if config.cache != "none" else "none",
        prune=PruningConfig(epochs=epochs, lr=lr),
    )


def dense_config(config: PruneConfig, out: Path) -> TrainConfig:
    """Config of the dense run, which is trained first in its own folder if no run is given.

    `--profile` traces the training after pruning.
    """
    fields = {name: value for name, value in vars(config).items() if name != "prune"}
    return TrainConfig(**{**fields, "out": str(out), "profile": None})


def retraining(config: PruneConfig) -> PruneConfig:
    """Replace the dense run's recipe in the config with that of the training after pruning."""
    p = config.prune
    if p.from_scratch:
        return config
    optim = dataclasses.replace(config.optim, lr=p.lr, schedule="cosine", warmup_epochs=0.0)
    return dataclasses.replace(config, epochs=p.epochs, steps=None, optim=optim)


def check_dates(config: PruneConfig, epoch_steps: float) -> None:
    """Check, for steps per epoch, that the masks of a schedule that moves them change during the training.

    Raises:
      UsageError: `every` is too long; the message gives the longest that works.
    """
    p, training = config.prune, retraining(config)
    steps = training.steps or max(int(training.epochs * epoch_steps), 1)
    traced_steps(config.profile, steps)
    begin, end = dates(p, steps)
    # RigL and SET first move weights after `every` steps; AC/DC first frees them `every` steps after `begin`.
    begin = {"rigl": 0, "set": 0, "acdc": max(begin, 1)}.get(p.schedule, end)
    if begin < end and p.every >= end - begin:
        longest = end - begin - 1
        hint = f"choose --prune.every {longest} or less, or train longer" if longest else "train longer"
        late = f"the masks of {p.schedule} would not move by step {end}, the last change"
        raise UsageError(f"--prune.every {p.every}: {late}: {hint}")


def dates(p: PruningConfig, steps: int) -> tuple[int, int]:
    """Steps of the (first, last) change of the masks in a training of `steps`."""
    end = max(round(p.end * steps), 1)
    return min(round(p.begin * steps), end - 1), end


def unused(config: PruneConfig) -> dict[str, str]:
    """Fields that have no effect on this kind of pruning, see `train.config.unused`."""
    p = config.prune
    at_once, iterative, moves = p.schedule in AT_ONCE, p.schedule == "iterative", p.schedule in ("rigl", "set")
    dated = p.schedule in ("gradual", "acdc")
    applies = {
        "prune.epochs": not p.from_scratch,
        "prune.lr": not p.from_scratch,
        "prune.begin": dated,
        "prune.end": dated or moves,
        "prune.every": dated or moves,
        "prune.fraction": moves,
        "prune.levels": iterative,
        "prune.restart": iterative,
        "prune.rewind_epochs": iterative and p.restart == "rewind",
        "prune.round_to": p.structure == CHANNELS,
        "prune.scope": not p.layers and p.masks is None and ":" not in p.structure,  # N:M prunes every layer equally
        "prune.score": p.masks is None,
        "prune.sparsity": p.masks is None,
        "prune.rounds": at_once and p.masks is None,
        "prune.recalibrate": at_once,
        "prune.batches": p.needs_images,
        "dense": p.start == "trained",
    }
    reasons = {name: "on this pruning" for name, matters in applies.items() if not matters}
    # The recipe is the dense run's, which already exists if `init` is given.
    if config.init is not None and not p.from_scratch:
        hint = "on this pruning: the training after pruning is set by --prune.epochs and --prune.lr"
        recipe = ("epochs", "steps", "optim.lr", "optim.schedule", "optim.warmup_epochs")
        reasons |= dict.fromkeys((*recipe, "optim.milestones", "optim.factor"), hint)
    return training.unused(config) | reasons


SHARE = "[0, 1) (a share, not percent)"
RANGES = {
    SHARE: "prune.sparsity",
    "(0, 1000000000]": "prune.epochs",
    "[0, 1000000000]": "prune.rewind_epochs",
    "[0, inf)": "prune.lr",
    "[1, inf)": "prune.round_to prune.every prune.levels prune.rounds prune.batches",
    "[0, 1) (a fraction of the training)": "prune.begin",
    "(0, 1] (a fraction of the training)": "prune.end",
    "(0, 1)": "prune.fraction",
}


def check(config: PruneConfig) -> None:
    """Refuse settings that cannot work, in one line and before anything is loaded.

    Raises:
      UsageError: an unknown name, a number out of range, options that exclude each other.
    """
    p = config.prune
    if p.score not in SCORES:
        raise unknown("score", p.score, SCORES)
    try:
        kind = p.kind
    except ValueError as error:
        raise UsageError(f"--prune.structure: {error}, or {CHANNELS}") from None
    try:
        shares = p.by_layer
    except ValueError:
        raise UsageError(f"--prune.layers {' '.join(p.layers)} is not of the form PATTERN=SPARSITY ...") from None
    for pattern in (*p.exclude, *shares):
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(f"{pattern!r} is not a valid regular expression: {error}") from None
    check_training(config, RANGES)
    check_ranges({"prune.layers": shares.values()}, {SHARE: "prune.layers"})
    at_once, iterative = p.schedule in AT_ONCE, p.schedule == "iterative"
    refused = {
        f"--prune.end {p.end} is not after --prune.begin {p.begin}": p.end <= p.begin,
        f"--prune.sparsity {p.sparsity} contradicts {p.structure}: leave it out": (
            kind == "n:m" and abs(p.final - dataclasses.replace(p, sparsity=None).final) > 1e-6
        ),
        "--prune.scope lamp and erk apply only to single weights: channels take global or uniform": (
            kind == CHANNELS and p.scope not in ("global", "uniform")
        ),
        "--prune.layers applies only to weights pruned by rank, not to channels, N:M or levels": (
            bool(p.layers) and (kind != "block" or iterative)
        ),
        "--prune.score norm_scale scores channels: add --prune.structure channels": (
            p.score == "norm_scale" and kind != CHANNELS
        ),
        f"--prune.schedule {p.schedule} scores inside the step: choose --prune.score {', '.join(IN_STEP)}": (
            not at_once and p.score not in IN_STEP
        ),
        f"--prune.schedule {p.schedule} moves single weights: it needs --prune.structure unstructured": (
            p.schedule in ("rigl", "set") and p.structure != "unstructured"
        ),
        "--prune.masks needs --prune.schedule one_shot": p.masks is not None and p.schedule != "one_shot",
        "rewinding needs the early weights of a run that it trains itself: leave the run out, or choose "
        "--prune.restart finetune": iterative and p.restart == "rewind" and config.init is not None,
        "--prune.start random does not work with iterative: choose --prune.restart reinit": (
            p.start == "random" and iterative
        ),
        "--select best would take the least pruned network: pruning selects the last": config.select == "best",
        "--prune.values int8 rounds single weights: with channels the compact network is the delivery": (
            kind == CHANNELS and p.values == "int8"
        ),
    }
    for message, wrong in refused.items():
        if wrong:
            raise UsageError(message)
