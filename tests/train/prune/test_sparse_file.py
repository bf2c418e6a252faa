"""Sparse files: exact round trips, the error of int8, sizes, reproducible bytes, and every kind of damage."""

import json
import tracemalloc
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from resnet_jax.masks import no_masks
from resnet_jax.resnet import MODELS
from resnet_jax.tree import is_kernel, select
from train.errors import RunError, UsageError
from train.prune import sparse_file
from train.prune.sparse_file import FORMAT, is_sparse_file, load_sparse, save_sparse, sizes

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
LEAVES = st.tuples(SHAPES, st.sampled_from(["never", "all", "none", "some"]), st.integers(0, 2**32 - 1))
TREES = st.dictionaries(
    st.text(max_size=3),
    st.recursive(LEAVES, lambda inner: st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=6),
    max_size=3,
)
ODD = np.array([0.0, -0.0, 1e-45, -3.4e38, np.inf], np.float32)


def built(tree, *, odd=ODD):
    """(arrays, masks) of a tree of (shape, kind of mask, seed)."""
    if isinstance(tree, dict):
        pairs = {key: built(inner, odd=odd) for key, inner in tree.items()}
        return {key: array for key, (array, _) in pairs.items()}, {key: mask for key, (_, mask) in pairs.items()}
    shape, kind, seed = tree
    rng = np.random.default_rng(seed)
    array = np.asarray(rng.standard_normal(shape), np.float32)
    if len(odd):
        array = np.where(rng.random(shape) < 0.3, rng.choice(odd, shape), array)
    if kind == "never":
        return array, np.ones((), bool)
    mask = np.asarray({"all": np.ones(shape, bool), "none": np.zeros(shape, bool)}.get(kind, rng.random(shape) < 0.5))
    return np.where(mask, array, np.float32(0)), mask


