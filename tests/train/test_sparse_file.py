"""Sparse files: exact round trips, the error of int8, sizes, equal bytes, old files, and every kind of damage."""

import gzip
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
from resnet_jax.tree import map_with_path
from tests.conftest import ROOT
from train import sparse_file
from train.errors import RunError, UsageError
from train.prune.deliver import dense_file
from train.sparse_file import FORMAT, is_sparse_file, load_sparse, save_sparse
from train.weights import save_encoder

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
LEAVES = st.tuples(SHAPES, st.sampled_from(["never", "all", "none", "some"]), st.integers(0, 2**32 - 1))
TREES = st.dictionaries(
    st.text(max_size=3),
    st.recursive(LEAVES, lambda inner: st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=6),
    max_size=3,
)
prunable = kernels_except(["stem", "head"])
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


def assert_bit_equal(a, b):
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


@settings(deadline=None, max_examples=40)
@given(tree=TREES, statistics=TREES)
def test_what_is_saved_comes_back_bit_by_bit(tmp_path_factory, tree, statistics):
    path = tmp_path_factory.getbasetemp() / "round_trip"
    params, masks = built(tree)
    variables = {"params": params, "batch_stats": built(statistics)[0]}
    save_sparse(path, variables, masks, metadata={"sparsity": "0.9", "": "é"})
    loaded, loaded_masks, metadata = load_sparse(path)
    assert_bit_equal(variables, loaded)
    assert_bit_equal(masks, loaded_masks)
    assert metadata == {"sparsity": "0.9", "": "é"}


@settings(deadline=None, max_examples=40)
@given(tree=TREES, exponent=st.integers(-44, 38))
def test_int8_is_off_by_half_a_scale_at_most(tmp_path_factory, tree, exponent):
    path = tmp_path_factory.getbasetemp() / "int8"
    params, masks = built(tree, odd=np.zeros(2, np.float32))
    params = jax.tree.map(lambda w: np.clip(w * 10.0**exponent, -3.4e38, 3.4e38).astype(np.float32), params)
    save_sparse(path, {"params": params}, masks, values="int8")
    loaded, loaded_masks, metadata = load_sparse(path)
    assert_bit_equal(masks, loaded_masks)
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
    assert_bit_equal(network[0], load_sparse(tmp_path / "a")[0])


def test_files_are_small(tmp_path):
    """ResNet-20 at 90 %: a seventh of its dense file, a seventeenth in int8, and less than gzip's."""
    model, rng = MODELS["resnet20"](num_classes=10), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, 32, 32, 3))), jax.random.key(0))
    variables = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), dict(shapes))
    masks = map_with_path(
        lambda path, w: rng.random(w.shape) > 0.9 if prunable(path, w) else np.ones((), bool), variables["params"]
    )
    variables["params"] = jax.tree.map(lambda w, m: np.where(m, w, 0), variables["params"], masks)
    dense = dense_file(variables)
    assert 4 * 272_000 < len(dense) < 4 * 275_000
    for values, ratio in (("float32", 7.8), ("int8", 17.5)):
        save_sparse(tmp_path / values, variables, masks, values=values)
        size = (tmp_path / values).stat().st_size
        assert size < len(gzip.compress(dense)) and size < len(dense) / ratio
    assert_bit_equal(variables, load_sparse(tmp_path / "float32")[0])


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
        assert_bit_equal([variables, masks], found)
        assert metadata == about
    assert (tmp_path / "new").stat().st_size <= 1.04 * path.stat().st_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, m: m["a"].update(bias=np.zeros((), bool)), "params/a/bias has pruned weights"),
        (
            lambda v, m: m["a"].update(kernel=np.ones((3, 4), bool)),
            r"params/a/kernel .* \(3, 4, 5\) with bool \(3, 4\)",
        ),
        (lambda v, m: m["a"].update(kernel=np.ones((3, 4, 5), np.float32)), "params/a/kernel .* with float32"),
        (lambda v, m: m["a"].pop("bias"), "params/a/bias is not in both"),
        (lambda v, m: m.update(c=np.ones((), bool)), "params/c is not in both"),
        (lambda v, m: m["a"].update(kernel=np.zeros((3, 4, 5), bool)), "params/a/kernel has pruned weights"),
        (lambda v, m: v["batch_stats"]["norm"].update(mean=np.ones(3, int)), "batch_stats/norm/mean .* not int64"),
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
    for limit in ("MAX_MASKED", "MAX_LAYOUT"):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="too large"):
            patch.setattr(sparse_file, limit, 50)
            save_sparse(tmp_path / "net", *network)
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "none" / "net"):
        with pytest.raises(RunError, match="cannot write"):
            save_sparse(path, *network)
        with pytest.raises(RunError, match="cannot write"):
            save_encoder(path, network[0], flax_names=True)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def refused(path):
    """The one line with which `load_sparse` refuses a file."""
    with pytest.raises(UsageError) as error:
        load_sparse(path)
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
        except UsageError:
            noticed += 1
        else:
            assert_bit_equal(wanted[:2], found[:2])
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
    wanted = dict.fromkeys(("plain", "other", "newer"), "does not have the format 'resnet-jax sparse 1'")
    wanted |= {"missing": "no sparse file at", "folder": "", "text": ""}
    for name, message in wanted.items():
        assert message in refused(tmp_path / name)
        assert is_sparse_file(tmp_path / name) == (name == "newer")


def parts(path):
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def deflated(content):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return np.frombuffer(zlib.compress(text, 9), np.uint8)


HUGE = 2**40
FORGED = {
    "a layout that inflates": {"layout": deflated(b" " * 2**26)},
    "a nested layout": {"layout": deflated(b"[" * 100_000)},
    "no layout": {"layout": deflated(b"not JSON")},
    "a huge leaf": {"layout": deflated([[["params", "z"], [HUGE, HUGE, HUGE], False]])},
    "a huge masked leaf": {"layout": deflated([[["params", "z"], [2**27, 8], True]])},
    "a mask that inflates": {"mask": deflated(b"\xff" * 2**26)},
    "fewer values than the mask keeps": {"values": np.zeros(3, np.float32)},
    "too few other weights": {"dense": np.zeros(3, np.float32)},
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_files_are_refused_before_memory_is_allocated(saved, kind):
    """With a checksum that is right, as a forger could."""
    metadata, tensors = load_sparse(saved)[2], {**parts(saved), **FORGED[kind]}
    head = {"metadata": metadata, "sha256": sparse_file._digest(metadata, tensors)}
    save_file(tensors, saved, {FORMAT: json.dumps(head)})
    tracemalloc.start()
    try:
        message = refused(saved)
        assert "damaged" in message and "checksum" not in message
        assert tracemalloc.get_traced_memory()[1] < 4 * sparse_file.MAX_LAYOUT
    finally:
        tracemalloc.stop()
