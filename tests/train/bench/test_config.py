"""The benchmark's flags: those of `--versus`, and errors."""

import pytest

from tests.train.bench.toy import FLAGS
from train.bench.__main__ import main
from train.bench.config import PRESETS, other
from train.bench.tasks import TASKS
from train.cli import parse


@pytest.mark.parametrize(("flags", "batch"), [("--no-donate", 32), ("--batch 64 --no-donate", 64)])
def test_versus_applies_flags_over_the_config(flags, batch):
    _, config = parse("bench", PRESETS, ["--versus", flags, "--batch", "32", "--task", "eval"], default="step")
    assert (config.versus, config.batch, config.donate) == (flags, 32, True)
    second = other(config, TASKS)
    assert (second.batch, second.donate, second.task) == (batch, False, "eval")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "resnet19"], "unknown model 'resnet19': did you mean resnet18"),
        (["--task", "trian"], "unknown task 'trian': did you mean train?"),
        (["--batch", "12"], "a batch of 12 is not divisible by 8 devices: choose a multiple of 8"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--repeats", "1"], "--repeats must be at least 2, got 1"),
        (["--xla", "fast"], "--xla 'fast' is not of the form NAME=VALUE"),
        (["--versus", "--bacth 3"], "--versus '--bacth 3': unknown field '--bacth': did you mean --batch? "),
        (["--versus=--model=vgg"], "unknown model 'vgg'"),
        (["--versus=--steps=3"], "--versus cannot change --steps: both sides share it"),
        (["--versus", "--batch 32", "--gate", "x.py"], "--versus and --gate are separate benchmarks"),
        (["--versus", "--batch 32", "--task", "augment"], "--versus and --task augment are separate benchmarks"),
        (["--versus", "--task augment"], "--versus and --task augment are separate benchmarks"),
        (["--versus", "--gate x.py"], "--versus and --gate are separate benchmarks"),
        (["--profile", "x", "--task", "input"], "--profile and --task input are separate benchmarks"),
        (["--gate-record"], "name its file with --gate"),
        (["--out", "/proc/none"], "cannot make the folder --out /proc/none"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(flags, said, fails):
    assert said in fails(2, main, [*FLAGS, *flags])
