"""oneDNN's kernels equal XLA's: outputs, gradients, whole networks, all modes."""

import os
import time
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax import MODELS, onednn
from resnet_jax.layers import BatchNorm, max_pool
from resnet_jax.onednn import library
from resnet_jax.parallel import axis_of, compile_step, make_mesh, replicated, shard_batch
from tests.reference.compare import assert_near
from tests.reference.nets import CLASSES, batch_of, tiny, tiny_state, tiny_tx
from train.state import init_variables
from train.steps import train_step


def missing(dtype=None):
    """Why oneDNN cannot be used here, for a dtype if there is one; empty if it can."""
    try:
        onednn.load() if dtype is None else onednn.check(dtype)
    except onednn.Unavailable as error:
        return str(error)
    return ""


@pytest.fixture(autouse=True)
def needs_onednn(request):
    if missing() and request.function is not test_unavailable:
        pytest.skip(missing())


FAST = {"conv": onednn.Conv, "norm": onednn.BatchNorm, "max_pool": onednn.max_pool}

# (batch, height, width, channels, features, kernel, strides, groups)
SHAPES = [
    (2, 8, 8, 16, 32, 3, 2, 1),
    (1, 9, 7, 5, 3, 3, 2, 1),  # odd sizes, odd channels, batch of one
    (1, 1, 1, 4, 8, 3, 1, 1),  # the kernel is larger than the image
    (3, 7, 8, 8, 16, 1, 2, 1),
    (2, 15, 16, 3, 8, 7, 2, 1),
    (2, 6, 6, 16, 32, 3, 2, 4),
    (2, 6, 6, 8, 8, 3, 1, 8),  # depthwise
]


