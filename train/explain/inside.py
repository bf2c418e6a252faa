"""What a network has learned: its first filters, the maps of a layer, and images that excite its outputs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.explain import Network, channel_goal, class_score, feature_maps, filters, grid, output_goal, visualize
from train import page
from train.explain.dataset import View
from train.explain.images import Pixels
from train.runtime import compiler_options
from train.trained import Trained

SHOWN = 64  # most filters, and channels of a map
DREAMS = 10  # most classes, or channels, to make images of
SIDE = 32  # least side of a tile, in pixels
WIDTH = 480  # of a picture, in pixels


def inside_view(trained: Trained, pixels: Pixels, image: jax.Array, layer: str | None, seed: int) -> View:
    """Show filters, the maps of a layer for one normalised image [1, H, W, C], and images that excite the outputs.

    Without classes, the images excite channels of the layer.
    """
    network = Network(trained.model, trained.variables)
    name = network.resolve(layer, image)
    options: dict[str, Any] = compiler_options(trained.dtype)
    kernels = np.asarray(filters(network, image))[:SHOWN]
    if kernels.shape[-1] not in (1, 3):  # no colours: the first input
        kernels = kernels[..., :1]
    maps = np.asarray(
        jax.jit(lambda n, x: feature_maps(n, x, name, limit=SHOWN), compiler_options=options)(network, image)
    )

    chosen = min(DREAMS, len(trained.classes) or network.layers(image)[name].shape[-1])
    numbers = jnp.arange(chosen, dtype=jnp.int32)

    def dream(network: Network, key: jax.Array) -> jax.Array:
        goal = output_goal(network, class_score(numbers)) if trained.classes else channel_goal(network, name, numbers)
        height, width, colours = image.shape[1:]
        jitter = max(min(image.shape[1:3]) // 16, 1)
        shape, (mean, std) = (chosen, height, width, colours), (x.tolist() for x in (pixels.mean, pixels.std))
        return visualize(goal, key=key, shape=shape, mean=mean, std=std, jitter=jitter)

    dreams = np.asarray(jax.jit(dream, compiler_options=options)(network, jax.random.key(seed)))
    labels = trained.classes[:chosen] or [f"channel {number}" for number in range(chosen)]
    pictures = {
        "filters": _tiles(kernels),
        "feature_maps": _tiles(maps[0][..., None]),
        "dreams": _tiles(dreams, columns=min(chosen, 5)),
    }
    captions = {
        "filters": f"{len(kernels)} filters of the first convolution, each scaled to its own range",
        "feature_maps": f"the first {maps.shape[1]} channels of {name} for the first image",
        "dreams": f"images that excite most, in reading order: {', '.join(labels)}; made from noise, not photographs",
    }
    shown = [page.picture(*page.tile(x, captions[key], width=WIDTH)) for key, x in pictures.items()]
    return View(pictures, (page.figures(*shown),), {})


def _tiles(values: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Tiles in [0, 1], [N, h, w, C], as one picture uint8 [H, W, 3]."""
    # Small tiles are enlarged, so that the gaps between them stay narrow.
    times = max(SIDE // values.shape[1], 1)
    picture = np.asarray(grid(jnp.asarray(values.repeat(times, 1).repeat(times, 2)), columns, gap=2, fill=0.5))
    return np.rint(255 * np.broadcast_to(picture, (*picture.shape[:2], 3))).astype(np.uint8)
