"""Folders of images: which files are found, how they are split, and the message for every fault."""

import io

import numpy as np
import pytest
from PIL import Image

from resnet_jax.parallel import make_mesh
from train.data import folder
from train.data.batches import train_batches
from train.data.sets import Arrays, Encoded, load
from train.errors import UsageError


def image_bytes(kind="JPEG", size=(10, 8), seed=0, **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def write(path, data=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_bytes(**options) if data is None else data)
    return path


def fill(root, counts, **options):
    """`counts` images in each class folder of `root`."""
    for name, count in counts.items():
        for i in range(count):
            write(root / name / f"{i}.jpg", seed=i, **options)
    return root


def load_folder(root, **options):
    return load(f"folder:{root}", **{"image_size": 6, **options})


def counts(source, classes):
    return dict(zip(classes, np.bincount(source.labels, minlength=len(classes)).tolist(), strict=True))


# ---- what is found -------------------------------------------------------------------------------------------------


def test_class_folders_are_split_within_each_class(tmp_path):
    fill(tmp_path, {"cat": 10, "dog": 20, "eel": 3})
    data = load_folder(tmp_path, validation=0.2)
    assert data.classes == ("cat", "dog", "eel")
    assert data.image_shape == (6, 6, 3)
    # A fifth of each class for test, then a fifth of what is left for validation, always one at least.
    assert counts(data.test, data.classes) == {"cat": 2, "dog": 4, "eel": 1}
    assert counts(data.validation, data.classes) == {"cat": 2, "dog": 3, "eel": 1}
    assert counts(data.train, data.classes) == {"cat": 6, "dog": 13, "eel": 1}


def test_the_split_is_seeded_and_complete(tmp_path):
    fill(tmp_path, {"cat": 12, "dog": 12})
    same, again, other = (load_folder(tmp_path, memory_limit=0, split_seed=seed) for seed in (0, 0, 1))
    for split, source in same.splits.items():
        np.testing.assert_array_equal(source.indices, again.splits[split].indices)
    assert any((s.indices != other.splits[k].indices).any() for k, s in same.splits.items())
    parts = [source.indices for source in same.splits.values()]
    assert sorted(np.concatenate(parts)) == list(range(24))


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("training", "valid", "testing"), ("Train", "Validation", "TEST")]
)
def test_split_folders(names, tmp_path):
    for name, count in zip(names, (4, 2, 3), strict=True):
        fill(tmp_path / name, {"cat": count, "dog": 1})
    data = load_folder(tmp_path)
    assert {k: len(s) for k, s in data.splits.items()} == {"train": 5, "validation": 3, "test": 4}


def test_train_and_test_folders_alone(tmp_path):
    fill(tmp_path / "train", {"cat": 10, "dog": 10})
    fill(tmp_path / "test", {"cat": 2, "dog": 2})
    data = load_folder(tmp_path)
    assert {k: len(s) for k, s in data.splits.items()} == {"train": 18, "validation": 2, "test": 4}


def test_a_lone_val_folder_is_the_test_split(tmp_path):
    fill(tmp_path / "train", {"cat": 10, "dog": 10})
    fill(tmp_path / "val", {"cat": 2, "dog": 3})
    assert {k: len(s) for k, s in load_folder(tmp_path).splits.items()} == {"train": 18, "validation": 2, "test": 5}


def test_nested_files_capitals_and_kinds(tmp_path):
    fill(tmp_path, {"dog": 5})
    write(tmp_path / "cat" / "a.JPG")
    write(tmp_path / "cat" / "deep" / "er" / "b.PnG", kind="PNG")
    write(tmp_path / "cat" / "c.webp", kind="WEBP")
    write(tmp_path / "cat" / "d.jpeg")
    write(tmp_path / "cat" / "e.GIF", kind="GIF")
    write(tmp_path / "cat" / "notes.txt", b"not an image, and not taken for one")
    classes, splits = folder.read(tmp_path, size=6, skip_broken=False)
    assert classes == ("cat", "dog")
    assert np.bincount(splits["train"].labels).tolist() == [5, 5]


def test_hidden_files_and_folders_are_left_alone(tmp_path):
    fill(tmp_path, {"cat": 3, "dog": 3})
    write(tmp_path / "cat" / "._0.jpg", b"left by a desktop")
    write(tmp_path / "cat" / ".ipynb_checkpoints" / "0-checkpoint.jpg")
    write(tmp_path / ".cache" / "0.jpg")
    classes, splits = folder.read(tmp_path, size=6, skip_broken=False)
    assert classes == ("cat", "dog")
    assert len(splits["train"]) == 6


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(tmp_path / "pets", {"cat": 4, "dog": 4})
    assert load("folder:~/pets", image_size=6).classes == ("cat", "dog")


