"""Models by name in a script: `model, variables, preprocess = from_pretrained("cifar10_resnet20")`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.augment import IMAGENET_MEAN, IMAGENET_STD, Augment, center_crop, compose, normalize, preprocess_batch
from resnet_jax.resnet import MODELS, ResNet
from resnet_jax.tree import PyTree
from train.data.decode import is_many, read_pixels
from train.errors import UsageError, unknown
from train.hub import Card, read_card
from train.weights import find_weights, load_weights


def from_pretrained(source: str | Path, **fields: Any) -> tuple[ResNet, dict[str, PyTree], Callable[[Any], jax.Array]]:
    """Load (model, variables, preprocess) by name.

    `model.apply(variables, preprocess("cat.jpg"))` are logits. `preprocess` takes an image (a path, encoded bytes, a
    Pillow image, or uint8 [H, W, 3]) or a list of them, and returns the normalised float32 [B, size, size, 3].

    Args:
      source: a model that comes with this project, such as `cifar10_resnet20`; on the Hugging Face hub `hf:OWNER/NAME`,
        such as `hf:timm/resnet50.a1_in1k`, or `hf:OWNER/NAME@REVISION`; or a folder laid out like a model there.
      fields: of `ResNet`, such as `dtype`; `num_classes=None` drops the head, so that the model returns features.

    Raises:
      UsageError: no such model, one that is not among `MODELS`, no network, or huggingface_hub is not installed.
    """
    card = read_card(source)
    if card is None:
        raise UsageError(f"{find_weights(source)} has no config.json that names its model")
    model, variables, augment, side = load_card(source, card, **fields)
    crop = jax.jit(partial(preprocess_batch, augment))

    def preprocess(images: Any) -> jax.Array:
        pixels = np.stack([read_pixels(image, (side, side, 3)) for image in (images if is_many(images) else [images])])
        return crop(pixels)

    return model, variables, preprocess


def load_card(source: str | Path, card: Card, **fields: Any) -> tuple[ResNet, dict[str, PyTree], Augment, int]:
    """Load (model, variables, preprocessing, side of the square images that it takes) of a source with this card.

    Without size, mean or deviation on the card, they are ImageNet's. For `fields` and errors see `from_pretrained`.
    """
    if card.model not in MODELS:
        raise unknown("model", card.model, MODELS)
    model = MODELS[card.model](**{"num_classes": card.classes, **fields})
    size = card.size or 224
    images = jnp.zeros((1, size, size, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images))
    variables = load_weights(source, dict(shapes))
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(variables)):
        raise UsageError(f"{source} has no head for {model.num_classes} classes: pass num_classes=None for features")
    normal = normalize(card.mean or IMAGENET_MEAN, card.std or IMAGENET_STD)
    return model, variables, compose(center_crop(size), normal), card.resize or 256
