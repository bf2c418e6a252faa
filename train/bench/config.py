"""The configuration of a benchmark: one frozen dataclass, one command-line flag for each field."""

import shlex
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

from resnet_jax.parallel import Mode
from resnet_jax.resnet import MODELS
from train.cli import parse
from train.config import check_xla
from train.errors import UsageError, unknown
from train.ranges import check_ranges

STEPS, REPEATS, WARMUP = 10, 5, 3  # the most that are timed, unless flags say how many
FEEDING = ("augment", "input")  # tasks without a step of their own; see `train.bench.feeding`
# Both sides of --versus share these: how they are measured, and where the result goes.
SHARED = ("steps", "repeats", "warmup", "shares", "peak", "versus", "gate_record", "out")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """A benchmark of one compiled step."""

    model: str = "resnet20"
    """A name in `resnet_jax.MODELS`."""
    task: str = "train"
    """`train`, `eval`, `predict`, `prune`, `augment` or `input`; `python -m pretrain.bench` adds `contrastive`."""
    batch: int = 128
    """Global batch size."""
    image_size: int = 32
    """Side of the square uint8 images."""
    classes: int = 10
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of convolutions and activations; auto is bfloat16 on GPU and TPU, float32 on CPU."""
    mode: Mode = "jit"
    kernels: Literal["auto", "plain", "onednn"] = "auto"
    """What computes convolutions: XLA (plain), or oneDNN on CPU; auto is oneDNN where it can be used."""
    xla: tuple[str, ...] = ()
    """XLA compiler options for the step, NAME=VALUE each (not in mode pmap)."""
    donate: bool = True
    """Let a training step reuse its state's memory, as the pipelines do."""
    steps: int | None = None
    """Timed steps of a block; None means 10, or fewer for slow steps, so that the benchmark takes about a minute."""
    repeats: int | None = None
    """Blocks; whatever is compared is interleaved block by block, and intervals come from the spread of blocks. None
    means 5, or fewer for slow steps."""
    warmup: int | None = None
    """Untimed steps before the first block, at least 2; None means 3, or 2 for slow steps."""
    shares: bool = True
    """Also time the step's parts; costs a compilation each."""
    peak: float | None = None
    """Peak TFLOP/s of one device; None measures matrix products."""
    versus: str | None = None
    """Flags of a second config, applied on top of this one: both are measured, interleaved."""
    gate: str | None = None
    """A file that defines plain steps, PIPELINES. Exit code 1 if our steps, on resnet20 with 32 images in float32, are
    slower relative to them than its gate.json allows."""
    gate_record: bool = False
    """Write gate.json instead of comparing with it."""
    profile: str | None = None
    """Folder for a profiler trace of three steps."""
    out: str | None = None
    """Folder for the result, each in a file of its own."""


def step() -> BenchConfig:
    """One compiled step: start, steady speed, work, memory, and where its time goes.

    Command: python -m train.bench --model resnet20 --batch 128
    Hardware: any; about a minute on two cores.
    """
    return BenchConfig()


PRESETS: dict[str, Callable[[], BenchConfig]] = {"step": step}


RANGES = {
    "[1, inf)": "batch steps warmup",
    "[2, inf)": "classes repeats",  # one block has no spread to take an interval from
    "[8, 65536]": "image_size",
    "(0, inf)": "peak",
}


def check(config: BenchConfig, tasks: Collection[str]) -> None:
    """Refuse a config that cannot work, in one line, before any device is touched; `tasks` are those with a step.

    Raises:
      UsageError: an unknown name, a number out of range, flags that exclude each other.
    """
    names: dict[str, Collection[str]] = {"model": MODELS, "task": (*tasks, *FEEDING)}
    for name, valid in names.items():
        if getattr(config, name) not in valid:
            raise unknown(name, getattr(config, name), valid)
    check_ranges(vars(config), RANGES)
    check_xla(config.xla, config.mode)
    benchmarks = {
        "--versus": config.versus,
        "--gate": config.gate,
        "--profile": config.profile,
        f"--task {config.task}": config.task in FEEDING,
    }
    chosen = [flag for flag, value in benchmarks.items() if value]
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(chosen)} are separate benchmarks: run one after the other")
    if config.gate_record and not config.gate:
        raise UsageError("--gate-record writes the limits of a gate: name its file with --gate")


def unused(config: BenchConfig) -> dict[str, str]:
    """Fields that the chosen benchmark does not use, see `train.config.unused`."""
    if config.gate:
        fixed = ("model", "task", "batch", "image_size", "classes", "dtype", "mode", "xla", "shares")
        return dict.fromkeys(fixed, "with --gate, which fixes what is measured")
    if config.versus:
        return {"shares": "with --versus"}
    names = {"augment": ("donate", "shares"), "input": ("shares",), "eval": ("donate",), "predict": ("donate",)}
    return dict.fromkeys(names.get(config.task, ()), f"with --task {config.task}")


def other(config: BenchConfig, tasks: Collection[str]) -> BenchConfig:
    """The second config of `--versus`.

    Raises:
      UsageError: flags that are unknown, out of range, or shared by both sides.
    """
    try:
        _, second = parse("--versus", {"step": lambda: config}, shlex.split(config.versus or ""), default="step")
        check(second, tasks)
    except (UsageError, ValueError) as error:
        raise UsageError(f"--versus {config.versus!r}: {error}") from None
    for name in SHARED:
        if getattr(second, name) != getattr(config, name):
            raise UsageError(f"--versus cannot change --{name.replace('_', '-')}: both sides share it")
    return second