def test_labels_are_known_without_reading_a_file_again(tmp_path, monkeypatch):
    """Splitting a large folder by class must not read all of it."""
    fill(tmp_path, {"cat": 4, "dog": 4})
    reads = []
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda path: reads.append(path))
    load_folder(tmp_path, memory_limit=0)
    assert not reads


# ---- sizes ---------------------------------------------------------------------------------------------------------


def test_one_size_needs_no_image_size(tmp_path):
    fill(tmp_path, {"cat": 4, "dog": 4}, size=(10, 8))
    assert load_folder(tmp_path, image_size=None).image_shape == (8, 10, 3)


@pytest.mark.parametrize("memory_limit", [0, 1 << 20])
def test_several_sizes_without_image_size(memory_limit, tmp_path):
    fill(tmp_path, {"cat": 4, "dog": 4})
    write(tmp_path / "dog" / "tall.jpg", size=(8, 20))
    with pytest.raises(UsageError, match=r"differ in size: pass --data\.image-size"):
        load_folder(tmp_path, image_size=None, memory_limit=memory_limit)
    assert load_folder(tmp_path).image_shape == (6, 6, 3)


def test_a_photo_on_its_side_counts_as_it_is_seen(tmp_path):
    fill(tmp_path, {"cat": 4, "dog": 4}, size=(10, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path / "dog" / "side.jpg", size=(8, 10), exif=exif)  # stored tall, seen wide
    assert load_folder(tmp_path, image_size=None).image_shape == (8, 10, 3)


def test_splits_of_different_sizes(tmp_path):
    fill(tmp_path / "train", {"cat": 4, "dog": 4}, size=(10, 8))
    fill(tmp_path / "test", {"cat": 1, "dog": 1}, size=(8, 8))
    with pytest.raises(UsageError, match=r"the splits of folder:.* differ in size: pass --data\.image-size"):
        load_folder(tmp_path, image_size=None)


# ---- wrong folders -------------------------------------------------------------------------------------------------


def test_missing_folder(tmp_path):
    with pytest.raises(UsageError, match=rf"there is no folder {tmp_path}/nowhere"):
        load_folder(tmp_path / "nowhere")


def test_images_without_classes_are_one(tmp_path):
    """Enough for pretraining; in subfolders that are no classes, such as train and test, too."""
    for split, count in {"train": 8, "test": 2}.items():
        for i in range(count):
            write(tmp_path / split / f"{i}.jpg")
    dataset = load_folder(tmp_path)
    assert dataset.classes == ("unlabelled",)
    assert [len(source) for source in dataset.splits.values()] == [7, 1, 2]
    assert dataset.train[0]["label"] == 0


def test_no_classes(tmp_path):
    with pytest.raises(UsageError, match=rf"{tmp_path} holds no class folders \(one subfolder of images for each"):
        load_folder(tmp_path)


def test_empty_class(tmp_path):
    fill(tmp_path, {"cat": 4, "dog": 4})
    (tmp_path / "emu").mkdir()
    with pytest.raises(UsageError, match=rf"{tmp_path}/emu holds no images \(\.bmp, "):
        load_folder(tmp_path)


def test_class_that_training_does_not_have(tmp_path):
    fill(tmp_path / "train", {"cat": 4, "dog": 4})
    fill(tmp_path / "test", {"cat": 1, "eel": 1})
    with pytest.raises(UsageError, match=rf"{tmp_path}/test/eel is a class that the training split does not have"):
        load_folder(tmp_path)


def test_split_folder_without_classes(tmp_path):
    fill(tmp_path / "train", {"cat": 4, "dog": 4})
    write(tmp_path / "test" / "0.jpg")
    with pytest.raises(UsageError, match=rf"{tmp_path}/test holds no class folders with images"):
        load_folder(tmp_path)


def test_val_and_test_are_not_taken_for_classes(tmp_path):
    fill(tmp_path / "val", {"cat": 4, "dog": 4})
    fill(tmp_path / "test", {"cat": 4, "dog": 4})
    with pytest.raises(UsageError, match="holds test and val, but no folder train"):
        load_folder(tmp_path)


def test_a_class_may_be_named_like_a_split(tmp_path):
    fill(tmp_path, {"test": 4, "control": 4})
    assert load_folder(tmp_path).classes == ("control", "test")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"cat": 1, "dog": 1}, "2 images are too few"), ({"cat": 1, "dog": 1, "eel": 1}, "a class needs two images")],
)
def test_too_few_images_to_hold_some_back(sizes, message, tmp_path):
    fill(tmp_path, sizes)
    with pytest.raises(UsageError, match=message):
        load_folder(tmp_path)


