"""Files that a pruned run delivers: a sparse file and, if channels were pruned, a smaller network as a run folder."""

import dataclasses
import gzip
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from resnet_jax.augment import Augment, preprocess_batch
from resnet_jax.channels import compact
from resnet_jax.tree import PyTree, count, leaves
from train.checkpoint import Checkpoints
from train.data.sources import collate
from train.errors import RunError
from train.from_config import make_tx
from train.prune.config import CHANNELS, dense_config
from train.run_folder import claim, write_config
from train.session import Session
from train.sparse_file import SPARSE, save_sparse
from train.state import TrainState, init_state

COMPACT = "compact"


def deliver(session: Session[Any], model: nn.Module, state: TrainState, preprocess: Augment) -> dict[str, Any]:
    """Write the files; return their sizes, and the difference between a compact network's outputs and the masked one's.

    Every host takes part; only the first writes. `preprocess` maps validation images to the network's inputs.

    Raises:
      RunError: the compact network's outputs differ from the masked one's; the disk is full.
    """
    config = session.config
    variables, masks = jax.device_get((state.variables, state.masks))
    widths, folder, figures, dense = config.widths, session.out, {}, variables
    # With pruned channels, the smaller network is delivered in place of the masked one.
    if config.prune.structure == CHANNELS:
        folder = session.out / COMPACT
        images = session.dataset.validation
        pixels = collate([images[i] for i in range(min(64, len(images)))])["image"]
        # Compare in float32 whatever the run's dtype, so that the difference is not due to rounding.
        small, variables, masks, error = compacted(
            model.clone(dtype=jnp.float32), variables, masks, preprocess_batch(preprocess, jnp.asarray(pixels))
        )
        widths = tuple(small.widths)
        save_run(folder, widths, variables, masks, session)
        figures = {"compact": str(folder), "compact_parameters": count(variables["params"]), "compact_error": error}
    if not session.main:
        return figures
    classes = json.dumps(session.dataset.classes)
    about = {"model": config.model, "widths": json.dumps(widths), "classes": classes}
    save_sparse(folder / SPARSE, variables, masks, values=config.prune.values, metadata=about)
    content = dense_file(dense)
    return {
        **figures,
        "dense_bytes": len(content),
        "dense_gzip_bytes": len(gzip.compress(content)),
        "pruned_bytes": (folder / SPARSE).stat().st_size,
        "pruned_file": str(folder / SPARSE),
    }


def dense_file(variables: dict[str, PyTree]) -> bytes:
    """A float32 safetensors file with one tensor per leaf, to compare sizes with."""
    return save({path: np.ascontiguousarray(leaf, np.float32) for path, leaf in leaves(variables).items()})


def compacted(
    model: Any, variables: dict[str, PyTree], masks: PyTree, images: jax.Array
) -> tuple[Any, dict[str, PyTree], PyTree, float]:
    """Make (smaller model, its variables, its masks, largest difference of logits on these images).

    If single weights were pruned as well, their masks are kept.

    Raises:
      RunError: the outputs differ by more than rounding, as for a network that was not trained under its masks.
    """
    small, kept = compact(model, variables, masks)
    # Masks of single weights shrink like the weights: compact them as if they were parameters.
    whole = jax.tree.map(lambda x, m: jnp.broadcast_to(m, x.shape).astype(jnp.float32), variables["params"], masks)
    _, cut = compact(model, {"params": whole}, masks)
    rest = jax.tree.map(lambda m: np.asarray(m > 0) if not (m > 0).all() else np.ones((), bool), cut["params"])
    with jax.default_matmul_precision("highest"):
        before, after = (
            np.asarray(jax.jit(partial(net.apply, train=False))(v, images), np.float32)
            for net, v in ((model, variables), (small, kept))
        )
    error = float(np.abs(before - after).max())
    if not error <= 1e-5 * max(float(np.abs(before).max()), 1.0):
        raise RunError(f"the compact network's outputs differ from the masked one's by {error:.2g}")
    return small, jax.device_get(kept), rest, error


def save_run(
    folder: Path, widths: Sequence[int], variables: dict[str, PyTree], masks: PyTree, session: Session[Any]
) -> None:
    """Save this network as a run of training: to predict with, to start from, to prune further."""
    small = dataclasses.replace(
        dense_config(session.config, folder), widths=tuple(widths), init=None, ema=None, dense=False, freeze=False
    )
    if session.main:
        claim(folder, small, session.dataset)
        write_config(folder, "custom", small, session.dataset)
    tx, _ = make_tx(small.optim, 1, 1.0)
    state = init_state(variables, tx, jax.random.key(small.seed), masks=masks)
    checkpoints = Checkpoints(folder / "checkpoints", keep_last=1)
    checkpoints.save(state, session.stream.state())
    checkpoints.close()
