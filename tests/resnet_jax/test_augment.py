"""Augmentations against NumPy, colorsys and Pillow references, and properties that all of them share."""

import colorsys
import inspect
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec
from PIL import Image, ImageOps

import resnet_jax
from resnet_jax import augment as A
from resnet_jax import auto_augment as AA
from resnet_jax import mix as M

CASES = {
    "normalize": {"mean": 0.5, "std": 0.25},
    "random_crop": {"padding": 3, "mode": "reflect"},
    "random_flip": {},
    "center_crop": {"size": (5, 4)},
    "resize": {"size": (6, 12)},
    "random_resized_crop": {"size": (6, 8)},
    "cutout": {"size": 4},
    "random_erasing": {"p": 0.9},
    "color_jitter": {},
    "grayscale": {"p": 0.5},
    "solarize": {"p": 0.5},
    "gaussian_blur": {},
    "trivial_augment": {},
    "rand_augment": {"num_ops": 1},
}
FIXED = {"normalize", "center_crop", "resize"}
SHAPE = (9, 7, 3)


def photo(shape, seed=0):
    """An image of multiples of 1/255, so that an 8-bit copy of it is exact."""
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.float32) / np.float32(255)


def factory(name):
    return getattr(resnet_jax, name)


@cache
def batched(name):
    return jax.jit(partial(A.augment_batch, factory(name)(**CASES[name])))


@cache
def with_gradient(name):
    """`(keys, images) -> (augmented, gradient of their sum)`."""

    def total(images, keys):
        augmented = batched(name)(keys, images)
        return augmented.sum(), augmented

    def run(keys, images):
        (_, augmented), gradient = jax.value_and_grad(total, has_aux=True)(images, keys)
        return augmented, gradient

    return jax.jit(run)


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def test_every_augment_is_covered():
    functions = {name: x for module in (A, AA) for name, x in vars(module).items() if inspect.isfunction(x)}
    factories = {name for name, x in functions.items() if x.__annotations__.get("return") is A.Augment}
    assert CASES.keys() == factories - {"compose", "randomly", "choose"}


@pytest.mark.parametrize("name", CASES)
def test_contract(name):
    """Shape, range, finite gradients; each image has its own draw and does not depend on the others."""
    size = SHAPE[:2] if name == "cutout" else CASES[name].get("size", SHAPE[:2])
    images = np.stack([*(photo(SHAPE, seed) for seed in range(7)), np.full(SHAPE, 0.25, np.float32)])
    augmented, gradient = with_gradient(name)(keys(8), images)
    assert augmented.shape == (8, *size, 3) and augmented.dtype == jnp.float32
    assert np.isfinite(augmented).all() and np.isfinite(gradient).all()
    if name != "normalize":
        assert augmented.min() >= -1e-6 and augmented.max() <= 1 + 1e-6
    backwards, _ = with_gradient(name)(keys(8)[::-1], images[::-1])
    np.testing.assert_array_equal(backwards[::-1], augmented)
    same, _ = with_gradient(name)(keys(8), np.repeat(images[:1], 8, 0))
    assert (len(np.unique(same, axis=0)) == 1) == (name in FIXED)


@pytest.mark.parametrize("name", CASES)
def test_64_bits_change_no_dtype(name):
    with jax.enable_x64(True):
        image = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
        assert jax.eval_shape(factory(name)(**CASES[name]), jax.random.key(0), image).dtype == jnp.float32


@pytest.mark.parametrize("name", ["color_jitter", "grayscale", "trivial_augment"])
def test_one_channel(name):
    """Equal and constant neighbors of gray images could cause divisions by zero."""
    images = np.stack([photo((8, 11, 1)), np.full((8, 11, 1), 0.5, np.float32)])
    augmented, gradient = with_gradient(name)(keys(2), images)
    assert augmented.shape == images.shape and np.isfinite(augmented).all() and np.isfinite(gradient).all()
    if name == "grayscale":
        np.testing.assert_array_equal(augmented, images)


def test_preprocessing_needs_no_keys():
    evaluation = A.compose(A.resize(12), A.center_crop(8), A.normalize())
    images = (np.stack([photo(SHAPE, seed) for seed in range(3)]) * 255).round().astype(np.uint8)
    preprocess, augment = (jax.jit(partial(f, evaluation)) for f in (A.preprocess_batch, A.augment_batch))
    np.testing.assert_allclose(preprocess(images), augment(keys(3), images), atol=1e-6)


