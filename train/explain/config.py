"""Configuration of an explanation: one flag per field."""

from dataclasses import dataclass, field
from typing import Literal

from resnet_jax.explain.methods import METHODS
from train.config import SEEDS, flat
from train.errors import UsageError, unknown
from train.ranges import check_ranges

VIEW_NAMES = ("confusion", "reliability", "mistakes", "neighbours", "pca", "tsne", "umap", "landscape")
USUAL = ("grad_cam", "integrated_gradients", "smooth_grad", "occlusion")


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """The image set that images, neighbours and views of a set come from."""

    name: str | None = None
    """`digits`, `folder:DIR`, or a prepared TFDS set; None is the set that the run was trained on."""
    dir: str | None = None
    """The TFDS data_dir that prepared sets are in."""
    split: Literal["train", "validation", "test"] = "validation"
    """Split to look at; neighbours always come from the training split."""


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """What to explain, and how."""

    out: str | None = None
    """New folder for index.html, scores.json and the pictures (required); an earlier explanation in it is replaced."""
    methods: tuple[str, ...] = USUAL
    """Methods by name; `random` is always added, as a reference for their scores."""
    layer: str | None = None
    """Layer of the CAM methods and of the feature maps, such as stage2 or stage3_block1/conv2; None is the last map."""
    target: str | None = None
    """`predicted`, a CLASS by name or number, CLASS:CLASS for the first rather than the second, `image:PATH` for the
    similarity to that image's embedding, or `neighbour` for that to the most similar training image. The default is
    `predicted`, or `neighbour` for encoders."""
    count: int = 8
    """Images to take if none is named, half of them mistakes; also the most to take from a folder."""
    cascade: bool = False
    """Also show how each method's maps change while layers get random weights one after the other, from the head down,
    with `guided_backprop` as the method that hardly notices. Takes each method's time once per layer."""
    features: bool = False
    """Also show filters, feature maps, and images that the network is made to see."""
    dataset: tuple[str, ...] | None = None
    """Also look at the whole split: without a name the usual views, or confusion, reliability, mistakes, neighbours,
    pca, tsne, umap, landscape."""
    data: SplitConfig = field(default_factory=SplitConfig)
    most: int = 10_000
    """Most images of a split to look at."""
    batch: int = 16
    """Images to explain at once; memory grows with it."""
    seed: int = 0
    """Seed of all that is random, except of which images of a large split are looked at: they are always the same."""


RANGES = {"[1, inf)": "count batch", "[4, inf)": "most", SEEDS: "seed"}


def check(config: ExplainConfig) -> None:
    """Refuse a config that cannot work, before anything is loaded.

    Raises:
      UsageError: an unknown method or view, a number out of range, a missing `--out`, a flag without effect.
    """
    if config.out is None:
        raise UsageError("name the folder to write to: --out DIR")
    for name in config.methods:
        if name not in METHODS:
            raise unknown("method", name, METHODS)
    for name in config.dataset or ():
        if name not in VIEW_NAMES:
            raise unknown("view", name, VIEW_NAMES)
    if not (config.methods or config.features or config.dataset is not None):
        raise UsageError("nothing to do: name --methods, or pass --features or --dataset")
    for name in ("target", "cascade"):
        if getattr(config, name) and not config.methods:
            raise UsageError(f"--{name} has no effect without --methods")
    check_ranges(flat(config), RANGES)