def plain(images, kernel, strides, groups):
    pads = [((size - 1) // 2,) * 2 for size in kernel.shape[:2]]
    return jax.lax.conv_general_dilated(
        images,
        kernel,
        (strides, strides),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision="highest",
    )


def operands(shape, dtype=np.float32):
    batch, height, width, channels, features, size, _, groups = shape
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch, height, width, channels))
    kernel = rng.standard_normal((size, size, channels // groups, features))
    return jnp.asarray(images, dtype), jnp.asarray(kernel, dtype)


X, W = operands((2, 8, 8, 16, 16, 3, 1, 1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients(shape):
    *_, strides, groups = shape

    @jax.jit
    def answers(images, kernel):
        def of(conv):
            conv = partial(conv, strides=strides, groups=groups)
            gradient = jax.grad(lambda x, w: jnp.sin(conv(x, w)).sum(), (0, 1))
            return conv(images, kernel), gradient(images, kernel)

        return of(onednn.convolution), of(plain)

    assert_near(*answers(*operands(shape)))


@pytest.mark.slow
def test_no_worse_than_xla_against_float64():
    """The mean error of output and gradients, over shapes, is at most 1.5 times that of XLA."""
    errors = {"onednn": [], "xla": []}
    for shape in SHAPES:
        *_, strides, groups = shape
        images, kernel = operands(shape)
        with jax.enable_x64(True):
            exact = jax.vjp(partial(plain, strides=strides, groups=groups), *operands(shape, np.float64))
            wide = [exact[0], *exact[1](jnp.ones_like(exact[0]))]
        for name, conv in (("onednn", onednn.convolution), ("xla", plain)):
            y, pull = jax.vjp(partial(conv, strides=strides, groups=groups), images, kernel)
            errors[name] += [
                np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
                for a, b in zip([y, *pull(jnp.ones_like(y))], map(np.asarray, wide), strict=True)
            ]
    assert np.mean(errors["onednn"]) <= 1.5 * np.mean(errors["xla"])


def test_bfloat16():
    if reason := missing(jnp.bfloat16):
        pytest.skip(reason)
    images, kernel = X.astype(jnp.bfloat16), W.astype(jnp.bfloat16)
    got = onednn.convolution(images, kernel)
    assert got.dtype == jnp.bfloat16
    assert_near(got, np.asarray(plain(images, kernel, 1, 1), np.float32), 1e-2)


def test_vmap_and_per_example_gradients():
    images, kernel = operands(SHAPES[0])

    def per_example(conv):
        loss = jax.grad(lambda w, x: jnp.sin(conv(x[None], w, strides=2, groups=1)).sum())
        return jax.jit(jax.vmap(loss, (None, 0)))(kernel, images)

    assert_near(per_example(onednn.convolution), per_example(plain))


def normalize(x, channels=4):
    return onednn.batch_norm(x, jnp.ones(channels), jnp.zeros(4))[0]


def second_derivative(f):
    first = jax.grad(lambda x: (f(x) ** 2).sum())
    return jax.grad(lambda x: first(x).sum())(X[..., :4])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: onednn.convolution(X.astype("float16"), W.astype("float16")), TypeError, "bfloat16, got float16"),
        (lambda: onednn.convolution(X, W.astype("bfloat16")), TypeError, "got float32 images and a bfloat16 kernel"),
        (lambda: onednn.convolution(X[..., :4], W), ValueError, "4 channels in 1 groups do not fit"),
        (lambda: onednn.convolution(X[0], W), ValueError, "cannot convolve images of shape"),
        (lambda: onednn.convolution(X[:0], W), ValueError, "cannot convolve images of shape"),
        (lambda: jax.jvp(lambda x: onednn.convolution(x, W), (X,), (X,)), TypeError, "forward-mode"),
        (lambda: normalize(X.astype("float16")), TypeError, "float32 or bfloat16, got float16"),
        (lambda: normalize(X[..., :4], 3), ValueError, r"scale \(3,\) and bias \(4,\) do not fit images"),
        (lambda: second_derivative(normalize), ValueError, "norm_gradient` cannot be differentiated"),
        (lambda: onednn.max_pool(X.astype("float16")), TypeError, "float32 or bfloat16, got float16"),
        (lambda: onednn.max_pool(X[0]), ValueError, r"takes images \[B, H, W, C\]"),
        (lambda: second_derivative(onednn.max_pool), ValueError, "max_pool_gradient` cannot be differentiated"),
        (
            lambda: second_derivative(lambda x: onednn.convolution(x, W[..., :4, :])),
            ValueError,
            "cannot be differentiated",
        ),
    ],
)
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- batch normalization -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 7, 5), (1, 2, 2, 64)], ids=str)
def test_batch_norm(shape, relu):
    """Outputs, gradients of all three operands, running statistics: those of Flax's."""
    x = 3 * jax.random.normal(jax.random.key(0), shape) + 1
    weight = jax.random.normal(jax.random.key(1), shape)

    def through(module):
        variables = module.init(jax.random.key(0), x)
        variables["params"] = {"scale": jnp.linspace(0.5, 2, shape[3]), "bias": jnp.linspace(-1, 1, shape[3])}

        def loss(params, x):
            call = module.apply({**variables, "params": params}, x, mutable=["batch_stats"], **with_relu(module))
            y, new = (jax.nn.relu(call[0]) if relu and not with_relu(module) else call[0]), call[1]
            return (y * weight).sum(), (y, new["batch_stats"])

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables["params"], x)

    def with_relu(module):
        return {"relu": relu} if isinstance(module, onednn.BatchNorm) else {}

    (got, got_aux), (want, want_aux) = (through(m(use_running_average=False)) for m in (onednn.BatchNorm, BatchNorm))
    assert_near((got, got_aux), (want, want_aux), 5e-5)


def test_batch_norm_is_exact_to_float32():
    """A mean far above the deviation, where one pass over squares would cancel: still 1e-4 of float64."""
    x = np.random.default_rng(0).normal(100, 0.1, (8, 16, 16, 4)).astype(np.float32)
    y, mean, var = onednn.batch_norm(jnp.asarray(x), jnp.ones(4), jnp.zeros(4))
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(var, exact.var((0, 1, 2)), rtol=1e-3)
    want = (exact - exact.mean((0, 1, 2))) / np.sqrt(exact.var((0, 1, 2)) + 1e-5)
    assert np.abs(y - want).max() < 1e-2


def test_batch_norm_in_evaluation():
    module = onednn.BatchNorm(use_running_average=True)
    x = jnp.linspace(-2, 2, 32).reshape(2, 2, 2, 4)
    variables = module.init(jax.random.key(0), x)
    assert_near(module.apply(variables, x, method="with_relu"), jax.nn.relu(x) / np.sqrt(1 + 1e-5))


