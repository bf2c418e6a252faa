"""What a config may hold: every number has a range, and fields without effect are refused."""

import dataclasses
from pathlib import Path
from typing import get_args

import pytest

from pretrain import config as pretraining
from pretrain.config import PretrainConfig
from pretrain.evaluate import evaluate
from pretrain.presets import PRESETS as PRETRAIN_PRESETS
from train import config as training
from train.bench import config as bench
from train.bench.tasks import TASKS
from train.cli import kinds_of
from train.config import DataConfig, OptimConfig, TrainConfig, check, check_changes, flat
from train.errors import UsageError
from train.presets import PRESETS
from train.prune import config as pruning
from train.ranges import check_ranges

TABLES = {
    TrainConfig: [training.RANGES],
    PretrainConfig: [training.RANGES, pretraining.RANGES],
    pruning.PruneConfig: [training.RANGES, pruning.RANGES],
    bench.BenchConfig: [bench.RANGES],
}


@pytest.mark.parametrize("kind", TABLES)
def test_every_number_has_one_range(kind):
    ranged = [name for table in TABLES[kind] for names in table.values() for name in names.split()]

    def numeric(kind):
        return kind in (int, float) or any(numeric(one) for one in get_args(kind) if one is not kind)

    fields = {name.replace("-", "_") for name, field in kinds_of(kind).items() if numeric(field)}
    assert fields <= set(ranged), fields - set(ranged)
    assert len(ranged) == len(set(ranged))


RANGED = {name: interval for table in (training.RANGES, pretraining.RANGES, pruning.RANGES, bench.RANGES)
          for interval, names in table.items() for name in names.split()}  # fmt: skip


@pytest.mark.parametrize("name", RANGED)
def test_numbers_outside_a_range_are_refused(name):
    """Both ends, nan and infinities, alone and in a tuple."""
    interval = RANGED[name]
    low, _, high = interval[1:].split(" (")[0].split(" for")[0].rstrip(")]").partition(", ")
    low, high = float(low), float(high)
    span = min(high - low, 1.0)
    table = {interval: name}
    for inside in (low + span / 2, low if interval[0] == "[" else low + span / 100):
        check_ranges({name: inside}, table)
        check_ranges({name: (inside, inside)}, table)
    check_ranges({name: None}, table)
    at_low = [low] if interval[0] == "(" else []
    for outside in (*at_low, low - 1, high if high == float("inf") else high + 1, float("nan"), float("-inf")):
        for value in (outside, (low + span / 2, outside)):
            with pytest.raises(UsageError, match=f"^--{name.replace('_', '-')} must be (at least|above) .*, got "):
                check_ranges({name: value}, table)


def test_integers_have_32_bits():
    """Where a range has no end; floats have none."""
    table = {"[1, inf)": "batch"}
    for number in (2**31 - 1, 1e30):
        check_ranges({"batch": number}, table)
    with pytest.raises(UsageError, match=r"^--batch must be at least 1 and below 2147483648, got 2147483648"):
        check_ranges({"batch": 2**31}, table)


def test_messages_name_the_range():
    for field, value, message in (
        ("momentum", 1.0, "--optim.momentum must be at least 0 and below 1, got 1.0"),
        ("lr", -1.0, "--optim.lr must be at least 0, got -1.0"),
        ("lr", float("inf"), "--optim.lr must be at least 0 and finite, got inf"),
        (
            "milestones",
            (0.5, 2.0),
            "--optim.milestones must be above 0 and below 1 (fractions of all steps), got 2.0",
        ),
    ):
        with pytest.raises(UsageError) as refusal:
            check(TrainConfig(optim=OptimConfig(**{field: value})))
        assert str(refusal.value) == message


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64, 10**400])
def test_seeds_have_32_bits(seed):
    for config in (TrainConfig(seed=seed), TrainConfig(data=DataConfig(split_seed=seed))):
        with pytest.raises(UsageError, match=r"seed must be at least 0 and below 4294967296, got "):
            check(config)
    check(TrainConfig(seed=2**32 - 1))


