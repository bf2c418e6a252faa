"""The benchmark's flags: those of `--versus`, and errors."""

import pytest

from tests.train.bench.toy import FLAGS, tiny
from train.bench import BenchConfig
from train.bench.__main__ import main
from train.bench.config import PRESETS, check, other
from train.bench.tasks import TASKS
from train.cli import parse
from train.errors import UsageError


@pytest.mark.parametrize("flags", ["--no-donate", "--batch 64 --no-donate"])
def test_versus_takes_flags_for_its_value(flags):
    _, config = parse("bench", PRESETS, ["--versus", flags, "--batch", "32"], default="step")
    assert (config.versus, config.batch) == (flags, 32)
    assert not other(config, TASKS).donate


def test_versus_applies_flags_over_the_config():
    second = other(tiny(task="eval", versus="--batch 64 --kernels onednn"), TASKS)
    assert (second.batch, second.kernels, second.task, second.model) == (64, "onednn", "eval", "resnet8")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "resnet19"], "unknown model 'resnet19': did you mean resnet18"),
        (["--task", "trian"], "unknown task 'trian': did you mean train?"),
        (["--batch", "12"], "a batch of 12 is not divisible by 8 devices: choose a multiple of 8"),
        (["--batch", "0"], "--batch 0 is out of range"),
        (["--batch", "many"], "many"),
        (["--steps", "0"], "--steps 0 is out of range"),
        (["--repeats", "1"], "--repeats 1 is out of range"),
        (["--warmup", "0"], "--warmup 0 is out of range"),
        (["--image-size", "4"], "--image-size 4 is out of range"),
        (["--peak", "-1"], "--peak -1.0 is out of range"),
        (["--device", "tpu"], "--device tpu: JAX finds none here, only 8 x cpu"),
        (["--xla", "fast"], "--xla 'fast' is not of the form NAME=VALUE"),
        (["--xla", "a=b", "--mode", "pmap"], "pmap takes no compiler options"),
        (["--versus", "--bacth 3"], "--versus '--bacth 3': unknown field '--bacth': did you mean --batch or "),
        (["--versus=--model=vgg"], "unknown model 'vgg'"),
        (["--versus=--steps=3"], "--versus cannot change --steps: both sides share it"),
        (["--versus=--batch=12"], "a batch of 12 is not divisible"),
        (["--versus", "--batch 32", "--gate", "x.py"], "--versus and --gate are separate benchmarks"),
        (["--versus", "--batch 32", "--task", "augment"], "task augment has no step to compare"),
        (["--versus", "--task augment"], "task augment has no step to compare"),
        (["--versus", "--gate x.py"], "--versus cannot change --gate"),
        (["--profile", "x", "--task", "input"], "--profile traces one task's steps"),
        (["--gate-record"], "name its file with --gate"),
        (["--out", "/proc/none"], "cannot make the folder --out /proc/none"),
        (["--stesp", "3"], "unknown field '--stesp': did you mean --steps or "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(flags, said, fails):
    assert said in fails(2, main, [*FLAGS, *flags])


@pytest.mark.parametrize("field", ["dtype", "mode", "kernels", "device"])
def test_configs_from_python_are_checked_as_well(field):
    with pytest.raises(UsageError, match=f"unknown {field} 'x': choose one of"):
        check(BenchConfig(**{field: "x"}), TASKS)
