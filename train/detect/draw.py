"""Detections and objects drawn on images."""

import colorsys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from train.detect.metrics import Detections, Truth
from train.detect.mistakes import best_and_worst, classify_errors, image_scores, missed

SMALLEST, LARGEST = 480, 1200  # pixels of a picture's longer side
FONT = 14  # pixels
DASH = 6


def colour_of(label: int) -> tuple[int, int, int]:
    """A bright colour for a class; those of classes next to each other are far apart."""
    red, green, blue = colorsys.hsv_to_rgb((0.55 + 0.618034 * label) % 1, 0.85, 1)
    return round(255 * red), round(255 * green), round(255 * blue)


def enlarged(image: np.ndarray) -> tuple[Image.Image, float]:
    """(an image uint8 [H, W, 1 or 3] with a longer side of `SMALLEST` to `LARGEST` pixels or little more, its scale).

    Small images are enlarged by a whole number, with sharp pixels.
    """
    whole = Image.fromarray(image if image.shape[2] == 3 else image.repeat(3, axis=2))
    longest = max(whole.size)
    if longest > LARGEST:
        width, height = (max(round(side * LARGEST / longest), 1) for side in whole.size)
        return whole.resize((width, height), Image.Resampling.LANCZOS), LARGEST / longest
    times = -(-SMALLEST // longest)
    return whole.resize((whole.width * times, whole.height * times), Image.Resampling.NEAREST), times


def draw_objects(
    image: np.ndarray,
    detections: Detections,
    classes: Sequence[str],
    truth: Truth | None = None,
    *,
    least: float = 0.5,
) -> np.ndarray:
    """Draw boxes with class and score, and the true ones dashed; objects that were not found are named.

    Args:
      image: uint8 [H, W, 1 or 3]; for its size in the picture see `enlarged`.
      detections, truth: in pixels of `image`.
      least: lowest score that is drawn.

    Returns:
      uint8 [h, w, 3].
    """
    picture, scale = enlarged(image)
    pen, seen = ImageDraw.Draw(picture), detections.above(least)
    order = np.argsort(-seen.scores, kind="stable")
    labelled = []  # box, texts from long to short, class
    for at in order[::-1]:  # the most confident on top
        _outline(pen, seen.boxes[at] * scale, colour_of(seen.labels[at]))
    for at in order:
        texts = [f"{classes[seen.labels[at]]} {seen.scores[at]:.0%}", f"{seen.scores[at]:.0%}"]
        labelled.append((seen.boxes[at] * scale, texts, seen.labels[at]))
    if truth is not None:
        lost = missed(truth, *classify_errors(seen, truth))
        for box, label, unfound in zip(truth.boxes * scale, truth.labels, lost, strict=True):
            _dashes(pen, box, colour_of(label))
            if unfound:
                labelled.append((box, [f"missed {classes[label]}", "missed"], label))
    _write(pen, picture.size, labelled)
    return np.asarray(picture)


def draw_box(image: np.ndarray, box: np.ndarray, label: int) -> np.ndarray:
    """Draw one box in the colour of its class, without a text: uint8 [h, w, 3], see `draw_objects`."""
    picture, scale = enlarged(image)
    _outline(ImageDraw.Draw(picture), box * scale, colour_of(label))
    return np.asarray(picture)


def _outline(pen: ImageDraw.ImageDraw, box: np.ndarray, colour: tuple[int, int, int]) -> None:
    """A box of lines three pixels wide, its border in the middle, with a dark edge that any background shows."""
    left, top, right, bottom = _on_image(box)
    pen.rectangle((left - 2, top - 2, right + 2, bottom + 2), outline=(0, 0, 0), width=5)
    pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=colour, width=3)


def _dashes(pen: ImageDraw.ImageDraw, box: np.ndarray, colour: tuple[int, int, int]) -> None:
    """A box of thin dashes in the colour and black."""
    left, top, right, bottom = _on_image(box)
    for tint, start in ((colour, 0), ((0, 0, 0), DASH)):
        for x in range(left + start, right + 1, 2 * DASH):
            for y in (top, bottom):
                pen.line((x, y, min(x + DASH - 1, right), y), fill=tint)
        for y in range(top + start, bottom + 1, 2 * DASH):
            for x in (left, right):
                pen.line((x, y, x, min(y + DASH - 1, bottom)), fill=tint)


def _on_image(box: np.ndarray) -> tuple[int, int, int, int]:
    """First and last pixels of a box; not less than one pixel."""
    left, top, right, bottom = np.rint(box).astype(int).tolist()
    return left, top, max(right - 1, left), max(bottom - 1, top)