def assert_same(a, b):
    """Bit-equal trees of NumPy arrays: structure, shapes, dtypes, the sign of zeros."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert isinstance(y, np.ndarray)
        assert (x.shape, x.dtype, x.tobytes()) == (y.shape, y.dtype, y.tobytes())


def pruned(name):
    """(variables, masks) of a network of random weights: 90 % of its kernels, but for stem and head, pruned by size."""
    model, rng = MODELS[name](num_classes=10), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, 32, 32, 3))), jax.random.key(0))
    dense = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), dict(shapes))
    chosen = select(dense["params"], lambda path, leaf: is_kernel(path, leaf) and path[:4] not in ("stem", "head"))
    scores = [np.abs(w).ravel() for w, c in zip(*map(jax.tree.leaves, (dense["params"], chosen)), strict=True) if c]
    ordered = np.sort(np.concatenate(scores))
    least = ordered[round(0.9 * ordered.size)]
    masks = jax.tree.map(lambda w, c: np.abs(w) >= least if c else np.ones((), bool), dense["params"], chosen)
    params = jax.tree.map(lambda w, m: np.where(m, w, np.float32(0)), dense["params"], masks)
    kept = sum(int(m.sum()) for m in jax.tree.leaves(masks) if m.ndim)
    assert kept == ordered.size - round(0.9 * ordered.size)
    return {**dense, "params": params}, masks


@pytest.fixture(scope="module")
def network():
    """(variables, masks) of two small layers."""
    params, masks = built({"a": {"kernel": ((3, 4, 5), "some", 0), "bias": ((5,), "never", 1)}, "b": ((6,), "some", 2)})
    return {"params": params, "batch_stats": {"norm": {"mean": np.arange(5, dtype=np.float32)}}}, masks


@pytest.fixture(params=["float32", "int8"])
def saved(request, network, tmp_path):
    variables, masks = network
    finite = jax.tree.map(lambda leaf: np.clip(leaf, -9, 9), variables)
    save_sparse(tmp_path / "net.sparse", finite, masks, values=request.param, metadata={"epoch": "3", "é\n": '"'})
    return tmp_path / "net.sparse"


@settings(deadline=None, max_examples=150)
@given(tree=TREES, statistics=TREES)
def test_what_is_saved_comes_back_bit_by_bit(tmp_path_factory, tree, statistics):
    path = tmp_path_factory.getbasetemp() / "round_trip"
    params, masks = built(tree)
    variables = {"params": params, "batch_stats": built(statistics)[0]}
    save_sparse(path, variables, masks, metadata={"sparsity": "0.9", "": "é"})
    loaded, loaded_masks, metadata = load_sparse(path)
    assert_same(variables, loaded)
    assert_same(masks, loaded_masks)
    assert metadata == {"sparsity": "0.9", "": "é"}


def test_the_mask_and_not_the_value_says_what_is_kept(tmp_path):
    variables = {"params": {"w": np.array([0.0, -0.0, 0.0, 2.0], np.float32)}}
    masks = {"w": np.array([True, True, False, True])}
    for values in ("float32", "int8"):
        save_sparse(tmp_path / "net", variables, masks, values=values)
        loaded, loaded_masks, metadata = load_sparse(tmp_path / "net")
        assert_same(masks, loaded_masks)
        np.testing.assert_array_equal(loaded["params"]["w"], variables["params"]["w"])
        assert metadata == {}
        assert np.signbit(loaded["params"]["w"]).tolist() == [False, values == "float32", False, False]


def test_arrays_of_jax_are_saved_too(tmp_path, network):
    variables, masks = network
    save_sparse(tmp_path / "jax", *jax.tree.map(jnp.asarray, (variables, masks)))
    save_sparse(tmp_path / "numpy", variables, masks)
    assert (tmp_path / "jax").read_bytes() == (tmp_path / "numpy").read_bytes()
    save_sparse(tmp_path / "dense", variables, no_masks(variables["params"]))
    assert_same(variables, load_sparse(tmp_path / "dense")[0])


@settings(deadline=None, max_examples=100)
@given(tree=TREES, exponent=st.integers(-44, 38))
def test_int8_is_off_by_half_a_scale_at_most(tmp_path_factory, tree, exponent):
    path = tmp_path_factory.getbasetemp() / "int8"
    params, masks = built(tree, odd=np.zeros(2, np.float32))
    params = jax.tree.map(lambda w: np.clip(w * 10.0**exponent, -3.4e38, 3.4e38).astype(np.float32), params)
    save_sparse(path, {"params": params}, masks, values="int8")
    loaded, loaded_masks, _ = load_sparse(path)
    assert_same(masks, loaded_masks)
    for w, mask, q in zip(*map(jax.tree.leaves, (params, masks, loaded["params"])), strict=True):
        if mask.ndim != w.ndim or (w.ndim == 0 and mask):
            assert w.tobytes() == q.tobytes()
            continue
        w = w.astype(np.float64)
        scale = np.abs(w).max(tuple(range(w.ndim - 1)) if w.ndim > 1 else None, keepdims=True, initial=0) / 127
        # No scale is below the least normal number.
        assert (np.abs(w - q) <= np.maximum(scale, np.finfo(np.float32).tiny) * (0.5 + 2e-5)).all()
        assert not q[w == 0].any()


def test_the_order_of_dicts_does_not_matter(tmp_path, network):
    def turned(tree):
        return {key: turned(tree[key]) for key in reversed(tree)} if isinstance(tree, dict) else tree

    variables, masks = network
    save_sparse(tmp_path / "a", variables, masks, metadata={"x": "1", "y": "2"})
    save_sparse(tmp_path / "b", turned(variables), turned(masks), metadata={"y": "2", "x": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_files_are_small(tmp_path):
    """ResNet-20 at 90 %: a seventh of its dense file, a fifteenth in int8, and less than gzip's."""
    variables, masks = pruned("resnet20")
    for values, ratio in (("float32", 7.7), ("int8", 17)):
        save_sparse(tmp_path / values, variables, masks, values=values)
        measured = sizes(tmp_path / values, variables)
        assert measured["file_bytes"] == (tmp_path / values).stat().st_size < measured["gzip_bytes"]
        assert 4 * 272_000 < measured["dense_bytes"] < 4 * 275_000
        assert measured["ratio"] == measured["dense_bytes"] / measured["file_bytes"] > ratio
    assert_same(variables, load_sparse(tmp_path / "float32")[0])


def test_masks_cost_no_more_than_they_tell(tmp_path):
    """Whole channels pruned: almost nothing; at random: about the entropy of a bit; every second: a bit a weight."""
    rng = np.random.default_rng(0)
    rows, scattered = np.zeros((64, 1024), bool), rng.random((64, 1024)) < 0.1
    rows[::3] = True
    entropy = -(0.1 * np.log2(0.1) + 0.9 * np.log2(0.9)) * scattered.size / 8
    for mask, most in ((rows, 300), (scattered, 1.05 * entropy), (rng.random((64, 1024)) < 0.5, 64 * 128)):
        save_sparse(tmp_path / "net", {"params": {"w": mask.astype(np.float32)}}, {"w": mask})
        assert parts(tmp_path / "net")["mask"].nbytes <= most
        assert_same({"w": mask}, load_sparse(tmp_path / "net")[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, m: m["a"].update(bias=np.zeros((), bool)), "params/a/bias is"),
        (lambda v, m: m["a"].update(kernel=np.ones((3, 4), bool)), r"params/a/kernel is \(3, 4, 5\)"),
        (lambda v, m: m["a"].update(kernel=np.ones((3, 4, 5), np.float32)), "the mask of params/a/kernel is float32"),
        (lambda v, m: m["a"].pop("bias"), "params/a/bias is not in both"),
        (lambda v, m: m.update(c=np.ones((), bool)), "params/c is not in both"),
        (lambda v, m: m["a"].update(bias={}), "params/a/bias is empty"),
        (lambda v, m: m["a"].update(kernel=np.zeros((3, 4, 5), bool)), "params/a/kernel has pruned weights"),
        (lambda v, m: v["params"].update(b=np.ones(6)), "params/b is float64"),
        (lambda v, m: v["batch_stats"]["norm"].update(mean=np.ones(3, int)), "batch_stats/norm/mean is int64"),
        (lambda v, m: v.pop("params"), "is not in both"),
    ],
)
def test_wrong_arguments_name_the_leaf(tmp_path, network, change, message):
    variables, masks = jax.tree.map(lambda leaf: leaf, network)
    change(variables, masks)
    with pytest.raises(ValueError, match=message):
        save_sparse(tmp_path / "net", variables, masks)
    assert not list(tmp_path.iterdir())