@pytest.mark.parametrize("name", ["sdg", "optax.lbfgs"])
def test_names_are_checked_before_the_data_are_opened(name):
    for optim, kind in ((OptimConfig(name=name), "optimizer|lbfgs"), (OptimConfig(schedule="cos"), "schedule")):
        with pytest.raises(UsageError, match=kind):
            check(TrainConfig(optim=optim))
        with pytest.raises(UsageError, match=kind):
            pretraining.check(dataclasses.replace(PRETRAIN_PRESETS["digits_simclr"](), optim=optim))


def with_field(config, name, value):
    head, _, rest = name.partition(".")
    return dataclasses.replace(config, **{head: with_field(getattr(config, head), rest, value) if rest else value})


# (fields that are in force, a field that they leave without effect, its value)
WITHOUT_EFFECT = [
    ({"optim.name": "optax.sgd"}, "optim.momentum", 0.5),
    ({"optim.name": "lamb"}, "optim.nesterov", False),
    ({"optim.name": "optax.adam"}, "optim.nesterov", False),
    ({}, "optim.trust_coefficient", 0.1),
    ({}, "optim.milestones", (0.2,)),
    ({"optim.schedule": "one_cycle"}, "optim.factor", 0.5),
    ({"steps": 3}, "epochs", 3),
    ({"data.name": "folder:x"}, "data.dir", "y"),
    ({}, "augment.min_scale", 0.5),
    ({"augment.crop_padding": 0}, "augment.crop_mode", "reflect"),
    ({"init": "x", "freeze": True}, "drop_path", 0.1),
    ({"init": "x"}, "zero_init", True),
]


@pytest.mark.parametrize(("given", "name", "value"), WITHOUT_EFFECT, ids=lambda x: x if isinstance(x, str) else "")
def test_fields_without_effect_are_refused(given, name, value):
    usual = PRESETS["digits"]()
    config = usual
    for field, setting in given.items():
        config = with_field(config, field, setting)
    check_changes(config, usual)  # what the preset sets is not the user's to answer for
    with pytest.raises(UsageError, match=f"^--{name.replace('_', '-')} has no effect with"):
        check_changes(with_field(config, name, value), usual)


def test_fields_with_effect_are_taken():
    usual = PRESETS["digits"]()
    for given in (
        {"optim.schedule": "step", "optim.milestones": (0.2,), "optim.factor": 0.5},
        {"optim.name": "lars", "optim.trust_coefficient": 0.1, "optim.momentum": 0.5},
        {"optim.name": "adamw", "optim.nesterov": False},
        {"augment.resized_crop": 8, "augment.min_scale": 0.5},
        {"augment.crop_mode": "reflect"},
        {"epochs": 3},
    ):
        config = usual
        for field, setting in given.items():
            config = with_field(config, field, setting)
        check_changes(config, usual)


def test_fields_of_pretraining_and_of_benchmarks_without_effect():
    usual = PRETRAIN_PRESETS["digits_swav"]()
    for name in ("augment.small_crop", "augment.small_scale"):
        value = 4 if name.endswith("crop") else (0.1, 0.2)
        with pytest.raises(UsageError, match=r"has no effect without --augment\.small-views"):
            check_changes(with_field(usual, name, value), usual, pretraining.unused)
        check_changes(with_field(with_field(usual, name, value), "augment.small_views", 2), usual, pretraining.unused)
    step = bench.step()
    for given, name, value in (
        ({"task": "input"}, "shares", False),
        ({"task": "eval"}, "donate", False),
        ({"gate": "x.py"}, "batch", 64),
        ({"versus": "--batch 3"}, "shares", False),
    ):
        config = dataclasses.replace(step, **given)
        bench.check(config, TASKS)
        check_changes(config, step, bench.unused)
        with pytest.raises(UsageError, match=f"^--{name} has no effect with --"):
            check_changes(dataclasses.replace(config, **{name: value}), step, bench.unused)


@pytest.mark.parametrize("given", [{"epochs": 0}, {"lr": float("nan")}, {"batch": 0}, {"seed": -1}])
def test_numbers_of_an_evaluation(given):
    with pytest.raises(UsageError, match=f"^--{next(iter(given))} must be "):
        evaluate(Path("nowhere"), **given)


def test_presets_pass_their_own_checks():
    for preset in PRESETS.values():
        check(preset())
    for preset in PRETRAIN_PRESETS.values():
        pretraining.check(preset())
    assert flat(PRESETS["cifar100_resnet18"]())["optim.milestones"] == (0.3, 0.6, 0.8)