def on_zeros(augment, shape):
    return jax.eval_shape(augment, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: A.color_jitter(hue=0.6), "hue must not exceed 0.5"),
        (lambda: A.color_jitter(brightness=-0.1), "strengths must not be negative"),
        (lambda: on_zeros(A.center_crop(9), (8, 9, 3)), "cannot crop 9x9 from"),
        (lambda: on_zeros(A.normalize(), (8, 9, 1)), "3 means, 3 stds"),
        (lambda: on_zeros(A.color_jitter(), (4, 4, 2)), "1 or 3 channels"),
        (lambda: on_zeros(A.grayscale(), (4, 4, 2)), "1 or 3 channels"),
        (lambda: on_zeros(AA.rand_augment(), (4, 4, 2)), "1 or 3 channels"),
        (lambda: AA.rand_augment(2, 31), r"magnitude must be in \[0, 31\), not 31"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_batch_scales_uint8_only():
    images = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3) * 11
    np.testing.assert_allclose(A.augment_batch(A.identity, keys(2), jnp.asarray(images)), images / 255, atol=1e-7)
    scaled = jnp.asarray(images, jnp.float32)
    np.testing.assert_array_equal(A.augment_batch(A.identity, keys(2), scaled), scaled)
    with pytest.raises(TypeError, match="int32"):
        A.augment_batch(A.identity, keys(2), jnp.zeros((2, 2, 2, 3), jnp.int32))


# --- combinators ---


def add(scale):
    return lambda key, image: image + scale * jax.random.uniform(key)


def test_compose_keeps_earlier_draws():
    key, image = jax.random.key(3), jnp.zeros((2, 2, 1))
    first, both = A.compose(add(1.0)), A.compose(add(1.0), lambda key, image: image * 2)
    np.testing.assert_allclose(both(key, image), 2 * first(key, image))
    assert float(jnp.abs(A.compose(add(1.0), add(-1.0))(key, image)).max()) > 1e-3


def test_randomly_and_choose_frequencies():
    level = [lambda key, image, value=value: jnp.full_like(image, value) for value in range(3)]
    chosen = jax.jit(partial(A.augment_batch, A.compose(A.choose(*level), A.randomly(level[0], 0.1))))
    shares = np.bincount(np.asarray(chosen(keys(2000), jnp.zeros((2000, 1, 1, 1))), int).ravel(), minlength=3) / 2000
    np.testing.assert_allclose(shares, [0.4, 0.3, 0.3], atol=0.04)


# --- geometry ---


def test_random_crop_is_a_slice_of_the_padded_image():
    image = photo(SHAPE)
    for mode, name in (("constant", None), ("reflect", "random_crop")):
        crop = batched(name) if name else jax.jit(partial(A.augment_batch, A.random_crop(3)))
        padded = np.pad(image, ((3, 3), (3, 3), (0, 0)), mode=mode)
        windows = {padded[i : i + 9, j : j + 7].tobytes() for i in range(7) for j in range(7)}
        seen = {x.tobytes() for x in np.asarray(crop(keys(100), np.repeat(image[None], 100, 0)))}
        assert seen <= windows and len(seen) > 30


def test_flip_mirrors_half_of_the_images():
    image = photo(SHAPE)
    images = np.asarray(batched("random_flip")(keys(200), np.repeat(image[None], 200, 0)))
    flipped, kept = ((images == x[None]).all((1, 2, 3)) for x in (image[:, ::-1], image))
    assert (flipped != kept).all() and 70 < sum(flipped) < 130


def test_center_crop():
    np.testing.assert_array_equal(batched("center_crop")(keys(1), photo(SHAPE)[None])[0], photo(SHAPE)[2:7, 2:6])


def bilinear(image, top, left, height, width, size):
    """Crop, then resample with repeated edges and half-pixel centres, one output pixel at a time."""
    image = image[top : top + height, left : left + width].astype(np.float64)
    out = np.zeros((*size, image.shape[-1]))
    for i in range(size[0]):
        for j in range(size[1]):
            y = min(max((i + 0.5) * height / size[0] - 0.5, 0), height - 1)
            x = min(max((j + 0.5) * width / size[1] - 0.5, 0), width - 1)
            y0, x0 = int(y), int(x)
            y1, x1, v, u = min(y0 + 1, height - 1), min(x0 + 1, width - 1), y - y0, x - x0
            upper = (1 - u) * image[y0, x0] + u * image[y0, x1]
            out[i, j] = (1 - v) * upper + v * ((1 - u) * image[y1, x0] + u * image[y1, x1])
    return out


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_resampling_equals_bilinear_reference(data):
    top, left = data.draw(st.integers(0, 8)), data.draw(st.integers(0, 6))
    height, width = data.draw(st.integers(1, 9 - top)), data.draw(st.integers(1, 7 - left))
    got = resample_box(photo(SHAPE), *map(float, (height, width, top, left)))
    np.testing.assert_allclose(got, bilinear(photo(SHAPE), top, left, height, width, (6, 8)), atol=2e-6)