def test_what_int8_and_the_format_cannot_hold(tmp_path, network, monkeypatch):
    variables, masks = network
    infinite = {"params": {"w": np.array([1, np.inf], np.float32)}}
    with pytest.raises(ValueError, match="params/w has weights that are not finite"):
        save_sparse(tmp_path / "net", infinite, {"w": np.ones(2, bool)}, values="int8")
    with pytest.raises(ValueError, match="float32 or int8, got 'int4'"):
        save_sparse(tmp_path / "net", variables, masks, values="int4")
    with pytest.raises(ValueError, match="strings to strings"):
        save_sparse(tmp_path / "net", variables, masks, metadata={"epoch": 3})
    for limit in ("MAX_MASKED", "MAX_LAYOUT"):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="too large"):
            patch.setattr(sparse_file, limit, 50)
            save_sparse(tmp_path / "net", variables, masks)
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "none" / "net"):
        with pytest.raises(RunError, match="cannot write"):
            save_sparse(path, variables, masks)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def refused(path):
    """What `load_sparse` says of a file, in one line."""
    with pytest.raises(UsageError) as error:
        load_sparse(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def test_no_flipped_byte_goes_unnoticed(saved):
    content, wanted = saved.read_bytes(), load_sparse(saved)
    noticed = 0
    for i in range(len(content)):
        damaged = bytearray(content)
        damaged[i] ^= (1, 2, 4, 8, 16, 32, 64, 128, 255)[i % 9]
        saved.write_bytes(damaged)
        try:
            found = load_sparse(saved)
        except UsageError as error:
            assert "\n" not in str(error)
            noticed += 1
        else:
            assert_same(wanted[:2], found[:2])
            assert found[2] == wanted[2]
    # What may differ is blank: the header's padding.
    assert noticed > 0.98 * len(content)


def test_what_is_cut_or_lengthened_is_refused(saved):
    content = saved.read_bytes()
    for length in {0, 1, 7, 8, 9, *range(10, len(content), 97), len(content) - 1}:
        saved.write_bytes(content[:length])
        refused(saved)
        assert not is_sparse_file(saved)
    saved.write_bytes(content + b"\0")
    refused(saved)
    saved.write_bytes(content)
    assert is_sparse_file(saved)
    load_sparse(saved)


def test_files_of_others_are_refused(tmp_path, saved):
    assert "no sparse file at" in refused(tmp_path / "missing")
    refused(tmp_path)
    tensors = {"layout": np.zeros(3, np.uint8)}
    save_file(tensors, tmp_path / "plain")
    save_file(tensors, tmp_path / "other", {"format": "pt"})
    save_file(tensors, tmp_path / "newer", {"resnet-jax sparse 2": "{}"})
    (tmp_path / "text").write_text("resnet-jax sparse 1" * 99)
    for name in ("plain", "other"):
        assert "no sparse file of resnet-jax" in refused(tmp_path / name)
    assert "version 2, not 1: update" in refused(tmp_path / "newer")
    refused(tmp_path / "text")
    assert not any(map(is_sparse_file, (tmp_path, *(tmp_path / n for n in ("missing", "plain", "other", "text")))))
    assert is_sparse_file(tmp_path / "newer") and is_sparse_file(saved)


def parts(path):
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def forge(path, metadata=None, **changes):
    """Change a file's parts (None: leave out) and metadata, and make its checksum right again."""
    tensors = {name: tensor for name, tensor in {**parts(path), **changes}.items() if tensor is not None}
    metadata = load_sparse(path)[2] if metadata is None else metadata
    head = {"metadata": metadata, "sha256": sparse_file._digest(metadata, tensors)}
    save_file(tensors, path, {FORMAT: json.dumps(head)})


def deflated(content):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return np.frombuffer(zlib.compress(text, 9), np.uint8)


def layout(path):
    return json.loads(zlib.decompress(parts(path)["layout"].tobytes()))


HUGE = 2**40


@pytest.mark.parametrize(
    "leaf",
    [
        [["params", "z"], [HUGE, HUGE, HUGE], False],
        [["params", "z"], [HUGE], True],
        [["params", "z"], [2**27, 8], True],
        [["params", "z"], [0, HUGE, HUGE, HUGE], True],
        [["params", "z"], [0] * 99, False],
        [["params", "z"], [-1, -1], False],
        [["params", "z"], [False], False],
        [["params", "z"], [1.5], False],
        [["params", "z"], "12", False],
        [["params", "z"], None, True],
        [["params", 3], [0], False],
        [["params"], [0], False],
        [["params", "b", "under"], [0], False],
        [["zeta"], [0], True],
        [[], [0], False],
        [{}, [0], False],
        ["params"],
        3,
        None,
    ],
    ids=str,
)
def test_forged_layouts_are_refused_before_memory_is_asked_for(saved, leaf):
    """The checksum is right: whoever forged the file could compute it too."""
    forge(saved, layout=deflated(sorted([*layout(saved), leaf], key=str)))
    refused_small(saved)


def test_an_unchanged_forgery_loads(saved):
    wanted = load_sparse(saved)
    forge(saved, layout=deflated(layout(saved)))
    assert_same(wanted[:2], load_sparse(saved)[:2])


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": deflated(b" " * 2**28)},  # a bomb: 256 MiB in 255 kB
        {"layout": deflated(b"[" * 100_000)},
        {"layout": deflated(b"not JSON")},
        {"layout": deflated(3)},
        {"layout": np.zeros(9, np.uint8)},
        {"layout": np.zeros((3, 3), np.uint8)},
        {"layout": None},
        {"mask": deflated(b"\xff" * 2**28)},
        {"mask": deflated(b"")},
        {"mask": np.zeros(0, np.uint8)},
        {"mask": np.full(99, 255, np.uint8)},
        {"mask": np.zeros(3, np.int8)},
        {"values": np.zeros(3, np.float32)},
        {"values": np.zeros(3, np.int8)},
        {"values": np.zeros(3, np.float16)},
        {"values": None},
        {"dense": np.zeros(3, np.float32)},
        {"scales": np.full(6, np.nan, np.float32)},
        {"scales": np.full(5, 1, np.float32)},
        {"more": np.zeros(3, np.float32)},
        {"metadata": {"epoch": 3}},
        {"metadata": {"epoch": {"a": "b"}}},
    ],
    ids=lambda changes: " ".join(f"{k}-{getattr(v, 'dtype', v)}{getattr(v, 'shape', '')}" for k, v in changes.items()),
)
def test_forged_parts_are_refused_before_memory_is_asked_for(saved, changes):
    forge(saved, **changes)
    refused_small(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: {"mask": np.append(p["mask"], np.uint8(0))},
        lambda p: {"dense": p["dense"][:, None]},
        lambda p: {"layout": p["layout"][:-1]},
        lambda p: {"layout": np.append(p["layout"], np.uint8(0))},
    ],
    ids=["mask longer", "dense a matrix", "layout cut", "layout longer"],
)
def test_parts_that_would_read_the_same_are_refused_too(saved, change):
    forge(saved, **change(parts(saved)))
    refused_small(saved)


