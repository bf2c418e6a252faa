"""Channel pruning: the compact network equals the masked one for every family; counts, ties and traces of the masks."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax import channels
from resnet_jax.channels import ChannelGroup, Member, channel_groups, channel_masks, channel_scores, compact, widths_of
from resnet_jax.layers import (
    CifarPreActStem,
    CifarStem,
    DeepStem,
    GroupNorm,
    NormAct,
    PooledProjection,
    SqueezeExcite,
    StandardizedConv,
    ZeroPad,
)
from resnet_jax.masks import apply_masks, no_masks
from resnet_jax.resnet import MODELS, BasicBlock, Bottleneck, PreActBlock, PreActBottleneck, ResNet
from resnet_jax.scores import magnitude, norm_scale
from resnet_jax.tree import PyTree, count, leaves, map_with_path


def net(block: Any, stages: tuple[int, ...] = (1, 1), **options: Any) -> ResNet:
    return ResNet(stages, block, **({"num_classes": 4, "width": 16, "stem": CifarStem} | options))


preact = partial(net, stem=CifarPreActStem, final=NormAct)
PADDED, PREACT_PADDED = (partial(block, shortcut=ZeroPad) for block in (BasicBlock, PreActBlock))
SQUEEZED = net(partial(Bottleneck, attention=SqueezeExcite))
DEEP = net(partial(Bottleneck, shortcut=PooledProjection), stem=DeepStem)

# fmt: off
# Networks, and their groups in order; 1_2/conv1 stands for stage1_block2/conv1.
NETS = {
    "basic": (net(BasicBlock, (2, 1)), "stream1 1_1/conv1 1_2/conv1 2_1/conv1 stream2"),
    "zero_pad": (net(PADDED, (1, 2, 1)), "stream1 1_1/conv1 2_1/conv1 stream2 2_2/conv1 3_1/conv1 stream3"),
    "zero_pad_odd": (net(PADDED, stem_width=11), "stem 1_1/conv1 stream1 2_1/conv1 stream2"),
    "bottleneck": (
        net(Bottleneck, (2, 1)), "stem 1_1/conv1 1_1/conv2 stream1 1_2/conv1 1_2/conv2 2_1/conv1 2_1/conv2 stream2",
    ),
    "pooled_deep": (DEEP, "1_1/conv1 1_1/conv2 stream1 2_1/conv1 2_1/conv2 stream2"),
    "deep_tied": (net(BasicBlock, stem=DeepStem), "1_1/conv1 2_1/conv1 stream2"),
    "preact": (preact(PreActBlock, (2, 1)), "stream1 1_1/conv1 1_2/conv1 2_1/conv1 stream2"),
    "preact_zero_pad": (preact(PREACT_PADDED), "stream1 1_1/conv1 2_1/conv1 stream2"),
    "preact_bottleneck": (preact(PreActBottleneck), "stem 1_1/conv1 1_1/conv2 stream1 2_1/conv1 2_1/conv2 stream2"),
    "wide": (preact(PreActBlock, stem_width=8), "stem 1_1/conv1 stream1 2_1/conv1 stream2"),
    "squeeze_excite": (SQUEEZED, "stem 1_1/conv1 1_1/conv2 2_1/conv1 2_1/conv2"),
    "grouped": (net(partial(Bottleneck, groups=4, group_width=16)), "stem stream1 stream2"),
    "features": (net(BasicBlock, num_classes=None), "stream1 1_1/conv1 2_1/conv1"),
}
# fmt: on
FAMILIES = {name: model for name, (model, _) in NETS.items()}


IMAGES = np.random.RandomState(0).normal(size=(4, 8, 8, 3)).astype(np.float32)


def shapes_of(model: ResNet) -> PyTree:
    return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))


def variables_of(model: ResNet) -> PyTree:
    """Random variables, including norms' statistics, scales and biases; none of them is 0."""
    rng = np.random.RandomState(0)

    def draw(path: str, leaf: Any) -> jax.Array:
        if path.endswith("kernel"):
            return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1])), jnp.float32)
        low, high = (0.5, 1.5) if path.endswith(("scale", "var")) else (-0.5, 0.5)
        return jnp.asarray(rng.uniform(low, high, leaf.shape), jnp.float32)

    return map_with_path(draw, shapes_of(model))