resample_box = jax.jit(lambda image, *box: A._resample(image, box, (6, 8), False))


@partial(jax.jit, static_argnums=(1, 2))
def boxes(keys, rows, columns):
    """Height, width, top, left and `fits` [5, B]."""

    def draw(key):
        box, fits = A._random_box(key, rows, columns, (0.08, 1.0), (3 / 4, 4 / 3))
        return jnp.stack([*box, fits])

    return jax.vmap(draw)(keys).T


def test_random_resized_crop_equals_the_reference_and_keeps_its_ranges():
    height, width, top, left, fits = np.asarray(boxes(keys(500), 40, 50))
    assert fits.mean() > 0.98
    height, width, top, left = (value[fits > 0] for value in (height, width, top, left))
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 40).all() and (left + width <= 50).all()
    assert height.min() >= 1 and (width / height).min() > 0.68 and (width / height).max() < 1.45
    share = height * width / 2000
    assert share.min() > 0.07 and share.max() <= 1 and 0.4 < share.mean() < 0.6
    crops, _ = with_gradient("random_resized_crop")(keys(8), np.repeat(photo(SHAPE)[None], 8, 0))
    for crop, (height, width, top, left, fits) in zip(crops, np.asarray(boxes(keys(8), 9, 7)).T, strict=True):
        if fits:
            expected = bilinear(photo(SHAPE), int(top), int(left), int(height), int(width), (6, 8))
            np.testing.assert_allclose(crop, expected, atol=2e-6)


def test_random_resized_crop_falls_back_to_the_central_box():
    crop = A.random_resized_crop((4, 4), scale=(1.0, 1.0), ratio=(1.0, 1.0))  # cannot fit into 4 x 9
    image = photo((4, 9, 3))
    np.testing.assert_allclose(jax.jit(crop)(jax.random.key(0), image), image[:, 2:6], atol=1e-6)
    thin = A.random_resized_crop((4, 4), ratio=(3.0, 4.0))  # a box of ratio 3 would be a third of a pixel high
    np.testing.assert_allclose(jax.jit(thin)(jax.random.key(0), image[:, :1]), np.tile(image[1:2, :1], (4, 4, 1)))


def test_resize_equals_pillow():
    plane = photo((13, 17, 1))
    for size in ((6, 8), (20, 31)):
        expected = np.asarray(Image.fromarray(plane[..., 0]).resize(size[::-1], Image.Resampling.BILINEAR))
        got = jax.jit(A.resize(size))(jax.random.key(0), plane)[..., 0]
        np.testing.assert_allclose(got, expected, atol=2e-6)


# --- erasing ---


def test_cutout_area_and_border():
    areas = (1 - np.asarray(batched("cutout")(keys(100), jnp.ones((100, 9, 7, 1))))).sum((1, 2, 3))
    assert areas.max() == 16 and areas.min() >= 4


def test_random_erasing_fills_one_box_within_its_range():
    erase = jax.jit(partial(A.augment_batch, A.random_erasing(p=1.0, value=0.5)))
    for image in np.asarray(erase(keys(30), jnp.ones((30, 20, 30, 1)))):
        erased = image[..., 0] == 0.5
        y, x = np.nonzero(erased)
        height, width = np.ptp(y) + 1, np.ptp(x) + 1
        assert height * width == erased.sum() and 0.01 < erased.mean() < 0.36 and 0.2 < width / height < 4.5


# --- color ---


def luma(image):
    return image @ np.array([0.2989, 0.587, 0.114])


def shift_hue(image, turns):
    out = np.empty_like(image)
    for index in np.ndindex(image.shape[:2]):
        hue, saturation, value = colorsys.rgb_to_hsv(*image[index])
        out[index] = colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value)
    return out


@settings(max_examples=20, deadline=None)
@given(st.floats(-0.5, 0.5, width=32), st.integers(0, 1000))
def test_hue_equals_colorsys(turns, seed):
    image = photo((5, 4, 3), seed)
    image[0] = [[0.5, 0.5, 0.5], [0.7, 0.7, 0.1], [0.1, 0.7, 0.7], [0.7, 0.1, 0.7]]  # gray, and pairs of equal maxima
    planes = hue_planes([image[..., channel] for channel in range(3)], np.float32(turns))
    np.testing.assert_allclose(np.stack(planes, -1), shift_hue(image.astype(float), turns), atol=5e-6)


