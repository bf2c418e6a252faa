"""Masks: small literal arrays with ties, exact counts, the papers' rules as loops, structures, errors."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from resnet_jax.masks import (
    apply_masks,
    check_masks,
    check_structure,
    erk_shares,
    full_masks,
    kernels_except,
    make_masks,
    no_masks,
    pack,
    sortable,
    sparsity_of,
    structure_of,
    unpack,
)
from resnet_jax.tree import is_kernel, leaves, map_with_path

RNG = np.random.default_rng(0)
PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)
SCOPES = ("global", "uniform", "erk", "lamp")

# Kernels of 2, 3 and 4 axes, in a dict and in a list, among leaves that are not kernels; in the tree's order.
SHAPES = {"a/kernel": (4, 6), "layers/0/kernel": (2, 4, 3), "layers/1/kernel": (1, 3, 4, 2)}


def tree_of(kernels):
    a, b, c = kernels
    return {"a": {"kernel": a, "bias": jnp.zeros(6)}, "layers": [{"kernel": b}, {"kernel": c}], "scale": jnp.ones(3)}


def kernels_of(tree):
    return [np.asarray(x) for path, x in leaves(tree).items() if path in SHAPES]


def draw(rng=RNG):
    return [rng.normal(size=shape).astype(np.float32) for shape in SHAPES.values()]


@cache
def compiled(**options):
    """`make_masks` with traced sparsity, compiled once for the same options."""
    return jax.jit(lambda scores, sparsity, masks: make_masks(scores, sparsity, masks=masks, **options))


def masks_of(scores, sparsity, *, masks=None, **options):
    return compiled(**options)(scores, sparsity, masks)


def assert_masks(got, want):
    """Leaves by path, as 0 and 1; every other leaf is a 0-d True."""
    for path, mask in leaves(got).items():
        assert mask.dtype == bool, path
        if path in want:
            np.testing.assert_array_equal(np.asarray(mask).astype(int), want[path], err_msg=path)
        else:
            assert mask.shape == () and bool(mask), path


# --- literal arrays ---------------------------------------------------------------------------------------------------

PAIR = {
    "a": {"kernel": jnp.asarray([[3.0, 1.0], [2.0, 2.0]]), "bias": jnp.zeros(2)},
    "b": {"kernel": jnp.asarray([[2.0, -0.0], [-1.0, 0.0]]), "scale": jnp.ones(2)},
}


@pytest.mark.parametrize(
    ("sparsity", "scope", "a", "b"),
    [
        (0.125, "global", [[1, 1], [1, 1]], [[1, 1], [0, 1]]),  # the negative one first
        (0.25, "global", [[1, 1], [1, 1]], [[1, 1], [0, 0]]),  # -0 is 0, and earlier
        (0.75, "global", [[1, 0], [1, 0]], [[0, 0], [0, 0]]),  # of two twos, in a leaf
        (0.5, "uniform", [[1, 0], [1, 0]], [[1, 1], [0, 0]]),
        ({"a/kernel": 0.75, "b/kernel": 0.25}, "global", [[1, 0], [0, 0]], [[1, 1], [0, 1]]),
        ({"a/kernel": 0.0, "b/kernel": 0.75}, "global", [[1, 1], [1, 1]], [[1, 0], [0, 0]]),
    ],
)
def test_literal_masks_of_two_leaves_with_ties(sparsity, scope, a, b):
    assert_masks(masks_of(PAIR, sparsity, scope=scope), {"a/kernel": a, "b/kernel": b})


# Groups of inputs go down a column.
TIES = [[1.0, -1.0], [2.0, -2.0], [2.0, -0.0], [2.0, 0.0]]


@pytest.mark.parametrize(
    ("structure", "sparsity", "scores", "want"),
    [
        ("2:4", 0.5, TIES, [[0, 0], [1, 0], [1, 1], [0, 1]]),
        ("2:4", 0.9, TIES, [[0, 0], [1, 0], [1, 1], [0, 1]]),  # at least two are kept
        ("4:8", 0.5, [*TIES, *TIES], [[0, 0], [1, 0], [1, 1], [1, 1], [0, 0], [1, 0], [0, 1], [0, 1]]),
        # Sums of blocks: 4, 4, -1, 5: the earlier of two.
        (
            "2x2",
            0.5,
            [[1, 1, 9, 0], [1, 1, -5, 0], [0, -1, 5, 0], [0, 0, 0, 0]],
            [[1, 1, 0, 0]] * 2 + [[0, 0, 1, 1]] * 2,
        ),
        ("4x1", 0.5, [[9, 1], [-9, 1], [0, 1], [0, 0]], [[0, 1]] * 4),
        ("1x2", 0.25, [[2.0, 2.0], [3.0, 1.0], [0, 0], [-7, 8]], [[1, 1], [1, 1], [0, 0], [1, 1]]),
    ],
)
def test_literal_structures(structure, sparsity, scores, want):
    got = masks_of({"kernel": jnp.asarray(scores)}, sparsity, structure=structure)
    assert_masks(got, {"kernel": want})


@pytest.mark.parametrize("window", [(2, 3), (6,)])
def test_structures_of_kernels_with_more_axes(window):
    """Inputs and outputs are the last two axes; others, such as a convolution's window, are independent."""
    x = RNG.permutation(2 * 3 * 8 * 4).reshape(*window, 8, 4).astype(np.float32)
    rank = (-x.reshape(*window, 2, 4, 4)).argsort(-2).argsort(-2)
    assert_masks(masks_of({"kernel": x}, 0.5, structure="2:4"), {"kernel": (rank < 2).reshape(x.shape)})

    sums = x.reshape(*window, 4, 2, 2, 2).sum((-3, -1))
    want = (sums >= np.sort(sums.ravel())[-12]).repeat(2, -2).repeat(2, -1)
    assert_masks(masks_of({"kernel": x}, 0.75, structure="2x2"), {"kernel": want})


