"""Streams of batches: the same from memory and from Grain's threads, exact restarts, every example exactly once."""

import io
from collections import Counter
from itertools import pairwise

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from resnet_jax.parallel import batch_sharding, make_mesh
from tests.reference.compare import assert_equal
from train.data.batches import eval_batch_size, eval_batches, stream_indices, train_batches
from train.data.sources import Arrays, Encoded
from train.errors import UsageError

COUNT = 37  # divisible by neither the batch nor the devices
MODES = ("jit", "pmap", "shard_map")
KINDS = ("resident", "streamed", "cropped")


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def sources():
    """The same images in memory, encoded, and encoded with random crops; the label tells which image it is."""
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 6, 6, 3), dtype=np.uint8)
    files = [png(image) for image in images]

    def encoded(**options):
        return Encoded(
            read=lambda i: (files[i], i), name=lambda i: f"{i}.png", indices=np.arange(COUNT), channels=3, **options
        )

    return {
        "resident": Arrays(images=images, labels=np.arange(COUNT)),
        "streamed": encoded(size=None),
        "cropped": encoded(size=6, random_crop=True),
    }


@pytest.fixture(scope="module")
def mesh():
    return make_mesh()


def take(stream, count):
    return [jax.tree.map(np.asarray, next(stream)) for _ in range(count)]


# ---- the order -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 50), st.integers(0, 2**32), st.integers(0, 4), st.data())
def test_every_example_once_an_epoch(count, seed, epoch, data):
    """However an epoch is cut into batches, some of which straddle its borders."""
    start, stop = epoch * count, (epoch + 1) * count
    cuts = sorted(data.draw(st.lists(st.integers(max(start - 5, 0), stop + 5), max_size=4)))
    edges = [max(start - 5, 0), *cuts, stop + 5]
    parts = [stream_indices(count, seed, a, b - a) for a, b in pairwise(edges) if b > a]
    order = np.concatenate(parts)[start - edges[0] :][:count]
    assert sorted(order) == list(range(count))


def test_epochs_and_seeds_differ():
    orders = {(seed, epoch): tuple(stream_indices(40, seed, 40 * epoch, 40)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(set(orders.values())) == 4


# ---- training streams ----------------------------------------------------------------------------------------------


def test_resident_and_streamed_are_the_same(sources, mesh):
    streams = [train_batches(sources[kind], batch=8, seed=3, mesh=mesh) for kind in ("resident", "streamed")]
    resident, streamed = (take(stream, 11) for stream in streams)
    assert_equal(streamed, resident)
    labels = np.concatenate([batch["label"] for batch in resident])
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, stream_indices(COUNT, 3, 0, 88))
    np.testing.assert_array_equal(resident[0]["image"], sources["resident"].images[resident[0]["label"]])


@pytest.mark.parametrize("kind", KINDS)
def test_goes_on_in_the_middle_of_an_epoch(kind, sources, mesh):
    def new():
        return train_batches(sources[kind], batch=16, seed=5, mesh=mesh)

    whole = take(new(), 7)
    stream = new()
    take(stream, 3)
    state = stream.state()
    rest = take(stream, 4)
    assert_equal(rest, whole[3:])

    fresh = new()
    fresh.restore(state)
    assert_equal(take(fresh, 4), whole[3:])
    stream.restore(state)  # and the stream that had gone further goes back
    assert_equal(take(stream, 4), whole[3:])
    assert fresh.state() == stream.state()


def test_random_crops_change_from_epoch_to_epoch(sources, mesh):
    batches = take(train_batches(sources["cropped"], batch=8, seed=0, mesh=mesh), 10)  # two epochs and a bit
    views = {}
    for batch in batches:
        for image, label in zip(batch["image"], batch["label"], strict=True):
            views.setdefault(int(label), []).append(image.tobytes())
    twice = [v for v in views.values() if len(v) > 1]
    assert len(twice) == COUNT
    assert all(len(set(v)) == len(v) for v in twice)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_layout(kind, mode, sources, mesh):
    batch = next(train_batches(sources[kind], batch=16, seed=0, mesh=mesh, mode=mode))
    want = stream_indices(COUNT, 0, 0, 16)
    if mode == "pmap":
        assert batch["image"].shape == (8, 2, 6, 6, 3)
        assert batch["label"].shape == (8, 2)
    else:
        assert batch["image"].shape == (16, 6, 6, 3)
        for array in batch.values():
            assert array.sharding == batch_sharding(mesh)
            assert {s.data.shape[0] for s in array.addressable_shards} == {2}
    assert batch["image"].dtype == np.uint8
    np.testing.assert_array_equal(np.ravel(batch["label"]), want)
    images = np.reshape(batch["image"], (16, 6, 6, 3))
    np.testing.assert_array_equal(images, sources["resident"].images[want])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (12, "a batch of 12 is not divisible by 8 devices: choose a multiple of 8"),
        (-8, "a batch of -8 is not divisible"),
        (40, "a batch of 40 is larger than the 37 training images"),
    ],
)
def test_impossible_batches(batch, message, sources, mesh):
    with pytest.raises(UsageError, match=message):
        train_batches(sources["streamed"], batch=batch, seed=0, mesh=mesh)