hue_planes = jax.jit(A._shift_hue)


def test_color_jitter_equals_the_operations_in_the_drawn_order():
    images = [photo(SHAPE, seed) for seed in range(8)]
    jittered, _ = with_gradient("color_jitter")(keys(8, 1), np.stack(images))
    orders = set()
    for key, image, got in zip(keys(8, 1), images, jittered, strict=True):
        factor_key, order_key, shift_key, turn_key = jax.random.split(key, 4)
        factors = np.asarray(jax.random.uniform(factor_key, (3,), minval=0.6, maxval=1.4), np.float64)
        turns = float(jax.random.uniform(shift_key, (), minval=-0.1, maxval=0.1))
        order = list(np.asarray(jax.random.permutation(order_key, 3)))
        order.insert(int(jax.random.randint(turn_key, (), 0, 4)), 3)
        orders.add(tuple(order))
        expected = image.astype(np.float64)
        for op in order:
            if op == 3:
                expected = shift_hue(expected, turns)
                continue
            gray = luma(expected)
            other = (0, gray.mean(), gray[..., None])[op]
            expected = np.clip(factors[op] * expected + (1 - factors[op]) * other, 0, 1)
        np.testing.assert_allclose(got, expected, atol=2e-5)
    assert len(orders) > 4


def test_jitter_of_one_channel_leaves_saturation_and_hue_out():
    image = jnp.asarray(photo((4, 5, 1)))
    np.testing.assert_allclose(A.color_jitter(0, 0, 0.4, 0.1)(jax.random.key(1), image), image, atol=1e-7)


def test_grayscale():
    image = photo(SHAPE)
    gray = jax.jit(A.grayscale(1.0))(jax.random.key(0), image)
    np.testing.assert_allclose(gray, np.repeat(luma(image)[..., None], 3, -1), atol=1e-6)


def test_blur_equals_convolution():
    small, sigma = photo((40, 7, 3)), 1.3  # as high as a kernel of 5 pixels needs
    image = small.astype(np.float64)
    weights = np.exp(-0.5 * (np.arange(-2, 3) / sigma) ** 2)
    kernel = np.outer(weights, weights) / weights.sum() ** 2
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
    expected = sum(kernel[i, j] * padded[i : i + 40, j : j + 7] for i in range(5) for j in range(5))
    got = jax.jit(A.gaussian_blur((sigma, sigma)))(jax.random.key(0), small)
    np.testing.assert_allclose(got, expected, atol=2e-6)


# --- automatic augmentation ---


apply_op = jax.jit(AA._apply_op)


def eight_bit(image):
    return Image.fromarray(np.round(np.asarray(image) * 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("op", "strength", "reference"),
    [
        ("posterize", 0.0, lambda image: image),
        ("posterize", 3.0, lambda image: ImageOps.posterize(image, 5)),
        ("posterize", 6.0, lambda image: ImageOps.posterize(image, 2)),
        ("solarize", 0.5, lambda image: ImageOps.solarize(image, 128)),
        ("autocontrast", 0.0, ImageOps.autocontrast),
        ("equalize", 0.0, ImageOps.equalize),
    ],
)
def test_tone_operations_equal_pillow(op, strength, reference):
    for low, high in ((0, 1), (0.25, 0.5)):
        image = np.round((low + (high - low) * photo((20, 31, 3))) * 255).astype(np.float32) / np.float32(255)
        got = apply_op(image, AA._OPS.index(op), strength)
        np.testing.assert_allclose(got * 255, np.asarray(reference(eight_bit(image)), np.float32), atol=1.001)
    if op in ("posterize", "equalize"):
        np.testing.assert_allclose(got * 255, np.asarray(reference(eight_bit(image)), np.float32), atol=1e-4)


def pillow_affine(*coefficients):
    return lambda image: image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.NEAREST)