@pytest.mark.parametrize(
    ("options", "sparsity", "previous", "want"),
    [
        # The two best weights are pruned: they count as pruned, and stay so.
        ({}, 0.5, [[0, 0], [1, 1], [1, 1], [1, 1]], [[0, 0], [1, 1], [1, 1], [0, 0]]),
        ({}, 0.25, [[0, 0], [1, 1], [1, 1], [1, 1]], [[0, 0], [1, 1], [1, 1], [1, 1]]),
        ({}, 0.0, [[0, 0], [1, 1], [1, 1], [1, 1]], [[0, 0], [1, 1], [1, 1], [1, 1]]),
        ({"scope": "uniform"}, 0.75, [[0, 0], [1, 1], [1, 1], [1, 1]], [[0, 0], [1, 1], [0, 0], [0, 0]]),
        ({"scope": "lamp"}, 0.75, [[0, 0], [1, 1], [1, 1], [1, 1]], [[0, 0], [1, 1], [0, 0], [0, 0]]),
        ({"structure": "2:4"}, 0.5, [[0, 0], [1, 0], [1, 0], [1, 1]], [[0, 0], [1, 0], [1, 0], [0, 1]]),
        ({"structure": "2x2"}, 0.5, [[0, 0], [0, 0], [1, 1], [1, 0]], [[0, 0], [0, 0], [1, 1], [1, 0]]),
        # Pruned weights of a block do not count in its sum: 8 against 6 + 5 + 4 + 3.
        ({"structure": "2x2"}, 0.5, [[0, 1], [0, 0], [1, 1], [1, 1]], [[0, 0], [0, 0], [1, 1], [1, 1]]),
    ],
)
def test_previous_masks_are_respected(options, sparsity, previous, want):
    scores = {"kernel": jnp.asarray([[9.0, 8.0], [7.0, 7.0], [6.0, 5.0], [4.0, 3.0]]), "bias": jnp.ones(2)}
    previous = {"kernel": jnp.asarray(previous, bool), "bias": jnp.ones((), bool)}
    assert_masks(masks_of(scores, sparsity, masks=previous, **options), {"kernel": want})