def test_unusual_norms_are_the_plain_ones():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    module = onednn.BatchNorm(use_running_average=False, use_scale=False)
    y, _ = module.apply(module.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    assert_near((y.mean((0, 1, 2)), y.var((0, 1, 2))), (jnp.zeros(8), jnp.ones(8)), 1e-3)


# ---- max-pool -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 7, 8, 5), (3, 1, 2, 5)], ids=str)
def test_max_pool(shape):
    """Outputs and gradients, with the many equal zeros that a ReLU leaves."""
    x = jax.nn.relu(jax.random.normal(jax.random.key(0), shape))
    weight = jax.random.normal(jax.random.key(1), max_pool(x).shape)

    def of(pool):
        return jax.jit(lambda x: (pool(x), jax.grad(lambda x: (pool(x) * weight).sum())(x)))(x)

    (got, got_gradient), (want, gradient) = of(onednn.max_pool), of(max_pool)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(got_gradient, gradient, atol=1e-6)


# ---- networks -------------------------------------------------------------------------------------------------------


def answers(model, variables, images, labels):
    """Logits, statistics, gradients of a training pass, and logits in evaluation."""

    def loss(params):
        logits, new = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
        return -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels].mean(), (logits, new["batch_stats"])

    grads, (logits, stats) = jax.grad(loss, has_aux=True)(variables["params"])
    return {"train": logits, "stats": stats, "grads": grads, "eval": model.apply(variables, images, train=False)}


OTHERS = ("resnet50", "preact_resnet18_cifar", "resnet8", "resnet18", "resnext50_32x4d")


@pytest.mark.parametrize(
    ("name", "stages"), [("resnet50", 1), *(pytest.param(name, 3, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_networks(name, stages):
    """Each block and stem, one block a stage: outputs, statistics and gradients of whole networks."""
    model = MODELS[name](num_classes=CLASSES, width=16)
    model = model.clone(stage_sizes=(1,) * stages)
    variables = init_variables(model, jax.random.key(0), (33, 33, 3))
    images = jax.random.normal(jax.random.key(1), (4, 33, 33, 3))
    labels = np.arange(4)
    want = jax.jit(partial(answers, model))(variables, images, labels)
    got = jax.jit(partial(answers, model.clone(**FAST)))(variables, images, labels)
    grads, want_grads = got.pop("grads"), want.pop("grads")
    assert_near(got, want, 2e-4)
    # One activation that rounds to the other side of zero moves whole kernels: hold their norm, not each entry.
    off = jnp.sqrt(sum(((a - b) ** 2).sum() for a, b in zip(*map(jax.tree.leaves, (grads, want_grads)), strict=True)))
    assert off < 0.03 * jnp.sqrt(sum((b**2).sum() for b in jax.tree.leaves(want_grads)))


@pytest.fixture(scope="module")
def params_after(images):
    """`params_after(mode, devices, fast)`: after three steps of a small net."""

    @cache
    def run(mode, devices, fast):
        mesh = make_mesh(jax.devices()[:devices])
        model = tiny(axis_name=axis_of(mode), **(FAST if fast else {}))
        step = compile_step(partial(train_step, model=model, tx=tiny_tx()), mesh=mesh, mode=mode)
        state = jax.device_put(tiny_state(tiny_tx()), replicated(mesh))
        for _ in range(3):
            state, _ = step(state, shard_batch(batch_of(images), mesh, mode=mode))
        return jax.device_get(state.params)

    return run


@pytest.mark.parametrize(
    "mode", ["shard_map", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("jit", "pmap"))]
)
def test_three_modes(mode, params_after):
    """Three steps on eight devices equal three plain steps on one."""
    close = partial(np.testing.assert_allclose, atol=2e-6, rtol=0)
    jax.tree.map(close, params_after(mode, 8, True), params_after("jit", 1, False))


# ---- the library ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a process that has not loaded oneDNN, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library._load.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    library._load.cache_clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda patch: patch.setattr(library.Path, "is_file", lambda path: False), "pip install onednn-cpu-gomp"),
        (lambda patch: patch.setattr(library.sys, "platform", "darwin"), "need Linux"),
        (lambda patch: patch.setenv("PATH", ""), r"needs a C\+\+ compiler|not installed"),
        (lambda patch: patch.setenv("CXX", "false"), r"false cannot compile .*handlers\.cc|not installed"),
    ],
)
def test_unavailable(fresh, monkeypatch, change, message):
    change(monkeypatch)
    with pytest.raises(onednn.Unavailable, match=message):
        onednn.load()


def test_compiled_once(fresh, monkeypatch):
    include, path = library._find_library()
    calls = []
    monkeypatch.setattr(library, "_compile", lambda output, *_: (calls.append(output), output.touch()))
    compiled = library._compiled_library(include, path)
    assert compiled.parent == fresh / "resnet-jax"
    # That the library has been read since is not a change.
    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    assert library._compiled_library(include, path) == compiled
    assert len(calls) == 1
