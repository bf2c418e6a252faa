"""Image sets: decoding, splitting, prepared TFDS sets and the messages for unusable ones."""

import io
import json
import shutil
import socket
import struct
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from train.data.__main__ import main
from train.data.decode import Unreadable, decode_image, random_box
from train.data.prepare import prepare
from train.data.prepared import default_data_dir, prepared_folder
from train.data.sets import from_arrays, load, share_of, split_by_class
from train.data.sources import Arrays, Encoded, decode_all
from train.errors import UsageError

quick = settings(deadline=None, max_examples=60)


def encode(image, kind="PNG", **options):
    """An encoded file of a Pillow image or an array."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def counts(data):
    """How many images each split has."""
    return {name: len(split) for name, split in data.splits.items()}


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# ---- decoding ------------------------------------------------------------------------------------------------------


def palette(**options):
    """Left half index 0, right half index 1."""
    image = Image.new("P", (8, 8))
    image.putpalette([200, 100, 50, 10, 20, 30])
    image.paste(1, (4, 0, 8, 8))
    return encode(image, **options)


def deep(value):
    return encode(np.full((8, 8), value, np.uint16))


MODES = {
    "L": (encode(Image.new("L", (8, 8), 77)), (77, 77, 77)),
    "RGB": (encode(Image.new("RGB", (8, 8), (10, 200, 30))), (10, 200, 30)),
    "RGB with a transparent colour": (encode(Image.new("RGB", (8, 8), (9, 9, 9)), transparency=(9, 9, 9)), (0, 0, 0)),
    "RGBA half": (encode(Image.new("RGBA", (8, 8), (10, 200, 30, 128))), (5, 100, 15)),
    "LA": (encode(Image.new("LA", (8, 8), (200, 128))), (100, 100, 100)),
    "P": (palette(), (200, 100, 50)),
    "P with a transparent index": (palette(transparency=0), (0, 0, 0)),
    "P with transparency by index": (palette(transparency=bytes([128, 255])), (100, 50, 25)),
    "GIF": (palette(kind="GIF", transparency=0), (0, 0, 0)),
    "I;16": (deep(257 * 90), (90, 90, 90)),
    "I;16 of 8 bits": (deep(200), (200, 200, 200)),
    "I of 8 bits": (encode(Image.new("I", (8, 8), 90), "TIFF"), (90, 90, 90)),
    "CMYK": (encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), (255, 0, 0)),
    "1 white": (encode(Image.new("1", (8, 8), 1)), (255, 255, 255)),
}


@pytest.mark.parametrize("size", [None, 4, 16])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_as_colour_and_grey(mode, size):
    data, colour = MODES[mode]
    grey = round(np.dot(colour, (0.299, 0.587, 0.114)))
    for channels, want in ((3, colour), (1, [grey])):
        pixels = decode_image(data, size, channels)
        assert pixels.dtype == np.uint8
        assert pixels.shape == (size or 8, size or 8, channels)
        np.testing.assert_allclose(pixels[0, 0].astype(int), want, atol=3)


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (1, 1)), (6, (0, 1)), (8, (1, 0))])
def test_orientation_is_followed(orientation, corner):
    """The bright top left corner of the stored image is seen elsewhere."""
    pixels = np.zeros((32, 48), np.uint8)
    pixels[:16, :24] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = decode_image(encode(pixels, "JPEG", exif=exif, quality=95), None, 1)[..., 0]
    assert seen.shape == ((48, 32) if orientation in (6, 8) else (32, 48))
    h, w = seen.shape
    bright = {(y, x) for y in (0, 1) for x in (0, 1) if seen[h // 4 + y * h // 2, w // 4 + x * w // 2] > 128}
    assert bright == {corner}


def tiff(tag, kind, count, value, extra=b""):
    entry = struct.pack("<HHHI", 1, tag, kind, count) + value + struct.pack("<I", 0)
    return b"II*\0\x08\0\0\0" + entry + extra


ORIENTATION = 0x112
BAD_EXIF = {
    "as text": tiff(ORIENTATION, 2, 2, b"6\0\0\0"),
    "a fraction": tiff(ORIENTATION, 5, 1, struct.pack("<I", 26), struct.pack("<II", 6, 1)),
    "0 over 0": tiff(ORIENTATION, 5, 1, struct.pack("<I", 26), struct.pack("<II", 0, 0)),
    "nine": tiff(ORIENTATION, 3, 1, struct.pack("<HH", 9, 0)),
    "doubled": b"Exif\0\0" + tiff(ORIENTATION, 3, 1, struct.pack("<HH", 1, 0)),
    "empty": b"",
    "cut off": b"II*\0\x08\0",
    "nonsense": b"garbage garbage garbage",
    "offset beyond": b"II*\0\xff\xff\xff\x7f",
    "bytes": tiff(ORIENTATION, 7, 4, b"\x06\0\0\0"),
}


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize("block", BAD_EXIF)
@pytest.mark.filterwarnings("ignore")  # Pillow warns of some
def test_malformed_exif_does_not_turn_or_damage_an_image(block, kind):
    image = Image.new("RGB", (8, 4), "red")
    data = encode(image, kind, exif=b"Exif\0\0" + BAD_EXIF[block])
    pixels = decode_image(data, None, 3)
    assert pixels.shape == (4, 8, 3)
    np.testing.assert_allclose(pixels[0, 0].astype(int), [255, 0, 0], atol=4)


RAMP = np.tile(np.linspace(0, 1, 256, dtype=np.float32), (4, 1))
DEEP = {
    "fractions": RAMP,
    "fractions that resampling made a little larger": RAMP * 1.01,
    "12 bits as floats": RAMP * 4095,
    "from -1 to 1": RAMP * 2 - 1,
    "large floats": RAMP * 1e6,
    "fractions that are too small to be seen": RAMP * np.float32(1e-6),
    "8 bits in 16": np.rint(RAMP * 255).astype(np.uint16),
    "12 bits in 16": (RAMP * 4095).astype(np.uint16),
    "16 bits": (RAMP * 65535).astype(np.uint16),
    "8 bits in 32": np.rint(RAMP * 255).astype(np.int32),
    "16 bits in 32": (RAMP * 65535).astype(np.int32),
    "Hounsfield units": (RAMP * 3000 - 1000).astype(np.int32),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_images_keep_their_contrast(name):
    pixels = decode_image(encode(DEEP[name], "TIFF"), None, 1)
    np.testing.assert_allclose(pixels[0, :, 0].astype(int), np.arange(256), atol=1)


def test_values_that_are_no_numbers_are_black():
    pixels = np.where(RAMP > 0.5, np.float32("nan"), RAMP)
    pixels[:, -1] = np.inf
    assert decode_image(encode(pixels, "TIFF"), None, 1).max() == 127


@pytest.mark.parametrize("shade", [0, 255])
def test_a_drawing_without_a_background_is_visible(shade):
    image = Image.new("LA", (8, 8), (shade, 0))
    image.paste((shade, 255), (0, 0, 4, 8))
    pixels = decode_image(encode(image), None, 3)[0, :, 0]
    assert pixels.tolist() == [shade] * 4 + [255 - shade] * 4


def test_animations_are_their_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        np.testing.assert_allclose(decode_image(data, None, 3)[0, 0].astype(int), [255, 0, 0], atol=4)


def test_too_many_pixels_are_named(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Unreadable, match="more pixels than Pillow reads safely"):
        decode_image(encode(np.zeros((20, 20), np.uint8)), 8, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize(("shape", "rows"), [((20, 40), slice(None)), ((40, 40), slice(10, 30))])
def test_sides_of_a_rectangle(shape, rows, kind):
    """The centre with the rectangle's aspect."""
    ramp = np.tile(np.linspace(0, 255, shape[0]).astype(np.uint8)[:, None], (1, shape[1]))
    pixels = decode_image(encode(ramp, kind), (10, 20), 1)
    assert pixels.shape == (10, 20, 1)
    want = ramp[rows, 0].reshape(10, 2).mean(1)
    np.testing.assert_allclose(pixels[1:-1, 5, 0], want[1:-1], atol=6)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("side", [60, 300])
