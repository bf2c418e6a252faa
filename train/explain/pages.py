"""The report: heat maps next to their scores, and the folder that everything is written to."""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from train import page
from train.drawing import save_figure
from train.errors import RunError, UsageError
from train.explain import figures
from train.explain.attributions import COMPLETE, COUNTEREXAMPLE, REFERENCE, SCORES, Aim, Attribution
from train.explain.dataset import View
from train.explain.images import Images, evenly
from train.explain.outputs import Outputs
from train.json_text import to_json
from train.page import Html
from train.paths import local_path, make_folder
from train.report import charts

RESULT, PAGE, PICTURES = "scores.json", "index.html", "pictures"
WIDTH = 200  # of a picture in the page, in pixels
STEPS = 8  # most layers of the cascade to show maps of
LEAST = 640  # least width of a PNG file, to which small pictures are enlarged
ABOUT = (
    "Bright or red parts speak for what is explained, blue ones against it. "
    "Deletion removes the hottest pixels first: with a good map the probability falls at once (low). "
    "Insertion starts from a blurred image and shows the hottest pixels first (high). "
    "ROAD fills removed pixels from their neighbours: half of what the hottest cost more than the coldest (high). "
    "Infidelity is the error of predicting from the map what hiding squares does (low). "
    "Randomization is the rank correlation with the map of the same network with random weights: "
    "a map that hardly changes (near 1) does not show what was learned. "
    "The completeness error of integrated gradients is the distance of their sum from the score minus that of an image "
    "of mean colour (0). "
    f"Do not trust a method that is not clearly better than {REFERENCE}."
)


def attribution_view(
    images: Images,
    shown: np.ndarray,
    classes: Sequence[str],
    seen: Outputs,
    aim: Aim,
    found: Mapping[str, Attribution],
) -> View:
    """Show each image, uint8 [N, H, W, C], with the heat map and the scores of each method."""
    means = {name: {score: float(x.mean()) for score, x in one.scores.items()} for name, one in found.items()}
    best: Any = {"deletion": "min", "insertion": "max", "road": "max", "infidelity": "min"}
    columns = (*SCORES, *(COMPLETE[name] for name in found if name in COMPLETE))
    rows: list[list[page.Cell]] = [[name, *map(scores.get, columns)] for name, scores in means.items()]
    caption = f"mean scores over {len(images.names)} images"
    table = page.table(("method", *columns), rows, best=best, caption=caption)
    pieces = [table, page.details("What the scores say", page.paragraph(ABOUT))]
    drawings, numbers = {}, []
    for at, name in enumerate(images.names):
        tiles, texts = [figures.in_colour(shown[at])], ["image"]
        if aim.others is not None:
            tiles, texts = [*tiles, figures.in_colour(aim.others[at])], [*texts, "compared with"]
        scores = {method: {score: float(x[at]) for score, x in one.scores.items()} for method, one in found.items()}
        for method, one in found.items():
            tiles.append(figures.overlay(shown[at], one.heat[at]))
            texts.append("\n".join([method, *(f"{score} {value:.3f}" for score, value in scores[method].items())]))
        said: dict[str, Any] = {"image": name, "label": images.labels[at], "explained": aim.texts[at]}
        if classes:
            said |= {"predicted": classes[seen.predicted[at]], "probability": float(seen.confidence[at])}
        grid = [
            page.tile(tile, _caption(text), text.partition("\n")[0], width=WIDTH)
            for tile, text in zip(tiles, texts, strict=True)
        ]
        pieces += [page.heading(_title(said)), page.image_grid(grid, smallest=150)]
        lines = [slice(start, start + 6) for start in range(0, len(tiles), 6)]
        drawings[f"{at:03}_{re.sub(r'[^A-Za-z0-9]+', '_', Path(name).stem)}"] = figures.gallery(
            [tiles[line] for line in lines], [texts[line] for line in lines], side=2.2
        )
        numbers.append({**said, "scores": scores})
    return View(drawings, tuple(pieces), {"methods": means, "images": numbers})