@pytest.mark.parametrize("keys", [["params", 3], [], ["batch_stats"]], ids=str)
def test_forged_layouts_of_one_leaf_are_refused(tmp_path, keys):
    save_sparse(tmp_path / "net", {"params": {"w": np.zeros(0, np.float32)}}, {"w": np.ones((), bool)})
    forge(tmp_path / "net", layout=deflated([[keys, [0], False]]))
    refused_small(tmp_path / "net")


def test_more_masked_weights_than_allowed_are_refused(saved, monkeypatch):
    monkeypatch.setattr(sparse_file, "MAX_MASKED", 50)
    assert "66 masked weights, more than 50" in refused(saved)


def test_int8_beyond_its_range_is_refused(tmp_path):
    path = tmp_path / "net"
    save_sparse(path, {"params": {"w": np.ones(2, np.float32)}}, {"w": np.ones(2, bool)}, values="int8")
    largest = np.array([sparse_file.SCALES[1]], np.float32)
    forge(path, values=np.array([127, -127], np.int8), scales=largest)
    assert np.isfinite(load_sparse(path)[0]["params"]["w"]).all()
    forge(path, values=np.array([127, -128], np.int8))
    refused_small(path)


def refused_small(path):
    """Refused, with a few MiB at most, whatever the file claims to hold."""
    tracemalloc.start()
    try:
        assert "damaged" in refused(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * sparse_file.MAX_LAYOUT
    finally:
        tracemalloc.stop()