# ---- evaluation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)  # evaluation never crops at random
@pytest.mark.parametrize("batch", [5, 20, 64])
def test_evaluation_shows_each_example_once(batch, kind, mode, sources, mesh):
    seen = Counter()
    size = -(-batch // 8) * 8
    batches = list(eval_batches(sources[kind], batch=batch, mesh=mesh, mode=mode))
    assert len(batches) == -(-COUNT // size)
    for b in batches:
        lead = (8, size // 8) if mode == "pmap" else (size,)
        assert {k: v.shape for k, v in b.items()} == {"image": (*lead, 6, 6, 3), "label": lead, "valid": lead}
        assert mode == "pmap" or all(array.sharding == batch_sharding(mesh) for array in b.values())
        valid, label = np.ravel(b["valid"]), np.ravel(b["label"])
        assert (valid.dtype, label.dtype) == (bool, np.int32)
        seen.update(label[valid].tolist())
        images = np.reshape(b["image"], (size, 6, 6, 3))
        np.testing.assert_array_equal(images, sources["resident"].images[label])
    assert seen == Counter(range(COUNT))


@pytest.mark.parametrize(
    ("wanted", "validation", "largest", "size"),
    [
        (500, 6, 6, 6),  # six images are not padded to 500
        (500, 6, 60, 60),
        (500, 6, 10_000, 128),  # neither is validation, for the sake of a large test split
        (500, 144, 360, 144),
        (500, 5000, 10_000, 500),
        (16, 6, 10_000, 16),
    ],
)
def test_evaluation_batches_fit_the_splits(wanted, validation, largest, size):
    assert eval_batch_size(wanted, validation, largest) == size


def test_evaluation_batch_of_nothing(sources, mesh):
    with pytest.raises(UsageError, match="a batch must hold at least one image, got 0"):
        next(eval_batches(sources["resident"], batch=0, mesh=mesh))


# ---- unreadable images ---------------------------------------------------------------------------------------------


def broken_at(index):
    files = [png(np.full((6, 6, 3), i, np.uint8)) for i in range(COUNT)]
    files[index] = files[index][:40] + b"?" * 20
    return Encoded(
        read=lambda i: (files[i], i), name=lambda i: f"photos/{i}.png", indices=np.arange(COUNT), size=6, channels=3
    )


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_unreadable_image_stops_a_stream_with_its_name(kind, mesh):
    """Grain's threads hand the error on as it is, so that the user gets the one line."""
    train = train_batches(broken_at(30), batch=8, seed=0, mesh=mesh)
    with pytest.raises(UsageError, match=r"cannot read image photos/30\.png: "):
        take(train if kind == "train" else eval_batches(broken_at(30), batch=8, mesh=mesh), 6)


# ---- several processes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "mode"), [*((kind, "pmap") for kind in KINDS), ("resident", "eval"), ("streamed", "eval")]
)
def test_processes_share_the_batches(kind, mode, sources, mesh, monkeypatch):
    """Step by step, the parts of two processes put together are the batch of one."""

    def batches(mode):
        if mode == "eval":
            return take(eval_batches(sources[kind], batch=16, mesh=mesh), 3)
        stream = train_batches(sources[kind], batch=16, seed=2, mesh=mesh, mode=mode)
        stream.restore({"position": 16})  # the next step straddles two epochs
        return take(stream, 2)

    whole = batches("eval" if mode == "eval" else "jit")
    parts = []
    for process in range(2):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        parts.append(batches(mode))
    for want, *own in zip(whole, *parts, strict=True):
        joined = jax.tree.map(lambda want, *x: np.concatenate(x).reshape(-1, *want.shape[1:]), want, *own)
        assert_equal(joined, want)
