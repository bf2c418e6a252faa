"""Sparse files: exact round trips, the error of int8, sizes, equal bytes, old files, and every kind of damage."""

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

from resnet_jax.masks import kernels_except, no_masks
from resnet_jax.resnet import MODELS
from resnet_jax.tree import select
from tests.conftest import ROOT
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
    array = np.where(rng.random(shape) < 0.3, rng.choice(odd, shape), rng.standard_normal(shape)).astype(np.float32)
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


@settings(deadline=None, max_examples=100)
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


@settings(deadline=None, max_examples=60)
@given(tree=TREES, exponent=st.integers(-44, 38))
def test_int8_is_off_by_half_a_scale_at_most(tmp_path_factory, tree, exponent):
    path = tmp_path_factory.getbasetemp() / "int8"
    params, masks = built(tree, odd=np.zeros(2, np.float32))
    params = jax.tree.map(lambda w: np.clip(w * 10.0**exponent, -3.4e38, 3.4e38).astype(np.float32), params)
    save_sparse(path, {"params": params}, masks, values="int8")
    loaded, loaded_masks, metadata = load_sparse(path)
    assert_same(masks, loaded_masks)
    assert metadata == {}
    for w, mask, q in zip(*map(jax.tree.leaves, (params, masks, loaded["params"])), strict=True):
        assert isinstance(q, np.ndarray)
        if mask.ndim != w.ndim or (w.ndim == 0 and mask):
            assert w.tobytes() == q.tobytes()
            continue
        w = w.astype(np.float64)
        scale = np.abs(w).max(tuple(range(w.ndim - 1)) if w.ndim > 1 else None, keepdims=True, initial=0) / 127
        # No scale is below the least normal number.
        assert (np.abs(w - q) <= np.maximum(scale, np.finfo(np.float32).tiny) * (0.5 + 2e-5)).all()
        assert not q[w == 0].any() and not np.signbit(q[w == 0]).any()


def test_equal_networks_give_equal_files(tmp_path, network):
    """In JAX arrays too, whatever the order of the dicts; a dense network is a sparse file as well."""

    def reversed_dicts(tree):
        return {key: reversed_dicts(tree[key]) for key in reversed(tree)} if isinstance(tree, dict) else tree

    save_sparse(tmp_path / "a", *network, metadata={"x": "1", "y": "2"})
    save_sparse(tmp_path / "b", *map(reversed_dicts, network), metadata={"y": "2", "x": "1"})
    save_sparse(tmp_path / "jax", *jax.tree.map(jnp.asarray, network), metadata={"x": "1", "y": "2"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "jax").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "jax"]
    save_sparse(tmp_path / "a", network[0], no_masks(network[0]["params"]))
    assert_same(network[0], load_sparse(tmp_path / "a")[0])


def test_files_are_small(tmp_path):
    """ResNet-20 at 90 %: a seventh of its dense file, a seventeenth in int8, and less than gzip's."""
    model, rng = MODELS["resnet20"](num_classes=10), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, 32, 32, 3))), jax.random.key(0))
    dense = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), dict(shapes))
    chosen = select(dense["params"], kernels_except(["stem", "head"]))
    prunable = [np.abs(w).ravel() for w, c in zip(*map(jax.tree.leaves, (dense["params"], chosen)), strict=True) if c]
    least = np.quantile(np.concatenate(prunable), 0.9)
    masks = jax.tree.map(lambda w, c: np.abs(w) >= least if c else np.ones((), bool), dense["params"], chosen)
    variables = {**dense, "params": jax.tree.map(lambda w, m: np.where(m, w, 0), dense["params"], masks)}
    for values, ratio in (("float32", 7.85), ("int8", 17.7)):
        save_sparse(tmp_path / values, variables, masks, values=values)
        measured = sizes(tmp_path / values, variables)
        assert measured["file_bytes"] == (tmp_path / values).stat().st_size < measured["gzip_bytes"]
        assert 4 * 272_000 < measured["dense_bytes"] < 4 * 275_000
        assert measured["ratio"] == measured["dense_bytes"] / measured["file_bytes"] > ratio
    assert_same(variables, load_sparse(tmp_path / "float32")[0])


def test_masks_cost_little(tmp_path):
    """Whole channels: a fifth of a bit per weight; at random: about the entropy; every second weight: a bit."""
    rng = np.random.default_rng(0)
    rows, scattered = np.zeros((64, 1024), bool), rng.random((64, 1024)) < 0.1
    rows[::3] = True
    entropy = -(0.1 * np.log2(0.1) + 0.9 * np.log2(0.9)) * scattered.size / 8
    for mask, most in ((rows, rows.size / 40), (scattered, 1.05 * entropy), (rng.random((64, 1024)) < 0.5, 64 * 128)):
        save_sparse(tmp_path / "net", {"params": {"w": mask.astype(np.float32)}}, {"w": mask})
        assert parts(tmp_path / "net")["mask"].nbytes <= most
        assert_same({"w": mask}, load_sparse(tmp_path / "net")[1])


