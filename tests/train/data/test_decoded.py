"""Decoded sets are kept in a folder: equal to what is decoded, noticed when damaged or stale, bounded in size."""

import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.config import DataConfig, TrainConfig
from train.data import decoded, folder, sets, sources
from train.data.sets import load
from train.errors import UsageError
from train.from_config import load_data

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def keep_small_sets(monkeypatch):
    monkeypatch.setattr(decoded, "SMALLEST", 0)


def picture(seed, side=8):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def pets(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for seed in range(6):
            (tmp_path / "pets" / name / f"{seed}.png").write_bytes(picture(seed + 10 * len(name)))
    return tmp_path / "pets"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache" / "decoded"


def files(cache):
    return {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}


def same(one, other):
    assert one.passed_over == other.passed_over and one.images == other.images and one.classes == other.classes
    for split, source in one.splits.items():
        np.testing.assert_array_equal(source.images, other.splits[split].images)
        np.testing.assert_array_equal(source.labels, other.splits[split].labels)
        assert other.splits[split].labels.dtype == np.int32
    return True


def fails(*args):
    pytest.fail("decoded")


@pytest.mark.parametrize("name", ["folder", "folder with a size", "grey"])
def test_second_call_decodes_nothing(name, pets, cache, tfds_dir, monkeypatch, capsys):
    # scikit-learn's digits, as a prepared TFDS set, are grey
    size = 6 if name == "folder with a size" else None
    call = ("digits", {"dir": tfds_dir}) if name == "grey" else (f"folder:{pets}", {"image_size": size})
    fresh = load(call[0], **call[1])
    assert not cache.exists()
    first = load(call[0], **call[1], cache=cache)
    monkeypatch.setattr(sets, "decode_readable", fails)
    monkeypatch.setattr(folder, "_look", fails)
    second = load(call[0], **call[1], cache=cache)
    assert same(fresh, first) and same(fresh, second) and len(files(cache)) == 1
    assert not second.train.images.flags.writeable and second.train.images.ctypes.data % 64 == 0
    assert capsys.readouterr().err == ""


def test_other_splits_and_sizes_are_kept_apart(pets, cache, capsys):
    for options in ({}, {"split_seed": 1}, {"fraction": 0.5}, {"validation": 0.3}, {"image_size": 4}):
        assert same(load(f"folder:{pets}", **options), load(f"folder:{pets}", **options, cache=cache))
    assert len(files(cache)) == 5 and capsys.readouterr().err == ""


@pytest.mark.parametrize("change", ["other pixels", "same size", "one more", "one less"])
def test_changed_set_is_noticed(change, pets, cache, capsys):
    load(f"folder:{pets}", cache=cache)
    before = files(cache)
    path = pets / "cat" / "3.png"
    if change == "other pixels":
        path.write_bytes(picture(99))
    elif change == "same size":
        data = picture(99).ljust(len(path.read_bytes()), b"\0")
        path.write_bytes(path.read_bytes()[: -len(data)] + data)
        os.utime(path, ns=(1, 1))
    elif change == "one more":
        (pets / "cat" / "new.png").write_bytes(picture(98))
    else:
        path.unlink()
    assert same(load(f"folder:{pets}", cache=cache), load(f"folder:{pets}"))
    assert capsys.readouterr().err == f"note: folder:{pets} has changed since it was decoded: decoding it again\n"
    assert len(files(cache)) == 1 and files(cache).keys() != before.keys()


def test_shards_of_a_prepared_set_are_compared(tfds_dir, cache, capsys):
    load("digits", dir=tfds_dir, cache=cache)
    shard = next(tfds_dir.glob("digits/*/*array_record*"))
    os.utime(shard, ns=(1, 1))
    load("digits", dir=tfds_dir, cache=cache)
    assert "note: digits has changed since it was decoded" in capsys.readouterr().err and len(files(cache)) == 1


@pytest.mark.parametrize("damage", ["truncated", "empty", "a bit", "the header", "the checksum", "longer"])
def test_damaged_file_is_noticed_and_replaced(damage, pets, cache, capsys, monkeypatch):
    first = load(f"folder:{pets}", cache=cache)
    (path,) = cache.iterdir()
    data = bytearray(path.read_bytes())
    flipped = {"a bit": len(data) // 2, "the header": 12, "the checksum": 2}
    if damage in flipped:
        data[flipped[damage]] ^= 1
    # Replaced like this, the file that `first` maps stays as it is.
    path.unlink()
    path.write_bytes({"truncated": data[:-5], "empty": b"", "longer": data + b"x"}.get(damage, data))
    assert same(load(f"folder:{pets}", cache=cache), first)
    assert capsys.readouterr().err == f"note: {path} is damaged: decoding the images again\n"
    monkeypatch.setattr(sets, "decode_readable", fails)
    assert same(load(f"folder:{pets}", cache=cache), first) and capsys.readouterr().err == ""


def test_broken_images_keep_their_list(pets, cache, capsys, monkeypatch):
    whole = (pets / "dog" / "2.png").read_bytes()
    # Only decoding finds it: both ends of the file are as they should be.
    (pets / "dog" / "2.png").write_bytes(whole[:60] + bytes(20) + whole[80:])
    with pytest.raises(UsageError, match=r"1 of 12 images cannot be decoded: .*2\.png"):
        load(f"folder:{pets}", cache=cache)
    first = load(f"folder:{pets}", broken="skip", cache=cache)
    said = capsys.readouterr().err
    monkeypatch.setattr(sets, "decode_readable", fails)
    assert same(load(f"folder:{pets}", broken="skip", cache=cache), first)
    assert "dog/2.png" in first.passed_over[0] and capsys.readouterr().err == said
    with pytest.raises(UsageError, match=r"1 of 12 images cannot be decoded: .*2\.png"):
        load(f"folder:{pets}", cache=cache)


def test_files_that_cannot_be_opened_are_looked_at_every_time(pets, cache, capsys):
    (pets / "dog" / "2.png").write_bytes(b"text")
    said = set()
    for _ in range(2):
        assert load(f"folder:{pets}", broken="skip", cache=cache).passed_over == (f"{pets}/dog/2.png: not an image",)
        said.add(capsys.readouterr().err)
    assert len(said) == 1
    with pytest.raises(UsageError, match="1 of 12 images cannot be decoded"):
        load(f"folder:{pets}", cache=cache)


def test_least_recently_used_go_first(pets, cache, monkeypatch):
    def touch(seed):
        load(f"folder:{pets}", split_seed=seed, cache=cache)
        for number, path in enumerate(sorted(cache.iterdir(), key=lambda path: path.stat().st_mtime_ns)):
            os.utime(path, (number + 1, number + 1))  # clocks of file systems are coarse
        return set(files(cache))

    zero, one = touch(0), touch(1) - touch(0)
    size = sum(path.stat().st_size for path in cache.iterdir())
    monkeypatch.setattr(decoded, "CAPACITY", size)
    assert touch(2) >= zero and not touch(2) & one  # 0 was read after 1
    monkeypatch.setattr(decoded, "CAPACITY", 10)
    assert touch(3) == touch(2)  # larger than the folder may be


def test_folder_that_cannot_be_written(pets, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert same(load(f"folder:{pets}", cache=tmp_path / "file" / "decoded"), load(f"folder:{pets}"))
    assert capsys.readouterr().err.count("note: the decoded images are not kept in ") == 1


def test_several_at_once(pets, cache):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: load(f"folder:{pets}", cache=cache), range(8)))
    assert all(same(found[0], other) for other in found) and len(files(cache)) == 1


@pytest.mark.parametrize("kept", [True, False])
def test_field_cache(kept, pets, cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    data = DataConfig(name=f"folder:{pets}")
    load_data(TrainConfig(data=data, cache="auto" if kept else "none"))
    assert kept == (cache.parent / "resnet-jax" / "decoded").exists()
    if kept:
        load_data(TrainConfig(data=data, cache=str(cache.parent / "mine")))
        assert len(files(cache.parent / "mine" / "decoded")) == 1


@pytest.mark.parametrize("allowed", [True, False])
def test_processes_decode_what_threads_do(allowed, pets, monkeypatch):
    if not allowed:  # as in a container without shared memory
        monkeypatch.setattr("joblib.externals.loky.ProcessPoolExecutor", lambda count: os.stat("/nowhere"))
    (pets / "dog" / "2.png").write_bytes(b"text")
    source = load(f"folder:{pets}", image_size=8, memory_limit=0).train
    here = sources.decode_readable(source)
    monkeypatch.setattr(sources, "MANY_IMAGES", 1)
    monkeypatch.setattr(sources, "CHUNK", 1)  # more tasks than are sent ahead
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    there = sources.decode_readable(source)
    assert here[1] == there[1] and len(here[1]) == 1 and "2.png: not an image" in here[1][0]
    for one, other in zip(here[0], there[0], strict=True):
        np.testing.assert_array_equal(one["image"], other["image"])
        assert one["label"] == other["label"]


def test_a_script_without_a_main_guard_and_processes_without_jax(pets, tmp_path):
    """Processes import neither the user's script nor JAX."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
from train.data import load, sources
print("once", "jax" in sys.modules)
sources.MANY_IMAGES = 1
print(len(load("folder:{pets}", image_size=8).train))
""")
    program = "import sys, train.data.decode; print('jax' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command, printed in (([str(script)], "once False\n8\n"), (["-c", program], "False\n")):
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
        assert (done.stdout, done.stderr) == (printed, "")
