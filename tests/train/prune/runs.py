"""Prune a small network on digits in a few steps, and check what a run of pruning leaves."""

import json
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from resnet_jax.layers import CifarStem
from resnet_jax.masks import apply_masks
from resnet_jax.resnet import BasicBlock, ResNet
from resnet_jax.tree import leaves
from tests.reference.compare import assert_equal
from train import session as session_module
from train.config import TrainConfig
from train.prune.__main__ import main
from train.run_folder import load_state, read_config
from train.sparse_file import load_sparse

# Two stages of one block for 8x8 digits.
TWO_BLOCKS = partial(ResNet, (1, 1), BasicBlock, stem=CifarStem)
NETWORK = ["--model", "two_blocks", "--width", "16"]
ALIKE = ["--batch", "64", "--eval-every", "100", "--log-every", "1"]
LAYERS = [
    "stage1_block1/conv1/kernel",
    "stage1_block1/conv2/kernel",
    "stage2_block1/conv1/kernel",
    "stage2_block1/conv2/kernel",
    "stage2_block1/shortcut/conv/kernel",
]

# 8 steps, by the recipe of the training after pruning or by that of the dense run.
EIGHT, SCRATCH = ("--prune.epochs", "0.4"), ("--steps", "8")
TO_80 = ("--prune.sparsity", "0.8")
DATES = ("--prune.every", "2", "--prune.end", "0.9")
ONE_SHOT = ("--prune.schedule", "one_shot")
AT_ONCE = (*ONE_SHOT, *EIGHT)
GRADUAL = ("--prune.schedule", "gradual", *DATES, *EIGHT, *TO_80)
ITERATIVE = ("--prune.schedule", "iterative", "--prune.levels", "2", "--prune.restart")
CHANNELS = (
    *AT_ONCE, "--prune.structure", "channels", "--prune.score", "norm_scale", "--prune.scope", "uniform",
    "--prune.sparsity", "0.5", "--prune.recalibrate"
)  # fmt: skip


class Start(NamedTuple):
    """What a training started from: the step, arrays by path, the place in the data."""

    step: int
    params: dict[str, np.ndarray]
    masks: dict[str, np.ndarray]
    position: Any


class Pruned(NamedTuple):
    """A run of pruning, and where each training in it started."""

    out: Path
    result: dict[str, Any]
    starts: list[Start]


def flat(tree):
    return {path: np.array(leaf) for path, leaf in leaves(tree).items()}


def prune(*arguments):
    """Run it in this process; `--out` comes last."""
    starts = []

    def noting(step, state, data, **options):
        starts.append(Start(int(state.step), flat(state.params), flat(state.masks), data.state()))
        return fit(step, state, data, **options)

    fit = session_module.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session_module, "fit", noting)
        main([str(a) for a in arguments])
    out = Path(arguments[-1])
    return Pruned(out, json.loads((out / "result.json").read_text()), starts)


@cache
def state_of(run):
    """The final state of a run, read once; runs that are asked for are finished."""
    return load_state(run)


def masks_of(run):
    """The masks of what can be pruned, by path."""
    return {path: mask for path, mask in flat(state_of(Path(run)).masks).items() if mask.ndim}


def kept_in(masks):
    return sum(int(mask.sum()) for mask in masks.values())


def rows_of(out, name):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [round(row[name], 6) for row in rows if name in row]


def assert_pruned(out, result, share, *, slack=0):
    """This share is pruned, to the weight; what is pruned is zero; the sparse file has the same weights and masks."""
    state, masks = state_of(out), masks_of(out)
    assert sorted(masks) == LAYERS
    size = sum(mask.size for mask in masks.values())
    assert abs(kept_in(masks) - (size - round(share * size))) <= slack
    assert result["sparsity"] == pytest.approx(1 - kept_in(masks) / size, abs=1e-6)
    assert_equal(flat(state.params), flat(apply_masks(state.params, state.masks)))
    variables, saved, about = load_sparse(Path(result["pruned_file"]))
    assert_equal(flat(saved), flat(state.masks))
    config, _ = read_config(out, TrainConfig)
    classes = json.dumps([str(digit) for digit in range(10)])
    assert about == {"model": "two_blocks", "widths": json.dumps(config.widths), "classes": classes}
    if "file_accuracy" not in result:  # not int8
        assert_equal(flat(variables), flat(state.variables))
    return masks