def masks_for(model: ResNet, params: PyTree, sparsity: float = 0.5, only: str = "", **options: Any) -> PyTree:
    """By magnitude, of the groups with `only` in their names; compiled, as operations one by one take far longer."""
    groups = [group for group in channel_groups(model, params) if only in group.name]

    @jax.jit
    def make(params: PyTree) -> PyTree:
        scores = channel_scores(magnitude(params), groups)
        return channel_masks(scores, sparsity, groups=groups, params=params, **options)

    return make(params)


def masked(variables: PyTree, masks: PyTree) -> PyTree:
    return variables | {"params": apply_masks(variables["params"], masks)}


def assert_same_outputs(model: ResNet, variables: PyTree, small: ResNet, small_variables: PyTree) -> None:
    expected = jax.jit(model.apply)(variables, IMAGES)
    actual = jax.jit(small.apply)(small_variables, IMAGES)
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


FAST = {"zero_pad", "bottleneck", "preact_bottleneck", "squeeze_excite"}


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES])
def test_compact_is_the_masked_network(name: str) -> None:
    """Half of the channels of every group, in multiples that leave unequal counts; then pruned and compacted again."""
    model = FAMILIES[name]
    variables = variables_of(model)
    groups = channel_groups(model, variables["params"])
    expected = re.sub(r"(\d)_(\d)/", r"stage\1_block\2/", NETS[name][1])
    assert [group.name for group in groups] == expected.split()

    scope = "global" if name in ("zero_pad", "preact") else "uniform"
    masks = masks_for(model, variables["params"], round_to=2, scope=scope)
    small, small_variables = compact(model, variables, masks)
    assert small.widths == widths_of(small, small_variables["params"])
    assert jax.tree.map(jnp.shape, small_variables) == jax.tree.map(jnp.shape, shapes_of(small))
    assert count(small_variables["params"]) < 0.8 * count(variables["params"])
    assert_same_outputs(model, masked(variables, masks), small, small_variables)

    if name in ("zero_pad", "zero_pad_odd"):
        masks = masks_for(small, small_variables["params"], round_to=2, sparsity=0.4)
        smaller, smaller_variables = compact(small, small_variables, masks)
        assert count(smaller_variables["params"]) < count(small_variables["params"])
        assert_same_outputs(small, masked(small_variables, masks), smaller, smaller_variables)


@pytest.mark.parametrize("name", ["zero_pad", pytest.param("preact_bottleneck", marks=pytest.mark.slow)])
def test_compact_trains_as_the_masked_network(name: str) -> None:
    """Loss, statistics and gradients in training mode are those of the channels that are left."""
    model = FAMILIES[name]
    variables = variables_of(model)
    masks = masks_for(model, variables["params"])

    def loss(params: PyTree, variables: PyTree, model: ResNet) -> tuple[jax.Array, PyTree]:
        logits, updates = model.apply(variables | {"params": params}, IMAGES, train=True, mutable=["batch_stats"])
        return jnp.square(logits).mean(), updates["batch_stats"]

    def step(model: ResNet, variables: PyTree) -> Any:
        run = jax.jit(jax.value_and_grad(partial(loss, model=model), has_aux=True))
        return run(variables["params"], variables)

    (expected, statistics), gradient = step(model, masked(variables, masks))
    (actual, small_statistics), small_gradient = step(*compact(model, variables, masks))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    _, cut = compact(model, {"params": gradient, "batch_stats": statistics}, masks)
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, small_gradient, cut["params"])
    jax.tree.map(close, small_statistics, cut["batch_stats"])


