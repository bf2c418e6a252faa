"""Runs written by version 0.1 (commit 9ac8e3e) load, resume, and give the same results."""

import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from pretrain.config import PretrainConfig
from resnet_jax.masks import apply_masks
from train.config import TrainConfig
from train.predict import load
from train.run import run
from train.run_folder import load_state, read_config
from train.state import digest
from train.weights import load_masks, load_weights

OLD = Path(__file__).parents[1] / "reference" / "old_runs"


def extracted(name, folder):
    with tarfile.open(OLD / f"{name}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / name


@pytest.fixture
def old(request, tmp_path):
    return extracted(request.param, tmp_path)


# Adafactor's state is a tuple whose fields are not in alphabetical order, as the checksum needs them.
@pytest.mark.parametrize("old", ["train", "prune", "adafactor"], indirect=True)
def test_state_is_the_one_that_was_saved(old):
    state = load_state(old)
    assert digest(state) == json.loads((old / "result.json").read_text())["params_digest"]
    if old.name == "prune":
        assert sum(mask.size for mask in jax.tree.leaves(load_masks(old, state.params))) > 1000
        jax.tree.map(np.testing.assert_array_equal, apply_masks(state.params, state.masks), state.params)


@pytest.mark.parametrize("old", ["train"], indirect=True)
def test_predicts_and_goes_on(old, tfds_dir, one_device):
    """The same command, after its end was lost: from the last checkpoint to the same result."""
    predictions = load(old, top=10)(np.zeros((8, 8, 1), np.uint8))
    assert sum(probability for _, probability in predictions) == pytest.approx(1, abs=1e-4)
    before = json.loads((old / "result.json").read_text())
    (old / "result.json").unlink()
    config, _ = read_config(old, TrainConfig)
    again = run(TrainConfig(**{**vars(config), "out": str(old)}), "digits")
    assert again["params_digest"] == before["params_digest"]
    assert again["test_loss"] == pytest.approx(before["test_loss"], rel=1e-5)


@pytest.mark.parametrize("old", ["pretrain"], indirect=True)
def test_encoder_of_pretraining(old):
    config, _ = read_config(old, PretrainConfig)
    assert config.objective.name == "mocov2"
    like = load_state(extracted("train", old.parent)).variables
    loaded = load_weights(old, like)["params"]
    assert not np.array_equal(loaded["stem"]["conv"]["kernel"], like["params"]["stem"]["conv"]["kernel"])