@pytest.mark.parametrize(
    ("op", "strength", "reference"),
    [
        ("identity", 0.0, lambda image: image),
        ("shear_x", 0.3, pillow_affine(1, 0.3, 0, 0, 1, 0)),
        ("shear_y", -0.7, pillow_affine(1, 0, 0, -0.7, 1, 0)),
        ("translate_x", 5.0, pillow_affine(1, 0, -5, 0, 1, 0)),
        ("translate_y", -3.9, pillow_affine(1, 0, 0, 0, 1, 3)),
        ("rotate", 90.0, None),
        ("rotate", 33.0, lambda image: image.rotate(33.0)),
    ],
)
def test_warps_equal_pillow(op, strength, reference):
    image = photo((31, 31, 3) if reference is None else (20, 31, 3), 1)
    got = np.round(np.asarray(apply_op(image, AA._OPS.index(op), strength)) * 255)
    expected = np.rot90(image * 255) if reference is None else np.asarray(reference(eight_bit(image)))
    assert (np.abs(got - expected).max(-1) > 0.5).mean() < 0.01  # ties between two pixels may round either way


def test_enhancements_equal_the_blends():
    image = photo((20, 31, 3)).astype(np.float64)
    padded = sum(np.roll(image, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)) + 4 * image
    smooth = image.copy()
    smooth[1:-1, 1:-1] = padded[1:-1, 1:-1] / 13
    others = {"brightness": 0, "color": luma(image)[..., None], "contrast": luma(image).mean(), "sharpness": smooth}
    for op, other in others.items():
        for strength in (0.7, -0.4):
            got = apply_op(photo((20, 31, 3)), AA._OPS.index(op), strength)
            expected = np.clip((1 + strength) * image - strength * other, 0, 1)
            np.testing.assert_allclose(got, expected, atol=3e-6)


# --- mixing ---


IMAGES = np.stack([photo((6, 5, 3), seed) for seed in range(16)])
LABELS = np.random.default_rng(0).dirichlet(np.ones(4), 16).astype(np.float32)
MIXES = {
    "mixup": partial(M.mixup, alpha=0.4),
    "cutmix": partial(M.cutmix, alpha=1.0),
    "mix": partial(M.mix, mixup_alpha=0.8, cutmix_alpha=1.0),
}


@cache
def mixer(name):
    return jax.jit(MIXES[name])


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(list(MIXES)), st.integers(0, 2**31 - 1))
def test_mixing_keeps_label_mass_and_matches_the_area(name, seed):
    images, labels = (np.asarray(x) for x in mixer(name)(jax.random.key(seed), IMAGES, LABELS))
    np.testing.assert_allclose(labels.sum(1), 1, atol=1e-5)
    # Images of ones and zeros show the share of the example itself in every pixel.
    halves = np.concatenate([np.ones_like(IMAGES[:8]), np.zeros_like(IMAGES[:8])])
    share = np.asarray(mixer(name)(jax.random.key(seed), halves, LABELS)[0])[0, ..., :1]
    np.testing.assert_allclose(images, share * IMAGES + (1 - share) * IMAGES[::-1], atol=2e-6)
    np.testing.assert_allclose(labels, share.mean() * LABELS + (1 - share.mean()) * LABELS[::-1], atol=2e-6)
    if name == "cutmix":
        assert set(np.unique(share)) <= {0.0, 1.0}


def test_mix_uses_both_and_zero_turns_one_off():
    key = jax.random.key(0)
    kinds = set()
    for seed in range(20):
        kinds.add(bool(np.isin(np.asarray(mixer("mix")(jax.random.key(seed), IMAGES, LABELS)[0]), IMAGES).all()))
    assert kinds == {True, False}
    images, labels = M.mix(key, IMAGES, LABELS, mixup_alpha=0, cutmix_alpha=0)
    assert images is IMAGES and labels is LABELS
    with pytest.raises(TypeError, match="int32"):
        M.mixup(key, jnp.asarray(IMAGES), jnp.zeros(16, jnp.int32))
    inner = jax.random.split(key)[1]
    for alphas, name in (((0.4, 0), "mixup"), ((0, 1.0), "cutmix")):
        got = jax.jit(partial(M.mix, mixup_alpha=alphas[0], cutmix_alpha=alphas[1]))(key, IMAGES, LABELS)
        np.testing.assert_allclose(got[0], mixer(name)(inner, IMAGES, LABELS)[0], atol=1e-6)


def test_mixing_shards_equal_one_device():
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec("data"), PartitionSpec()

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(whole, split, split), out_specs=split)
    def sharded(key, images, labels):
        return [MIXES[name](key, images, labels, axis_name="data") for name in ("mixup", "cutmix")]

    for seed in range(3):
        arguments = jax.random.key(seed), IMAGES, LABELS
        expected = [mixer(name)(*arguments) for name in ("mixup", "cutmix")]
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), sharded(*arguments), expected)