@pytest.mark.parametrize("name", ["resnet20", pytest.param("resnet50_cifar", marks=pytest.mark.slow)])
def test_published_networks_by_half(name: str) -> None:
    """Every group by half: a layer with both sides halved has a quarter of the weights."""
    model = MODELS[name](width=16)
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    half = tuple(width // 2 for width in widths_of(model, params))
    small = jax.eval_shape(model.clone(widths=half).init, jax.random.key(0), x)["params"]
    assert widths_of(model, small) == half
    assert count(small) == pytest.approx(0.25 * count(params), rel=0.02)
    groups = channel_groups(model, params)
    scores = {group.name: jnp.ones(group.size) for group in groups}
    masks = jax.eval_shape(partial(channel_masks, groups=groups, params=params), scores, 0.5)
    assert {p for p, m in leaves(masks).items() if not m.ndim} == {"head/bias"}


def test_resnet20_in_multiples_of_eight() -> None:
    model = MODELS["resnet20"]()
    variables = variables_of(model)
    small, small_variables = compact(model, variables, masks_for(model, variables["params"]))
    assert small.widths == (8,) * 7 + (16,) * 6 + (32,) * 6
    assert jax.tree.map(jnp.shape, small_variables) == jax.tree.map(jnp.shape, shapes_of(model.clone(width=8)))
    small, _ = compact(model, variables, masks_for(model, variables["params"], 0.3, scope="global"))
    assert all(width % 8 == 0 for width in small.widths)
    assert len(set(small.widths)) > 3


def groups_of(*sizes: int, copies: int = 1) -> tuple[tuple[ChannelGroup, ...], PyTree]:
    """Groups of these sizes, each a 1x1 kernel's outputs."""
    groups = tuple(
        ChannelGroup(f"g{i}", size, copies, (Member(f"g{i}/kernel", 3, 0, True),)) for i, size in enumerate(sizes)
    )
    return groups, {group.name: {"kernel": np.zeros((1, 1, 2, group.size), np.float32)} for group in groups}


def kept_of(masks: PyTree) -> list[list[int]]:
    return [np.flatnonzero(mask[0, 0, 0]).tolist() for mask in leaves(masks).values()]


CASES = [
    # scores, sparsity, options, kept channels
    ([[1, 3, 2, 4]], 0.5, {"round_to": 1}, [[1, 3]]),
    ([[5, 5, 5, 5]], 0.5, {"round_to": 1}, [[0, 1]]),
    ([[0, 0, 1, 0]], 0.25, {"round_to": 1}, [[0, 1, 2]]),
    ([[1, 2, 3]], 0.99, {"round_to": 1}, [[2]]),
    ([[1, 2, 3, 4, 5]], 0.0, {"round_to": 2}, [[0, 1, 2, 3, 4]]),
    ([[1, 2, 3, 4, 5]], 0.4, {"round_to": 2}, [[1, 2, 3, 4]]),  # 3: the larger of 2 and 4
    ([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]], 0.9, {"round_to": 4}, [[6, 7, 8, 9]]),
    ([[1, 2, 3, 4]], 0.75, {"round_to": 8}, [[0, 1, 2, 3]]),
    # Of means 1: 0.4 0.8 1.2 1.6 and 0.5 1.5 0.5 1.5; the best four.
    ([[1, 2, 3, 4], [1, 3, 1, 3]], 0.5, {"round_to": 1, "scope": "global"}, [[2, 3], [1, 3]]),
    # The first two of equal scores are enough to fill the half.
    ([[2, 2, 2, 2], [9, 9, 9, 9]], 0.5, {"round_to": 1, "scope": "global"}, [[0, 1, 2, 3], [0]]),
    ([[0, 0], [1, 1]], 0.5, {"round_to": 1, "scope": "global"}, [[0], [0, 1]]),
    ([[9, 1, 1, 1], [2, 2, 2, 2]], 0.375, {"round_to": 2, "scope": "global"}, [[0, 1], [0, 1, 2, 3]]),
    ([[0, 1, 2, 3, 4, 5]], 0.4, {"round_to": 4, "copies": 2}, [[2, 3, 4, 5]]),  # pairs: 7.2 channels, in fours 8
]


