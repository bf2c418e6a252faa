"""FROZEN: plain Flax steps that `python -m train.bench --gate` compares ours with.

A ResNet-20 (https://arxiv.org/abs/1512.03385 section 4.2) from stock Flax, `jax.jit` and optax, without code of this
project. Do not make it faster: the gate compares ratios to it with those in gate.json.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

MEAN, STD = jnp.array([0.485, 0.456, 0.406]), jnp.array([0.229, 0.224, 0.225])


class PlainResNet20(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        conv = partial(nn.Conv, kernel_size=(3, 3), padding=((1, 1), (1, 1)), use_bias=False)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5)
        x = nn.relu(norm()(conv(16)(x)))
        for stage, width in enumerate((16, 32, 64)):
            for block in range(3):
                strides = 2 if stage and not block else 1
                y = nn.relu(norm()(conv(width, strides=(strides, strides))(x)))
                y = norm()(conv(width)(y))
                if strides == 2:
                    x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (width // 4, width // 4)))
                x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


MODEL = PlainResNet20()
TX = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(1e-3, momentum=0.9, nesterov=True))


def crop_and_flip(key, image):
    corner_key, flip_key = jax.random.split(key)
    top, left = jax.random.randint(corner_key, (2,), 0, 9)
    padded = jnp.pad(image, ((4, 4), (4, 4), (0, 0)))
    image = jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)
    return jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)


def prepared(images):
    return (images.astype(jnp.float32) / 255 - MEAN[None, None, None]) / STD[None, None, None]


@partial(jax.jit, static_argnames="augment", donate_argnums=0)
def train_step(state, images, labels, *, masks=None, augment=False):
    params, stats, opt_state, key = state
    if augment:
        key, draw = jax.random.split(key)
        images = jax.vmap(crop_and_flip)(jax.random.split(draw, len(images)), images)

    def objective(params):
        variables = {"params": params, "batch_stats": stats}
        logits, updated = MODEL.apply(variables, prepared(images), True, mutable=["batch_stats"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, (updated["batch_stats"], (logits.argmax(-1) == labels).mean())

    (loss, (stats, accuracy)), grads = jax.value_and_grad(objective, has_aux=True)(params)
    updates, opt_state = TX.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    if masks is not None:
        params = jax.tree.map(jnp.multiply, params, masks)
    return (params, stats, opt_state, key), (loss, accuracy)


@jax.jit
def eval_step(variables, images, labels):
    logits = MODEL.apply(variables, prepared(images), False)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()
    return loss, (logits.argmax(-1) == labels).sum()


def data(batch):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, 32, 32, 3), np.uint8)
    return jnp.asarray(images), jnp.asarray(rng.integers(0, 10, batch, np.int32))


def fresh():
    return jax.jit(lambda key: MODEL.init(key, jnp.zeros((1, 32, 32, 3)), False))(jax.random.key(0))


def trained(batch, *, masked=False, augment=False):
    variables, (images, labels) = fresh(), data(batch)
    params = variables["params"]
    masks = jax.tree.map(lambda p: (jnp.abs(p) > jnp.median(jnp.abs(p))).astype(p.dtype), params) if masked else None
    held = [(params, variables["batch_stats"], TX.init(params), jax.random.key(1))]

    def run():
        held[0], metrics = train_step(held[0], images, labels, masks=masks, augment=augment)
        return held[0], metrics

    return run


def evaluated(batch):
    variables, (images, labels) = fresh(), data(batch)
    return lambda: eval_step(variables, images, labels)


PIPELINES = {
    "train": trained,
    "eval": evaluated,
    "augmented": partial(trained, augment=True),
    "masked": partial(trained, masked=True),
}
