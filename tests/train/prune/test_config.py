"""Settings of pruning: presets, and what is refused before anything is loaded."""

import dataclasses
import json

import pytest

from train.config import OptimConfig, TrainConfig, from_dict
from train.errors import UsageError
from train.prune.__main__ import main
from train.prune.config import PruneConfig, PruningConfig, check, check_dates, of_run
from train.prune.presets import PRESETS

BAD_SETTINGS = {
    "nothing left": (
        ["--prune.sparsity", "1"],
        "--prune.sparsity must be at least 0 and below 1 (a share",
    ),
    "negative": (
        ["--prune.sparsity", "-0.1"],
        "--prune.sparsity must be at least 0 and below 1 (a share",
    ),
    "percent": (
        ["--prune.sparsity", "90"],
        "--prune.sparsity must be at least 0 and below 1 (a share",
    ),
    "preset": (["digits_prun"], "unknown preset 'digits_prun': did you mean digits_prune"),
    "no such run": (["runs/nowhere"], "runs/nowhere is neither a preset (digits_prune, "),
    "field": (["--prune.sparsty", "0.5"], "unknown field '--prune.sparsty': did you mean --prune.sparsity"),
    "score": (["--prune.score", "magnitud"], "unknown score 'magnitud': did you mean magnitude?"),
    "structure": (["--prune.structure", "rows"], "unknown structure 'rows': choose unstructured, N:M such as 2:4, or"),
    "N of M": (["--prune.structure", "4:2"], "unknown structure '4:2'"),
    "schedule": (["--prune.schedule", "slow"], "--prune.schedule 'slow': choose one of one_shot, gradual,"),
    "layers": (["--prune.layers", "stage1"], "--prune.layers stage1 is not of the form PATTERN=SPARSITY"),
    "share": (["--prune.layers", "stage1=1"], "--prune.layers must be at least 0 and below 1 (a share"),
    "sparsity of N:M": (["--prune.structure", "2:4", "--prune.sparsity", "0.9"], "contradicts 2:4: leave it out"),
    "scope of channels": (
        ["--prune.structure", "channels", "--prune.scope", "lamp"],
        "channels take global or uniform",
    ),
    "score in step": (
        ["--prune.score", "snip"],
        "--prune.schedule gradual scores inside the step: choose --prune.score magnitude, random, taylor, norm_scale",
    ),
    "score of channels": (["--prune.score", "norm_scale"], "norm_scale scores channels: add --prune.structure"),
    "moving blocks": (
        ["--prune.schedule", "rigl", "--prune.structure", "4x1"],
        "rigl moves single weights: it needs --prune.structure unstructured",
    ),
    "masks": (["--prune.masks", "runs/other"], "--prune.masks needs --prune.schedule one_shot"),
    "end before begin": (
        ["--prune.begin", "0.5", "--prune.end", "0.4"],
        "end 0.4 is not after --prune.begin 0.5",
    ),
    "levels": (["--prune.schedule", "iterative", "--prune.levels", "0"], "--prune.levels must be at least 1, got 0"),
    "random levels": (
        ["--prune.schedule", "iterative", "--prune.start", "random"],
        "--prune.start random does not work with iterative: choose --prune.restart reinit",
    ),
    "select": (["--select", "best"], "--select best would take the least pruned network: pruning selects the last"),
    "int8 of channels": (
        ["--prune.structure", "channels", "--prune.values", "int8"],
        "the compact network is the delivery",
    ),
    "dense without init": (["--dense"], "pass that run with --init"),
    "no pattern": (["--prune.exclude", "(stem"], "'(stem' is not a valid regular expression: missing )"),
    "no pattern of layers": (["--prune.layers", "*=0.5"], "'*' is not a valid regular expression: nothing to repeat"),
}
# Fields that the other settings leave without effect.
UNUSED = {
    "begin": ["--prune.schedule", "set", "--prune.begin", "0.1"],
    "end": ["--prune.schedule", "one_shot", "--prune.end", "0.3"],
    "every": ["--prune.schedule", "one_shot", "--prune.every", "3"],
    "fraction": ["--prune.schedule", "acdc", "--prune.fraction", "0.1"],
    "levels": ["--prune.levels", "2"],
    "restart": ["--prune.restart", "reinit"],
    "rewind-epochs": ["--prune.schedule", "iterative", "--prune.restart", "reinit", "--prune.rewind-epochs", "2"],
    "epochs": ["--prune.schedule", "iterative", "--prune.epochs", "2"],
    "lr": ["--prune.start", "random", "--prune.lr", "1"],
    "round-to": ["--prune.round-to", "4"],
    "rounds": ["--prune.rounds", "3"],
    "recalibrate": ["--prune.recalibrate"],
    "scope": ["--prune.layers", "stage1=0.5", "--prune.scope", "erk"],
    "score": ["--prune.schedule", "one_shot", "--prune.masks", "runs/other", "--prune.score", "random"],
    "batches": ["--prune.batches", "2"],
}
# (schedule, every, begin, end, the longest spacing that works) in a training of 20 steps
LATE = [
    ("rigl", 50, 0.0, 1.0, 19),
    ("rigl", 20, 0.0, 1.0, 19),
    ("set", 10, 0.0, 0.5, 9),
    ("acdc", 10, 0.5, 1.0, 9),
    ("rigl", 50, 0.0, 0.05, 0),
]


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings_are_refused_in_one_line(case, fails, tmp_path):
    arguments, message = BAD_SETTINGS[case]
    assert message in fails(2, main, [*arguments, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("field", UNUSED)
def test_settings_without_effect_are_refused(field, fails, tmp_path):
    line = fails(2, main, [*UNUSED[field], "--out", str(tmp_path / "run")])
    assert line == f"error: --prune.{field} has no effect on this pruning"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_say_what_they_are_and_survive_json(name):
    about = PRESETS[name].__doc__
    assert f"python -m train.prune{'' if name == 'digits_prune' else ' ' + name}" in about
    assert "Command:" in about and "Hardware:" in about
    config = PRESETS[name]()
    check(config)
    assert from_dict(PruneConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(("schedule", "every", "begin", "end", "longest"), LATE)
def test_masks_that_would_never_move_are_refused(schedule, every, begin, end, longest):
    """In time is in time: one step less between the changes works. Gradual pruning reaches its sparsity at the end."""

    def config(schedule, every):
        return PruneConfig(prune=PruningConfig(schedule=schedule, every=every, begin=begin, end=end, epochs=2))

    hint = f"choose --prune.every {longest} or less, or train longer" if longest else "train longer"
    with pytest.raises(
        UsageError, match=rf"^--prune.every {every}: the masks of {schedule} would not move .*: {hint}$"
    ):
        check_dates(config(schedule, every), 10.0)
    if longest:
        check_dates(config(schedule, longest), 10.0)
    check_dates(config("gradual", 50), 10.0)


def test_what_is_not_taken_over_from_the_run_that_is_pruned(tmp_path):
    """How it started and where it ran; the recipe is."""
    dense = TrainConfig(
        init="weights.pth", freeze=True, dense=True, select="best", distributed="auto", kernels="onednn", cache="there",
        ema=0.9, drop_path=0.1, accumulate=2, label_smoothing=0.1, optim=OptimConfig(lr=0.5, momentum=0.8), epochs=9,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"config": dataclasses.asdict(dense)}))
    config = of_run(tmp_path)
    assert (config.freeze, config.dense, config.select, config.distributed) == (False, False, "last", None)
    assert (config.kernels, config.cache, config.init) == ("auto", "auto", str(tmp_path))
    assert (config.ema, config.drop_path, config.accumulate, config.label_smoothing) == (0.9, 0.1, 2, 0.1)
    assert (config.optim.momentum, config.prune.lr, config.prune.epochs) == (0.8, 0.1, 3)


def test_run_may_follow_its_flags(tmp_path, fails):
    (tmp_path / "config.json").write_text(json.dumps({"config": dataclasses.asdict(TrainConfig())}))
    assert "--prune.sparsity must be" in fails(2, main, ["--prune.sparsity", "7", str(tmp_path)])
    assert "is neither a preset" in fails(2, main, ["--prune.sparsity", "0.7", str(tmp_path / "no")])
