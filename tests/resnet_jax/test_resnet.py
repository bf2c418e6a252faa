"""Residual networks: published parameter counts, every name's shapes and dtypes, and small real forward passes."""

import re
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from resnet_jax.layers import BatchNorm, CifarPreActStem, CifarStem, DropPath, NormAct, PooledProjection, SqueezeExcite
from resnet_jax.parallel import AXIS, make_mesh
from resnet_jax.resnet import MODELS, BasicBlock, Bottleneck, PreActBlock, PreActBottleneck, ResNet
from resnet_jax.tree import PyTree, count, leaves, map_with_path
from train.runtime import compiler_options

COUNTS = {
    # num_params of https://docs.pytorch.org/vision/stable/models/resnet.html
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    # https://docs.pytorch.org/vision/stable/models/wide_resnet.html
    "wide_resnet50_2": 68_883_240,
    "wide_resnet101_2": 126_886_696,
    # https://docs.pytorch.org/vision/stable/models/resnext.html
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    # https://github.com/osmr/imgclsmob/blob/master/pytorch/pytorchcv/models/seresnet.py
    "seresnet18": 11_778_592,
    "seresnet34": 21_958_868,
    "seresnet50": 28_088_024,
    "seresnet101": 49_326_872,
    # https://github.com/osmr/imgclsmob/blob/master/pytorch/pytorchcv/models/resneta.py, another name for "D"
    "resnet18d": 11_708_744,
    "resnet50d": 25_576_264,
    "resnet101d": 44_568_392,
    "resnet152d": 60_212_040,
    # https://github.com/osmr/imgclsmob/blob/master/pytorch/pytorchcv/models/wrn_cifar.py
    "wrn_28_10": 36_479_194,
    # num_params of timm 1.0.31
    "resnet26d": 16_014_408,
    "resnet50c": 25_576_264,
    "resnet50_gn": 25_557_032,
    "legacy_seresnet50": 28_088_024,
    "resnetv2_50": 25_549_352,
    "resnetv2_50x1_bit": 25_549_352,
    # 0.27 M to 1.7 M in table 6 of https://arxiv.org/abs/1512.03385, as built with option A by
    # https://github.com/akamaster/pytorch_resnet_cifar10
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
}


def depth_of(name: str) -> int:
    return int(re.findall(r"(?<!v)\d+", name)[0])


def block_of(model: ResNet) -> Any:
    return getattr(model.block, "func", model.block)


def narrow(name: str, **options: Any) -> ResNet:
    """The model of that name with 16 channels, the fewest that squeeze-excite leaves one of, and few blocks."""
    model = MODELS[name](width=16, **options)
    return model.clone(stage_sizes=(1, 2, 1, 1)[: len(model.stage_sizes)])


def tiny(block: Any = BasicBlock, **options: Any) -> ResNet:
    """Two stages of one block, 8 channels, 5 classes."""
    return ResNet((1, 1), block, **({"num_classes": 5, "width": 8, "stem": CifarStem} | options))


def init_with_maps(model: ResNet, shape: tuple[int, ...]) -> tuple[dict[str, Any], PyTree]:
    """What `maps` gives in training on images of `shape`, and the variables, both abstract."""
    init = partial(model.init_with_output, train=True, method="maps")
    return jax.eval_shape(init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))


def init(model: ResNet, x: Any) -> PyTree:
    """Initial variables, from a kind of key that compiles five times faster: none depends on which draws they are."""
    return jax.jit(model.init)(jax.random.key(0, impl="rbg"), x)


def images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).normal(size=shape).astype(np.float32)


# One depth of each kind of network; tracing the deep ones takes seconds.
# `resnetv2_50` and such are other names, and Caffe's pooling, without padding, has shapes of its own.
SHALLOW = [
    name for name in MODELS if depth_of(name) in (16, 18, 20, 50) and not re.match(r"resnetv2_\d+$|legacy|.*x3_", name)
]


@pytest.mark.parametrize("name", [n if n in SHALLOW else pytest.param(n, marks=pytest.mark.slow) for n in COUNTS])
def test_published_parameter_count(name: str) -> None:
    shape = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(MODELS[name]().init, jax.random.key(0), shape)
    assert count(variables["params"]) == COUNTS[name]


@pytest.mark.parametrize("name", MODELS)
def test_depth_is_what_the_name_says(name: str) -> None:
    model = MODELS[name]()
    layers = sum(model.stage_sizes) * len(block_of(model).kernel_sizes) + 2  # the stem and the head are one each
    if name.startswith("wrn"):
        layers += 2  # their authors count the two projections
    assert depth_of(name) == layers


