"""Views: their parts and order, their random draws, and the whole step of every preset."""

import inspect
import json
from dataclasses import asdict, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pretrain import from_config as build
from pretrain.config import PretrainConfig, ViewConfig, check, check_images, make_objective
from pretrain.presets import PRESETS
from pretrain.steps import contrastive_step
from pretrain.views import make_views, view
from resnet_jax import augment as aug
from tests.pretrain.test_steps import Encoder
from train.config import from_dict
from train.from_config import make_tx

RNG = np.random.default_rng(0)
IMAGE = RNG.random((10, 10, 3), np.float32)
PLAIN = {"flip": False, "jitter": (0, 0, 0, 0), "grayscale": 0, "mean": 0.0, "std": 1.0}  # the crop alone


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def drawn(views, count=8, image=IMAGE):
    """Views of one image under the same keys each, [count, H, W, C] by name, in one compiled call."""
    every = jax.jit(lambda keys: {name: jax.vmap(lambda key, f=f: f(key, image))(keys) for name, f in views.items()})
    return {name: np.asarray(x) for name, x in every(keys(count)).items()}


def at(position, augment, before):
    """`augment` as the part of this place after `before`, which ends in no normalisation."""
    return lambda key, image: augment(jax.random.fold_in(key, position), before(key, image))


# ---- one view --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "shape"), [(None, (10, 7)), (6, (6, 6)), (12, (12, 12))])
def test_shapes(size, shape):
    for channels in (1, 3):
        statistics = {"mean": (0.5,) * channels, "std": (0.2,) * channels}
        one = view(size, blur=0.5, solarize=0.5, **statistics)
        out = jax.eval_shape(one, jax.random.key(0), jnp.zeros((10, 7, channels)))
        assert (out.shape, out.dtype) == ((*shape, channels), jnp.float32)


def test_parts_follow_one_another_in_the_published_order():
    """Each part draws from the key of its place. What is normalised at the end is in [0, 1]; parts may be absent."""
    options = {"jitter": (0.8, 0.8, 0.8, 0.2), "grayscale": 0.3, "blur": 0.5, "solarize": 0.7}
    parts = (
        aug.random_resized_crop(6, scale=(0.2, 1.0)),
        aug.random_flip(),
        aug.randomly(aug.color_jitter(*options["jitter"]), 0.8),
        aug.grayscale(0.3),
        aug.randomly(aug.gaussian_blur(), 0.5),
        aug.solarize(p=0.7),
    )
    by_hand = [aug.identity]
    for position, part in enumerate(parts):
        by_hand.append(at(position, part, by_hand[-1]))
    mean, std = (0.5, 0.4, 0.3), (0.3, 0.2, 0.1)
    views = {
        "view": view(6, scale=(0.2, 1.0), **options, mean=mean, std=std),
        "by hand": by_hand[-1],
        "plain": view(6, scale=(0.2, 1.0), **PLAIN),
        "crop": by_hand[1],
    }
    got = drawn(views, 32)
    np.testing.assert_allclose(got["view"], (got["by hand"] - mean) / std, atol=2e-5)
    np.testing.assert_allclose(got["plain"], got["crop"], atol=1e-6)
    assert got["by hand"].min() >= -1e-5 and got["by hand"].max() <= 1 + 1e-5
    assert len(np.unique(got["view"].reshape(32, -1), axis=0)) == 32


# ---- pairs and groups ------------------------------------------------------------------------------------------------


def test_config_says_what_each_view_is(monkeypatch):
    """Large views, then small ones; blur and solarisation by odd and even number, in both kinds."""
    monkeypatch.setattr(build, "view", lambda size, **options: (size, options))
    config = ViewConfig(
        views=3,
        resized_crop=8,
        min_scale=0.3,
        small_views=2,
        small_crop=4,
        small_scale=(0.1, 0.2),
        flip=False,
        jitter=(0.1, 0.2, 0.3, 0.4),
        grayscale=0.5,
        blur=(1.0, 0.1),
        solarize=(0.0, 0.2),
        mean=(0.6,),
        std=(0.7,),
    )
    shared = {"flip": False, "jitter": (0.1, 0.2, 0.3, 0.4), "grayscale": 0.5, "mean": (0.6,), "std": (0.7,)}
    odd, even = shared | {"blur": 1.0, "solarize": 0.0}, shared | {"blur": 0.1, "solarize": 0.2}
    large, small = {"scale": (0.3, 1.0)}, {"scale": (0.1, 0.2)}
    assert build.make_views(config) == (
        (8, odd | large),
        (8, even | large),
        (8, odd | large),
        (4, odd | small),
        (4, even | small),
    )
    assert build.make_views(replace(config, resized_crop=None, small_views=0))[0] == (None, odd | large)