def test_pruned_weights_rank_below_negative_scores():
    scores = {"kernel": jnp.asarray([[5.0, 4.0], [-3.0, -jnp.inf]])}
    previous = {"kernel": jnp.asarray([[False, False], [True, True]])}
    assert_masks(masks_of(scores, 0.5, masks=previous), {"kernel": [[0, 0], [1, 1]]})
    assert_masks(masks_of(scores, 0.75, masks=previous), {"kernel": [[0, 0], [1, 0]]})
    # Scalar masks prune nothing.
    got = masks_of(PAIR, 0.5, masks=no_masks(PAIR))
    assert_masks(got, {"a/kernel": [[1, 0], [1, 1]], "b/kernel": [[1, 0], [0, 0]]})


def test_traced_sparsity_is_the_concrete_one():
    scores, shares = tree_of(draw()), dict(zip(SHAPES, (0.1, 0.37, 0.81), strict=True))
    variants = [
        *((0.37, {"scope": scope}) for scope in SCOPES),
        (shares, {}),
        *((0.37, {"structure": structure, "prunable": is_first}) for structure in ("2:4", "2x1")),
    ]
    concrete = jax.jit(lambda scores: [make_masks(scores, sparsity, **options) for sparsity, options in variants])
    for (sparsity, options), want in zip(variants, concrete(scores), strict=True):
        jax.tree.map(np.testing.assert_array_equal, masks_of(scores, sparsity, **options), want)


def is_first(path, leaf):
    return path == "a/kernel"


# --- properties, for scores with many ties ----------------------------------------------------------------------------

VALUES = st.sampled_from([np.float32(x) for x in (-2, -1, -0.0, 0.0, 0.5, 1, 1 + 2**-23, 3)])
TREES = st.tuples(*(arrays(np.float32, shape, elements=VALUES) for shape in SHAPES.values()))
SPARSITY = st.floats(0, 127 / 128, width=32)


def kept_of(size, sparsity):
    """As many of `size` as are kept; halves go to the even number, as NumPy's and JAX's `round` do."""
    return size - int(np.round(np.float32(sparsity) * np.float32(size)))


def best(scores, count):
    """The `count` highest of a flat array, by a stable sort: of equal ones the earlier."""
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(-scores, kind="stable")[:count]] = True
    return mask


@PROPERTY
@given(TREES, SPARSITY)
def test_global_and_uniform_are_a_stable_sort(kernels, sparsity):
    """The exact number, the highest, and of equal ones the earlier, over all leaves or in each."""
    flat = np.concatenate([x.ravel() for x in kernels])
    want = best(flat, kept_of(flat.size, sparsity))
    got = kernels_of(masks_of(tree_of(kernels), sparsity, scope="global"))
    np.testing.assert_array_equal(np.concatenate([m.ravel() for m in got]), want)

    for mask, x in zip(kernels_of(masks_of(tree_of(kernels), sparsity, scope="uniform")), kernels, strict=True):
        np.testing.assert_array_equal(mask.ravel(), best(x.ravel(), kept_of(x.size, sparsity)))


@PROPERTY
@given(TREES, SPARSITY)
def test_n_of_m_keeps_n_in_each_group(kernels, sparsity):
    x = kernels[0]
    for n, m in ((2, 4), (1, 4), (1, 2), (3, 4)):
        got = masks_of({"kernel": x}, sparsity, structure=f"{n}:{m}")["kernel"]
        kept = max(n, int(np.round(m * (np.float32(1) - np.float32(sparsity)))))
        groups, masks = (np.asarray(y).T.reshape(-1, m) for y in (x, got))
        for group, mask in zip(groups, masks, strict=True):
            np.testing.assert_array_equal(mask, best(group, kept))


@PROPERTY
@given(TREES, st.tuples(SPARSITY, SPARSITY))
def test_sparser_masks_are_subsets_and_pruning_again_is_pruning_at_once(kernels, sparsities):
    """Earlier masks of the same scores change nothing: what they pruned counts."""
    low, high = sorted(sparsities)
    scores = tree_of([np.abs(x) for x in kernels])
    structures = [{"structure": structure, "prunable": is_first} for structure in ("2:4", "2x2", "4x1")]
    for chosen in [*({"scope": scope} for scope in SCOPES), *structures]:
        denser, sparser = (masks_of(scores, s, **chosen) for s in (low, high))
        assert jax.tree.all(jax.tree.map(lambda a, b: (a | ~b).all(), denser, sparser)), chosen
        if chosen.get("scope") in ("global", "uniform"):
            jax.tree.map(np.testing.assert_array_equal, masks_of(scores, high, masks=denser, **chosen), sparser)


