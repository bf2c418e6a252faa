"""Sizes of images: how each is scaled, and the few bucket sizes that all are padded to, one compilation each."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from train.data.sources import shortened
from train.errors import UsageError

Size = tuple[int, int]
"""(height, width) in pixels."""

STRIDE = 32  # buckets are multiples of the coarsest stride of a ResNet
BUCKETS = 3
SLACK = 0.02  # share of padded pixels that another bucket has to save
GROWTH = 1.3  # a bucket's area over that of the largest image, above which memory is wasted


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How images are laid out: scaled by `fit`, and padded to the smallest of `buckets`, with `rows` rows for boxes."""

    min_size: int | None
    max_size: int | None
    buckets: tuple[Size, ...]
    rows: int

    def bucket_of(self, size: Size) -> int:
        """Index of the smallest bucket that an image of this original size fits into when scaled; -1 if none."""
        (height, width), _ = fit(size, self.min_size, self.max_size)
        return next((i for i, (h, w) in enumerate(self.buckets) if height <= h and width <= w), -1)


def fit(size: Size, min_size: int | None, max_size: int | None) -> tuple[Size, float]:
    """Scale an image as torchvision's detectors do: (its new size, pixels there per pixel here).

    The short side becomes `min_size`, unless the long one would exceed `max_size`; None is without a limit, and
    without both the size is kept. The scale is the same for both axes: less than a pixel of the image is cut off.
    """
    scales = [1.0] if min_size is None and max_size is None else []
    scales += [min_size / min(size)] if min_size is not None else []
    scales += [max_size / max(size)] if max_size is not None else []
    scale = min(scales)
    # The small number undoes rounding, as in 600 * (800 / 600).
    height, width = (max(int(side * scale + 1e-6), 1) for side in size)
    return (height, width), scale


def choose_buckets(sizes: Sequence[Size], most: int = BUCKETS) -> tuple[Size, ...]:
    """Choose at most `most` bucket sizes (multiples of `STRIDE`, by area) for images of these scaled sizes.

    Beginning with a bucket for each size, the two are merged that add the fewest padded pixels, until few are left
    and merging more would cost over `SLACK` of all pixels.
    """
    rounded = -(-np.asarray(sizes) // STRIDE) * STRIDE
    unique, counts = np.unique(rounded, axis=0, return_counts=True)
    limit = GROWTH * unique.prod(axis=1).max()
    while len(unique) > 1:
        areas = unique.prod(axis=1)
        union = np.maximum(unique[:, None], unique[None]).prod(axis=2)
        cost = (counts[:, None] + counts[None]) * union - counts * areas - (counts * areas)[:, None]
        cost = np.where(np.eye(len(unique), dtype=bool), np.inf, cost.astype(float))
        allowed = np.where(union <= limit, cost, np.inf)
        cost = allowed if np.isfinite(allowed).any() else cost
        one, other = np.unravel_index(np.argmin(cost), cost.shape)
        if len(unique) <= most and cost[one, other] > SLACK * np.sum(counts * areas):
            break
        unique[one] = np.maximum(unique[one], unique[other])
        counts[one] += counts[other]
        unique, counts = np.delete(unique, other, axis=0), np.delete(counts, other)
    return by_area([(int(h), int(w)) for h, w in unique])


def by_area(buckets: Sequence[Size]) -> tuple[Size, ...]:
    """Sort bucket sizes, each once, so that the first that fits is the smallest."""
    return tuple(sorted(set(buckets), key=lambda size: (size[0] * size[1], size)))


def check_buckets(buckets: Sequence[Size]) -> tuple[Size, ...]:
    """Check a user's bucket sizes and sort them.

    Raises:
      UsageError: a side is not a positive multiple of `STRIDE`.
    """
    for height, width in buckets:
        if min(height, width) < 1 or height % STRIDE or width % STRIDE:
            raise UsageError(f"bucket {height}x{width}: the sides of a bucket must be multiples of {STRIDE}")
    return by_area([(int(h), int(w)) for h, w in buckets])


def check_fits(names: Sequence[str], sizes: Sequence[Size], layout: Layout) -> None:
    """Check that each image, of a name and an original size, fits into a bucket.

    Raises:
      UsageError: some do not; the message names them, and the bucket that they need.
    """
    fitted = [fit(size, layout.min_size, layout.max_size)[0] for size in sizes]
    large = [i for i, size in enumerate(sizes) if layout.bucket_of(size) < 0]
    if large:
        lines = [f"{names[i]} ({fitted[i][0]}x{fitted[i][1]})" for i in large]
        need = choose_buckets([fitted[i] for i in large], 1)[0]
        buckets = ", ".join(f"{h}x{w}" for h, w in layout.buckets)
        raise UsageError(
            f"{len(large)} of {len(sizes)} images are larger than every bucket ({buckets}): {shortened(lines, 3)}; "
            f"add a bucket of {need[0]}x{need[1]}, or lower the images' max size"
        )