def old_network(kind):
    """(variables, masks) of the files in `old_runs`; weights are exact in int8 too: -127, 0 and 127 times a scale."""
    noise = np.random.RandomState(0).randint(0, 1009, (3, 3, 16, 8))  # a stream that NumPy keeps
    mask = {
        "unstructured": noise > 940,
        "2_4": (noise.reshape(3, 3, 4, 4, 8).argsort(3).argsort(3) < 2).reshape(noise.shape),
        "rows": np.broadcast_to(np.arange(16)[:, None] % 8 == 0, noise.shape),
    }[kind]
    weights = np.where(mask, 127 * (noise % 3 - 1), 0) * 2.0 ** np.arange(-4, 4)
    stem, zero = np.linspace(-1, 1, 36).reshape(3, 3, 1, 4), np.zeros(())
    params = {"stem": {"kernel": stem}, "block": {"kernel": weights}, "none": {}, "zero": zero}
    masks = {"stem": {"kernel": np.ones((), bool)}, "block": {"kernel": mask}, "none": {}, "zero": zero.astype(bool)}
    variables = {"params": params, "batch_stats": {"norm": {"mean": np.arange(4)}}}
    return jax.tree.map(lambda x: x.astype(np.float32), variables), masks


@pytest.mark.parametrize("values", ["float32", "int8"])
@pytest.mark.parametrize("kind", ["unstructured", "2_4", "rows"])
def test_files_of_commit_9ac8e3e_load(kind, values, tmp_path):
    """Their masks are stored in three ways: Huffman codes, as they are, and deflated with repeats."""
    path = ROOT / "tests" / "reference" / "old_runs" / f"{kind}_{values}.safetensors"
    variables, masks = old_network(kind)
    about = {"model": "net", "é": kind}
    save_sparse(tmp_path / "new", variables, masks, values=values, metadata=about)
    for each in (path, tmp_path / "new"):
        assert is_sparse_file(each)
        *found, metadata = load_sparse(each)
        assert_same([variables, masks], found)
        assert metadata == about
    assert (tmp_path / "new").stat().st_size <= 1.04 * path.stat().st_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, m: m["a"].update(bias=np.zeros((), bool)), "params/a/bias is"),
        (lambda v, m: m["a"].update(kernel=np.ones((3, 4), bool)), r"params/a/kernel is \(3, 4, 5\)"),
        (lambda v, m: m["a"].update(kernel=np.ones((3, 4, 5), np.float32)), "params/a/kernel .* its mask float32"),
        (lambda v, m: m["a"].pop("bias"), "params/a/bias is not in both"),
        (lambda v, m: m.update(c=np.ones((), bool)), "params/c is not in both"),
        (lambda v, m: m["a"].update(bias={}), "params/a/bias is not in both"),
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
    infinite = {"params": {"w": np.array([1, np.inf], np.float32)}}
    with pytest.raises(ValueError, match="params/w has weights that are not finite"):
        save_sparse(tmp_path / "net", infinite, {"w": np.ones(2, bool)}, values="int8")
    with pytest.raises(ValueError, match="float32 or int8, got 'int4'"):
        save_sparse(tmp_path / "net", *network, values="int4")
    with pytest.raises(ValueError, match="strings to strings"):
        save_sparse(tmp_path / "net", *network, metadata={"epoch": 3})
    for limit in ("MAX_MASKED", "MAX_LAYOUT"):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="too large"):
            patch.setattr(sparse_file, limit, 50)
            save_sparse(tmp_path / "net", *network)
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "none" / "net"):
        with pytest.raises(RunError, match="cannot write"):
            save_sparse(path, *network)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def refused(path):
    """The one line with which `load_sparse` refuses a file."""
    with pytest.raises(UsageError) as error:
        load_sparse(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def test_no_damage_goes_unnoticed(saved):
    """Of any byte, of the end: what loads is equal, and only blanks may differ, the header's padding."""
    content, wanted, noticed = saved.read_bytes(), load_sparse(saved), 0
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
    assert noticed > 0.98 * len(content)
    for length in {0, 1, 7, 8, 9, *range(10, len(content), 97), len(content) - 1}:
        saved.write_bytes(content[:length])
        refused(saved)
        assert not is_sparse_file(saved)
    saved.write_bytes(content + b"\0")
    refused(saved)


def test_files_of_others_are_refused(tmp_path):
    tensors = {"layout": np.zeros(3, np.uint8)}
    save_file(tensors, tmp_path / "plain")
    save_file(tensors, tmp_path / "other", {"format": "pt"})
    save_file(tensors, tmp_path / "newer", {"resnet-jax sparse 2": "{}"})
    (tmp_path / "text").write_text("resnet-jax sparse 1" * 99)
    (tmp_path / "folder").mkdir()
    wanted = {"missing": "no sparse file at", "plain": "not a sparse file of resnet-jax", "folder": "", "text": ""}
    wanted |= {"other": wanted["plain"], "newer": "'resnet-jax sparse 2', not 'resnet-jax sparse 1': update"}
    for name, message in wanted.items():
        assert message in refused(tmp_path / name)
        assert is_sparse_file(tmp_path / name) == (name == "newer")


def parts(path):
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def forge(path, **changes):
    """Change a file's parts (None: leave out), and make its checksum right again, as a forger could."""
    tensors = {name: tensor for name, tensor in {**parts(path), **changes}.items() if tensor is not None}
    metadata = load_sparse(path)[2]
    head = {"metadata": metadata, "sha256": sparse_file._digest(metadata, tensors)}
    save_file(tensors, path, {FORMAT: json.dumps(head)})


def refused_small(path):
    """The refusal of a file, which takes a few MiB at most, whatever the file claims to hold."""
    tracemalloc.start()
    try:
        message = refused(path)
        assert "damaged" in message
        assert tracemalloc.get_traced_memory()[1] < 4 * sparse_file.MAX_LAYOUT
        return message
    finally:
        tracemalloc.stop()


def deflated(content):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return np.frombuffer(zlib.compress(text, 9), np.uint8)


HUGE = 2**40
Z = ["params", "z"]
MALFORMED = [
    [Z, [HUGE, HUGE, HUGE], False], [Z, [HUGE], True], [Z, [2**27, 8], True], [Z, [0, HUGE, HUGE, HUGE], True],
    [Z, [0] * 99, False], [Z, [-1, -1], False], [Z, [False], False], [Z, [1.5], False], [Z, "12", False],
    [Z, None, True], [["params", 3], [0], False], [["params"], [0], False], [["params", "b", "under"], [0], False],
    [["zeta"], [0], True], [Z, [2**70], False], [Z, [0, 2**70], False],
    [[], [0], False], [{}, [0], False], ["params"], 3, None,
]  # fmt: skip


@pytest.mark.parametrize("leaf", MALFORMED, ids=str)
def test_forged_layouts_are_refused_before_memory_is_allocated(saved, leaf):
    wanted, leaves = load_sparse(saved), json.loads(zlib.decompress(parts(saved)["layout"].tobytes()))
    forge(saved, layout=deflated(leaves))
    assert_same(wanted[:2], load_sparse(saved)[:2])
    forge(saved, layout=deflated(sorted([*leaves, leaf], key=str)))
    refused_small(saved)


@pytest.mark.parametrize("keys", [["params", 3], [], ["batch_stats"]], ids=str)
def test_forged_layouts_of_one_leaf_are_refused(tmp_path, keys):
    save_sparse(tmp_path / "net", {"params": {"w": np.zeros(0, np.float32)}}, {"w": np.ones((), bool)})
    forge(tmp_path / "net", layout=deflated([[keys, [0], False]]))
    refused_small(tmp_path / "net")


MUTATIONS = {
    "missing": lambda x: None,
    "zeros": lambda x: np.zeros(9, x.dtype),
    "empty": lambda x: x[:0],
    "cut": lambda x: x[:-1],
    "longer": lambda x: np.append(x, x[:1]),
    "a matrix": lambda x: x[:, None],
    "float16": lambda x: x.astype(np.float16),
    "float64": lambda x: x.astype(np.float64),
}


@pytest.mark.parametrize("name", ["layout", "mask", "values", "dense", "scales"])
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_forged_parts_are_refused(saved, name, mutation):
    """Also those that would read the same."""
    part = parts(saved).get(name)
    forge(saved, **{name: np.ones(1, np.float32) if part is None else MUTATIONS[mutation](part)})
    refused_small(saved)


FORGED = {
    "layout": [b" " * 2**26, b"[" * 100_000, b"not JSON", 3],
    "mask": [b"\xff" * 2**26, b"", np.full(99, 255, np.uint8), np.zeros(3, np.int8)],
    "values": [np.zeros(3, np.int8)],
    "scales": [np.full(6, np.nan, np.float32)],
    "more": [np.zeros(3, np.float32)],
}


@pytest.mark.parametrize(("name", "number"), [(name, i) for name in FORGED for i in range(len(FORGED[name]))])
def test_forged_contents_are_refused_before_memory_is_allocated(saved, name, number):
    content = FORGED[name][number]
    forge(saved, **{name: content if isinstance(content, np.ndarray) else deflated(content)})
    refused_small(saved)


@pytest.mark.parametrize("metadata", [{"epoch": 3}, {"epoch": {"a": "b"}}, ["epoch"], None], ids=str)
def test_metadata_other_than_strings_are_refused(saved, metadata):
    save_file(parts(saved), saved, {FORMAT: json.dumps({"metadata": metadata, "sha256": ""})})
    assert "checksum" not in refused_small(saved)


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