def _write(
    pen: ImageDraw.ImageDraw, size: tuple[int, int], labelled: Sequence[tuple[np.ndarray, Sequence[str], int]]
) -> None:
    """Write each label at a corner of its box, inside the image and without overlap; what has no place is left out."""
    font, taken = ImageFont.load_default(FONT), np.zeros((0, 4))
    high = round(pen.textbbox((0, 0), "\N{LATIN CAPITAL LETTER E WITH ACUTE}g", font)[3]) + 3
    for box, texts, label in labelled:
        left, top, right, bottom = _on_image(box)
        for text in texts:
            text = _fitting(pen, text, font, size[0] - 6)
            wide = round(pen.textlength(text, font)) + 6
            corners = [(x, y) for y in (top - high - 1, bottom + 2, top) for x in (left - 1, right + 2 - wide)]
            places = np.array([(x, y, x + wide, y + high) for x, y in corners])
            places -= np.tile(np.minimum(places[:, :2], 0) + np.maximum(places[:, 2:] - size, 0), 2)
            free = [place for place in places if not _touches(place, taken)]
            if free:
                taken = np.concatenate([taken, free[0][None]])
                tint = colour_of(label)
                dark = np.dot(tint, (0.299, 0.587, 0.114)) < 128
                x, y, *end = free[0].tolist()
                pen.rectangle((x, y, end[0] - 1, end[1] - 1), fill=tint)
                pen.text((x + 3, y + 1), text, fill=(255, 255, 255) if dark else (0, 0, 0), font=font)
                break


def _touches(place: np.ndarray, taken: np.ndarray) -> bool:
    """Whether a rectangle [4] shares a point with one of others [n, 4]."""
    return bool(((place[:2] < taken[:, 2:]) & (taken[:, :2] < place[2:])).all(1).any())


class Drawn(NamedTuple):
    """An image with its boxes, uint8 [h, w, 3], and a line about it."""

    picture: np.ndarray
    caption: str


def draw_best_and_worst(
    detections: Sequence[Detections],
    truths: Sequence[Truth],
    classes: Sequence[str],
    read: Callable[[int], np.ndarray],
    *,
    least: float = 0.5,
    count: int = 6,
) -> tuple[list[Drawn], list[Drawn]]:
    """Draw the images that are detected best, and worst, by F1.

    Args:
      read: the image at a position, uint8 [H, W, 1 or 3] in its original size.
      least: lowest score of a detection that is drawn and counted.
      count: most images of each.
    """
    scores = image_scores(detections, truths, least=least)

    def drawn(at: int) -> Drawn:
        caption = f"image {at}: F1 {scores[at]:.2f}, {len(truths[at].labels)} objects"
        return Drawn(draw_objects(read(at), detections[at], classes, truths[at], least=least), caption)

    best, worst = best_and_worst(scores, truths, count)
    return [drawn(at) for at in best.tolist()], [drawn(at) for at in worst.tolist()]


def contact_sheet(images: Sequence[Drawn], *, columns: int = 3, side: int = 480) -> np.ndarray:
    """Set pictures in cells of at most `side` pixels, each above its caption: uint8 [H, W, 3].

    Raises:
      ValueError: there are no images.
    """
    if not images:
        raise ValueError("no images to show")
    cells = [Image.fromarray(image.picture) for image in images]
    for cell in cells:
        cell.thumbnail((side, side), Image.Resampling.LANCZOS)
    columns, below, gap = min(columns, len(cells)), FONT + 16, 8
    heights = [max(cell.height for cell in cells[at : at + columns]) + below for at in range(0, len(cells), columns)]
    sheet = Image.new("RGB", (columns * (side + gap) + gap, sum(heights) + gap), (255, 255, 255))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT)
    for at, (cell, caption) in enumerate(zip(cells, (image.caption for image in images), strict=True)):
        left, top = gap + at % columns * (side + gap), gap + sum(heights[: at // columns])
        sheet.paste(cell, (left, top))
        pen.text((left, top + cell.height + 2), _fitting(pen, caption, font, side), fill=(0, 0, 0), font=font)
    return np.asarray(sheet)


def _fitting(pen: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> str:
    """The text, cut so that it is not wider than `width` pixels."""
    while len(text) > 1 and pen.textlength(text, font) > width:
        text = text[:-2] + "\N{HORIZONTAL ELLIPSIS}"
    return text
