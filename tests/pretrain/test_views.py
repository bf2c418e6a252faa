"""Views: their parts and order, their random draws, and the whole step of every preset."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pretrain import from_config as build
from pretrain.config import ViewConfig, check, check_images, make_objective
from pretrain.presets import PRESETS
from pretrain.steps import contrastive_step
from pretrain.views import make_views, view
from resnet_jax import augment as aug
from tests.pretrain.test_steps import Encoder
from tests.reference.nets import quick_jit
from train.from_config import make_tx

pytestmark = pytest.mark.usefixtures("unoptimised")

RNG = np.random.default_rng(0)
IMAGE = RNG.random((10, 10, 3), np.float32)
PLAIN = {"flip": False, "jitter": (0, 0, 0, 0), "grayscale": 0, "mean": 0.0, "std": 1.0}  # the crop alone
WHOLE = (1.0, 1.0)  # of a square image the crop keeps all


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def drawn(views, count=8, image=IMAGE):
    """Views of one image under the same keys each, [count, H, W, C] by name, in one compiled call."""
    every = quick_jit(lambda keys: {name: jax.vmap(lambda key, f=f: f(key, image))(keys) for name, f in views.items()})
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
    """Each part draws from the key of its place. What is normalised at the end is in [0, 1]."""
    options = {"jitter": (0.8, 0.8, 0.8, 0.2), "grayscale": 0.5, "blur": 0.5, "solarize": 0.5}
    by_hand = aug.random_resized_crop(6, scale=(0.2, 1.0))
    by_hand = at(0, by_hand, aug.identity)
    for position, part in enumerate(
        (
            aug.random_flip(),
            aug.randomly(aug.color_jitter(*options["jitter"]), 0.8),
            aug.grayscale(0.5),
            aug.randomly(aug.gaussian_blur(), 0.5),
            aug.solarize(p=0.5),
        ),
        start=1,
    ):
        by_hand = at(position, part, by_hand)
    mean, std = (0.5, 0.4, 0.3), (0.3, 0.2, 0.1)
    got = drawn({"view": view(6, scale=(0.2, 1.0), **options, mean=mean, std=std), "by hand": by_hand}, 32)
    np.testing.assert_allclose(got["view"], (got["by hand"] - mean) / std, atol=2e-5)
    assert got["by hand"].min() >= -1e-5 and got["by hand"].max() <= 1 + 1e-5
    assert len(np.unique(got["view"].reshape(32, -1), axis=0)) == 32


def test_certain_parts_have_their_effect_and_absent_ones_none():
    parts = {
        "grayscale": (aug.grayscale(1.0), 1.0),
        "blur": (aug.randomly(aug.gaussian_blur(), 1.0), 1.0),
        "solarize": (aug.solarize(p=1.0), 1.0),
        "flip": (aug.random_flip(), True),
        "jitter": (aug.randomly(aug.color_jitter(0.4, 0, 0, 0), 0.8), (0.4, 0, 0, 0)),
    }
    crop = at(0, aug.random_resized_crop(10, scale=(0.08, 1.0)), aug.identity)
    views = {name: view(**{**PLAIN, name: value}) for name, (_, value) in parts.items()}
    wanted = {f"{name} wanted": at(1, part, crop) for name, (part, _) in parts.items()}
    got = drawn({**views, **wanted, "crop": crop, "none": view(**PLAIN, blur=0, solarize=0)})
    np.testing.assert_allclose(got["none"], got["crop"], atol=1e-6)
    for name in parts:
        np.testing.assert_allclose(got[name], got[f"{name} wanted"], atol=1e-6, err_msg=name)
        changed = np.abs(got[name] - got["crop"]).max((1, 2, 3)) > 1e-3
        assert changed.all() if name in ("grayscale", "blur", "solarize") else changed.any(), name


def test_each_part_is_as_frequent_as_asked():
    count, share = 1000, {"grayscale": 0.2, "blur": 0.3, "solarize": 0.4}
    views = {name: view(scale=WHOLE, **{**PLAIN, name: p}) for name, p in share.items()}
    views |= {"flip": view(scale=WHOLE, **{**PLAIN, "flip": True})}
    views |= {"jitter": view(scale=WHOLE, **{**PLAIN, "jitter": (0.4, 0, 0, 0)})}
    for name, x in drawn(views, count, IMAGE[:6, :6]).items():
        changed = (np.abs(x - IMAGE[:6, :6]).max((1, 2, 3)) > 1e-4).mean()
        assert changed == pytest.approx({**share, "flip": 0.5, "jitter": 0.8}[name], abs=0.05), name


def test_scale_is_the_share_that_is_kept():
    """Of an image that is its own coordinates: neighbours in a view are as far apart as the crop is wide."""
    ramp = np.broadcast_to(np.arange(64, dtype=np.float32)[None, :, None] / 64, (64, 64, 1))
    rows = ramp.swapaxes(0, 1)
    image = np.concatenate([ramp, rows, ramp], axis=-1)
    for x, (low, high) in zip(
        drawn(
            {"a": view(8, scale=(0.5, 1.0), **PLAIN), "b": view(8, scale=(0.05, 0.14), **PLAIN)}, 200, image
        ).values(),
        ((0.5, 1.0), (0.05, 0.14)),
        strict=True,
    ):
        # Between the second and the last but one pixel, where nothing is cut at the border.
        width, height = (x[:, 4, 6, 0] - x[:, 4, 1, 0]) * 8 / 5, (x[:, 6, 4, 1] - x[:, 1, 4, 1]) * 8 / 5
        share = width * height
        assert low - 0.05 < share.min() < low + 0.15 * high and high - 0.15 * high < share.max() < high + 0.05


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
MAKE = quick_jit(partial(make_views, VIEWS))


def test_views_of_one_size_come_as_one_array():
    """Each under the key of its number and the example's, an example's views in order."""
    key, index = jax.random.key(3), np.arange(16, dtype=np.int32)
    large, small = MAKE(key, index, IMAGES)
    assert large.shape == (16, 2, 8, 8, 3) and small.shape == (16, 2, 4, 4, 3)

    @quick_jit
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
    """Every preset is traced, in shapes alone, with a small encoder: its views, heads, objective and optimizer fit."""
    config = PRESETS[name]()
    shape = SHAPES[config.data.name]
    statistics = {"mean": (0.5,) * shape[-1], "std": (0.25,) * shape[-1]}
    config = replace(config, augment=replace(config.augment, **statistics))
    check(config)
    check_images(config, shape)
    objective = make_objective(config.objective)
    network = build.make_network(config, objective, encoder=Encoder())
    tx, _ = make_tx(config.optim, 1000, 100)
    state = jax.eval_shape(lambda: build.make_pretrain_state(config, objective, network, tx, (8, 8, 3), 10))
    views = build.make_views(config.augment)
    options = build.step_options(config, objective, network, tx, views, 1000, 100)
    batch = {"image": jnp.zeros((4, *shape), jnp.uint8), "label": jnp.zeros(4, jnp.int32)}
    new, metrics = jax.eval_shape(partial(contrastive_step, **options), state, batch)

    def described(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert described(new) == described(state)
    assert set(described(metrics).values()) == {((), jnp.dtype(jnp.float32))}
    assert (state.ema is None) == (objective.target is None)
