"""Views of a whole image set: each computes its numbers, and returns them with pictures and pieces of the page."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from resnet_jax.augment import preprocess_batch
from resnet_jax.losses import softmax_cross_entropy
from resnet_jax.parallel import make_mesh
from resnet_jax.tree import PyTree
from train import page
from train.data.batches import eval_batches
from train.data.sources import sample
from train.errors import UsageError
from train.explain import figures
from train.explain.embeddings import Projection, neighbours, project
from train.explain.figures import in_colour
from train.explain.images import Images, evenly
from train.explain.landscape import loss_surface
from train.explain.mistakes import calibration, confusion, worst
from train.explain.subject import FORWARD, Subject
from train.page import Html
from train.report import charts
from train.state import forward
from train.steps import most_confused

PROJECTED = 2000  # most images in a plane: more hide each other
THUMBNAILS = 40
MISTAKES = 24
NEIGHBOURS = 6
SURFACE_IMAGES = 256
WIDTH = 120  # of a picture in the page, in pixels


class View(NamedTuple):
    """A part of the report: figures, or uint8 pictures, to write as PNG by name, pieces of the page, numbers."""

    drawings: dict[str, Any]
    pieces: tuple[Html, ...]
    numbers: Any


def confusion_view(subject: Subject, images: Images) -> View:
    """Which classes are taken for which."""
    classes, seen = subject.dataset.classes, subject.seen
    counted = confusion(seen.labels, seen.predicted)
    pairs = [(classes[t], classes[p], n) for t, p, n in most_confused(counted, 10).tolist()]
    drawing = charts.draw_confusion(counted, classes)
    accuracy = float(seen.correct.mean())
    part = f" Of {len(classes):,} classes, those with the most errors." if len(classes) > charts.CONFUSED else ""
    caption = f"{len(seen.labels):,} images, {accuracy:.1%} of them right. Errors are orange.{part}"
    listed = page.table(("true class", "predicted", "images"), pairs, caption="the most frequent errors")
    numbers = {"accuracy": accuracy, "images": len(seen.labels), "most_confused": pairs}
    return View({"confusion": drawing}, (page.figure(drawing, caption), *([listed] if pairs else [])), numbers)


def reliability_view(subject: Subject, images: Images) -> View:
    """Whether the network is as often right as it is confident."""
    seen = subject.seen
    found = calibration(seen.confidence, seen.correct)
    drawing = figures.reliability_figure(found)
    gap = float(seen.confidence.mean() - seen.correct.mean())
    leaning = f"{'over' if gap > 0 else 'under'}confident by {abs(gap):.1%} on average"
    caption = f"Bars below the diagonal are overconfident. The network is {leaning}."
    numbers = {"calibration_error": found.error, "mean_confidence": float(seen.confidence.mean())}
    return View({"reliability": drawing}, (page.figure(drawing, caption),), numbers)


def mistakes_view(subject: Subject, images: Images) -> View:
    """The most confident mistakes."""
    classes, seen = subject.dataset.classes, subject.seen
    found = worst(seen.confidence, seen.correct, MISTAKES)
    if not len(found):
        return View({}, (page.paragraph(f"No mistake in {len(seen.labels):,} images."),), [])
    pixels = _pixels(subject, found)
    rows = [(classes[seen.labels[at]], classes[seen.predicted[at]], float(seen.confidence[at])) for at in found]
    captions = [f"{true}, predicted {said} ({share:.0%})" for true, said, share in rows]
    tiles = [page.tile(in_colour(x), text, width=WIDTH) for x, text in zip(pixels, captions, strict=True)]
    listed = [{"label": true, "predicted": said, "probability": share} for true, said, share in rows]
    short = [f"{true}\n{said} {share:.0%}" for true, said, share in rows]
    lines = [slice(at, at + 8) for at in range(0, len(found), 8)]
    drawing = figures.gallery([[*pixels[line]] for line in lines], [short[line] for line in lines])
    return View({"mistakes": drawing}, (page.image_grid(tiles),), listed)


def neighbours_view(subject: Subject, images: Images) -> View:
    """The training images whose embeddings are most similar to those of the explained images."""
    classes = subject.dataset.classes
    queries = subject.outputs_of(images.pixels)
    nearest, similarity = neighbours(queries.features, subject.bank_outputs.features, NEIGHBOURS)
    rows, texts, pieces, numbers = [], [], [], []
    for image, name, places, values in zip(images.pixels, images.names, nearest, similarity, strict=True):
        examples = [subject.bank[int(at)] for at in places]
        labels = [classes[example["label"]] for example in examples]
        rows.append([image, *(example["image"] for example in examples)])
        texts.append([name, *(f"{label}, {value:.2f}" for label, value in zip(labels, values, strict=True))])
        tiles = [page.tile(in_colour(x), text, width=WIDTH) for x, text in zip(rows[-1], texts[-1], strict=True)]
        pieces.append(page.image_grid(tiles, smallest=80))
        numbers.append({"image": name, "labels": labels, "similarity": values})
    note = page.paragraph(
        f"On the left the explained image, then the most similar of {len(subject.bank):,} training images, each with "
        "its label and the cosine of the two embeddings."
    )
    short = [[text[-22:] for text in row] for row in texts]
    return View({"neighbours": figures.gallery(rows, short)}, (note, *pieces), numbers)


def projection_view(subject: Subject, images: Images, *, method: Projection) -> View:
    """The embeddings in a plane."""
    chosen = evenly(len(subject.split), PROJECTED)
    points = project(subject.seen.features[chosen], method, subject.config.seed)
    shown = figures.spread(points, THUMBNAILS)
    classes = subject.dataset.classes
    drawing = figures.scatter(
        points,
        subject.seen.labels[chosen],
        classes,
        shown,
        _pixels(subject, chosen[shown]),
        f"{method} of the embeddings",
    )
    far = "" if method == "pca" else " Only small distances mean something: groups may lie anywhere."
    caption = f"{len(points):,} images of the {subject.config.data.split} split, coloured by label.{far}"
    return View({method: drawing}, (page.figure(drawing, caption, smallest=480),), {"images": len(points)})


def landscape_view(subject: Subject, images: Images) -> View:
    """The training loss around the network, along two random directions."""
    model, preprocess = subject.trained.model, subject.trained.preprocess
    variables = dict(subject.trained.variables)
    params = variables.pop("params")

    def loss(params: PyTree, batch: PyTree) -> jax.Array:
        logits, _ = forward(model, {**variables, "params": params}, preprocess_batch(preprocess, batch["image"]))
        losses = softmax_cross_entropy(logits, jax.nn.one_hot(batch["label"], logits.shape[-1]))
        return (losses * batch["valid"]).sum()

    source = sample(subject.dataset.train, SURFACE_IMAGES)
    batches = eval_batches(source, batch=min(subject.config.batch * FORWARD, len(source)), mesh=make_mesh())
    places, total = loss_surface(loss, params, batches, key=jax.random.key(subject.config.seed))
    losses = total / len(source)
    middle = float(losses[len(places) // 2, len(places) // 2])
    drawing = figures.landscape_figure(places, losses)
    caption = (
        f"Mean loss of {len(source):,} training images, without augmentation, when all filters move along two random "
        f"directions of their own norm; the dot is the network ({middle:.3g} nats). A flat bowl is a wide minimum. "
        "Batch statistics stay as they are."
    )
    numbers = {"loss": middle, "places": places, "losses": losses}
    return View({"landscape": drawing}, (page.figure(drawing, caption),), numbers)


VIEWS: dict[str, tuple[str, Callable[[Subject, Images], View]]] = {
    "confusion": ("Confusion matrix", confusion_view),
    "reliability": ("Confidence and accuracy", reliability_view),
    "mistakes": ("Worst mistakes", mistakes_view),
    "neighbours": ("Nearest training images", neighbours_view),
    "pca": ("Embeddings: PCA", partial(projection_view, method="pca")),
    "tsne": ("Embeddings: t-SNE", partial(projection_view, method="tsne")),
    "umap": ("Embeddings: UMAP", partial(projection_view, method="umap")),
    "landscape": ("Loss around the minimum", landscape_view),
}
"""Views of a set by name: (title, function)."""

NEED_CLASSES = ("confusion", "reliability", "mistakes", "landscape")
USUAL = ("confusion", "reliability", "mistakes", "neighbours", "pca", "tsne")


def check_views(names: Sequence[str], subject: Subject) -> tuple[str, ...]:
    """The views to draw: `names`, or the usual ones that this network allows if there are none.

    Raises:
      UsageError: a view that needs classes, which the network does not have, or not those of the set.
    """
    classes, needed, name = subject.trained.classes, subject.dataset.classes, subject.dataset.name
    if len(classes) == len(needed):
        return tuple(names) or USUAL
    if needy := [name for name in names if name in NEED_CLASSES]:
        has = f"{len(classes) or 'no'} classes"
        raise UsageError(f"{needy[0]} needs the {len(needed)} classes of {name}, but {subject.source} has {has}")
    return tuple(names) or tuple(name for name in USUAL if name not in NEED_CLASSES)


def _pixels(subject: Subject, positions: np.ndarray) -> np.ndarray:
    """Images of the split, uint8 [M, H, W, C]."""
    return np.stack([subject.split[int(at)]["image"] for at in positions])
