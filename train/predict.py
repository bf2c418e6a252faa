"""Use a trained run: `python -m train.predict RUN IMAGE...`, or in Python

from train.predict import load
predict = load("runs/digits-seed0")
predict("seven.png")  # [("7", 0.97), ("1", 0.01), ...]
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.augment import preprocess_batch
from train.config import TrainConfig
from train.data.decode import Unreadable, any_to_pixels, is_many, silence_pillow
from train.errors import UsageError, one_line
from train.from_config import compute_dtype, eval_augment, make_model
from train.run_folder import load_state, read_config
from train.runtime import compiler_options
from train.state import forward

Prediction = list[tuple[str, float]]  # (class, probability), most probable first


def load(run: str | Path, *, model: nn.Module | None = None, top: int = 5) -> Callable[[Any], Any]:
    """Load the trained network of a run as a function of an image, or of a list of images.

    An image is a path, encoded bytes, an open file, a Pillow image or a uint8 array [H, W, C]; it is resized and
    cropped to the shape of the run's images. Returns the `top` classes with their probabilities. `model` is the one
    that was passed to the run, if one was.

    Raises:
      UsageError: no such run, no good checkpoint, a model that is missing, an image that cannot be read.
    """
    silence_pillow()
    run = Path(run)
    config, saved = read_config(run, TrainConfig)
    if model is None and "model" in saved.get("replaced", []):
        raise UsageError(f"{run} trained a model that was passed to run(): pass it here too, load(run, model=...)")
    model = model or make_model(config, len(saved["classes"]))
    variables = jax.tree.map(jnp.asarray, load_state(run).variables)
    preprocess = eval_augment(config.augment)

    @partial(jax.jit, compiler_options=compiler_options(compute_dtype(config.dtype)))
    def probabilities(images: jax.Array) -> jax.Array:
        logits, _ = forward(model, variables, preprocess_batch(preprocess, images))
        return jax.nn.softmax(logits)

    def predict(images: Any) -> Prediction | list[Prediction]:
        many = is_many(images)
        if many and not len(images := list(images)):
            return []
        batch = np.stack([_pixels(i, saved["image_shape"]) for i in (images if many else [images])])
        found = []
        for row in np.asarray(probabilities(batch)):
            best = np.argsort(-row, kind="stable")[:top]
            found.append([(saved["classes"][i], float(row[i])) for i in best])
        return found if many else found[0]

    return predict


def _pixels(image: Any, shape: Sequence[int]) -> np.ndarray:
    try:
        return any_to_pixels(image, (shape[0], shape[1], shape[2]))
    except Unreadable as error:
        name = f" {image}" if isinstance(image, str | Path) else ""
        raise UsageError(f"cannot read image{name}: {error}") from None


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m train.predict RUN IMAGE...`: print each image's top classes on stderr, and as JSON on stdout."""
    parser = argparse.ArgumentParser(prog="python -m train.predict", description=main.__doc__)
    parser.add_argument("run", help="run folder")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--top", type=int, default=5, help="number of classes to print")
    args = parser.parse_args(argv)
    predictions = list(zip(args.images, load(args.run, top=args.top)(args.images), strict=True))
    for path, found in predictions:
        print(f"{path}: " + ", ".join(f"{name} {p:.1%}" for name, p in found), file=sys.stderr)
    print(json.dumps([{"image": path, "top": found} for path, found in predictions]))


if __name__ == "__main__":
    with one_line():
        main()
