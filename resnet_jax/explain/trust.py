"""Does a heat map say what the network uses? Scores of heat maps [B, H, W]; compare each with that of a random map."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg

from resnet_jax.explain.maps import blur
from resnet_jax.explain.network import Network
from resnet_jax.explain.sampling import total
from resnet_jax.explain.targets import Target
from resnet_jax.keys import Key, example_index, example_keys
from resnet_jax.parallel import vary_like

Perturb = Callable[[Key, jax.Array], tuple[jax.Array, jax.Array]]
"""`(key, images) -> (how much of each value is removed, the perturbed images)`."""


class Road(NamedTuple):
    """Scores [B, P] after imputing shares of the pixels: the most (`morf`) or the least (`lerf`) relevant first."""

    morf: jax.Array
    lerf: jax.Array

    def combined(self) -> jax.Array:
        """Return the mean of (lerf - morf) / 2 over the shares, [B]; higher is better, a random map has about 0."""
        return (self.lerf - self.morf).mean(1) / 2


def deletion(
    network: Network,
    images: jax.Array,
    target: Target,
    heat: jax.Array,
    *,
    steps: int = 32,
    baseline: float | jax.Array = 0.0,
    chunk: int = 16,
) -> jax.Array:
    """Return scores [B, steps + 1] as pixels become the baseline, hottest first, https://arxiv.org/abs/1806.07421.

    Entry i is the score with a share i / steps of the pixels removed, `chunk` entries are computed at once. A small
    `area` is good; the paper's target is the probability of the predicted class.
    """
    ranks = _ranks(heat)

    def score(count: jax.Array) -> jax.Array:
        return target(network.outputs(jnp.where((ranks < count)[..., None], baseline, images)))

    counts = jnp.round(jnp.linspace(0, heat[0].size, steps + 1)).astype(jnp.int32)
    return jax.lax.map(score, counts, batch_size=chunk).T


def insertion(
    network: Network,
    images: jax.Array,
    target: Target,
    heat: jax.Array,
    *,
    steps: int = 32,
    baseline: float | jax.Array | None = None,
    chunk: int = 16,
) -> jax.Array:
    """Return scores [B, steps + 1] as pixels of the blurred images become sharp, hottest first; a large `area` is good.

    `baseline` replaces the blurred images. As in `deletion`, entry i has a share i / steps of the images' own pixels.
    """
    if baseline is None:
        baseline = blur(images, max(heat.shape[1:]) / 16)
    # Inserting the hottest first is deleting the coldest, which have the highest ranks, first, read backwards.
    curves = deletion(network, images, target, _ranks(heat), steps=steps, baseline=baseline, chunk=chunk)
    return curves[:, ::-1]


def area(curves: jax.Array) -> jax.Array:
    """Return the area under curves [B, n] over [0, 1], by trapezoids, [B]."""
    return (curves[:, 1:] + curves[:, :-1]).mean(1) / 2


def road(
    network: Network,
    images: jax.Array,
    target: Target,
    heat: jax.Array,
    *,
    key: Key,
    shares: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8),
    noise: float = 0.01,
    chunk: int = 4,
) -> Road:
    """Remove and debias: score the images with shares of their pixels imputed, https://arxiv.org/abs/2202.00449.

    Values that neighbours predict hide a pixel better than a constant does, which shows where pixels were removed.
    Noise of standard deviation `noise` is added to them.
    """

    def curve(ranks: jax.Array) -> jax.Array:
        def score(part: tuple[jax.Array, Key]) -> jax.Array:
            count, key = part
            removed = ranks < count
            noisy = impute(images, removed) + noise * jax.random.normal(key, images.shape)
            return target(network.outputs(jnp.where(removed[..., None], noisy, images)))

        counts = jnp.round(jnp.asarray(shares) * heat[0].size).astype(jnp.int32)
        return jax.lax.map(score, (counts, jax.random.split(key, len(shares))), batch_size=chunk).T

    ranks = _ranks(heat)
    return Road(morf=curve(ranks), lerf=curve(heat[0].size - 1 - ranks))


def impute(images: jax.Array, removed: jax.Array) -> jax.Array:
    """Replace the removed pixels, bool [B, H, W], by means of their neighbours, all at once: images [B, H, W, C].

    The four nearest weigh 1/6 and the four diagonal ones 1/12. Conjugate gradients solve the linear system.
    """

    def neighbours(x: jax.Array) -> jax.Array:
        """Weighted sum over the neighbours inside the image, of [H, W, C]."""
        sums = x
        for axis in (0, 1):
            size = sums.shape[axis]
            padded = jnp.pad(sums, [(1, 1) if a == axis else (0, 0) for a in range(3)])
            before, after = (jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in (0, 2))
            sums = before + 2 * sums + after
        return (sums - 4 * x) / 12

    def one(image: jax.Array, removed: jax.Array) -> jax.Array:
        hole = removed[..., None].astype(jnp.float32)
        weight = neighbours(jnp.ones_like(image))

        def system(x: jax.Array) -> jax.Array:
            return hole * (weight * x - neighbours(hole * x)) + (1 - hole) * x

        values, _ = cg(system, hole * neighbours((1 - hole) * image), tol=1e-6, maxiter=1000)
        return jnp.where(removed[..., None], values, image)

    return jax.vmap(one)(images.astype(jnp.float32), removed)


def square_removal(baseline: float | jax.Array = 0.0, smallest: int = 1, largest: int | None = None) -> Perturb:
    """Return a perturbation that sets one random square per image to the baseline, of at most half the image's side."""

    def perturb(key: Key, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        height, width = images.shape[1:3]

        def square(key: Key) -> jax.Array:
            key_side, key_corner = jax.random.split(key)
            side = jax.random.randint(key_side, (), smallest, (largest or min(height, width) // 2) + 1)
            top, left = jax.random.randint(key_corner, (2,), 0, jnp.asarray([height, width]) - side + 1)
            rows, columns = jnp.arange(height) - top, jnp.arange(width) - left
            return ((rows >= 0) & (rows < side))[:, None] & ((columns >= 0) & (columns < side))[None]

        removed = jax.vmap(square)(example_keys(key, example_index(len(images))))
        return removed.astype(jnp.float32), jnp.where(removed[..., None], baseline, images)

    return perturb


def infidelity(
    network: Network,
    images: jax.Array,
    target: Target,
    attribution: jax.Array,
    *,
    key: Key,
    perturb: Perturb | None = None,
    samples: int = 64,
    scaled: bool = True,
    chunk: int = 8,
) -> jax.Array:
    """Return the mean squared error of the predicted losses of score, [B], https://arxiv.org/abs/1901.09392.

    The prediction is the sum of `attribution` over what `perturb` removes: by default `square_removal`, with a heat map
    [B, H, W] of contributions. `scaled` first multiplies it by the factor that fits best, as heat maps have no unit.
    """
    before, perturb = target(network.outputs(images)), perturb or square_removal()

    def sample(key: Key) -> tuple[jax.Array, jax.Array, jax.Array]:
        removed, perturbed = perturb(key, images)
        predicted = (removed * attribution).sum(tuple(range(1, attribution.ndim)))
        lost = before - target(network.outputs(perturbed))
        return predicted**2, predicted * lost, lost**2

    square, product, change = total(sample, jax.random.split(key, samples), chunk)
    factor = jnp.where(square > 0, product / jnp.where(square > 0, square, 1), 1.0) if scaled else 1.0
    return (factor**2 * square - 2 * factor * product + change) / samples


def completeness_error(
    network: Network,
    images: jax.Array,
    target: Target,
    attribution: jax.Array,
    *,
    baseline: float | jax.Array = 0.0,
) -> jax.Array:
    """Return the sum of the attributions minus the difference of score to the baseline, [B]; 0 for exact IG."""
    start = target(network.outputs(jnp.broadcast_to(jnp.asarray(baseline, images.dtype), images.shape)))
    return attribution.sum(tuple(range(1, attribution.ndim))) - (target(network.outputs(images)) - start)


def _ranks(heat: jax.Array) -> jax.Array:
    """Position of each pixel in the order from hot to cold, int32 [B, H, W]; ties go to the lower index."""
    flat = heat.reshape(len(heat), -1)
    ranks = jnp.argsort(jnp.argsort(-flat, axis=1), axis=1).reshape(heat.shape)
    return vary_like(ranks, heat)  # JAX takes positions in a sorted array for equal on all shards
