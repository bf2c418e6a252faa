"""Batches by bucket: each image once per epoch, one bucket per batch, resumable anywhere, the same in all modes."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_jax.parallel import make_mesh
from train.detect.batches import BucketBatches, EvalBatches, batch_like, bucket_members, bucket_schedule
from train.detect.layout import Layout
from train.detect.objects import Annotated, Objects
from train.errors import UsageError


def split(count=22):
    """Images of two sizes, whose pixels are their number."""

    def example(i):
        size = (20, 40) if i % 3 else (40, 30)
        boxes = np.array([[1, 2, 10 + i % 5, 12]] * (i % 4), np.float32).reshape(-1, 4)
        labels = np.full(i % 4, i % 2, np.int32)
        pixels = np.full((*size, 3), i, np.uint8)
        return Annotated(
            name=f"{i}", read=lambda: pixels, size=size, boxes=boxes, labels=labels, crowd=np.zeros(i % 4, bool)
        )

    layout = Layout(min_size=None, max_size=None, buckets=((32, 64), (64, 32)), rows=4)
    return Objects(examples=tuple(example(i) for i in range(count)), layout=layout)


def one():
    return make_mesh(jax.devices()[:1])


def ids(batch):
    return np.asarray(batch["id"]).ravel().tolist()


@pytest.fixture(scope="module")
def stream():
    """The first batches of a stream, over several epochs of each bucket."""
    batches = BucketBatches(split(), batch=4, seed=3, mesh=one())
    return [next(batches) for _ in range(44)]


def test_one_bucket_per_batch(stream):
    for batch in stream:
        bucket = (64, 32) if ids(batch)[0] % 3 == 0 else (32, 64)
        assert batch["image"].shape == (4, *bucket, 3)
        for image, size, number in zip(batch["image"], np.asarray(batch["size"]), ids(batch), strict=True):
            assert size.tolist() == ([20, 40] if number % 3 else [40, 30])
            assert (np.asarray(image)[: size[0], : size[1]] == number).all()
            assert int(np.asarray(image, int).sum()) == 3 * number * size.prod()


def test_each_image_once_per_epoch_of_its_bucket(stream):
    for members in bucket_members(split()):
        drawn = [i for batch in stream for i in ids(batch) if i in members]
        assert len(drawn) == 4 * 2 * len(members)  # in N batches, a bucket of n images has n
        epochs = [drawn[i : i + len(members)] for i in range(0, len(drawn), len(members))]
        assert all(sorted(epoch) == members.tolist() for epoch in epochs) and epochs[0] != epochs[1]


@pytest.mark.parametrize("step", [0, 1, 5, 21, 22, 37])
def test_resumed_anywhere_it_goes_on_equally(stream, step):
    batches = BucketBatches(split(), batch=4, seed=3, mesh=one())
    batches.restore({"position": 4 * step})
    for want in stream[step : step + 3]:
        for name, value in next(batches).items():
            np.testing.assert_array_equal(value, want[name])
    assert batches.state() == {"position": 4 * (step + 3)}


def test_the_seed_decides_the_order(stream):
    other = BucketBatches(split(), batch=4, seed=4, mesh=one())
    assert [ids(next(other)) for _ in range(6)] != [ids(batch) for batch in stream[:6]]


@pytest.mark.parametrize("mode", ["jit", "shard_map", "pmap"])
def test_modes_and_devices_see_the_same_examples(stream, mode):
    batches = BucketBatches(split(), batch=4, seed=3, mesh=make_mesh(jax.devices()[:2]), mode=mode)
    for want in stream[:4]:
        batch = next(batches)
        for name, value in batch.items():
            assert value.shape == ((2, 2, *want[name].shape[1:]) if mode == "pmap" else want[name].shape)
            np.testing.assert_array_equal(np.asarray(value).reshape(want[name].shape), want[name])


def test_shapes_to_compile_for(stream):
    layout = split().layout
    for batch in stream[:6]:
        like = batch_like(layout, layout.buckets.index(batch["image"].shape[1:3]), 4)
        assert {n: (x.shape, x.dtype) for n, x in batch.items()} == {n: (x.shape, x.dtype) for n, x in like.items()}
    first = next(iter(EvalBatches(split(), batch=4, mesh=one())))
    like = batch_like(layout, 0, 4, valid=True)
    assert {n: (x.shape, x.dtype) for n, x in first.items()} == {n: (x.shape, x.dtype) for n, x in like.items()}


@pytest.mark.parametrize(("batch", "devices", "steps"), [(4, 1, 6), (5, 2, 5), (100, 1, 2)])
def test_evaluation_sees_each_image_once(batch, devices, steps):
    batches = EvalBatches(split(), batch=batch, mesh=make_mesh(jax.devices()[:devices]))
    assert len(batches) == steps
    for _ in range(2):
        seen = [
            (number, size.tolist())
            for part in batches
            for number, size, valid in zip(ids(part), np.asarray(part["size"]), np.asarray(part["valid"]), strict=True)
            if valid
        ]
        assert sorted(number for number, _ in seen) == list(range(22))
        assert all(size == ([20, 40] if number % 3 else [40, 30]) for number, size in seen)


def test_a_split_without_images_of_some_bucket():
    source = split(1)
    assert [ids(batch) for batch in EvalBatches(source, batch=2, mesh=one())] == [[0, 0]]
    wide = replace(source, layout=replace(source.layout, buckets=((32, 64), (64, 32), (64, 64))))
    batches = BucketBatches(wide, batch=1, seed=0, mesh=one())
    assert [ids(next(batches)) for _ in range(3)] == [[0]] * 3


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any))
@settings(deadline=None, max_examples=100)
def test_buckets_come_as_often_as_their_images(counts):
    order, before = bucket_schedule(counts)
    taken = np.cumsum(order[:, None] == np.arange(len(counts)), axis=0)
    shares = np.arange(1, len(order) + 1)[:, None] * np.array(counts) / sum(counts)
    assert (taken[-1] == counts).all() and (taken - shares < 1).all()
    assert (before == taken[np.arange(len(order)), order] - 1).all()


def test_bad_batches():
    with pytest.raises(UsageError, match="a batch of 3 is not divisible by 2 devices"):
        BucketBatches(split(), batch=3, seed=0, mesh=make_mesh(jax.devices()[:2]))
    with pytest.raises(UsageError, match="a batch of 23 is larger than the 22 training images"):
        BucketBatches(split(), batch=23, seed=0, mesh=one())
    with pytest.raises(UsageError, match="a batch must hold at least one image, got 0"):
        EvalBatches(split(), batch=0, mesh=one())
