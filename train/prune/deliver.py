"""What a pruned run delivers: a sparse file, and where whole channels went, a smaller network as a run of its own."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.augment import augment_batch
from resnet_jax.channels import compact
from resnet_jax.keys import example_keys
from resnet_jax.tree import PyTree, count
from train.checkpoint import Checkpoints
from train.errors import RunError
from train.from_config import eval_augment, make_model, make_tx, trained_part
from train.prune.config import CHANNELS, PruneConfig, dense_config
from train.prune.sparse_file import save_sparse, sizes
from train.run import Setup
from train.run_folder import write_config
from train.state import TrainState, init_state

SPARSE, COMPACT = "sparse.safetensors", "compact"


def deliver(state: TrainState, setup: Setup, config: PruneConfig) -> dict[str, Any]:
    """Write the files; returns their sizes, and how far a compact network's outputs are from the masked one's.

    `config` is the run's own, with channel statistics. Every host takes part, the first writes.

    Raises:
      RunError: the compact network is another than the masked one; the disk is full.
    """
    variables, masks = jax.device_get((state.variables, state.masks))
    main, widths = jax.process_index() == 0, config.widths
    folder, found, dense = setup.out, {}, variables
    if config.prune.structure == CHANNELS:
        folder = setup.out / COMPACT
        # In float32, whatever the run computes in: it is the networks that are compared, not the rounding.
        model = make_model(config, setup.model.num_classes).clone(dtype=jnp.float32)
        small, variables, masks, error = compacted(model, variables, masks, setup)
        widths = tuple(small.widths)
        save_run(folder, widths, variables, masks, setup, config)
        found = {"compact": str(folder), "compact_parameters": count(variables["params"]), "compact_error": error}
    if not main:
        return found
    classes = json.dumps(setup.dataset.classes)
    about = {"model": config.model, "widths": json.dumps(widths), "classes": classes}
    save_sparse(folder / SPARSE, variables, masks, values=config.prune.values, metadata=about)
    measured = sizes(folder / SPARSE, dense)
    return {
        **found,
        "dense_bytes": measured["dense_bytes"],
        "dense_gzip_bytes": measured["gzip_bytes"],
        "pruned_bytes": measured["file_bytes"],
        "pruned_file": str(folder / SPARSE),
    }


def compacted(
    model: Any, variables: dict[str, PyTree], masks: PyTree, setup: Setup
) -> tuple[Any, dict[str, PyTree], PyTree, float]:
    """(smaller model, its variables, its masks, largest difference of logits on validation images).

    Masks of single weights, where there are any besides, go with them.

    Raises:
      RunError: the outputs differ by more than rounding, which a network that was not trained under its masks would.
    """
    small, found = compact(model, variables, masks)
    whole = jax.tree.map(lambda x, m: jnp.broadcast_to(m, x.shape).astype(jnp.float32), variables["params"], masks)
    _, cut = compact(model, {"params": whole}, masks)
    rest = jax.tree.map(lambda m: np.asarray(m > 0) if not (m > 0).all() else np.ones((), bool), cut["params"])

    pixels = stacked(setup.dataset.validation, range(min(64, len(setup.dataset.validation))))["image"]
    keys = example_keys(jax.random.key(0), jnp.arange(len(pixels)))
    images = augment_batch(eval_augment(setup.config.augment), keys, jnp.asarray(pixels))
    with jax.default_matmul_precision("highest"):
        before, after = (
            np.asarray(jax.jit(partial(net.apply, train=False))(v, images), np.float32)
            for net, v in ((model, variables), (small, found))
        )
    error = float(np.abs(before - after).max())
    if not error <= 1e-5 * max(float(np.abs(before).max()), 1.0):
        raise RunError(f"the compact network's outputs differ from the masked one's by {error:.2g}")
    return small, jax.device_get(found), rest, error


def save_run(
    folder: Path, widths: Sequence[int], variables: dict[str, PyTree], masks: PyTree, setup: Setup, config: PruneConfig
) -> None:
    """A run of training that holds this network: to predict with, to start from, to prune on."""
    small = dataclasses.replace(
        dense_config(config, folder), widths=tuple(widths), init=None, ema=None, dense=False, freeze=False
    )
    if jax.process_index() == 0:
        write_config(folder, "custom", small, setup.dataset)
    tx, _ = make_tx(small.optim, 1, 1.0, trainable=trained_part(small))
    state = init_state(variables, tx, jax.random.key(config.seed), masks=masks)
    checkpoints = Checkpoints(folder / "checkpoints", keep_last=1)
    checkpoints.save(state, setup.stream.state())
    checkpoints.close()


def stacked(source: Any, indices: Iterable[int]) -> dict[str, np.ndarray]:
    """These examples of a split as one batch: `image` uint8 [B, H, W, C], `label` int32 [B]."""
    examples = [source[int(i)] for i in indices]
    return {
        "image": np.stack([e["image"] for e in examples]),
        "label": np.array([e["label"] for e in examples], np.int32),
    }
