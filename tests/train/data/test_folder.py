"""Folders of images: which files are found, how they are split, and the message for every fault."""

import io
import unicodedata

import numpy as np
import pytest
from PIL import Image

from train.data import folder, sets
from train.data.sets import Arrays, load
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
    """`counts` images in each folder below `root`."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            write(root / name / f"{i}.jpg", seed=i, **options)
    return root


def load_folder(root, **options):
    return load(f"folder:{root}", **{"image_size": 6, **options})


def sizes(data):
    return [len(source) for source in data.splits.values()]


# ---- what is found -------------------------------------------------------------------------------------------------


def test_class_folders_are_split_within_each_class(tmp_path):
    fill(tmp_path, {"cat": 10, "dog": 20, "eel": 3, "fly": 2, "gnu": 1})
    data = load_folder(tmp_path, validation=0.2)
    assert data.classes == ("cat", "dog", "eel", "fly", "gnu")
    assert data.image_shape == (6, 6, 3)
    assert all(isinstance(source, Arrays) for source in data.splits.values())
    # A fifth of each class for test, then a fifth of what is left for validation, one at least, but never the last.
    counted = {split: np.bincount(source.labels, minlength=5).tolist() for split, source in data.splits.items()}
    assert counted == {"train": [6, 13, 1, 1, 1], "validation": [2, 3, 1, 0, 0], "test": [2, 4, 1, 1, 0]}


def test_the_split_is_seeded_and_complete(tmp_path):
    fill(tmp_path, {"cat": 12, "dog": 12})
    same, again, other = (load_folder(tmp_path, memory_limit=0, split_seed=seed) for seed in (0, 0, 1))
    for split, source in same.splits.items():
        np.testing.assert_array_equal(source.indices, again.splits[split].indices)
    assert any((s.indices != other.splits[k].indices).any() for k, s in same.splits.items())
    parts = [source.indices for source in same.splits.values()]
    assert sorted(np.concatenate(parts)) == list(range(24))


def split_folders(train, validation, test):
    return {f"{name}/{c}": n for name, n in ((train, 4), (validation, 2), (test, 3)) for c in ("cat", "dog")}


@pytest.mark.parametrize(
    ("layout", "classes", "want"),
    [
        (split_folders("train", "val", "test"), ("cat", "dog"), [8, 4, 6]),
        (split_folders("training", "valid", "testing"), ("cat", "dog"), [8, 4, 6]),
        (split_folders("Train", "Validation", "TEST"), ("cat", "dog"), [8, 4, 6]),
        ({"train/cat": 10, "train/dog": 10, "test/cat": 2, "test/dog": 2}, ("cat", "dog"), [18, 2, 4]),
        # A lone validation folder is the test split.
        ({"train/cat": 10, "train/dog": 10, "val/cat": 2, "val/dog": 3}, ("cat", "dog"), [18, 2, 5]),
        # A class may be named like a split.
        ({"test": 4, "control": 4}, ("control", "test"), [4, 2, 2]),
        # Images without classes are one, which is enough for pretraining.
        ({"train": 8, "test": 2}, ("unlabelled",), [7, 1, 2]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_layouts(layout, classes, want, tmp_path):
    data = load_folder(fill(tmp_path, layout))
    assert data.classes == classes
    assert sizes(data) == want


def test_nested_files_capitals_kinds_and_hidden_files(tmp_path):
    fill(tmp_path, {"dog": 5})
    write(tmp_path / "cat" / "a.JPG")
    write(tmp_path / "cat" / "deep" / "er" / "b.PnG", kind="PNG")
    write(tmp_path / "cat" / "c.webp", kind="WEBP")
    write(tmp_path / "cat" / "d.jpeg")
    write(tmp_path / "cat" / "e.GIF", kind="GIF")
    write(tmp_path / "cat" / "notes.txt", b"not an image, and not taken for one")
    write(tmp_path / "cat" / "._0.jpg", b"left by a desktop")
    write(tmp_path / "cat" / ".ipynb_checkpoints" / "0-checkpoint.jpg")
    write(tmp_path / ".cache" / "0.jpg")
    classes, splits, passed_over = folder.read(str(tmp_path), size=6)
    assert passed_over == (f"{tmp_path}/cat/notes.txt: .txt",)
    assert classes == ("cat", "dog")
    assert np.bincount(splits["train"].labels).tolist() == [5, 5]


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


def found(root, capsys, **options):
    """(classes, images per class over all splits, what stderr says) of a folder."""
    data = load_folder(root, **options)
    labels = np.concatenate([source.labels for source in data.splits.values()])
    return data.classes, np.bincount(labels).tolist(), capsys.readouterr().err


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        ("jfif", "JPEG"),
        ("ppm", "PPM"),
        ("pgm", "PPM"),
        ("pnm", "PPM"),
        ("tga", "TGA"),
        ("JPE", "JPEG"),
        ("jp2", "JPEG2000"),
        ("avif", "AVIF"),
    ],
)
def test_every_kind_that_pillow_reads(suffix, kind, tmp_path, capsys):
    fill(tmp_path, {"cat": 4, "dog": 4})
    write(tmp_path / "cat" / f"a.{suffix}", kind=kind, size=(16, 16))
    assert found(tmp_path, capsys) == (("cat", "dog"), [5, 4], "")


def test_what_is_passed_over_is_counted_and_listed(tmp_path, capsys):
    fill(tmp_path, {"cat": 4, "dog": 4})
    for name in ("cat/a.heic", "cat/b.heic", "dog/notes.txt", "dog/data.h5", "dog/plain", "stray.jpg", "labels.csv"):
        write(tmp_path / name)
    (tmp_path / "dog" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "dog" / "self.jpg").symlink_to("self.jpg")
    for quiet in ("cat/Thumbs.db", "cat/desktop.ini", "__MACOSX/cat/._0.jpg", "dog/@eaDir/0.jpg/THUMB.jpg", ".x/0.jpg"):
        write(tmp_path / quiet)
    data = load_folder(tmp_path)
    assert sum(sizes(data)) == 8 and data.classes == ("cat", "dog")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"note: passed over in {tmp_path}: 2 x .heic, 1 x ")
    assert {line.removeprefix(f"{tmp_path}/") for line in data.passed_over if "self.jpg" not in line} == {
        "cat/a.heic: .heic",
        "cat/b.heic: .heic",
        "dog/notes.txt: .txt",
        "dog/data.h5: .h5",
        "dog/plain: a file without a suffix",
        "dog/gone.jpg: a link to nothing",
        "stray.jpg: an image outside of the class folders",
    }


def test_links_are_followed_and_loops_are_not(tmp_path, capsys):
    fill(tmp_path / "set", {"cat": 4})
    fill(tmp_path / "store", {"dog": 5, "more": 2})
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "store" / "dog")
    (tmp_path / "set" / "cat" / "more").symlink_to(tmp_path / "store" / "more")
    (tmp_path / "set" / "cat" / "twice").symlink_to(tmp_path / "store" / "more")
    (tmp_path / "set" / "cat" / "again").symlink_to(tmp_path / "set")
    classes, counts, said = found(tmp_path / "set", capsys)
    assert (classes, counts) == (("cat", "dog"), [6, 5])
    assert "2 x a link to a folder that was read" in said


def test_links_from_one_class_to_another_are_not_followed(tmp_path, capsys):
    """Else the same images would have two labels, in training and in test."""
    fill(tmp_path, {"cat": 4, "dog": 5})
    (tmp_path / "cat" / "more").symlink_to(tmp_path / "dog")
    (tmp_path / "dog" / "more").symlink_to(tmp_path / "cat")
    _, counts, said = found(tmp_path, capsys)
    assert counts == [4, 5]
    assert "2 x a link to a folder that was read" in said
    (tmp_path / "kitten").symlink_to(tmp_path / "cat")
    with pytest.raises(UsageError, match=f"{tmp_path}/kitten and cat are the same folder"):
        load_folder(tmp_path)


@pytest.mark.parametrize("name", ["train", "Train", "training", "val", "valid", "test", "eval", "dev"])
def test_class_that_is_called_like_a_split(name, tmp_path, capsys):
    """As in PASCAL VOC and COCO."""
    fill(tmp_path, {"bus": 4, "car": 4, name: 4})
    assert found(tmp_path, capsys) == (tuple(sorted(["bus", "car", name])), [4, 4, 4], "")


@pytest.mark.parametrize(
    "layout",
    [
        {"bus/red": 4, "car/blue": 4, "train/steam": 4, "train/diesel": 4},
        {"bus": 4, "car": 4, "train/steam": 4},
        {"bus": 4, "train": 4, "test": 4},
    ],
    ids=" ".join,
)
def test_unclear_whether_train_is_a_class_or_a_split(layout, tmp_path):
    with pytest.raises(UsageError, match=rf"{tmp_path} holds train, which is the name of a split, next to bus.*rename"):
        load_folder(fill(tmp_path, layout))


@pytest.mark.parametrize(
    ("layout", "want", "note"),
    [
        (split_folders("train", "eval", "test"), [8, 4, 6], ""),
        (split_folders("train", "dev", "test"), [8, 4, 6], ""),
        # Kaggle: test images without labels.
        ({"train/cat": 10, "train/dog": 10, "test": 3}, [16, 2, 2], "1 x a split without class folders"),
        ({"train/cat": 10, "train/dog": 10, "test": 3, "sample": 1}, [16, 2, 2], "1 x a folder that is not a split"),
        ({**split_folders("train", "val", "test"), "eval/cat": 1}, [8, 4, 6], "1 x a folder that is not a split"),
        ({**split_folders("train", "val", "test"), "extra": 5}, [8, 4, 6], "1 x a folder that is not a split"),
        ({**split_folders("train", "val", "test"), "labels": 0}, [8, 4, 6], ""),
        # A folder around the set, as archives have it.
        ({f"set/{name}": n for name, n in split_folders("train", "val", "test").items()}, [8, 4, 6], ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_layouts_of_archives(layout, want, note, tmp_path, capsys):
    data = load_folder(fill(tmp_path, layout))
    assert (data.classes, sizes(data)) == (("cat", "dog"), want)
    said = capsys.readouterr().err
    assert note in said if note else said == ""


def test_only_class_that_holds_folders(tmp_path, capsys):
    fill(tmp_path, {"photos/cat": 4, "photos/dog": 4})
    classes, _, said = found(tmp_path, capsys)
    assert classes == ("photos",)
    assert f"note: photos is the only class; if cat, dog are the classes, pass folder:{tmp_path}/photos" in said


@pytest.mark.parametrize(
    ("train", "other"),
    [
        (["caf\u00e9", "the"], ["cafe\u0301", "the"]),
        (["cafe\u0301", "the"], ["caf\u00e9", "The"]),
        (["Cat", "Dog"], ["cat", "DOG"]),
        (["Cat", "cat"], ["Cat", "cat"]),
    ],
)
def test_classes_whose_names_differ_between_splits(train, other, tmp_path):
    """Files from macOS have decomposed accents; the training split's spelling is kept, and with it the labels."""
    fill(tmp_path / "train", dict.fromkeys(train, 10))
    fill(tmp_path / "test", {name: 2 + k for k, name in enumerate(other)})
    data = load_folder(tmp_path)
    assert data.classes == tuple(train)
    assert np.bincount(data.test.labels).tolist() == [2, 3]