def noise(key, image):
    return image + jax.random.normal(key, image.shape)


def corner(key, image):
    return noise(key, image)[:4, :4]


IMAGES = RNG.integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
VIEWS = (noise, noise, corner, corner)
MAKE = jax.jit(partial(make_views, VIEWS))


def test_views_of_one_size_come_as_one_array():
    """Each under the key of its number and the example's, an example's views in order."""
    key, index = jax.random.key(3), np.arange(16, dtype=np.int32)
    large, small = MAKE(key, index, IMAGES)
    assert large.shape == (16, 2, 8, 8, 3) and small.shape == (16, 2, 4, 4, 3)

    @jax.jit
    def by_hand(images):
        return [
            jnp.stack([f(jax.random.fold_in(jax.random.fold_in(key, v), i), images[i]) for i in range(2)])
            for v, f in enumerate(VIEWS)
        ]

    want = by_hand(IMAGES[:2].astype(np.float32) / 255)
    for v, x in enumerate(want):
        np.testing.assert_allclose((large, small)[v // 2][:2, v % 2], x, atol=1e-6)
    # Other views of an image are other draws.
    assert np.abs(large[:, 0] - large[:, 1]).max((1, 2, 3)).min() > 0.1
    # Sizes that alternate stay in order.
    alternating = jax.eval_shape(partial(make_views, (noise, corner, noise, noise)), key, index, jnp.asarray(IMAGES))
    assert [x.shape for x in alternating] == [(16, 1, 8, 8, 3), (16, 1, 4, 4, 3), (16, 2, 8, 8, 3)]


def test_images_do_not_depend_on_the_rest_of_the_batch():
    """An example is drawn by its global index, wherever it is and whatever is beside it."""
    key, index = jax.random.key(3), np.arange(16, dtype=np.int32)
    whole, part = MAKE(key, index, IMAGES), MAKE(key, index[4:8], IMAGES[4:8])
    for all_rows, rows in zip(whole, part, strict=True):
        np.testing.assert_array_equal(all_rows[4:8], rows)
    other = MAKE(jax.random.key(4), index, IMAGES)
    assert np.abs(other[0] - whole[0]).max((2, 3, 4)).min() > 0.1


# ---- presets ---------------------------------------------------------------------------------------------------------

SHAPES = {"digits": (8, 8, 1), "cifar10": (32, 32, 3), "imagenet2012": (256, 256, 3)}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_one_step(name):
    """Every preset is traced, in shapes alone, with a small encoder: its views, heads, objective and optimizer fit.

    It says what it is, and survives JSON.
    """
    config, about = PRESETS[name](), inspect.getdoc(PRESETS[name])
    assert f"python -m pretrain {name}" in about and "Command:" in about and "Hardware:" in about
    assert from_dict(PretrainConfig, json.loads(json.dumps(asdict(config)))) == config
    shape = SHAPES[config.data.name]
    statistics = {"mean": (0.5,) * shape[-1], "std": (0.25,) * shape[-1]}
    config = replace(config, augment=replace(config.augment, **statistics))
    check(config)
    check_images(config, shape)
    objective = make_objective(config.objective)
    network = build.make_network(config, objective, encoder=Encoder())
    tx, _ = make_tx(config.optim, 1000, 100)
    state = jax.eval_shape(lambda: build.make_pretrain_state(config, objective, network, tx, shape, 10))
    views = build.make_views(config.augment)
    options = build.step_options(config, objective, network, tx, views, 1000, 100)
    batch = {"image": jnp.zeros((4, *shape), jnp.uint8), "label": jnp.zeros(4, jnp.int32)}
    new, metrics = jax.eval_shape(partial(contrastive_step, **options), state, batch)

    def described(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert described(new) == described(state)
    assert set(described(metrics).values()) == {((), jnp.dtype(jnp.float32))}
    assert (state.ema is None) == (objective.target is None)
