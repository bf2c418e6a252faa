"""Mixup and cutmix over a batch, with the same result on one device or many.

The partner of global example i is example B - 1 - i: since batches are shuffled the partner is random, and shards
exchange partners in a single permutation.
"""

import jax
import jax.numpy as jnp

from resnet_jax.augment import random_centered_box
from resnet_jax.keys import Key


def mixup(
    key: Key, images: jax.Array, labels: jax.Array, *, alpha: float = 0.2, axis_name: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Mix each example with its partner: `lam * x + (1 - lam) * partner`, one lam ~ Beta(alpha, alpha) per batch.

    https://arxiv.org/abs/1710.09412, with alpha > 0. Images are float [B, H, W, C], and labels float [B, K], one-hot or
    soft. With `axis_name` the batch is split over that axis; the same key on all devices gives the result of one.

    Raises:
      TypeError: images or labels are integers.
    """
    return _mix(images, labels, _weights(key, images.shape, alpha, False), axis_name)


def cutmix(
    key: Key, images: jax.Array, labels: jax.Array, *, alpha: float = 1.0, axis_name: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Paste a random box of the partner's image, and mix labels by the box's exact area after clipping.

    https://arxiv.org/abs/1905.04899. Arguments are as in `mixup`. The box covers about 1 - lam of the image, with
    lam ~ Beta(alpha, alpha).
    """
    return _mix(images, labels, _weights(key, images.shape, alpha, True), axis_name)


def mix(
    key: Key,
    images: jax.Array,
    labels: jax.Array,
    *,
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Apply `mixup` or `cutmix` to the batch, each with probability 1/2; an alpha of 0 (static) turns that one off."""
    if not mixup_alpha and not cutmix_alpha:
        return images, labels
    choice_key, key = jax.random.split(key)
    use_cutmix = jax.random.bernoulli(choice_key) if mixup_alpha and cutmix_alpha else bool(cutmix_alpha)
    alpha = jnp.where(use_cutmix, cutmix_alpha, mixup_alpha)
    return _mix(images, labels, _weights(key, images.shape, alpha, use_cutmix), axis_name)


def _weights(key: Key, shape: tuple[int, ...], alpha: jax.Array | float, use_cutmix: jax.Array | bool) -> jax.Array:
    """Return pixel weights [H, W, 1]: 0 inside a random box of area 1 - lam if `use_cutmix`, else lam everywhere."""
    lam_key, place_key = jax.random.split(key)
    lam = jax.random.beta(lam_key, alpha, alpha, (), jnp.float32)
    height, width = (jnp.floor(length * jnp.sqrt(1 - lam)).astype(jnp.int32) for length in shape[1:3])
    box = random_centered_box(place_key, shape[1], shape[2], height, width)
    return jnp.where(use_cutmix, 1 - box.astype(jnp.float32), lam)


def _mix(
    images: jax.Array, labels: jax.Array, weights: jax.Array, axis_name: str | None
) -> tuple[jax.Array, jax.Array]:
    """Blend with the partners: images by `weights` [H, W, 1], labels by their mean."""
    if not (jnp.issubdtype(images.dtype, jnp.floating) and jnp.issubdtype(labels.dtype, jnp.floating)):
        raise TypeError(f"images and labels must be floating (labels one-hot or soft): {images.dtype}, {labels.dtype}")

    def partner(x: jax.Array) -> jax.Array:
        if axis_name is not None:
            n = jax.lax.axis_size(axis_name)
            x = jax.lax.ppermute(x, axis_name, [(device, n - 1 - device) for device in range(n)])
        return x[::-1]

    weights, share = weights[None].astype(images.dtype), jnp.mean(weights).astype(labels.dtype)
    return weights * images + (1 - weights) * partner(images), share * labels + (1 - share) * partner(labels)