def test_one_name_in_two_unicode_forms(tmp_path):
    fill(tmp_path, {"caf\u00e9": 4, unicodedata.normalize("NFD", "caf\u00e9"): 4})
    with pytest.raises(UsageError, match="twice, in two Unicode forms"):
        load_folder(tmp_path)


def test_classes_are_in_the_order_of_text_and_a_note_says_so(tmp_path, capsys):
    fill(tmp_path, {str(k): 3 for k in range(12)})
    classes, _, said = found(tmp_path, capsys)
    assert classes == ("0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9")
    assert said == "note: classes are in the order of their names as text: 0, 1, 10, 11 and 8 more\n"


@pytest.mark.parametrize(
    ("name", "message"), [("folder:", "needs the path of a folder"), ("folder:a.zip", "a.zip: it is a file; unpack it")]
)
def test_names_of_no_folder(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.zip")
    with pytest.raises(UsageError, match=message):
        load(name)
    fill(tmp_path / "pets", {"cat": 1})
    for name in ("pets", "Folder:pets", "imagefolder:pets"):
        with pytest.raises(UsageError, match="did you mean folder:pets"):
            load(name)


def test_folder_that_may_not_be_listed(tmp_path, monkeypatch):
    fill(tmp_path, {"cat": 4})

    def scandir(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.scandir", scandir)
    with pytest.raises(UsageError, match=f"cannot list the folder {tmp_path}: Permission denied"):
        load_folder(tmp_path)


def test_a_set_that_fits_in_memory_is_opened_without_looking_at_its_files(tmp_path, monkeypatch):
    """Decoding checks it."""
    fill(tmp_path, {"cat": 4, "dog": 4})
    monkeypatch.setattr(folder, "_look", lambda path: pytest.fail("looked at a file"))
    assert sum(sizes(load_folder(tmp_path))) == 8
    monkeypatch.setattr(sets, "MEMORY_LIMIT", 8)  # streamed, and few enough files to look at
    with pytest.raises(pytest.fail.Exception):
        load_folder(tmp_path)
    monkeypatch.setattr(sets, "MANY_FILES", 7)
    assert sum(sizes(load_folder(tmp_path))) == 8


# ---- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_limit", [0, 1 << 20])
def test_several_sizes_without_image_size(memory_limit, tmp_path):
    fill(tmp_path, {"cat": 4, "dog": 4})
    write(tmp_path / "dog" / "tall.jpg", size=(8, 20))
    with pytest.raises(UsageError, match=r"differ in size: pass --data\.image-size"):
        load_folder(tmp_path, image_size=None, memory_limit=memory_limit)
    assert load_folder(tmp_path).image_shape == (6, 6, 3)


def test_one_size_needs_no_image_size_and_a_photo_on_its_side_counts_as_it_is_seen(tmp_path):
    fill(tmp_path, {"cat": 4, "dog": 4}, size=(10, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path / "dog" / "side.jpg", size=(8, 10), exif=exif)  # stored tall, seen wide
    assert load_folder(tmp_path, image_size=None).image_shape == (8, 10, 3)


@pytest.mark.parametrize("memory_limit", [1, 1 << 20])
def test_splits_of_different_sizes(memory_limit, tmp_path):
    fill(tmp_path / "train", {"cat": 4, "dog": 4}, size=(10, 8))
    fill(tmp_path / "test", {"cat": 1, "dog": 1}, size=(8, 8))
    with pytest.raises(UsageError, match=r"the splits of folder:.* differ in size: pass --data\.image-size"):
        load_folder(tmp_path, image_size=None, memory_limit=memory_limit)


# ---- wrong folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({}, "there is no folder {}"),
        ({".": 0}, r"{} holds no class folders \(one subfolder of images for each"),
        ({"cat": 4, "dog": 4, "emu": 0}, r"{}/emu holds no images \(\.jpg, "),
        (
            {"train/cat": 4, "test/cat": 1, "test/eel": 1},
            "{}/test/eel is a class that the training split",
        ),
        ({"val/cat": 4, "test/cat": 4}, "{} holds test and val, but no folder train"),
        ({"cat": 1, "dog": 1}, "2 images are too few"),
        ({"cat": 1, "dog": 1, "eel": 1}, "a class needs two images"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_wrong_folders(layout, message, tmp_path):
    root = fill(tmp_path / "set", layout)
    with pytest.raises(UsageError, match=message.format(root)):
        load_folder(root)


# ---- broken files --------------------------------------------------------------------------------------------------

WHOLE = image_bytes(size=(40, 30))
PNG = image_bytes("PNG", size=(40, 30))
BROKEN = {
    "truncated.jpg": (WHOLE[: len(WHOLE) // 2], "truncated"),
    "truncated.png": (PNG[: len(PNG) // 2], "truncated"),
    "empty.jpg": (b"", "not an image"),
    "text.jpg": (b"This is a letter, not a photograph.", "not an image"),
    "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\noid sha256:7\nsize 9", "git lfs pull"),
    # Both ends are whole: only decoding finds the fault.
    "middle.png": (PNG[:800] + bytes(64) + PNG[864:], "broken|unrecognized"),
    # Sorted before the others: the image that the size of the set is judged by.
    "-.png": (PNG[:800] + bytes(64) + PNG[864:], "broken|unrecognized"),
}


@pytest.mark.parametrize("size", [6, None])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_named_and_refused_or_skipped(name, size, tmp_path, capsys):
    fill(tmp_path, {"cat": 5, "dog": 5}, size=(40, 30))
    data, reason = BROKEN[name]
    path = write(tmp_path / "cat" / name, data)
    with pytest.raises(
        UsageError, match=rf"1 of \d+ images cannot be decoded: .*{path}: .*({reason}).*--data\.broken skip"
    ):
        load_folder(tmp_path, image_size=size)

    assert sum(sizes(load_folder(tmp_path, image_size=size, broken="skip"))) == 10
    said = capsys.readouterr()
    assert said.err.startswith("warning: 1 of ") and "; skipping them" in said.err
    assert str(path) in said.err
    assert said.out == ""


def test_broken_files_are_counted(tmp_path):
    fill(tmp_path, {"cat": 5, "dog": 5})
    for i in range(5):
        write(tmp_path / "dog" / f"bad{i}.jpg", b"")
    with pytest.raises(
        UsageError, match=r"5 of 15 images cannot be decoded: .*bad0.*bad1.*bad2\.jpg: not an image and 2 more"
    ):
        load_folder(tmp_path)


def test_skipped_files_are_all_listed(tmp_path):
    fill(tmp_path, {"cat": 5, "dog": 5})
    for i in range(5):
        write(tmp_path / "dog" / f"bad{i}.jpg", b"")
    write(tmp_path / "dog" / "middle.png", BROKEN["middle.png"][0])
    passed_over = load_folder(tmp_path, broken="skip").passed_over
    assert len(passed_over) == 6 and all("bad" in line or "middle" in line for line in passed_over)


@pytest.mark.parametrize("size", [6, None])
def test_class_of_which_no_image_can_be_read(size, tmp_path):
    fill(tmp_path, {"cat": 5, "dog": 5})
    for i in range(4):
        write(tmp_path / "eel" / f"{i}.jpg", b"")
    with pytest.raises(UsageError, match=r"^no image of eel can be read"):
        load_folder(tmp_path, image_size=size, broken="skip")


def test_nothing_but_broken_files(tmp_path):
    write(tmp_path / "cat" / "0.jpg", b"")
    with pytest.raises(UsageError, match=rf"folder:{tmp_path} train holds no image that can be read"):
        load_folder(tmp_path, broken="skip")


@pytest.mark.parametrize("extra", [b"\0" * 10, b"maker's note " * 1000])
def test_data_behind_the_end_is_no_fault(extra, tmp_path):
    fill(tmp_path, {"cat": 5, "dog": 5})
    write(tmp_path / "cat" / "camera.jpg", WHOLE + extra)
    assert sum(sizes(load_folder(tmp_path))) == 11


def test_file_that_went_away_is_named(tmp_path):
    fill(tmp_path, {"cat": 5, "dog": 5})
    data = load_folder(tmp_path, memory_limit=0)
    path = tmp_path / "cat" / "0.jpg"
    path.unlink()
    with pytest.raises(UsageError, match=rf"cannot read image {path}: "):
        for source in data.splits.values():
            list(source)