def test_tiny_classes_keep_an_image_to_train_on(tmp_path):
    fill(tmp_path, {"cat": 12, "dog": 2, "eel": 1})
    assert counts(load_folder(tmp_path).train, ("cat", "dog", "eel")) == {"cat": 10, "dog": 1, "eel": 1}


# ---- broken files --------------------------------------------------------------------------------------------------

WHOLE = image_bytes(size=(40, 30))
PNG = image_bytes("PNG", size=(40, 30))
BROKEN = {
    "truncated.jpg": (WHOLE[: len(WHOLE) // 2], "truncated"),
    "truncated.png": (PNG[: len(PNG) // 2], "truncated"),
    "empty.jpg": (b"", "not an image"),
    "text.jpg": (b"This is a letter, not a photograph.", "not an image"),
    # Both ends are whole: only decoding finds the fault.
    "middle.png": (PNG[:800] + bytes(64) + PNG[864:], "broken|unrecognized"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_named_and_refused_or_skipped(name, tmp_path, capsys):
    fill(tmp_path, {"cat": 5, "dog": 5})
    data, reason = BROKEN[name]
    path = write(tmp_path / "cat" / name, data)
    with pytest.raises(
        UsageError, match=rf"1 of \d+ images cannot be decoded: .*{path}: .*({reason}).*--data\.broken skip"
    ):
        load_folder(tmp_path)

    data = load_folder(tmp_path, broken="skip")
    assert sum(map(len, data.splits.values())) == 10
    said = capsys.readouterr()
    assert said.err.startswith("warning: 1 of ") and "; skipping them" in said.err
    assert str(path) in said.err
    assert said.out == ""


def test_first_file_broken_in_its_middle(tmp_path):
    """The image that the size of the set is judged by may be the one that cannot be decoded."""
    fill(tmp_path, {"cat": 5, "dog": 5}, size=(40, 30))
    path = write(tmp_path / "cat" / "-.png", BROKEN["middle.png"][0])  # sorted before the others
    assert folder.read(tmp_path, size=6, skip_broken=False)[1]["train"].name(0) == str(path)
    for size in (6, None):
        with pytest.raises(UsageError, match=rf"1 of \d+ images cannot be decoded: .*{path}"):
            load_folder(tmp_path, image_size=size)
        assert sum(map(len, load_folder(tmp_path, image_size=size, broken="skip").splits.values())) == 10


def test_broken_files_are_counted(tmp_path):
    fill(tmp_path, {"cat": 5, "dog": 5})
    for i in range(5):
        write(tmp_path / "dog" / f"bad{i}.jpg", b"")
    with pytest.raises(
        UsageError, match=r"5 of 15 images cannot be decoded: .*bad0.*bad1.*bad2\.jpg: not an image and 2 more"
    ):
        load_folder(tmp_path)


def test_nothing_but_broken_files(tmp_path):
    for i in range(3):
        write(tmp_path / "cat" / f"{i}.jpg", b"")
    with pytest.raises(UsageError, match=rf"{tmp_path} holds no image that can be read"):
        load_folder(tmp_path, broken="skip")


@pytest.mark.parametrize("extra", [b"\0" * 10, b"maker's note " * 1000])
def test_data_behind_the_end_is_no_fault(extra, tmp_path):
    fill(tmp_path, {"cat": 5, "dog": 5})
    write(tmp_path / "cat" / "camera.jpg", WHOLE + extra)
    assert sum(map(len, load_folder(tmp_path).splits.values())) == 11


def test_file_that_went_away_is_named(tmp_path):
    fill(tmp_path, {"cat": 5, "dog": 5})
    data = load_folder(tmp_path, memory_limit=0)
    path = tmp_path / "cat" / "0.jpg"
    path.unlink()
    with pytest.raises(UsageError, match=rf"cannot read image {path}: "):
        for source in data.splits.values():
            for i in range(len(source)):
                source[i]


def test_file_broken_in_its_middle_stops_a_stream_with_its_name(tmp_path):
    for split in ("train", "test"):
        fill(tmp_path / split, {"cat": 6, "dog": 6})
    path = write(tmp_path / "train" / "cat" / "middle.png", BROKEN["middle.png"][0])
    data = load_folder(tmp_path, memory_limit=0, validation=0.01)
    assert isinstance(data.train, Encoded)
    stream = train_batches(data.train, batch=8, seed=0, mesh=make_mesh())
    with pytest.raises(UsageError, match=rf"cannot read image {path}: "):
        for _ in range(3):
            next(stream)


def test_in_memory_by_default(tmp_path):
    fill(tmp_path, {"cat": 5, "dog": 5})
    assert all(isinstance(source, Arrays) for source in load_folder(tmp_path).splits.values())
