"""Object sets: prepared TFDS sets, the rendered shapes, splits, sizes and buckets."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from train.detect.layout import Layout, check_buckets, check_fits, choose_buckets, fit
from train.detect.objects import decode_scaled
from train.detect.sets import load
from train.detect.shapes import CLASSES
from train.errors import UsageError

SIZES = [(40, 60), (60, 40), (30, 60)]


def encoded(size, seed=0, kind="PNG"):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def objects(**extra):
    return {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "objects": tfds.features.Sequence(
            {"bbox": tfds.features.BBoxFeature(), "label": tfds.features.ClassLabel(names=["cat", "dog"])} | extra
        ),
    }


def prepare(root, name, splits, features):
    """Prepare a TFDS set of `splits`: name -> [values by feature, ...]."""
    body = {
        "VERSION": tfds.core.Version("1.0.0"),
        "_info": lambda self: tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features)),
        "_split_generators": lambda self, dl_manager: {k: enumerate(values) for k, values in splits.items()},
        "_generate_examples": None,
    }
    tfds.disable_progress_bar()
    with tfds.core.registered.skip_registration():
        kind = type(name, (tfds.core.GeneratorBasedBuilder,), {"name": name, **body})
    kind(data_dir=root, file_format="array_record").download_and_prepare()


def examples(count, seed=0, bad=(), **extra):
    """Images with 0, 1 or 2 objects, the first of which covers the lower right quarter."""
    boxes = [tfds.features.BBox(0.5, 0.5, 1.0, 1.0), tfds.features.BBox(0.0, 0.25, 0.5, 1.0)]
    for i in range(count):
        found = [{"bbox": boxes[j], "label": (i + j) % 2, **dict.fromkeys(extra, j == 0)} for j in range(i % 3)]
        data = b"text" if i in bad else encoded(SIZES[i % 3], seed + i)
        yield {"image": io.BytesIO(data), "objects": found}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("objects")
    hard = {"is_difficult": np.bool_}
    prepare(root, "plain", {"train": list(examples(12)), "test": list(examples(6, 100))}, objects())
    prepare(root, "hard", {"train": list(examples(9, **hard))}, objects(**hard))
    prepare(root, "voc", {"train": list(examples(9)), "test": list(examples(6, 100))}, objects())
    prepare(root, "faulty", {"train": list(examples(9, bad=(1,)))}, objects())
    unlabelled = [{"image": io.BytesIO(encoded((8, 8))), "objects": []}]
    prepare(
        root, "coco_like", {"train": list(examples(9)), "validation": list(examples(6)), "test": unlabelled}, objects()
    )
    prepare(root, "pixels", {"train": unlabelled}, objects(bbox=tfds.features.BBoxFeature(bbox_format="XYXY")))
    labels = {"image": tfds.features.Image(shape=(8, 8, 3)), "label": tfds.features.ClassLabel(num_classes=2)}
    prepare(root, "labels", {"train": [{"image": io.BytesIO(encoded((8, 8))), "label": 0}]}, labels)
    return root


def test_coordinates_of_voc_count_from_one(data_dir):
    plain, voc = (load(name, dir=data_dir) for name in ("plain", "voc"))
    for one, other in zip(plain.test.examples, voc.test.examples, strict=True):
        np.testing.assert_allclose(other.boxes[:, 2:], one.boxes[:, 2:])
        np.testing.assert_allclose(other.boxes[:, :2], np.maximum(one.boxes[:, :2] - 1, 0))


def counts(data):
    return {split: len(source) for split, source in data.splits.items()}


def test_prepared_set(data_dir):
    data = load("plain", dir=data_dir, validation=0.25)
    assert data.classes == ("cat", "dog") and counts(data) == {"train": 9, "validation": 3, "test": 6}
    assert data.layout == Layout(min_size=None, max_size=None, buckets=((32, 64), (64, 64)), rows=4)
    place = next(i for i, one in enumerate(data.test.examples) if one.size == (30, 60))
    example = data.test[place]
    assert example["image"].shape == (32, 64, 3) and example["size"].tolist() == [30, 60]
    np.testing.assert_array_equal(example["boxes"], [[30, 15, 60, 30], [15, 0, 60, 15], [0] * 4, [0] * 4])
    assert example["labels"].tolist() in ([0, 1, -1, -1], [1, 0, -1, -1]) and not example["crowd"].any()
    assert example["id"] == place and example["scale"] == 1
    seed = 102 if example["labels"][0] == 0 else 105
    pixels = np.asarray(Image.open(io.BytesIO(encoded((30, 60), seed))))
    np.testing.assert_array_equal(example["image"][:30, :60], pixels)
    assert not example["image"][30:].any() and not example["image"][:, 60:].any()
    assert sorted(len(one.labels) for one in data.test.examples) == [0, 0, 1, 1, 2, 2]
    assert {split: content["count"] for split, content in data.images.items()} == counts(data)


def test_decoded_on_access_it_is_the_same(data_dir):
    kept, read = (load("plain", dir=data_dir, min_size=32, memory_limit=limit) for limit in (2**20, 0))
    assert kept.train.pixels is not None and read.train.pixels is None and kept.images == read.images
    for one, other in zip(kept.train, read.train, strict=True):
        for name, value in one.items():
            np.testing.assert_array_equal(value, other[name])


def test_difficult_objects_are_crowds(data_dir):
    data = load("hard", dir=data_dir)
    assert counts(data) == {"train": 7, "validation": 1, "test": 1}
    flags = {tuple(one.crowd.tolist()) for source in data.splits.values() for one in source.examples}
    assert flags == {(), (True,), (True, False)}


def test_a_test_split_without_annotations_is_not_used(data_dir):
    data = load("coco_like", dir=data_dir)
    assert counts(data) == {"train": 8, "validation": 1, "test": 6}


def test_fractions_are_nested(data_dir):
    names = [{one.name for one in load("plain", dir=data_dir, fraction=f).train.examples} for f in (0.3, 0.6, 1.0)]
    assert [len(some) for some in names] == [3, 7, 11] and names[0] < names[1] < names[2]


def test_broken_image(data_dir, capsys):
    with pytest.raises(UsageError, match=r"1 of 9 .*cannot read image \d of faulty train: not an image.*skip"):
        load("faulty", dir=data_dir)
    data = load("faulty", dir=data_dir, broken="skip")
    assert [line.endswith("of faulty train: not an image") for line in data.passed_over] == [True]
    assert sum(counts(data).values()) == 8 and "skipping them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("labels", {}, "labels is not an object set: it needs an image, and objects with bbox and label"),
        ("pixels", {}, "pixels has boxes as XYXY, not as TFDS's usual REL_YXYX"),
        ("plein", {}, r"no prepared set 'plein' .*there: .*plain.*coco:, voc: or yolo:DIR reads plain images"),
        ("plain", {"validation": 1.0}, "the validation fraction must lie between 0 and 1"),
        ("plain", {"fraction": 0.0}, "the fraction of the training split must lie above 0"),
        ("plain", {"min_size": 0}, "the sizes of images must be at least 1, got 0 and None"),
        ("plain", {"buckets": [(48, 64)]}, "bucket 48x64: the sides of a bucket must be multiples of 32"),
        (
            "plain",
            {"buckets": [(32, 64)]},
            r"12 of 18 images are larger than every bucket \(32x64\): .* of plain .* \(40x60\), .* and 9 more; "
            r"add a bucket of 64x64, or lower",
        ),
    ],
)
def test_bad_input(data_dir, name, options, message):
    with pytest.raises(UsageError, match=message):
        load(name, dir=data_dir, **options)


def test_shapes():
    data = load("shapes")
    assert counts(data) == {"train": 480, "validation": 120, "test": 120} and data.classes == CLASSES
    assert data.layout.buckets == ((96, 128), (128, 96)) and data.layout.rows == 8
    # The same for everybody: what is drawn does not depend on the machine.
    assert data.images["validation"] == {"count": 120, "digest": "67be2ccb3a6b3c60"}
    number = np.array([len(one.labels) for one in data.train.examples])
    assert number.min() == 0 and number.max() == 6 and 0.02 < (number == 0).mean() < 0.1
    labels = np.concatenate([one.labels for one in data.train.examples])
    assert np.bincount(labels).min() > len(labels) / 6
    assert 0.3 < (data.train.bucket == 0).mean() < 0.7
    boxes = np.concatenate([one.boxes for one in data.train.examples])
    assert (boxes >= 0).all() and (boxes[:, 2:] - boxes[:, :2]).min() > 4
    for one in data.train.examples:
        assert (one.boxes <= [*one.size[::-1]] * 2).all()


# ---- sizes ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(32, 1000), st.integers(1, 500))
@settings(deadline=None, max_examples=200)
def test_fit_is_torchvision_s(height, width, short, more):
    """The short side is as wanted, unless the long one would be too long, and nothing is distorted."""
    (new_height, new_width), scale = fit((height, width), short, short + more)
    assert max(new_height, new_width) <= short + more and min(new_height, new_width) <= short
    assert min(new_height, new_width) == short or max(new_height, new_width) == short + more
    for side, new in ((height, new_height), (width, new_width)):
        assert new == 1 or -1e-5 <= side * scale - new < 1


def test_known_sizes():
    assert fit((480, 640), 800, 1333) == ((800, 1066), 800 / 480)
    assert fit((640, 480), None, 320) == ((320, 240), 0.5)
    assert fit((600, 600), 800, 1333)[0] == (800, 800)
    assert fit((7, 5), None, None) == ((7, 5), 1.0)


def test_scaled_pixels_are_where_boxes_say():
    """A rectangle's edges stay at scale times their position, with JPEG's reduced decoding as well."""
    for kind in ("PNG", "JPEG"):
        pixels = np.zeros((401, 603, 3), np.uint8)
        pixels[100:300, 150:450] = 255
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind, **({"quality": 95} if kind == "JPEG" else {}))
        for short in (97, 200, 333):
            size, scale = fit((401, 603), short, None)
            image = decode_scaled(file.getvalue(), (401, 603), size, scale, True)
            assert image.shape == (*size, 3)
            share = image[..., 0].astype(float) / 255
            middle = share[size[0] // 2], share[:, size[1] // 2]
            for line, start, end in zip(middle, (150, 100), (450, 300), strict=True):
                half = len(line) // 2
                assert abs(half - line[:half].sum() - start * scale) < 0.12, (kind, short)
                assert abs(half + line[half:].sum() - end * scale) < 0.12, (kind, short)


@given(st.lists(st.tuples(st.integers(1, 700), st.integers(1, 700)), min_size=1, max_size=60), st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_chosen_buckets_hold_all_images(sizes, most):
    buckets = choose_buckets(sizes, most)
    assert 1 <= len(buckets) <= most and check_buckets(buckets) == buckets
    layout = Layout(min_size=None, max_size=None, buckets=buckets, rows=4)
    check_fits([""] * len(sizes), sizes, layout)
    for size in sizes:
        bucket = layout.bucket_of(size)
        assert all(a <= b for a, b in zip(size, buckets[bucket], strict=True))
        assert not any(all(a <= b for a, b in zip(size, other, strict=True)) for other in buckets[:bucket])


def test_buckets_of_photographs():
    """Landscape and portrait images are not padded to a square."""
    sizes = [(800, 1066)] * 70 + [(1066, 800)] * 25 + [(800, 800)] * 3 + [(800, 1200)] * 2
    buckets = choose_buckets(sizes)
    assert (800, 1088) in buckets and (1088, 800) in buckets and len(buckets) == 3
    assert choose_buckets([(480, 640)] * 5) == ((480, 640),)
    assert choose_buckets([(480, 640)] * 500 + [(470, 630)] * 5) == ((480, 640),)
    assert choose_buckets([(480, 640), (640, 480)], 1) == ((640, 640),)
