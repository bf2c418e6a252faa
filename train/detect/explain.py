"""Which pixels made a box? Heat maps of the best detections in some images, on one page and as PNG files."""

import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.detection import FasterRCNN, region_layers, region_network
from resnet_jax.detection.augment import augment_batch
from resnet_jax.explain import METHODS, class_score
from resnet_jax.keys import example_keys
from train import page
from train.data.decode import read_pixels
from train.detect.draw import Drawn, contact_sheet, draw_box, draw_objects
from train.detect.metrics import Detections
from train.detect.predict import SHAPE, Detector, load
from train.drawing import new_figure
from train.errors import OneLineParser, UsageError, unknown
from train.explain.attributions import options_of
from train.explain.dataset import View
from train.explain.figures import overlay
from train.explain.pages import open_out, write_report
from train.json_text import to_json
from train.run_folder import environment
from train.runtime import compiler_options, say

USUAL = ("hires_cam", "smooth_grad", "occlusion")
ABOUT = (
    "A map shows what speaks for the class in this box: bright or red parts do, blue ones speak against it. "
    "Below is the share of its heat that lies in the box; of noise that would be the box's share of the image. "
    "Heat outside the box is not an error: the surroundings may speak for the object too. "
    "CAM methods show the map of the pyramid that the box is cut out of: hires_cam and layer_cam cannot leave the box, "
    "and grad_cam, whose weights hold for the whole map, shows similar things elsewhere too."
)


def explain_main(argv: Sequence[str]) -> None:
    """`python -m train.detect explain RUN IMAGE...`: show which pixels made the best detections of images."""
    parser = OneLineParser(prog="python -m train.detect explain", description=explain_main.__doc__)
    parser.add_argument("run", help="folder of a run of detection")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--out", required=True, help="folder for index.html, scores.json and pictures")
    parser.add_argument("--methods", nargs="+", default=USUAL, help=f"methods by name: {', '.join(METHODS)}")
    parser.add_argument("--count", type=int, default=3, help="most detections to explain per image, the best ones")
    parser.add_argument("--least", type=float, default=0.5, help="lowest score of a detection to explain")
    args = parser.parse_args(argv)
    print(to_json(explain(**vars(args))))


def explain(
    run: str,
    images: Sequence[str],
    *,
    out: str,
    methods: Sequence[str] = USUAL,
    count: int = 3,
    least: float = 0.5,
) -> dict[str, Any]:
    """Explain the `count` best detections of each image, and write index.html, scores.json and pictures to `out`.

    Returns:
      What scores.json holds: by image its detections, each with the share of every method's heat that is in its box.

    Raises:
      UsageError: not a run of Faster R-CNN, an image that cannot be read, an unknown method, a number out of range, a
        folder that cannot be written to, or a missing extra.
    """
    started = time.monotonic()
    for name in methods:
        if name not in METHODS:
            raise unknown("method", name, METHODS)
    if count < 1 or not 0 <= least <= 1:
        raise UsageError(f"--count must be at least 1 and --least between 0 and 1, got {count} and {least}")
    new_figure(1, 1)  # without matplotlib, stop here
    detector = load(run)
    if not isinstance(detector.model, FasterRCNN):
        raise UsageError(f"{run} is a {type(detector.model).__name__}: only boxes of faster_rcnn can be explained")
    pixels = [read_pixels(path, SHAPE) for path in images]
    folder = open_out(out)

    compiled = compiled_methods(detector, methods)
    drawings, pieces, numbers = {}, [page.details("How to read the maps", page.paragraph(ABOUT))], []
    for at, (path, image) in enumerate(zip(images, pixels, strict=True)):
        found = best(detector.detect(image), count, least)
        pieces.append(page.heading(path))
        if len(found.labels) == 0:
            say(f"{path}: no object with a score of at least {least:g}")
            pieces.append(page.paragraph(f"No object with a score of at least {least:g}."))
        objects = []
        for row in range(len(found.labels)):
            drawn, record = explain_object(detector, compiled, image, found, row)
            tiles = [page.tile(page.encode(picture, "jpeg"), caption) for picture, caption in drawn]
            pieces.append(page.image_grid(tiles, smallest=240))
            drawings[f"{at:03}_{re.sub(r'[^A-Za-z0-9]+', '_', Path(path).stem)}_{row}"] = contact_sheet(
                drawn, columns=4
            )
            objects.append(record)
            say(f"{path}: {drawn[0].caption}")
        numbers.append({"image": path, "objects": objects})
    about = {"run": run, "least": least, "seconds": round(time.monotonic() - started, 2), **environment()}
    view = View(drawings, tuple(pieces), {"images": numbers})
    return write_report(folder, {"Detections": view}, about, lead(numbers, methods))