def test_the_centre_is_cut_out(kind, wide, side):
    """JPEG is decoded at a fraction of its size, which must not move the box."""
    thirds = np.repeat(np.asarray([0, 150, 0], np.uint8), side)
    pixels = np.tile(thirds, (side, 1))
    pixels = pixels if wide else pixels.T.copy()
    seen = decode_image(encode(pixels, kind, **({"quality": 95} if kind == "JPEG" else {})), 20, 1)
    assert (np.abs(seen[1:-1, 1:-1].astype(int) - 150) <= 4).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (3, 2000), (2, 1)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("crop", [False, True])
def test_extreme_shapes(shape, kind, crop):
    data = encode(np.full(shape, 90, np.uint8), kind)
    for seed in range(5 if crop else 1):
        pixels = decode_image(data, 8, 3, rng=np.random.default_rng(seed) if crop else None)
        assert pixels.shape == (8, 8, 3)
        np.testing.assert_allclose(pixels.astype(int), 90, atol=2)


def test_own_size_is_exact():
    pixels = noise(5, 5, 3)
    for size in (None, 5):
        np.testing.assert_array_equal(decode_image(encode(pixels), size, 3), pixels)


@quick
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**32))
def test_random_box_lies_inside(width, height, seed):
    left, top, right, bottom = random_box(width, height, np.random.default_rng(seed))
    assert left >= 0 and top >= 0 and right <= width + 1e-9 and bottom <= height + 1e-9
    w, h = right - left, bottom - top
    if w == pytest.approx(h) and w == pytest.approx(min(width, height)):
        return  # the centre, where no box of such a shape fits
    assert 0.08 - 1e-6 <= w * h / (width * height) <= 1 + 1e-6
    assert 3 / 4 - 1e-6 <= w / h <= 4 / 3 + 1e-6


