"""What a benchmark is told: one frozen dataclass, one field a flag."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from resnet_jax.parallel import Mode
from resnet_jax.resnet import MODELS
from train.cli import parse
from train.config import check_xla
from train.errors import UsageError, unknown

STEP_TASKS = ("train", "eval", "predict", "contrastive", "prune")
OTHER_TASKS = ("augment", "input")
# What the two sides of a comparison share: how it is measured, and where the answer goes.
SHARED = ("device", "steps", "repeats", "warmup", "peak", "cache", "shares")
ACTIONS = ("compare", "versus", "gate", "gate_record", "all", "out", "profile")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """A benchmark of one compiled step."""

    model: str = "resnet20"
    """A name in `resnet_jax.MODELS`."""
    task: str = "train"
    """`train`, `eval`, `predict`, `contrastive`, `prune`, `augment` or `input`."""
    batch: int = 128
    """Global batch size."""
    image_size: int = 32
    """Side of the square uint8 images."""
    classes: int = 10
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of convolutions and activations; auto is bfloat16 on GPU and TPU, float32 on CPU."""
    mode: Mode = "jit"
    kernels: Literal["auto", "plain", "onednn"] = "auto"
    """What computes convolutions: XLA (plain), or oneDNN on CPU; auto is oneDNN where it can be used."""
    xla: tuple[str, ...] = ()
    """XLA compiler options for the step, NAME=VALUE each (not in mode pmap)."""
    donate: bool = True
    """Let a training step reuse its state's memory, as the pipelines do."""
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    steps: int = 10
    """Timed steps of a block."""
    repeats: int = 5
    """Blocks; what is compared takes turns block by block, and intervals come from their spread."""
    warmup: int = 3
    """Untimed steps before the first block."""
    shares: bool = True
    """Also time the step's parts; costs a compilation each."""
    peak: float | None = None
    """TFLOP/s of one device to hold against; None measures matrix products."""
    cache: str = "auto"
    """Persistent compilation cache: auto is an empty temporary one, a folder uses that, none goes without."""
    compare: str | None = None
    """A result of an earlier benchmark (JSON): its config is measured again, in turns with this one."""
    versus: str | None = None
    """Flags of a second config, applied over this one: measured in turns with it."""
    gate: str | None = None
    """A file that defines plain steps, PIPELINES: exit code 1 if ours, on resnet20 with 32 images in float32, are
    slower beside them than its gate.json says."""
    gate_record: bool = False
    """Write gate.json instead of holding against it."""
    all: bool = False
    """Every task in turn, with a batch of at most 32 on CPU."""
    profile: str | None = None
    """Folder for a profiler trace of three steps."""
    out: str | None = None
    """Folder for the result as a file of its own."""


def step() -> BenchConfig:
    """One compiled step: start, steady speed, work, memory, and where its time goes.

    Command: python -m train.bench --model resnet20 --batch 128
    Hardware: any; about a minute on two cores.
    """
    return BenchConfig()


PRESETS: dict[str, Callable[[], BenchConfig]] = {"step": step}


def check(config: BenchConfig) -> None:
    """Refuse in one line what cannot work, before any device is touched.

    Raises:
      UsageError: a name in no table, a number out of its range, flags that exclude each other.
    """
    if config.model not in MODELS:
        raise unknown("model", config.model, MODELS)
    if config.task not in STEP_TASKS + OTHER_TASKS:
        raise unknown("task", config.task, STEP_TASKS + OTHER_TASKS)
    choices = {
        "dtype": ("auto", "float32", "bfloat16"),
        "mode": ("jit", "pmap", "shard_map"),
        "kernels": ("auto", "plain", "onednn"),
        "device": ("auto", "cpu", "gpu", "tpu"),
    }
    for name, valid in choices.items():
        if getattr(config, name) not in valid:
            raise unknown(name, getattr(config, name), valid)
    ranges = {
        "batch": config.batch >= 1,
        "image_size": config.image_size >= 8,
        "classes": config.classes >= 2,
        "steps": 1 <= config.steps <= 10_000,
        # One block has no spread to take an interval from.
        "repeats": 2 <= config.repeats <= 1_000,
        "warmup": 1 <= config.warmup <= 1_000,
        "peak": config.peak is None or config.peak > 0,
    }
    for name, fits in ranges.items():
        if not fits:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(config, name)} is out of range")
    check_xla(config.xla, config.mode)
    actions = [name for name in ("compare", "versus", "gate", "all") if getattr(config, name)]
    if len(actions) > 1:
        raise UsageError(f"--{actions[0]} and --{actions[1]} are two benchmarks: run them one after the other")
    if actions and actions[0] in ("compare", "versus") and config.task not in STEP_TASKS:
        raise UsageError(f"task {config.task} has no step to compare: choose one of {', '.join(STEP_TASKS)}")
    if config.profile and (actions or config.task not in STEP_TASKS):
        raise UsageError("--profile traces the steps of one task: leave out what measures something else")
    if config.gate_record and not config.gate:
        raise UsageError("--gate-record writes the limits of a gate: name its file with --gate")


def other(config: BenchConfig) -> BenchConfig:
    """The second config of `--versus`.

    Raises:
      UsageError: flags that are unknown, out of range, or that both sides must share.
    """
    try:
        flags = shlex.split(config.versus or "")
        _, second = parse("--versus", {"step": lambda: replace(config, versus=None)}, flags, default="step")
        check(second)
    except (UsageError, ValueError) as error:
        raise UsageError(f"--versus {config.versus!r}: {error}") from None
    for name in SHARED + ACTIONS:
        if name != "versus" and getattr(second, name) != getattr(config, name):
            raise UsageError(f"--versus cannot change --{name.replace('_', '-')}: it holds for both sides")
    return second


def from_stored(values: dict[str, Any], config: BenchConfig) -> BenchConfig:
    """The config that a result holds, measured as `config` says: what `SHARED` names is taken from there.

    Raises:
      UsageError: values that are no benchmark's.
    """
    names = {f.name for f in fields(BenchConfig)} - {*SHARED, *ACTIONS}
    kept: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name in names}
    stored = BenchConfig(**(kept | {name: getattr(config, name) for name in SHARED}))
    check(stored)
    if stored.task not in STEP_TASKS:
        raise UsageError(f"its task {stored.task} has no step to compare")
    return stored