@pytest.mark.parametrize(("scores", "sparsity", "options", "expected"), CASES)
def test_which_channels_are_kept(scores: Any, sparsity: float, options: Any, expected: Any) -> None:
    groups, params = groups_of(*map(len, scores), copies=options.get("copies", 1))
    options = {name: value for name, value in options.items() if name != "copies"}
    by_group = {f"g{i}": jnp.array(row, jnp.float32) for i, row in enumerate(scores)}
    make = jax.jit(lambda scores: channel_masks(scores, sparsity, groups=groups, params=params, **options))
    assert kept_of(make(by_group)) == expected


def test_removed_channels_stay_removed() -> None:
    groups, params = groups_of(4, 4)
    keep = partial(channel_masks, groups=groups, params=params, round_to=1)
    make = jax.jit(keep)
    masks = make({"g0": jnp.array([0.0, 1, 2, 3]), "g1": jnp.ones(4)}, 0.25)
    scores = {"g0": jnp.array([9.0, 0, 5, 4]), "g1": jnp.array([1.0, 2, 3, 4])}
    assert kept_of(make(scores, 0.5, masks=masks)) == [[2, 3], [1, 2]]
    assert kept_of(make(scores, 0.0, masks=masks)) == [[1, 2, 3], [0, 1, 2]]
    over_all = jax.jit(partial(keep, scope="global"))
    assert kept_of(over_all(scores, 0.0, masks=masks)) == [[1, 2, 3], [0, 1, 2]]


def test_traced_sparsity_gives_one_trace() -> None:
    """Every count of a schedule, exact, from one compiled function."""
    groups, params = groups_of(20, 8)
    scores = {"g0": jnp.arange(20.0), "g1": jnp.arange(8.0)}
    traces = 0

    @jax.jit
    def make(sparsity: jax.Array, masks: PyTree) -> PyTree:
        nonlocal traces
        traces += 1
        return channel_masks(scores, sparsity, groups=groups, params=params, round_to=1, masks=masks)

    masks = jax.tree.map(lambda x: jnp.ones(x.shape, bool), params)
    for percent in (0, 10, 25, 45, 70, 85, 95):
        masks = make(jnp.float32(percent / 100), masks)
        # Halves are kept, though 1 - 0.45 is not exact.
        for mask, size in zip(jax.tree.leaves(masks), (20, 8), strict=True):
            assert int(mask[0, 0, 0].sum()) == max(1, int(np.floor(size * (100 - percent) / 100 + 0.5)))
    assert traces == 1


def test_scores_are_of_what_makes_a_channel() -> None:
    model = FAMILIES["zero_pad"]
    params = variables_of(model)["params"]
    groups = channel_groups(model, params)
    flat = {path: np.abs(leaf) for path, leaf in leaves(params).items()}
    scores = channel_scores(magnitude(params), groups)
    inner = flat["stage1_block1/conv1/kernel"].sum((0, 1, 2)) + flat["stage1_block1/norm1/scale"]
    np.testing.assert_allclose(scores["stage1_block1/conv1"], inner, rtol=1e-5)
    # Of 64 channels 16 come from stage 3 below, 8 from stage 2, 16 from the stem, 8 from stage 2 and 16 from stage 3.
    kernel = flat["stage3_block1/conv2/kernel"].sum((0, 1, 2)) + flat["stage3_block1/norm2/scale"]
    np.testing.assert_allclose(scores["stream3"], kernel[:16] + kernel[48:], rtol=1e-5)

    scales = channel_scores(norm_scale(params), groups)
    parts = [flat[f"{module}/scale"] for module in ("stem/norm", "stage1_block1/norm2")]
    parts += [flat[f"stage2_block{i}/norm2/scale"][8:24] for i in (1, 2)] + [flat["stage3_block1/norm2/scale"][24:40]]
    np.testing.assert_allclose(scales["stream1"], sum(parts), rtol=1e-5)