def best(found: Detections, count: int, least: float) -> Detections:
    """The `count` detections with the highest scores, of those of at least `least`."""
    found = found.above(least)
    rows = np.argsort(-found.scores, kind="stable")[:count]
    return Detections(found.boxes[rows], found.scores[rows], found.labels[rows])


def compiled_methods(detector: Detector, methods: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """Each method, compiled for a layer and for images of a size; boxes and labels do not compile it again."""

    def run(network: Any, images: jax.Array, label: jax.Array, *, name: str, layer: str | None) -> jax.Array:
        options = options_of(name, images.shape[1:])
        return METHODS[name](network, images, class_score(label), key=jax.random.key(0), layer=layer, **options)

    model: Any = detector.model
    options = compiler_options(model.backbone.dtype)
    program = jax.jit(run, static_argnames=("name", "layer"), compiler_options=options)
    return {name: partial(program, name=name) for name in dict.fromkeys(methods)}


def explain_object(
    detector: Detector, methods: dict[str, Callable[..., Any]], pixels: np.ndarray, found: Detections, row: int
) -> tuple[list[Drawn], dict[str, Any]]:
    """Explain one detection of an image: the image and its heat maps with the box drawn, and its numbers."""
    batch = detector.batch(pixels)
    seen = augment_batch(detector.preprocess, example_keys(jax.random.key(0), batch["id"]), batch)
    box, label, score = found.boxes[row] * batch["scale"][0], found.labels[row : row + 1], float(found.scores[row])
    model: Any = detector.model
    network = region_network(model, detector.variables, jnp.asarray(box[None]), jnp.asarray(batch["size"]))
    layer = region_layers(network, seen["image"])[0]

    height, width = batch["size"][0].tolist()
    image = batch["image"][0, :height, :width]
    name = detector.classes[label[0]]
    one = Detections(box[None], found.scores[row : row + 1], label)
    drawn = [Drawn(draw_objects(image, one, detector.classes, least=0), f"{name} {score:.0%}")]
    shares = {}
    for method, compute in methods.items():
        # The network does not see the padding, but maps are enlarged beyond the image's edge.
        used = layer if is_cam(method) else None
        heat = np.asarray(compute(network, seen["image"], jnp.asarray(label), layer=used)[0, :height, :width])
        shares[method] = inside(heat, box)
        picture = draw_box(overlay(image, heat), box, int(label[0]))
        drawn.append(Drawn(picture, f"{method}: {shares[method]:.0%} in the box"))
    area = inside(np.ones((height, width)), box)
    return drawn, {"label": name, "score": score, "box": found.boxes[row].tolist(), "area": area, "inside": shares}


def inside(heat: np.ndarray, box: np.ndarray) -> float:
    """The share of a map's positive heat, [H, W], that is in a box: https://arxiv.org/abs/1910.01279 (section 4.3)."""
    left, top = np.floor(box[:2]).astype(int)
    right, bottom = np.ceil(box[2:]).astype(int)
    positive = np.maximum(heat, 0)
    return float(positive[top:bottom, left:right].sum() / max(positive.sum(), 1e-12))


def is_cam(method: str) -> bool:
    """Whether a method makes a class activation map, of a layer."""
    return "cam" in method


def lead(numbers: Sequence[dict[str, Any]], methods: Sequence[str]) -> str:
    """The report in one sentence: how much of the heat of maps that may leave the boxes lies in them."""
    objects = [one for image in numbers for one in image["objects"]]
    if not objects:
        return "Nothing was detected, so there is nothing to explain."
    free = [name for name in methods if not is_cam(name)]
    shares = [f"{name} has {np.mean([one['inside'][name] for one in objects]):.0%}" for name in free]
    area = np.mean([one["area"] for one in objects])
    heat = f" Of its heat, {', '.join(shares)} in the boxes, which are {area:.0%} of the images." if shares else ""
    return f"What made the best {len(objects)} detections.{heat}"