# ---- splits in memory and encoded ----------------------------------------------------------------------------------

PIXELS = np.zeros((20, 2, 2, 3), np.uint8)


def encoded(files, labels=None, **options):
    return Encoded(
        read=lambda i: (files[i], 0 if labels is None else labels[i]),
        name=lambda i: f"file {i}",
        indices=np.arange(len(files)),
        **{"size": None, "channels": 3, **options},
    )


@pytest.mark.parametrize("many", [False, True])
def test_decode_all_keeps_the_order(many):
    images = noise(600, 4, 4, 3)  # more than one thread's part
    labels = np.arange(600)
    files = [encode(image) for image in images]
    reads = []
    read = {"read": lambda i: reads.append(i) or (files[i], i)}
    read |= {"read_many": lambda some: [(files[i], i) for i in some]} if many else {}
    decoded = decode_all(replace(encoded(files), **read).subset(np.arange(599, 0, -1)))
    assert len(reads) <= 1 if many else len(reads) >= 599  # `read_many` is preferred where there is one
    np.testing.assert_array_equal(decoded.images, images[:0:-1])
    np.testing.assert_array_equal(decoded.labels, labels[:0:-1])
    assert decoded.labels.dtype == np.int32


@pytest.mark.parametrize(
    ("images", "labels", "options", "message"),
    [
        (PIXELS.astype(np.float32), np.zeros(20, int), {}, "images must be uint8 .* not float32"),
        (PIXELS[..., 0], np.zeros(20, int), {}, r"images must be uint8 \[N, H, W, C\], not uint8 \(20, 2, 2\)"),
        (PIXELS, np.zeros(3, int), {}, r"labels must be integers \[20\], not int64 \(3,\)"),
        (PIXELS, np.zeros(20), {}, r"labels must be integers \[20\], not float64"),
        (PIXELS, np.arange(20) % 3 - 1, {}, "labels run from -1 to 1, but there are 2 classes"),
        (PIXELS, np.arange(20) % 3, {"classes": ["a", "b"]}, r"there are 2 classes \(0 to 1\)"),
        (PIXELS, np.zeros(20, int), {"test": (PIXELS[:1], np.asarray([7]))}, "test: labels run from 7 to 7"),
        (np.zeros((20, 3, 8, 8), np.uint8), np.zeros(20, int), {}, r"moveaxis\(images, 1, -1\)"),
        (PIXELS[:2], np.zeros(2, int), {}, "2 images are too few to hold some back for test"),
    ],
)
def test_arrays_that_are_no_set(images, labels, options, message):
    with pytest.raises(UsageError, match=message):
        from_arrays(images, labels, **options)


