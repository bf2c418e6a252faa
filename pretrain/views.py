"""Random views of an image, composed of the augmentations in `resnet_jax.augment` as the papers describe."""

from collections.abc import Sequence
from itertools import groupby

import jax
import jax.numpy as jnp

from resnet_jax import augment as aug
from resnet_jax.keys import example_keys

JITTER_P = 0.8  # probability of colour jitter, in every recipe


def view(
    size: int | None = None,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    flip: bool = True,
    jitter: Sequence[float] = (0.4, 0.4, 0.4, 0.1),
    grayscale: float = 0.2,
    blur: float = 0.0,
    solarize: float = 0.0,
    mean: float | Sequence[float] = aug.IMAGENET_MEAN,
    std: float | Sequence[float] = aug.IMAGENET_STD,
) -> aug.Augment:
    """Make one kind of view: resized crop, flip, colour jitter, grayscale, blur, solarisation, normalisation.

    The order and the probabilities are those of SimCLR (https://arxiv.org/abs/2002.05709, appendix A) and BYOL
    (https://arxiv.org/abs/2006.07733, appendix B). Images are float [H, W, C] in [0, 1]; the view is [size, size, C].

    Args:
      size: side of the view in pixels; None keeps the image's own size.
      scale: range of the fraction of the area that the crop keeps, drawn uniformly.
      jitter: strengths of the changes of brightness, contrast, saturation and hue, applied with probability 0.8.
      grayscale, blur, solarize: probabilities in [0, 1].
      mean, std: per-channel statistics for the normalisation.
    """

    def crop(key: aug.Key, image: aug.Image) -> aug.Image:
        return aug.random_resized_crop(size or (image.shape[0], image.shape[1]), scale=scale)(key, image)

    parts = (
        crop,
        aug.random_flip() if flip else None,
        aug.randomly(aug.color_jitter(*jitter), JITTER_P) if any(jitter) else None,
        aug.grayscale(grayscale) if grayscale else None,
        aug.randomly(aug.gaussian_blur(), blur) if blur else None,
        aug.solarize(p=solarize) if solarize else None,
        aug.normalize(mean, std),
    )
    return aug.compose(*(part for part in parts if part is not None))


def make_views(views: Sequence[aug.Augment], key: jax.Array, index: jax.Array, images: jax.Array) -> list[jax.Array]:
    """Make every view of images uint8 [B, H, W, C]: one array float32 [B, V, h, w, C] per size, in order.

    View `v` of the example with global index `i` draws from `fold_in(fold_in(key, v), i)`, so it is the same on one
    device as on eight. Consecutive views of one size share an array, for one pass of a network.
    """
    made = [
        aug.augment_batch(view, example_keys(jax.random.fold_in(key, v), index), images) for v, view in enumerate(views)
    ]
    # Stack an example's views in axis 1: in axis 0 they would have to move between devices.
    return [jnp.stack(list(group), axis=1) for _, group in groupby(made, key=jnp.shape)]
