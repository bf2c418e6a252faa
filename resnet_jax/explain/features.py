"""What a network has learned: filters, feature maps, and images that activate a channel or a class most."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.explain.maps import rescale
from resnet_jax.explain.network import Network
from resnet_jax.explain.targets import Target
from resnet_jax.keys import Key
from resnet_jax.tree import leaves

Goal = Callable[[jax.Array], jax.Array]
"""`images [B, H, W, C] -> [B]`: what `visualize` maximizes."""
State = tuple[jax.Array, jax.Array, jax.Array]


def channel_goal(network: Network, layer: str | None, channels: jax.Array) -> Goal:
    """Return a goal: image i of a batch activates channel `channels[i]` of a layer, int32 [B], on average.

    Raises:
      ValueError: when applied, if there is no such layer (the message lists them).
    """

    def goal(images: jax.Array) -> jax.Array:
        _, maps = network.forward(images, layer)
        means = maps.astype(jnp.float32).reshape(len(maps), -1, maps.shape[-1]).mean(1)
        return jnp.take_along_axis(means, channels[:, None], axis=1, mode="fill")[:, 0]

    return goal


def output_goal(network: Network, target: Target) -> Goal:
    """Return a goal: each image scores high, such as `class_score(jnp.arange(10))` for ten images of ten classes."""
    return lambda images: target(network.outputs(images))


def visualize(
    goal: Goal,
    *,
    key: Key,
    shape: tuple[int, int, int, int],
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.25,),
    steps: int = 256,
    rate: float = 0.05,
    jitter: int = 4,
    smoothness: float = 0.0,
) -> jax.Array:
    """Maximize a goal from noise: images [B, H, W, C] in [0, 1], https://distill.pub/2017/feature-visualization.

    The goal sees (images - mean) / std, shifted at random by up to `jitter` pixels in each step, and `smoothness` times
    the mean squared difference of neighbours is subtracted from it. Adam changes the images' spectra, divided by
    frequency, as natural images have them: otherwise the result is noise of high frequency.
    """
    batch, height, width, channels = shape
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    scale = np.sqrt(height * width) / np.maximum(frequency, 1 / max(height, width)) / 4
    scale = jnp.asarray(scale[None, :, :, None], jnp.float32)
    center, spread = (jnp.asarray(x, jnp.float32).reshape(1, 1, 1, -1) for x in (mean, std))

    def pixels(spectrum: jax.Array) -> jax.Array:
        waves = jax.lax.complex(spectrum[0], spectrum[1]) * scale
        return jax.nn.sigmoid(jnp.fft.irfft2(waves, (height, width), axes=(1, 2)))

    def loss(spectrum: jax.Array, shift: jax.Array) -> jax.Array:
        images = pixels(spectrum)
        rough = sum(jnp.square(jnp.diff(images, axis=axis)).mean() for axis in (1, 2))
        shifted = jnp.roll(images, shift, (1, 2))
        return batch * smoothness * rough - goal((shifted - center) / spread).sum()

    def step(state: State, now: tuple[jax.Array, jax.Array]) -> tuple[State, None]:
        spectrum, first, second = state
        count, shift = now
        gradient = jax.grad(loss)(spectrum, shift)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * jnp.square(gradient)
        size = jnp.sqrt(second / (1 - 0.999**count)) + 1e-8
        return (spectrum - rate * first / (1 - 0.9**count) / size, first, second), None

    key_start, key_shift = jax.random.split(key)
    start = 0.01 * jax.random.normal(key_start, (2, batch, *frequency.shape, channels), jnp.float32)
    shifts = jax.random.randint(key_shift, (steps, 2), -jitter, jitter + 1)
    counts = jnp.arange(1, steps + 1, dtype=jnp.float32)
    (spectrum, *_), _ = jax.lax.scan(step, (start, jnp.zeros_like(start), jnp.zeros_like(start)), (counts, shifts))
    return pixels(spectrum)


def filters(network: Network, images: jax.Array, layer: str | None = None) -> jax.Array:
    """Return a convolution's kernels [K, h, w, C], each scaled to [0, 1]; of the first one if `layer` is None.

    Raises:
      ValueError: the layer has no such kernel (the message lists those that do).
    """
    found = leaves(network.variables["params"])
    kernels = {name: found[f"{name}/kernel"] for name in network.layers(images) if f"{name}/kernel" in found}
    kernels = {name: kernel for name, kernel in kernels.items() if kernel.ndim == 4}
    layer = next(iter(kernels), "") if layer is None else layer
    if layer not in kernels:
        raise ValueError(f"{layer!r} has no convolution kernel; layers with one: {', '.join(kernels) or 'none'}")
    return rescale(jnp.moveaxis(kernels[layer], -1, 0).astype(jnp.float32))


def feature_maps(network: Network, images: jax.Array, layer: str | None = None, *, limit: int = 64) -> jax.Array:
    """Return the first `limit` channels of a layer as tiles [B, K, h, w], each image's scaled to [0, 1].

    Raises:
      ValueError: there is no such layer (the message lists them).
    """
    _, maps = network.forward(images, layer)
    return rescale(jnp.moveaxis(maps[..., :limit].astype(jnp.float32), -1, 1))
