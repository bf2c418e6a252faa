"""Use a trained network: `python -m train.predict RUN IMAGE...`, or in Python

from train.predict import load
predict = load("runs/digits-seed0")  # or a model by name: load("cifar10_resnet20")
predict("seven.png")  # [("7", 0.97), ("1", 0.01), ...]
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from resnet_jax.augment import preprocess_batch
from resnet_jax.tree import PyTree
from train.data.decode import is_many, read_pixels, silence_pillow
from train.errors import OneLineParser, UsageError, one_line
from train.hub import source_path
from train.json_text import to_json
from train.ranges import check_ranges
from train.run_folder import pipeline_of
from train.runtime import compiler_options
from train.state import forward
from train.trained import load_trained

CHUNK = 32  # most images to decode and compute at once

Prediction = list[tuple[str, float]]  # (class, probability), most probable first


def load(run: str | Path, *, model: nn.Module | None = None, top: int = 5) -> Callable[[Any], Any]:
    """Load a trained network as a function of an image, or of a list of images.

    An image is a path, encoded bytes, an open file, a Pillow image or a uint8 array [H, W, C]; it is resized and
    cropped to the shape of the network's images. Returns the `top` classes with their probabilities. A list may be of
    any length: `CHUNK` images are decoded and computed at a time.

    Args:
      run: a run folder, the sparse file in one, or a model by name as in `train.pretrained.from_pretrained`; classes
        without names are numbers.
      model: the one that was passed to the run, if one was.

    Raises:
      UsageError: no such run or model, no good checkpoint, a missing `model`, an unreadable image, a `top` below 1.
    """
    if top < 1:
        raise UsageError(f"the number of classes to return must be at least 1, got {top}")
    silence_pillow()
    network = load_trained(run, model=model)
    variables, classes, shape = network.variables, network.classes, network.shape

    @partial(jax.jit, compiler_options=compiler_options(network.dtype))
    def probabilities(variables: PyTree, images: jax.Array) -> jax.Array:
        logits, _ = forward(network.model, variables, preprocess_batch(network.preprocess, images))
        return jax.nn.softmax(logits)

    def predict(images: Any) -> Prediction | list[Prediction]:
        if not is_many(images):
            return chunk([images], [""])[0]
        images = list(images)
        names = [f"number {number}" for number in range(len(images))]
        starts = range(0, len(images), CHUNK)
        return [found for at in starts for found in chunk(images[at : at + CHUNK], names[at : at + CHUNK])]

    def chunk(images: Sequence[Any], names: Sequence[str]) -> list[Prediction]:
        pixels = [read_pixels(image, shape, name) for image, name in zip(images, names, strict=True)]
        # Pad to a power of two: then all lists share a few compiled programs, whatever their lengths.
        padding = [pixels[0]] * (2 ** (len(pixels) - 1).bit_length() - len(pixels))
        found = []
        for row in np.asarray(probabilities(variables, np.stack(pixels + padding)))[: len(pixels)]:
            best = np.argsort(-row, kind="stable")[:top]
            found.append([(classes[i], float(row[i])) for i in best])
        return found

    return predict


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m train.predict RUN IMAGE...`: print each image's top classes on stderr, and as JSON on stdout.

    A run of detection gives `objects` instead of `top`: each one's class, score and box. An image that cannot be read
    has an `error` instead, and makes the exit code 2.
    """
    parser = OneLineParser(prog="python -m train.predict", description=main.__doc__)
    parser.add_argument("run", help="run folder, or a model by name: cifar10_resnet20, hf:OWNER/NAME")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--top", type=int, help="number of classes to print (5); not for detectors")
    parser.add_argument("--least", type=float, help="lowest score of a detected object to print (0.5)")
    parser.add_argument("--draw", help="folder to write images with their detected objects to, as NAME.png")
    args = parser.parse_args(argv)
    key, predict = predictor(args)

    def attempt(paths: Sequence[str]) -> list[dict[str, Any]]:
        try:
            return [{"image": path, key: found} for path, found in zip(paths, predict(paths), strict=True)]
        except UsageError as error:
            if len(paths) == 1:
                return [{"image": paths[0], "error": str(error)}]
            return [found for path in paths for found in attempt([path])]

    # An image that cannot be read does not cost the others their predictions.
    results: list[dict[str, Any]] = []
    for at in range(0, len(args.images), CHUNK):
        for found in attempt(args.images[at : at + CHUNK]):
            results.append(found)
            if key in found:
                named = [tuple(one.values()) if isinstance(one, dict) else one for one in found[key]]
                line = ", ".join(f"{name} {p:.1%}" for name, p, *_ in named) or "nothing"
                print(f"{found['image']}: {line}", file=sys.stderr)
    if any(key in found for found in results):
        print(to_json(results))
    broken = [found["error"] for found in results if "error" in found]
    if broken:
        more = f" (and {len(broken) - 1} more of {len(results)} images)" if len(broken) > 1 else ""
        raise UsageError(broken[0] + more)


def predictor(args: argparse.Namespace) -> tuple[str, Callable[[Sequence[str]], Any]]:
    """Load the network of a command line: (what it gives for an image, the function of several images).

    Raises:
      UsageError: no such network, an option that does not apply to it, a number out of range, or a folder for `--draw`
        that cannot be written to.
    """
    run = source_path(args.run)
    if pipeline_of(run) != "train.detect":
        # Load first: of a folder that is not a run, the message says that.
        classify = load(args.run, top=5 if args.top is None else args.top)
        for name in ("least", "draw"):
            if getattr(args, name) is not None:
                raise UsageError(f"--{name} is for objects, and {args.run} does not detect any")
        return "top", classify
    from train.detect.predict import object_finder

    if args.top is not None:
        raise UsageError(f"--top is for classes, and {args.run} detects objects: pass --least")
    least = 0.5 if args.least is None else args.least
    check_ranges({"least": least}, {"[0, 1]": "least"})
    return "objects", object_finder(run, args.images, least=least, draw=args.draw)


if __name__ == "__main__":
    with one_line():
        main()