def test_from_arrays():
    images, labels = noise(50, 3, 4, 1), np.arange(50) % 5
    data = from_arrays(images, labels, classes="abcde", validation=0.2)
    assert data.classes == tuple("abcde")
    assert data.image_shape == (3, 4, 1)
    assert counts(data) == {"train": 32, "validation": 8, "test": 10}
    rows = np.concatenate([s.images for s in data.splits.values()])
    assert sorted(r.tobytes() for r in rows) == sorted(i.tobytes() for i in images)
    given_test = from_arrays(images, labels, test=(images[:7], labels[:7]))
    assert counts(given_test) == {"train": 45, "validation": 5, "test": 7}
    assert given_test.classes == tuple("01234")


@quick
@given(st.lists(st.integers(0, 5), min_size=1, max_size=200), st.floats(0.001, 0.999), st.integers(0, 2**32))
def test_split_by_class(labels, fraction, seed):
    labels = np.asarray(labels)
    kept, held = split_by_class(labels, fraction, seed)
    assert sorted([*kept, *held]) == list(range(len(labels)))
    assert (np.diff(kept) > 0).all() and (np.diff(held) > 0).all()
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        assert (labels[held] == label).sum() == min(max(round(count * fraction), 1), count - 1)


@quick
@given(st.lists(st.integers(0, 5), min_size=1, max_size=200), st.floats(0.001, 0.999), st.integers(0, 2**32))
def test_share_of_each_class(labels, fraction, seed):
    labels = np.asarray(labels)
    kept = share_of(labels, fraction, seed)
    assert (np.diff(kept) > 0).all()
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        assert (labels[kept] == label).sum() == max(round(count * fraction), 1)
    # As version 0.1 drew: what is drawn from a class depends on nothing else.
    members = np.flatnonzero(labels == labels[0])
    drawn = np.random.default_rng([seed, labels[0]]).permutation(members)[: max(round(len(members) * fraction), 1)]
    np.testing.assert_array_equal(kept[labels[kept] == labels[0]], np.sort(drawn))


# ---- built-in sets -------------------------------------------------------------------------------------------------


def test_digits(tfds_dir):
    data = load("digits")
    assert data.image_shape == (8, 8, 1)
    assert data.classes == tuple("0123456789")
    assert counts(data) == {"train": 1293, "validation": 144, "test": 360}
    assert prepared_folder("digits", tfds_dir) == tfds_dir / "digits" / "1.0.0"
    # The scans themselves, each once, in 17 shades.
    scans, labels = load_digits(return_X_y=True)
    want = sorted((bytes(np.rint(s * 255 / 16).astype(np.uint8)), int(y)) for s, y in zip(scans, labels, strict=True))
    got = [(s.images[i].tobytes(), int(s.labels[i])) for s in data.splits.values() for i in range(len(s))]
    assert sorted(got) == want
    assert np.bincount(data.test.labels).min() >= 34  # a fifth of each class
    other = load("digits", validation=0.25, split_seed=1).validation.images
    assert len(other) == 359 and (other[:144] != data.validation.images).any()