@pytest.mark.parametrize(("channels", "num_classes", "dtype"), [(1, 7, "float32"), (4, None, "bfloat16")])
@pytest.mark.parametrize("name", SHALLOW)
def test_every_kind_of_model(name: str, channels: int, num_classes: int | None, dtype: str) -> None:
    """Levels, strides, dtypes and names, on an odd size that no stride divides."""
    model = narrow(name, num_classes=num_classes, dtype=dtype)
    levels, variables = init_with_maps(model, (2, 33, 29, channels))
    stages = len(model.stage_sizes)
    head = [] if num_classes is None else ["logits"]
    assert set(levels) == {"stem", *(f"stage{i + 1}" for i in range(stages)), "pooled", *head}

    cifar = stages == 3 or name.endswith("_cifar")
    features = 16 * 2 ** (stages - 1) * block_of(model).expansion
    shapes = {"pooled": (2, features), "logits": (2, num_classes)}
    for i in range(stages):
        stride = (1 if cifar else 4) * 2**i
        shapes[f"stage{i + 1}"] = (2, -(-33 // stride), -(-29 // stride), features // 2 ** (stages - 1 - i))
    shapes["stem"] = (*shapes["stage1"][:3], 16)
    for level, x in levels.items():
        assert (x.shape, x.dtype) == (shapes[level], "float32" if level in ("pooled", "logits") else dtype)

    batch_norm = model.norm is BatchNorm
    assert set(variables) == ({"params", "batch_stats"} if batch_norm else {"params"})
    assert ("head" in variables["params"]) == (num_classes is not None)
    for path, leaf in leaves(variables).items():
        assert leaf.dtype == jnp.float32, path
        assert not re.search(r"[A-Z]|_\d", path), f"{path} is a name of Flax's own making"


FORWARDS = {
    "resnet8_bfloat16": MODELS["resnet8"](width=8, dtype=jnp.bfloat16),
    "features": tiny(num_classes=None),
    "seresnet50d": narrow("resnet50d").clone(
        block=partial(Bottleneck, shortcut=PooledProjection, attention=SqueezeExcite), stage_sizes=(1, 1, 1, 1)
    ),
}


@pytest.mark.parametrize("name", [*list(FORWARDS)[:2], pytest.param("seresnet50d", marks=pytest.mark.slow)])
def test_forward(name: str) -> None:
    """Finite outputs in training for one image of an odd size; in evaluation none depends on its neighbors."""
    model, x = FORWARDS[name], images(3, 33, 29, 3)
    variables = init(model, x[:1])
    # See compiler_options: XLA:CPU of jax 0.12 returns nan for this net in bfloat16 otherwise.
    jit = partial(jax.jit, compiler_options=compiler_options(model.dtype))
    outputs, updates = jit(partial(model.apply, train=True, mutable=["batch_stats"]))(variables, x[:1])
    assert model.num_classes is None or outputs.shape == (1, model.num_classes)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves([outputs, updates]))

    apply = jit(model.apply)
    together, alone = apply(variables, x), apply(variables, np.repeat(x[:1], 3, axis=0))
    tolerance = 5e-2 if model.dtype == jnp.bfloat16 else 1e-4
    np.testing.assert_allclose(together[:1], alone[:1], rtol=0, atol=tolerance * np.abs(together).max())
    assert not np.allclose(together[0], together[1])
    if name == "features":  # the call returns the last level
        maps = jit(partial(model.apply, method="maps"))(variables, x)
        np.testing.assert_array_equal(together, maps["pooled"])


def test_squeeze_and_excitation_of_few_channels() -> None:
    """At least one hidden unit."""
    shapes = jax.eval_shape(SqueezeExcite().init, jax.random.key(0), jnp.zeros((2, 3, 3, 8)))
    assert shapes["params"]["fc1"]["kernel"].shape == (8, 1)


BLOCKS = {
    "basic": (tiny(BasicBlock), "norm2/scale"),
    "bottleneck": (tiny(Bottleneck), "norm3/scale"),
    "preact": (tiny(PreActBlock, stem=CifarPreActStem, final=NormAct), "conv2/kernel"),
    "preact_bottleneck": (tiny(PreActBottleneck, stem=CifarPreActStem, final=NormAct), "conv3/kernel"),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if "neck" in n else n for n in BLOCKS])
