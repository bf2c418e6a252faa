"""A trained network with all that it takes to use it: of a run, a sparse file, or a model by name."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax import ResNet
from resnet_jax.augment import Augment
from resnet_jax.tree import PyTree
from train.config import ImageConfig, RunConfig, TrainConfig
from train.errors import UsageError
from train.from_config import compute_dtype, eval_augment, make_kernels, make_model, with_kernels
from train.hub import read_card, source_path
from train.pretrained import load_card
from train.run_folder import load_state, pipeline_of, read_config, refuse_own_model
from train.sparse_file import is_sparse_file, load_sparse
from train.state import init_variables
from train.weights import is_run, load_weights


class Trained(NamedTuple):
    """A trained network.

    Attributes:
      model, variables: the network, from normalised images to logits, or to features if there are no classes.
      preprocess: from uint8 images scaled to [0, 1], of this shape, to normalised ones; see `preprocess_batch`.
      classes: names of the outputs; empty if the network returns features.
      shape: (H, W, C) of the images that it takes.
      dtype: of its convolutions.
      config: the run's; None for a model by name.
    """

    model: nn.Module
    variables: dict[str, PyTree]
    preprocess: Augment
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    dtype: Any
    config: RunConfig | None


def load_trained(
    source: str | Path,
    *,
    model: nn.Module | None = None,
    encoders: bool = False,
    kernels: Literal["auto", "onednn", "plain"] = "plain",
) -> Trained:
    """Load a trained network.

    Args:
      source: a run folder, the sparse file in one, or a model by name as in `train.pretrained.from_pretrained`; classes
        without names are numbers.
      model: the one that was passed to the run, if one was.
      encoders: also load networks without classes, which return features: runs of pretraining, models without a head.
      kernels: of a `ResNet`; see `train.from_config.make_kernels`. `plain` supports every transformation; `auto` is
        faster on CPU, above all in loops.

    Raises:
      UsageError: no such run or model, no good checkpoint, a missing `model`, a network without classes, or kernels
        that cannot be used.
    """
    folder, sparse = source_path(source), None
    if folder.is_file() and is_run(folder.parent) and is_sparse_file(folder):
        folder, sparse = folder.parent, folder
    if model or is_run(folder) or (card := read_card(source)) is None:
        trained = _of_run(source, folder, sparse, model, encoders)
    elif card.classes is None and not encoders:
        raise UsageError(f"{source} has no classes to predict: it returns features")
    else:
        dtype = compute_dtype("auto")
        model, variables, preprocess, side = load_card(source, card, dtype=dtype)
        classes = card.labels or tuple(str(number) for number in range(card.classes or 0))
        trained = Trained(model, _on_device(variables), preprocess, classes, (side, side, 3), dtype, None)
    if not isinstance(trained.model, ResNet):
        return trained
    return trained._replace(model=with_kernels(trained.model, make_kernels(kernels, dtype=trained.dtype)[0]))


def _of_run(source: str | Path, folder: Path, sparse: Path | None, model: nn.Module | None, encoders: bool) -> Trained:
    encoder = encoders and pipeline_of(folder) == "pretrain"
    config, saved = read_config(folder, RunConfig if encoder else TrainConfig)
    if model is None:
        refuse_own_model(source, saved)
    if missing := [name for name in ("classes", "image_shape") if name not in saved]:
        raise UsageError(f"{folder / 'config.json'} does not name the {missing[0]} of the run")
    classes, (height, width, channels) = () if encoder else tuple(saved["classes"]), saved["image_shape"]
    model = model or make_model(config, len(classes) or None)
    if encoder:
        shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), (height, width, channels)))
        variables = load_weights(folder, shapes)
    else:
        variables = load_sparse(sparse)[0] if sparse else load_state(folder).variables
    assert isinstance(config.augment, ImageConfig)
    preprocess, dtype = eval_augment(config.augment), compute_dtype(config.dtype)
    return Trained(model, _on_device(variables), preprocess, classes, (height, width, channels), dtype, config)


def _on_device(variables: PyTree) -> PyTree:
    return jax.tree.map(jnp.asarray, variables)