def test_digits_prepared_by_two_runs_at_once(tmp_path, monkeypatch):
    """The second to finish finds the folder there, and uses it."""
    from train.data.digits import Digits

    download_and_prepare = Digits.download_and_prepare

    def late(builder):
        download_and_prepare(builder)
        raise FileExistsError("Cannot rename. Destination already exists.")

    monkeypatch.setattr(Digits, "download_and_prepare", late)
    assert prepare("digits", tmp_path) == tmp_path / "digits" / "1.0.0"


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=f"cannot prepare digits in {tmp_path}/file: "):
        load("digits", dir=tmp_path / "file")


def test_synthetic():
    data, again = load("synthetic"), load("synthetic")
    assert data.image_shape == (32, 32, 3)
    assert counts(data) == {"train": 1843, "validation": 205, "test": 512}
    np.testing.assert_array_equal(data.train.images, again.train.images)
    small = load("synthetic", image_size=8, memory_limit=0)
    assert small.image_shape == (8, 8, 3) and isinstance(small.train, Arrays)  # whatever the limit
    # It can be learned: the nearest class mean already tells the classes apart.
    means = np.stack([data.train.images[data.train.labels == c].mean(0) for c in range(10)])
    distance = ((data.test.images[:, None].astype(np.float32) - means) ** 2).sum((2, 3, 4))
    assert (distance.argmin(1) == data.test.labels).mean() > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": 0.0}, "the validation fraction must lie between 0 and 1"),
        ({"validation": 1.0}, "the validation fraction must lie between 0 and 1"),
        ({"random_crop": True}, r"--data\.random-crop needs --data\.image-size"),
        ({"random_crop": True, "image_size": 8}, "synthetic is not decoded"),
    ],
)
def test_options_that_do_not_work(options, message):
    with pytest.raises(UsageError, match=message):
        load("synthetic", **options)


# ---- prepared TFDS sets --------------------------------------------------------------------------------------------

LABELS = tfds.features.ClassLabel(num_classes=3)


def make_set(root, name, splits, *, shape=(6, 6, 3), features=None):
    """Prepare a TFDS set of `splits`: name -> [(encoded image, label), ...]."""
    features = features or {"image": tfds.features.Image(shape=shape), "label": LABELS}

    def examples(files):
        for key, (data, label) in enumerate(files):
            values = {"image": io.BytesIO(data), "label": label, "photo": io.BytesIO(data), "kind": label}
            yield key, {k: values[k] for k in features}

    body = {
        "VERSION": tfds.core.Version("1.0.0"),
        "_info": lambda self: tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features)),
        "_split_generators": lambda self, dl_manager: {k: examples(files) for k, files in splits.items()},
        "_generate_examples": None,
    }
    tfds.disable_progress_bar()
    with tfds.core.registered.skip_registration():
        kind = type(name, (tfds.core.GeneratorBasedBuilder,), {"name": name, **body})
    kind(data_dir=root, file_format="array_record").download_and_prepare()