def cascade_view(shown: np.ndarray, name: str, found: Mapping[str, Attribution]) -> View:
    """Show how maps change while layers get random weights, as curves and as maps of the first image, [H, W, C]."""
    curves = {method: {layer: float(x.mean()) for layer, x in one.cascade.items()} for method, one in found.items()}
    del curves[REFERENCE]  # it does not depend on the network: 1 everywhere
    means = {method: float(np.mean([*values.values()])) for method, values in curves.items()}
    methods = sorted(means, key=lambda method: -means[method])
    with charts.styled():
        drawing = figures.cascade_figure({method: curves[method] for method in methods}, COUNTEREXAMPLE)
    text = (
        "Mean rank correlation. A method that explains the network falls to 0 with the first layers; the longer its "
        "line stays up, the less its map says about what was learned. Highest on average: "
        f"{methods[0]} ({means[methods[0]]:.2f})."
    )
    layers = [*curves[methods[0]]]
    steps = evenly(len(layers), STEPS)
    texts = ["trained", *(layers[step] for step in steps)]
    rows, maps = [], []
    for method in methods:
        heats = [found[method].heat[0], *found[method].randomized[steps]]
        rows.append([figures.overlay(shown, heat) for heat in heats])
        tiles = [
            page.tile(x, page.breakable(at), f"{method}, {at}", width=WIDTH)
            for x, at in zip(rows[-1], texts, strict=True)
        ]
        maps += [page.heading(method), page.image_grid(tiles, smallest=80)]
    summary = f"Maps of {name}, with random weights from the head to each layer"
    pieces = page.figure(drawing, text), page.details(summary, *maps, shown=True)
    captions = [[f"{method}\n{at}" for at in texts] for method in methods]
    drawings = {"cascade": drawing, "cascade_maps": figures.gallery(rows, captions)}
    return View(drawings, pieces, {"cascade": curves})


def _caption(text: str) -> Html:
    """The name of a picture, and its scores below."""
    name, *scores = text.split("\n")
    return page.join(page.strong(page.breakable(name)), *scores, by="<br>")


def _title(said: Mapping[str, Any]) -> str:
    """One line about an image: its name and label, what the network says, what is explained."""
    label = f", labelled {said['label']}" if said["label"] is not None else ""
    predicted = f": {said['predicted']} ({said['probability']:.0%})" if "predicted" in said else ""
    other = "" if said["explained"] == said.get("predicted") else f"; explained: {said['explained']}"
    wrong = " - wrong" if said["label"] is not None and said["label"] != said.get("predicted", said["label"]) else ""
    return f"{said['image']}{label}{predicted}{wrong}{other}"


def lead(numbers: Mapping[str, Any], run: str) -> str:
    """The report in one sentence: which method to look at."""
    means = {name: x for name, x in numbers.get("methods", {}).items() if name != REFERENCE}
    if not means:
        return f"What {run} has learned."
    gains = {name: scores["insertion"] - scores["deletion"] for name, scores in means.items()}
    best = max(gains, key=lambda name: gains[name])
    reference = numbers["methods"][REFERENCE]
    chance = reference["insertion"] - reference["deletion"]
    if gains[best] <= chance:
        return f"Trust none of these maps: none is better than a random one ({best} comes nearest)."
    margin = f"insertion minus deletion {gains[best]:.2f}, a random map {chance:.2f}"
    return f"Look at {best} first: of these methods it finds best what {run} uses ({margin})."


def open_out(path: str) -> Path:
    """Create the folder to write to; an earlier explanation may be in it.

    Raises:
      UsageError: it holds other things, or cannot be written to.
    """
    out = local_path(path)
    make_folder(out)
    if not os.access(out, os.R_OK | os.W_OK | os.X_OK):
        raise UsageError(f"cannot write to {out}: permission denied")
    if any(out.iterdir()) and not (out / RESULT).is_file():
        raise UsageError(f"{out} holds other things than an explanation: choose a different --out")
    return out


def write_report(
    out: Path, sections: Mapping[str, View], about: Mapping[str, Any], first: str | None = None
) -> dict[str, Any]:
    """Write the page, the pictures and the numbers of all sections; return the numbers.

    The page begins with the sentence `first`; by default with that of `lead`.

    Raises:
      RunError: the folder cannot be written to any more.
    """
    numbers: dict[str, Any] = {}
    for view in sections.values():
        numbers |= view.numbers
    result = {**numbers, **about, "out": str(out), "page": str(out / PAGE)}
    parts = [page.section(title, *view.pieces) for title, view in sections.items()]
    command = page.details("How this was made", page.code(about["command"]))
    try:
        # First, so that `open_out` takes the folder again if this is interrupted.
        (out / RESULT).write_text(to_json(result, indent=1) + "\n")
        shutil.rmtree(out / PICTURES, ignore_errors=True)
        (out / PICTURES).mkdir()
        for view in sections.values():
            for name, drawing in view.drawings.items():
                file = out / PICTURES / f"{name}.png"
                if isinstance(drawing, np.ndarray):
                    times = max(LEAST // drawing.shape[1], 1)
                    Image.fromarray(drawing.repeat(times, 0).repeat(times, 1)).save(file)
                else:
                    save_figure(drawing, file)
        text = page.page(f"Explanation of {about['run']}", first or lead(numbers, about["run"]), *parts, command)
        (out / PAGE).write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write to {out}: {error.strerror}") from None
    return result