def test_zero_init(name: str) -> None:
    """Each residual branch adds nothing at first, and what was set to zero gets a gradient that moves it."""
    model, last = BLOCKS[name]
    model, x = model.clone(zero_init=True), images(4, 8, 8, 3)
    variables = init(model, x)
    zeroed = [f"stage{i}_block1/{last}" for i in (1, 2)]

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def run(params: PyTree) -> tuple[jax.Array, PyTree]:
        logits, captured = model.apply(
            variables | {"params": params},
            x,
            train=True,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=lambda module, _: isinstance(module, DropPath),
        )
        return jnp.square(logits - 1).sum(), captured["intermediates"]

    grads, branches = run(variables["params"])
    assert len(jax.tree.leaves(branches)) == 2
    for branch in jax.tree.leaves(branches):
        np.testing.assert_array_equal(branch, 0)
    for path in zeroed:
        np.testing.assert_array_equal(leaves(variables["params"])[path], 0)
        assert np.abs(leaves(grads)[path]).max() > 1e-3

    moved = map_with_path(lambda path, leaf: leaf + 1 if path in zeroed else leaf, variables["params"])
    assert all(np.abs(branch).max() > 0 for branch in jax.tree.leaves(run(moved)[1]))


def test_drop_path_keeps_the_expectation() -> None:
    drop, x = DropPath(rate=0.3), jnp.ones((4096, 1, 1, 1))
    kept = np.asarray(jax.jit(partial(drop.apply, {}, train=True))(x, rngs={"drop_path": jax.random.key(0)}))
    np.testing.assert_allclose(np.unique(kept), [0, 1 / 0.7], rtol=1e-6)
    assert abs(kept.mean() - 1) < 4 * np.sqrt(0.3 / 0.7 / 4096)
    assert drop.apply({}, x, train=False) is x


def test_drop_path_grows_linearly() -> None:
    rates = []

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, DropPath):
            rates.append(context.module.rate)
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        init_with_maps(tiny(drop_path=0.5).clone(stage_sizes=(2, 1)), (1, 8, 8, 3))
    assert rates == [0, 0.25, 0.5]
    for rate in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"drop_path must be in \[0, 1\)"):
            init_with_maps(tiny(drop_path=rate), (1, 8, 8, 3))


def test_drop_path_in_a_network() -> None:
    """Draws follow the key in training; evaluation draws nothing and equals a network without."""
    model, x = tiny(drop_path=0.6), images(8, 8, 8, 3)
    variables = init(model, x)

    @jax.jit
    def train(key: jax.Array) -> jax.Array:
        return model.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"drop_path": key})[0]

    first, again, second = (train(jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, second)
    without = model.clone(drop_path=0.0)
    np.testing.assert_array_equal(jax.jit(model.apply)(variables, x), jax.jit(without.apply)(variables, x))


def test_sync_bn() -> None:
    """Under `shard_map` statistics are the whole batch's, or with `sync_bn=False` each shard's own."""
    mesh, x = make_mesh(), images(16, 8, 8, 3)
    shards = mesh.size
    model = tiny()
    variables = init(model, x)

    def train(model: ResNet, x: jax.Array) -> tuple[jax.Array, PyTree]:
        return model.apply(variables, x, train=True, mutable=["batch_stats"])

    def local(x: jax.Array) -> tuple[jax.Array, PyTree]:
        logits, updates = train(model.clone(axis_name=AXIS, sync_bn=False), x)
        return logits, jax.tree.map(lambda leaf: leaf[None], updates)

    split, whole = PartitionSpec(AXIS), PartitionSpec()
    synced = partial(train, model.clone(axis_name=AXIS))
    expected = jax.jit(partial(train, model))(x)
    actual = jax.jit(jax.shard_map(synced, mesh=mesh, in_specs=split, out_specs=(split, whole)))(x)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), actual, expected)

    logits, updates = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=split))(x)
    alone, alone_updates = jax.jit(partial(train, model))(x[: 16 // shards])
    np.testing.assert_allclose(logits[: 16 // shards], alone, rtol=1e-4, atol=1e-5)
    assert shards == 1 or not np.allclose(logits, expected[0], atol=1e-3)
    first = updates["batch_stats"]["stem"]["norm"]["mean"]
    np.testing.assert_allclose(first[0], alone_updates["batch_stats"]["stem"]["norm"]["mean"], rtol=1e-4, atol=1e-6)
    whole_mean = expected[1]["batch_stats"]["stem"]["norm"]["mean"]
    np.testing.assert_allclose(first.mean(0), whole_mean, rtol=1e-4, atol=1e-6)