def test_sortable_is_in_the_order_of_floats():
    x = np.float32([-np.inf, -3e38, -1, -1e-30, 0, 1e-30, 1, 1 + 2**-23, 3e38, np.inf])
    assert (np.diff(np.asarray(sortable(x)).astype(np.int64)) > 0).all()
    assert sortable(jnp.float32(-0.0)) == sortable(jnp.float32(0.0))
    np.testing.assert_array_equal(sortable(x, jnp.arange(10) > 8), [0] * 9 + [sortable(jnp.float32(np.inf))])
    assert int(sortable(jnp.float32(-np.inf))) > 0


# --- the papers' rules, written out again -----------------------------------------------------------------------------


def erk_by_rounds(shapes, sparsity):
    """As the authors' code (google-research/rigl): the densest layers become dense, one round after another."""
    sizes = [np.prod(shape) for shape in shapes]
    raw = [np.sum(shape) / np.prod(shape) for shape in shapes]
    dense = set()
    while True:
        divisor = sum(r * n for i, (r, n) in enumerate(zip(raw, sizes, strict=True)) if i not in dense)
        target = sum(sizes) * (1 - sparsity) - sum(sizes[i] for i in dense)
        epsilon = target / divisor if divisor else 0.0
        top = max((r for i, r in enumerate(raw) if i not in dense), default=0.0)
        if top * epsilon <= 1:
            return [0.0 if i in dense else 1 - epsilon * r for i, r in enumerate(raw)]
        dense |= {i for i, r in enumerate(raw) if r == top}


RESNET = [(3, 3, 3, 16), (3, 3, 16, 16), (3, 3, 16, 32), (1, 1, 16, 32), (3, 3, 32, 32), (3, 3, 32, 64), (64, 10)]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.8, 0.99])
def test_erk_is_the_rule_by_rounds(sparsity):
    for shapes in (RESNET, [(5, 7)], [(4, 4), (4, 4)], list(SHAPES.values()), RESNET[::-1]):
        got = np.asarray(ERK(tuple(shapes), sparsity))
        np.testing.assert_allclose(got, erk_by_rounds(shapes, sparsity), atol=2e-6)
        sizes = np.array([np.prod(shape) for shape in shapes])
        assert (got * sizes).sum() / sizes.sum() == pytest.approx(sparsity, abs=1e-5)


ERK = jax.jit(erk_shares, static_argnums=0)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.8])
def test_erk_masks_are_the_best_of_each_leaf(sparsity):
    kernels, shares = draw(), erk_by_rounds(list(SHAPES.values()), sparsity)
    masks = kernels_of(masks_of(tree_of(kernels), sparsity, scope="erk"))
    for mask, x, share in zip(masks, kernels, shares, strict=True):
        np.testing.assert_array_equal(mask.ravel(), best(x.ravel(), kept_of(x.size, share)))


def lamp_by_loops(x):
    flat = x.ravel().astype(np.float64)
    scores = np.zeros(flat.size)
    for i, value in enumerate(flat):
        # Of equal ones the later has all of them in its sum, the earlier itself and what is before it.
        not_smaller = [v for j, v in enumerate(flat) if v > value or (v == value and j <= i)]
        scores[i] = value**2 / sum(v**2 for v in not_smaller)
    return scores


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("ties", [False, True])
def test_lamp_is_the_paper_s_by_loops(sparsity, ties):
    kernels = [np.abs(x) * scale for x, scale in zip(draw(), (1, 10, 100), strict=True)]
    if ties:
        kernels = [np.ceil(x * 3).astype(np.float32) for x in kernels]
    flat = np.concatenate([lamp_by_loops(x) for x in kernels])
    got = kernels_of(masks_of(tree_of(kernels), sparsity, scope="lamp"))
    np.testing.assert_array_equal(np.concatenate([m.ravel() for m in got]), best(flat, kept_of(flat.size, sparsity)))


