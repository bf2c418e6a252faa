"""`--config FILE`: presets below it, flags above it, and one line for what does not fit."""

import dataclasses
import json
from pathlib import Path

import pytest

from pretrain import presets as pretrain_presets
from pretrain.__main__ import main as pretrain
from train.__main__ import main
from train.cli import parse, read_command
from train.config import TrainConfig, check_changes, flat, pipeline
from train.config_file import as_kind, field_kinds, read_config_file, with_fields
from train.detect import presets as detect_presets
from train.presets import PRESETS
from train.prune import presets as prune_presets
from train.run_folder import environment, write_json

RESULTS = Path(__file__).parents[2] / "results"


@pytest.fixture
def written(tmp_path):
    """`written(content)` is a JSON file's name."""

    def write(content):
        path = tmp_path / "settings.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def changes(words, presets=PRESETS, default="digits"):
    """(preset, fields that differ from its config)."""
    preset, config = parse("train", presets, words, default=default)
    usual = flat(presets[preset]())
    return preset, {name: value for name, value in flat(config).items() if value != usual[name]}


def test_file_wins_over_preset_and_flags_win_over_file(written):
    file = written({"optim": {"lr": 1, "milestones": [0.5, 1]}, "augment.flip": True, "batch": 32.0, "width": None})
    fields = {"optim.lr": 1.0, "optim.milestones": (0.5, 1.0), "augment.flip": True, "batch": 32}
    assert changes(["--config", file]) == ("digits", fields)
    assert changes([f"--config={file}", "digits", "--optim.lr", "2", "--no-augment.flip"]) == (
        "digits",
        {"optim.lr": 2.0, "optim.milestones": (0.5, 1.0), "batch": 32},
    )


def test_preset_of_a_file_is_used_unless_one_is_named(written):
    file = written({"preset": "finetune", "seed": 1})
    assert changes(["--config", file]) == ("finetune", {"seed": 1})
    assert changes(["cifar10_resnet20", "--config", file]) == ("cifar10_resnet20", {"seed": 1})


@pytest.mark.parametrize(
    "words, presets, default",
    [
        (["imagenet_resnet50_rsb", "--optim.lr", "1e-3", "--widths", "8", "16"], PRESETS, "digits"),
        (["digits_dino", "--augment.jitter", "0,0,0,0"], pretrain_presets.PRESETS, "digits_simclr"),
        (["--prune.structure", "2:4", "--xla", "a=b"], prune_presets.PRESETS, "digits_prune"),
        (["--proposals.before", "50", "40", "--data.buckets", "64x64"], detect_presets.PRESETS, "shapes_fasterrcnn"),
    ],
)
def test_every_pipeline_repeats_a_run_from_its_record(words, presets, default, tmp_path):
    preset, config = parse("train", presets, words, default=default)
    fields = dataclasses.asdict(config)
    record = {"pipeline": pipeline(type(config)), "preset": preset, "config": fields, **environment()}
    write_json(tmp_path / "config.json", record)
    for name in (tmp_path, tmp_path / "config.json"):
        command = read_command("train", presets, ["--config", str(name)], default=default)
        assert (command.preset, command.config) == (preset, config)
        check_changes(command.config, command.start)
    write_json(tmp_path / "config.json", record | {"preset": "mine"})
    command = read_command("train", presets, ["--config", str(tmp_path)], default=default)
    assert (command.preset, command.config) == ("custom", config)


def test_published_runs_are_taken():
    preset, config = parse("train", PRESETS, ["--config", str(RESULTS / "digits" / "seed1.json")], default="digits")
    assert (preset, config.seed) == ("digits", 1)


def test_flag_without_effect_on_the_file_is_refused(written, fails):
    file = written({"optim": {"schedule": "constant"}})
    assert "--optim.factor has no effect with --optim.schedule constant" in fails(
        2, main, ["--config", file, "--optim.factor", "0.5"]
    )


def test_paths_of_a_run_are_found_from_its_folder(tmp_path, monkeypatch):
    (tmp_path / "there" / "run").mkdir(parents=True)
    (tmp_path / "there" / "weights.pth").touch()
    config = {"init": "weights.pth", "out": "run"}
    write_json(tmp_path / "there" / "run" / "config.json", {"config": config, "cwd": str(tmp_path / "there")})
    monkeypatch.chdir(tmp_path)
    found = with_fields(TrainConfig(), read_config_file("there/run"))
    assert Path(found.init).samefile(tmp_path / "there" / "weights.pth")


REFUSED = {
    '{"optim": {"lrr": 2}}': "unknown field 'optim.lrr': did you mean optim.lr",
    '{"lr": 2}': "unknown field 'lr': did you mean optim.lr? ",
    '{"optim": 3}': "unknown field 'optim': did you mean optim.name or ",
    '{"batch": "3"}': 'batch must be a whole number, got "3"',
    '{"batch": 3.5}': "batch must be a whole number, got 3.5",
    '{"batch": true}': "batch must be a whole number, got true",
    '{"batch": 0}': "--batch must be at least 1",
    '{"sync_bn": 1}': "sync_bn must be true or false, got 1",
    '{"optim": {"lr": NaN}}': "--optim.lr must be at least 0",
    '{"optim": {"lr": null}}': "optim.lr must be a number, got null",
    '{"mode": "x"}': 'mode must be one of jit, pmap, shard_map, got "x"',
    '{"augment": {"mean": ["a"]}}': 'augment.mean must be a list of numbers or null, got ["a"]',
    '{"preset": 3}': "preset must be text, got 3",
    '{"preset": "didgits"}': "unknown preset 'didgits': did you mean digits? ",
    '{"config": {}, "pipeline": "pretrain"}': "describes a run of pretrain, not of train",
    '{"config": {"prune": {"sparsity": 0.5}}}': "describes a run of train.prune, not of train",
    '{"config": 3}': "must hold an object of fields",
    "[]": "must hold an object of fields",
    "{": "is not JSON",
}


@pytest.mark.parametrize("text", REFUSED)
def test_refused_in_one_line(text, written, fails):
    assert REFUSED[text] in fails(2, main, ["--config", written(text)])


def test_missing_files_are_refused(tmp_path, fails):
    assert "cannot be read: No such file or directory" in fails(2, main, ["--config", str(tmp_path / "none.json")])
    assert "--config needs a value" in fails(2, main, ["--config"])


def test_wrong_lengths_are_refused(written, fails):
    line = fails(2, pretrain, ["--config", written({"augment": {"jitter": [0, 0, 0]}})])
    assert "augment.jitter must be a list of 4 numbers, got [0, 0, 0]" in line


def test_types_of_all_pipelines_are_described():
    for presets in (PRESETS, pretrain_presets.PRESETS, prune_presets.PRESETS):
        for name, kind in field_kinds(type(next(iter(presets.values()))())).items():
            with pytest.raises(ValueError, match=r"a|true|one of|text"):
                as_kind({}, kind)
            assert name