@pytest.mark.parametrize(
    ("only", "sparsity", "widths"),
    [
        ("conv", 0.5, (16, 8, 8, 64, 8, 8, 64, 16, 16, 128)),
        ("stream1", 0.75, (16, 16, 16, 16, 16, 16, 16, 32, 32, 128)),
    ],
)
def test_some_groups_alone(only: str, sparsity: float, widths: tuple[int, ...]) -> None:
    """Inner groups alone leave the streams whole: counts may then coincide, and the shortcut stays a projection."""
    model, variables = FAMILIES["bottleneck"], variables_of(FAMILIES["bottleneck"])
    masks = masks_for(model, variables["params"], sparsity, only)
    small, small_variables = compact(model, variables, masks)
    assert small.widths == widths
    assert "shortcut" in small_variables["params"]["stage1_block1"]
    assert_same_outputs(model, masked(variables, masks), small, small_variables)


def test_channels_masked_in_part_stay() -> None:
    """Masks of single weights remove nothing, but are applied."""
    model, variables = FAMILIES["zero_pad"], variables_of(FAMILIES["zero_pad"])
    rng = np.random.RandomState(1)
    masks = map_with_path(
        lambda path, leaf: rng.uniform(size=leaf.shape) > 0.5 if path.endswith("kernel") else np.True_,
        variables["params"],
    )
    small, small_variables = compact(model, variables, masks)
    assert small.widths == widths_of(model, variables["params"])
    assert_same_outputs(model, masked(variables, masks), small, small_variables)


def test_wrong_masks() -> None:
    model = FAMILIES["basic"]
    variables = variables_of(model)
    params = variables["params"]
    with pytest.raises(ValueError, match="come from a different model"):
        compact(model, variables, no_masks(variables_of(FAMILIES["bottleneck"])["params"]))
    with pytest.raises(ValueError, match="no convolution in stage2_block2"):
        channel_groups(FAMILIES["zero_pad"], params)

    # Nothing of the channels that stage 2 adds, though something is left of every leaf.
    model = FAMILIES["zero_pad"]
    variables = variables_of(model)
    groups = [group for group in channel_groups(model, variables["params"]) if group.name == "stream2"]
    masks = channels._masks_of({"stream2": jnp.zeros(groups[0].size, bool)}, groups, variables["params"])
    with pytest.raises(ValueError, match="no channel would be left of stream2"):
        compact(model, variables, masks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\)"),
        ({"scope": "local"}, "choose one of uniform, global"),
        ({"round_to": 0}, "round_to must be at least 1"),
        ({"groups": ()}, "no channels to prune"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    groups, params = groups_of(4)
    arguments = {"sparsity": 0.5, "groups": groups, "params": params} | options
    with pytest.raises(ValueError, match=message):
        channel_masks({"g0": jnp.ones(4)}, **arguments)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((16, 16, 16), "stage1_block1 has 2 convolutions, got 1 widths"),
        ((16, 16, 16, 16), "1 for the stem and the same number for each of 2 blocks, got 4"),
        ((16,), "1 for the stem and the same number for each of 2 blocks, got 1"),
    ],
)
def test_wrong_widths(widths: tuple[int, ...], message: str) -> None:
    model = FAMILIES["features"].clone(widths=widths)
    with pytest.raises(ValueError, match=message):
        shapes_of(model)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"norm": GroupNorm}, "group norm"),
        ({"norm": partial(GroupNorm, groups=16)}, "group norm"),
        ({"conv": StandardizedConv}, "standardised convolutions"),
        ({"conv": partial(StandardizedConv, epsilon=1e-5)}, "standardised convolutions"),
    ],
)
def test_statistics_of_other_channels_are_refused(layers: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message} cannot be removed: prune single weights"):
        channel_groups(net(BasicBlock, **layers), {})