@pytest.mark.parametrize("scale", [1e-30, 1e37])
def test_lamp_of_scores_whose_squares_float32_does_not_hold(scale):
    """As synaptic flow's may be: each leaf's own scale does not matter."""
    a, b, c = (np.abs(x) for x in draw())
    plain, scaled = (masks_of(tree_of([a, b * np.float32(s), c]), 0.6, scope="lamp") for s in (1.0, scale))
    jax.tree.map(np.testing.assert_array_equal, plain, scaled)


def test_lamp_of_zeros_keeps_what_is_not():
    scores = {"a": {"kernel": jnp.zeros((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
    want = {"a/kernel": np.zeros((2, 2)), "b/kernel": np.ones((2, 2))}
    assert_masks(masks_of(scores, 0.5, scope="lamp"), want)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sparsity", "options", "message"),
    [
        (1.0, {}, r"sparsity must be in \[0, 1\), got 1.0"),
        (-0.1, {}, r"sparsity must be in \[0, 1\), got -0.1"),
        (float("nan"), {}, r"sparsity must be in \[0, 1\), got nan"),
        ({"a/kernel": 0.5, "b/kernel": 2.0}, {}, r"sparsity must be in \[0, 1\), got 2.0"),
        ({"a/kernel": 0.5}, {}, "no sparsity is given for b/kernel"),
        (0.5, {"scope": "local"}, "unknown scope 'local'; choose one of global, uniform, erk, lamp"),
        (0.5, {"structure": "2:4"}, r"2:4 does not divide a/kernel of shape 2x2 \(inputs, outputs last\)"),
        (0.5, {"prunable": lambda path, leaf: False}, "no leaf is prunable; .* named `kernel`; leaves: 4: a/bias"),
    ],
)
def test_refused(sparsity, options, message):
    with pytest.raises(ValueError, match=message):
        make_masks(PAIR, sparsity, **options)


@pytest.mark.parametrize("name", ["", "4:4", "4:2", "0:4", "0x4", "4x0", "2:4:8", "2:-4", "2.0x1", " 2:4", "2:4\n"])
def test_unknown_structures(name):
    with pytest.raises(ValueError, match=r"\Aunknown structure .*: choose unstructured, N:M such as 2:4"):
        structure_of(name)


def test_check_structure_names_the_leaf():
    """The last two axes are inputs and outputs; only a structure without blocks fits a vector."""
    kernel, vector = {"bad/kernel": jnp.zeros((3, 3, 6, 4))}, {"b": jnp.zeros(4)}
    for structure in ("unstructured", "1:2", "3:6", "2x2", "6x4", "1x1"):
        check_structure(kernel, structure)
    check_structure(vector, "unstructured")
    for structure in ("2:4", "4x1", "1x3"):
        with pytest.raises(ValueError, match=rf"\A{structure} does not divide bad/kernel of shape 3x3x6x4 "):
            check_structure({"good/kernel": jnp.zeros((8, 3)), **kernel}, structure)
    with pytest.raises(ValueError, match="1:2 does not divide b of shape 4"):
        check_structure(vector, "1:2")


def test_check_masks():
    params = tree_of(draw())
    good = full_masks(params)
    check_masks(good, params)
    check_masks(no_masks(params), params)

    def changed(change):
        return map_with_path(lambda path, m: change(m) if path == "layers/1/kernel" else m, good)

    for masks, message in [
        (changed(jnp.zeros_like), r"\Anothing would be left of layers/1/kernel: lower the sparsity, or exclude it\Z"),
        (changed(lambda m: ~m[0, 0, 0, 0]), "nothing would be left of layers/1/kernel"),
        (changed(lambda m: m[0]), r"layers/1/kernel is \(3, 4, 2\), not \(1, 3, 4, 2\)"),
        ({**good, "new": jnp.ones((), bool)}, r"\Athe masks come from a different model: new is only in the masks\Z"),
        ({k: v for k, v in good.items() if k != "scale"}, r"\A.* a different model: scale is only in the model\Z"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_masks(masks, params)


# --- packed, counted, chosen ------------------------------------------------------------------------------------------


@PROPERTY
@given(st.tuples(*(arrays(bool, shape) for shape in ((3, 3, 2, 5), (7,), (8, 2), (1, 1)))))
def test_pack_and_unpack_are_inverse_at_a_bit_a_weight(masks):
    a, b, c, d = masks
    masks = {"list": [a, b], "c": c, "d": d, "bias": np.ones((), bool)}
    params = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape or (4,), jnp.float32), masks)
    packed = pack(jax.tree.map(jnp.asarray, masks))
    packed_leaves = {path: x for path, x in leaves(packed).items() if x.ndim}
    assert {path: x.nbytes for path, x in packed_leaves.items()} == {"list/0": 12, "list/1": 1, "c": 2, "d": 1}
    assert {x.dtype for x in packed_leaves.values()} == {np.dtype(np.uint8)}
    got = unpack(packed, params)
    assert all(x.dtype == bool for x in jax.tree.leaves(got))
    jax.tree.map(np.testing.assert_array_equal, got, masks)


def test_unpack_refuses_a_different_size():
    packed = pack({"a": {"kernel": np.ones((3, 3), bool)}})
    with pytest.raises(ValueError, match="the masks come from a different model: a/kernel has 16 bits, not 20"):
        unpack(packed, {"a": {"kernel": jnp.zeros((4, 5))}})


def test_sparsity_of():
    masks = {"a": jnp.asarray([[True, False], [False, False]]), "b": jnp.ones((1, 4), bool), "bias": jnp.ones((), bool)}
    nothing = jax.jit(sparsity_of)({"a": jnp.ones((37, 41), bool)})  # compiled, not slightly below 0
    values = [(sparsity_of(masks), 3 / 8), (sparsity_of(no_masks(masks)), 0), (sparsity_of({}), 0), (nothing, 0)]
    for got, want in values:
        assert (float(got), got.dtype, got.shape) == (want, jnp.float32, ())


def test_kernels_except():
    predicate = kernels_except(["^stem/", "head", r"conv\d/"])
    kernel, bias = jnp.zeros((2, 2)), jnp.zeros(2)
    chosen = {path: predicate(path, kernel) for path in ("stem/conv/kernel", "a/stem/kernel", "head/kernel")}
    assert chosen == {"stem/conv/kernel": False, "a/stem/kernel": True, "head/kernel": False}
    assert not predicate("a/conv3/kernel", kernel)
    assert not predicate("a/bias", bias) and not predicate("a/scale", kernel) and not predicate("a/kernel", bias)
    assert kernels_except([])("anything/kernel", kernel)


def test_full_masks():
    params = tree_of(draw())
    masks = full_masks(params)
    assert {path: m.shape for path, m in leaves(masks).items() if m.ndim} == SHAPES
    assert all(m.dtype == bool and np.asarray(m).all() for m in jax.tree.leaves(masks))
    jax.tree.map(np.testing.assert_array_equal, apply_masks(params, masks), params)
    masked = apply_masks({"a": jnp.asarray([1.0, -2.0, jnp.inf])}, {"a": jnp.asarray([True, False, False])})
    np.testing.assert_array_equal(masked["a"], [1, 0, 0])
    only = full_masks(params, lambda path, leaf: path == "scale")
    assert {path for path, m in leaves(only).items() if m.ndim} == {"scale"}
    assert jax.tree.structure(masks) == jax.tree.structure(params)


def test_any_predicate_and_any_leaf():
    """Vectors and embeddings too, where a predicate says so, of low precision, but never a scalar."""
    vectors = [jnp.asarray([5, 0], jnp.float16), jnp.zeros(())]
    scores = {"embedding": jnp.asarray([[1, 2], [3, 4]], jnp.bfloat16), "v": vectors}
    masks = masks_of(scores, 0.5, prunable=anything)
    assert_masks(masks, {"embedding": [[0, 0], [1, 1]], "v/0": [1, 0]})
    assert not is_kernel("embedding", scores["embedding"])


def anything(path, leaf):
    return True
