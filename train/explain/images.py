"""The images to explain: files, folders, or some of a set; as uint8 and as the network sees them."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.augment import preprocess_batch
from train.data.decode import read_pixels
from train.data.folder import suffixes
from train.data.sources import Arrays, Encoded
from train.errors import UsageError
from train.explain.mistakes import worst
from train.explain.outputs import Outputs
from train.paths import local_path
from train.runtime import say
from train.trained import Trained


class Images(NamedTuple):
    """Images uint8 [N, H, W, C], their names, and their labels (None where they are not known)."""

    pixels: np.ndarray
    names: list[str]
    labels: list[str | None]


def read_images(paths: Sequence[str], shape: tuple[int, int, int], most: int) -> Images:
    """Read files and folders, at most `most` images of a folder, in the shape that a network takes.

    Raises:
      UsageError: a file that cannot be read, or a folder without images.
    """
    files = [file for path in paths for file in _files(path, most)]
    return Images(np.stack([read_pixels(file, shape) for file in files]), list(map(str, files)), [None] * len(files))


def _files(path: str, most: int) -> list[Path]:
    folder = local_path(path)
    if not folder.is_dir():
        return [folder]
    found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in suffixes() and file.name[0] != ".")
    if not found:
        raise UsageError(f"{path} holds no images")
    if len(found) > most:
        say(f"note: {most} of the {len(found):,} images in {path} are explained; --count sets their number")
    return [found[at] for at in evenly(len(found), most)]


def choose(source: Arrays | Encoded, seen: Outputs | None, classes: Sequence[str], count: int, split: str) -> Images:
    """Take `count` images of a split: half of them the most confident mistakes, if there are as many, the others right.

    Without predictions they are taken at equal distances.
    """
    if seen is not None:
        wrong = worst(seen.confidence, seen.correct, count // 2)
        right = np.flatnonzero(seen.correct)
        places = np.concatenate([wrong, right[evenly(len(right), count - len(wrong))]])
    else:
        places = evenly(len(source), count)
    examples = [source[int(at)] for at in places]
    names = [f"{split} {at}" for at in places]
    return Images(np.stack([x["image"] for x in examples]), names, [classes[x["label"]] for x in examples])


def evenly(count: int, most: int) -> np.ndarray:
    """At most `most` positions in `count`, at equal distances."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int)


class Pixels(NamedTuple):
    """How a network sees images, which its preprocessing crops and normalises.

    Attributes:
      see: uint8 [B, H, W, C] to normalised float32 [B, h, w, C].
      mean, std: of each channel, for values in [0, 1].
    """

    see: Callable[[np.ndarray], jax.Array]
    mean: np.ndarray
    std: np.ndarray

    def show(self, seen: np.ndarray) -> np.ndarray:
        """The images uint8 [B, h, w, C] that normalised ones are made of."""
        return np.rint((seen * self.std + self.mean).clip(0, 1) * 255).astype(np.uint8)


def pixels_of(trained: Trained) -> Pixels:
    """Find how a network sees images, from what it makes of a black and a white one."""
    see = jax.jit(partial(preprocess_batch, trained.preprocess))
    extremes = np.stack([np.full(trained.shape, value, np.uint8) for value in (0, 255)])
    black, white = np.asarray(see(jnp.asarray(extremes)))[:, 0, 0]
    return Pixels(see, -black / (white - black), 1 / (white - black))