def pictures(count, *, size=(6, 6), label=None, seed=0):
    return [(encode(noise(*size, 3, seed=seed + i)), i % 3 if label is None else label) for i in range(count)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A data_dir with one good set, of 30 and 6 images of 6x6."""
    root = tmp_path_factory.mktemp("plain")
    make_set(root, "plain", {"train": pictures(30), "test": pictures(6, seed=100)})
    return root


def test_prepared_set(plain):
    data = load("plain", dir=plain)
    assert counts(data) == {"train": 27, "validation": 3, "test": 6}
    assert data.image_shape == (6, 6, 3)
    assert data.classes == ("0", "1", "2")
    want = sorted(noise(6, 6, 3, seed=100 + i).tobytes() for i in range(6))
    assert sorted(image.tobytes() for image in data.test.images) == want
    assert load("plain", dir=plain, image_size=4).image_shape == (4, 4, 3)
    assert load("plain", dir=str(plain)).name == "plain"


def test_large_sets_stay_encoded(plain):
    whole = load("plain", dir=plain)
    for split, source in load("plain", dir=plain, memory_limit=0).splits.items():
        assert isinstance(source, Encoded) and not source.random_crop
        examples = list(source)
        np.testing.assert_array_equal([e["image"] for e in examples], whole.splits[split].images)
        np.testing.assert_array_equal([e["label"] for e in examples], whole.splits[split].labels)
        assert examples[0]["label"].dtype == np.int32
    bytes_decoded = 36 * 6 * 6 * 3
    assert isinstance(load("plain", dir=plain, memory_limit=bytes_decoded).train, Arrays)
    assert isinstance(load("plain", dir=plain, memory_limit=bytes_decoded - 1).train, Encoded)


@pytest.mark.parametrize("size", [4, 6], ids=["smaller", "the images' own"])
def test_random_crop_is_for_training_alone(plain, size):
    """It keeps a small training split encoded, as each epoch draws other boxes."""
    data = load("plain", dir=plain, random_crop=True, image_size=size)
    assert isinstance(data.validation, Arrays) and isinstance(data.test, Arrays)
    assert len({data.train.example(0, np.random.default_rng(seed))["image"].tobytes() for seed in range(3)}) == 3
    np.testing.assert_array_equal(data.train[0]["image"], data.train.example(0, None)["image"])


def test_versions(plain, tmp_path):
    for version in ("1.0.0", "1.9.0", "1.10.0", "incomplete.ABC_2.0.0"):
        folder = tmp_path / "many" / version
        folder.mkdir(parents=True)
        (folder / "dataset_info.json").touch()
    assert prepared_folder("many", tmp_path).name == "1.10.0"  # the newest, which is not the last by name
    assert prepared_folder("many/1.9.0", tmp_path).name == "1.9.0"
    assert not any(prepared_folder(name, tmp_path / "many") for name in ("", ".", "..", "1.9.0/.."))
    assert len(load("plain/1.0.0", dir=plain).test) == 6
    with pytest.raises(UsageError, match=r"no prepared set 'plain/2\.0\.0' .*there: plain\)"):
        load("plain/2.0.0", dir=plain)


def test_unknown_set(plain, tmp_path):
    with pytest.raises(
        UsageError, match=rf"no prepared set 'cifar11' in {plain} \(there: plain\); 'python -m train.data prepare"
    ):
        load("cifar11", dir=plain)
    with pytest.raises(UsageError, match=r"\(there: none\)"):
        load("cifar11", dir=tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no prepared set ''"):
        load("", dir=plain)


@pytest.mark.parametrize(
    ("splits", "want"),
    [
        ({"train": 20, "validation": 5}, {"train": 18, "validation": 2, "test": 5}),
        ({"train": 20, "validation": 5, "test": 4}, {"train": 20, "validation": 5, "test": 4}),
        # Without labels, as ImageNet's in TFDS: results are reported on the validation split.
        ({"train": 20, "validation": 5, "test": -7}, {"train": 18, "validation": 2, "test": 5}),
    ],
)
def test_held_out_splits(splits, want, tmp_path):
    files = {split: pictures(abs(count), label=-1 if count < 0 else None) for split, count in splits.items()}
    make_set(tmp_path, "held", files)
    assert counts(load("held", dir=tmp_path)) == want


@pytest.mark.parametrize(("memory_limit", "broken"), [(0, "refuse"), (1 << 20, "skip")])
def test_label_out_of_range(memory_limit, broken, tmp_path):
    """A wrong label is not a broken image, and is never skipped."""
    make_set(tmp_path, "wrong", {"train": [*pictures(10), *pictures(1, label=-1)], "test": pictures(3)})
    with pytest.raises(UsageError, match=r"label -1 of image \d+ of wrong train is out of range"):
        data = load("wrong", dir=tmp_path, memory_limit=memory_limit, broken=broken)
        list(data.train), list(data.validation)


FEATURES = {"photo": tfds.features.Image(shape=(6, 6, 3)), "kind": LABELS}


@pytest.mark.parametrize(
    ("split", "names", "message"),
    [
        ("extra", ["photo", "kind"], r"other has no split named train \(there: extra\)"),
        ("train", ["photo"], "other is not a classification set: it has no ClassLabel feature"),
        ("train", ["kind"], "other is not a classification set: it has no Image feature"),
    ],
)
def test_unusable_sets(split, names, message, tmp_path):
    make_set(tmp_path, "other", {split: pictures(5)}, features={name: FEATURES[name] for name in names})
    with pytest.raises(UsageError, match=message):
        load("other", dir=tmp_path)


def test_features_of_other_names(tmp_path):
    make_set(tmp_path, "other", {"train": pictures(10)}, features=FEATURES)
    assert load("other", dir=tmp_path).image_shape == (6, 6, 3)


def test_set_of_several_sizes(tmp_path):
    files = pictures(6) + pictures(6, size=(9, 7))
    make_set(tmp_path, "sizes", {"train": files, "test": pictures(2)}, shape=(None, None, 3))
    with pytest.raises(UsageError, match=r"the images of sizes differ in size: pass --data\.image-size"):
        load("sizes", dir=tmp_path)
    assert load("sizes", dir=tmp_path, image_size=5).image_shape == (5, 5, 3)


@pytest.mark.parametrize(("channels", "want"), [(1, 1), (4, 3)])
def test_channels(channels, want, tmp_path):
    files = [(encode(noise(6, 6, channels, seed=i).squeeze()), i % 3) for i in range(6)]
    shape = (6, 6, channels)
    make_set(tmp_path, "deep", {"train": files, "test": files}, shape=shape)
    data = load("deep", dir=tmp_path, memory_limit=0)
    assert data.image_shape == (6, 6, want)
    assert data.train.channels == want


def test_broken_image_in_a_prepared_set(tmp_path, capsys):
    files = pictures(9)
    files[4] = (files[4][0][:50], 1)
    make_set(tmp_path, "torn", {"train": files, "test": pictures(3)})
    with pytest.raises(UsageError, match=r"1 of \d+ images cannot be decoded: cannot read image \d+ of torn train: "):
        load("torn", dir=tmp_path)
    assert sum(map(len, load("torn", dir=tmp_path, broken="skip").splits.values())) == 11
    said = capsys.readouterr().err
    assert said.startswith("warning: 1 of ") and "; skipping them" in said


def test_set_stored_without_random_access(plain, tmp_path):
    """What TFDS prepares by default."""
    shutil.copytree(plain / "plain", tmp_path / "plain")
    info = tmp_path / "plain" / "1.0.0" / "dataset_info.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "fileFormat": "tfrecord"}))
    with pytest.raises(UsageError, match="in a format without random access: prepare it as array_record"):
        load("plain", dir=tmp_path)


def test_default_data_dir(monkeypatch, plain):
    monkeypatch.setenv("TFDS_DATA_DIR", str(plain))
    assert len(load("plain").test) == 6
    monkeypatch.setenv("HOME", "/home/me")
    for value, want in {"~/sets": "sets", "": "tensorflow_datasets"}.items():
        monkeypatch.setenv("TFDS_DATA_DIR", value)
        assert default_data_dir() == Path("/home/me") / want
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert default_data_dir() == Path("/home/me/tensorflow_datasets")


# ---- preparing -----------------------------------------------------------------------------------------------------


def test_stock_set_needs_tensorflow(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # as if it were not installed
    message = r'^preparing a stock TFDS set needs TensorFlow: pip install -e "\.\[prepare\]"$'
    with pytest.raises(UsageError, match=message):
        prepare("cifar10", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "hint"),
    [("cifer10", "did you mean cifar10"), ("cifer10:3.0.2", "cifar10"), ("zzqqzz", "did you mean one of https://")],
)
def test_unknown_stock_set(name, hint, tmp_path):
    with pytest.raises(UsageError, match=f"TFDS has no set '{name.split(':')[0]}': .*{hint}") as error:
        prepare(name, tmp_path)
    assert len(str(error.value)) < 200  # not all of the hundreds


@pytest.fixture
def stock(monkeypatch, tmp_path):
    """`stock(download)` puts a stand-in, which prepares itself by calling `download`, in the place of cifar10."""

    def put(download, reachable=True):
        def builder(name, *, data_dir, file_format):
            assert (name, data_dir, file_format) == ("cifar10", tmp_path, "array_record")
            return types.SimpleNamespace(
                info=types.SimpleNamespace(homepage="https://www.cs.toronto.edu/~kriz/cifar.html"),
                data_dir=str(tmp_path / "cifar10" / "3.0.2"),
                download_and_prepare=download,
            )

        def connect(address, timeout):
            if not reachable:
                raise OSError(f"nobody at {address} within {timeout}")
            return io.BytesIO()

        for variable in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(variable, raising=False)
            monkeypatch.delenv(variable.upper(), raising=False)
        monkeypatch.setattr(socket, "create_connection", connect)

        monkeypatch.setitem(sys.modules, "tensorflow", types.ModuleType("tensorflow"))
        monkeypatch.setattr(tfds, "builder", builder)

    return put


def test_stock_set_is_downloaded_unless_it_is_there(stock, tmp_path):
    folder, downloads = tmp_path / "cifar10" / "3.0.2", []

    def download():
        downloads.append("cifar10")
        folder.mkdir(parents=True)

    stock(download)
    assert [prepare("cifar10", tmp_path), prepare("cifar10", tmp_path)] == [folder] * 2
    assert downloads == ["cifar10"]


def test_unreachable_source_fails_at_once(stock, tmp_path):
    stock(lambda: pytest.fail("TFDS was asked to download"), reachable=False)
    with pytest.raises(UsageError, match=r"cannot reach www\.cs\.toronto\.edu .*443\) within [1-9]\.0"):
        prepare("cifar10", tmp_path)


def test_behind_a_proxy_nothing_is_asked_directly(stock, monkeypatch, tmp_path):
    stock(lambda: None, reachable=False)
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    assert prepare("cifar10", tmp_path) == tmp_path / "cifar10" / "3.0.2"


@pytest.mark.parametrize(
    "error",
    [
        AssertionError("Manual directory does not exist. Download it by hand"),
        tfds.download.DownloadError("Failed to get url. HTTP code: 404."),
        OSError("Not enough disk space"),
    ],
)
def test_failed_preparation_is_one_error(error, stock, tmp_path):
    def download():
        print("TFDS talks a lot")
        raise error

    stock(download)
    with pytest.raises(UsageError, match=f"cannot prepare cifar10 in {tmp_path}: {error}"):
        prepare("cifar10", tmp_path)


def test_command_line(command, fails, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["data", "prepare", "nosuch", "--dir", str(tmp_path)])
    assert "TFDS has no set 'nosuch': " in fails(2, main)
    done = command("train.data", "prepare", "digits", "--dir", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path}/digits/1.0.0\n"  # and TFDS prints nothing of its own
    # Split the same for everybody, in whichever process.
    for here, there in zip(load("digits").splits.values(), load("digits", dir=tmp_path).splits.values(), strict=True):
        np.testing.assert_array_equal(here.images, there.images)
        np.testing.assert_array_equal(here.labels, there.labels)
