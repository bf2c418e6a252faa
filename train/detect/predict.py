"""Use a trained detector; `python -m train.predict RUN IMAGE...` comes here for runs of detection.

from train.detect.predict import load
detect = load("runs/shapes_fasterrcnn-seed0")
detect("photo.jpg")  # [Found(label="star", score=0.97, box=(12.1, 30.5, 40.2, 61.0)), ...]
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.detection.augment import BoxAugment
from train.data.batches import Batch
from train.data.decode import is_many, read_pixels, silence_pillow
from train.detect.config import DetectConfig, parse_buckets
from train.detect.draw import draw_objects
from train.detect.from_config import eval_augment, make_detector
from train.detect.layout import STRIDE, Layout, Size, fit
from train.detect.metrics import Detections
from train.detect.objects import decode_scaled
from train.detect.steps import detect_step
from train.from_config import compute_dtype, make_kernels
from train.page import encode
from train.paths import local_path, make_folder, replace_file
from train.run_folder import load_state, read_config, refuse_own_model
from train.runtime import compiler_options, keep_compiled

SHAPE = (None, None, 3)  # images are read in their own size, as RGB


class Found(NamedTuple):
    """One object: its class, score in [0, 1], and box (x1, y1, x2, y2) in pixels of the image."""

    label: str
    score: float
    box: tuple[float, float, float, float]


class Detector(NamedTuple):
    """A trained detector; call it with an image or a list of images.

    Attributes:
      classes: names of its classes.
      layout: how images are scaled and padded.
      model, preprocess: the network, and what it makes of images in [0, 1].
      program: compiled `detect_step` of (variables, batch).
      variables: the parameters and statistics.
    """

    classes: tuple[str, ...]
    layout: Layout
    model: nn.Module
    preprocess: BoxAugment
    program: Callable[..., Any]
    variables: Any

    def __call__(self, images: Any, *, least: float = 0.05) -> Any:
        """Detect objects with a score of at least `least`, best first: a list of `Found`, or a list of those.

        An image is a path, encoded bytes, an open file, a Pillow image or a uint8 array [H, W, C].

        Raises:
          UsageError: an image that cannot be read.
        """
        if is_many(images):
            return [self(image, least=least) for image in images]
        return self.named(self.detect(read_pixels(images, SHAPE)).above(least))

    def detect(self, pixels: np.ndarray) -> Detections:
        """Detect the objects of an image uint8 [H, W, 3]."""
        found = self.program(self.variables, self.batch(pixels))
        boxes, scores, labels = (np.asarray(found[name][0]) for name in ("boxes", "scores", "labels"))
        return Detections.unpadded(boxes, scores, labels)

    def batch(self, pixels: np.ndarray) -> Batch:
        """Lay out an image uint8 [H, W, 3] as a batch of one, scaled and padded."""
        size, scale = fit(pixels.shape[:2], self.layout.min_size, self.layout.max_size)
        image = np.zeros((1, *self.bucket(pixels.shape[:2], size), 3), np.uint8)
        image[0, : size[0], : size[1]] = decode_scaled(pixels, pixels.shape[:2], size, scale, False)
        return {
            "image": image,
            "size": np.asarray([size], np.int32),
            "boxes": np.zeros((1, 1, 4), np.float32),
            "labels": np.full((1, 1), -1, np.int32),
            "id": np.zeros(1, np.int32),
            "scale": np.asarray([scale], np.float32),
            "valid": np.ones(1, bool),
        }

    def bucket(self, original: Size, size: Size) -> Size:
        """The bucket of an image, or a size of its own if it is larger than all of them."""
        at = self.layout.bucket_of(original)
        height, width = (-(-side // STRIDE) * STRIDE for side in size)
        return self.layout.buckets[at] if at >= 0 else (height, width)

    def named(self, found: Detections) -> list[Found]:
        """Detections by the names of their classes, best first."""
        order = np.argsort(-found.scores, kind="stable")
        rows = zip(found.labels[order].tolist(), found.scores[order].tolist(), found.boxes[order].tolist(), strict=True)
        return [Found(self.classes[label], score, tuple(box)) for label, score, box in rows]

    def draw(self, image: Any, *, least: float = 0.5) -> np.ndarray:
        """Draw the objects of an image with a score of at least `least`: uint8 [h, w, 3]."""
        pixels = read_pixels(image, SHAPE)
        return draw_objects(pixels, self.detect(pixels), self.classes, least=least)


def object_finder(
    run: str | Path, paths: Sequence[str], *, least: float, draw: str | None = None
) -> Callable[[Sequence[str]], list[list[dict[str, Any]]]]:
    """Load a detector as a function of some of the image files `paths`: the fields of each one's `Found`, best first.

    It also writes each image with its objects to the folder `draw`, if one is given, as NAME.png.

    Raises:
      UsageError: see `load`, or the folder cannot be written to.
    """
    folder, files = None if draw is None else local_path(draw), picture_names(paths)
    if folder is not None:
        make_folder(folder)
    detector = load(run)

    def objects(path: str) -> list[dict[str, Any]]:
        pixels = read_pixels(path, SHAPE)
        found = detector.detect(pixels).above(least)
        if folder is not None:
            picture = encode(draw_objects(pixels, found, detector.classes, least=least))
            replace_file(folder / files[path], picture)
        return [one._asdict() for one in detector.named(found)]

    return lambda chosen: [objects(path) for path in chosen]


def picture_names(paths: Sequence[str]) -> dict[str, str]:
    """NAME.png of each image file; files of one name in different folders get numbers: NAME-2.png."""
    names: dict[str, str] = {}
    for path in dict.fromkeys(paths):
        stem = Path(path).stem
        options = chain([stem], (f"{stem}-{number}" for number in count(2)))
        names[path] = next(f"{name}.png" for name in options if f"{name}.png" not in names.values())
    return names


def load(run: str | Path, *, model: nn.Module | None = None) -> Detector:
    """Load the detector of a run.

    Args:
      model: the one that was passed to the run, if one was.

    Raises:
      UsageError: not a run of detection, no good checkpoint, or a missing `model`.
    """
    silence_pillow()
    keep_compiled()
    folder = Path(run)
    config, saved = read_config(folder, DetectConfig)
    if model is None:
        refuse_own_model(run, saved)
    dtype, classes, data = compute_dtype(config.dtype), tuple(saved["classes"]), config.data
    kernels, _ = make_kernels("auto", dtype=dtype)
    model = model or make_detector(config, len(classes), kernels, mode="jit")
    preprocess = eval_augment(config.augment)
    step = partial(detect_step, model=model, preprocess=preprocess)
    program = jax.jit(step, compiler_options=compiler_options(dtype, plain=not kernels))
    layout = Layout(min_size=data.min_size, max_size=data.max_size, buckets=parse_buckets(data.buckets), rows=1)
    variables = jax.tree.map(jnp.asarray, load_state(folder, DetectConfig).variables)
    return Detector(classes, layout, model, preprocess, program, variables)
