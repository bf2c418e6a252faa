"""Heads: layers by name, published sizes, outputs."""

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pretrain.heads import MLP, Network, Prototypes
from pretrain.objectives import OBJECTIVES
from resnet_jax.tree import count, leaves, map_with_path

X = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32) * 3 + 1


def shapes(module, inputs=6, **options):
    """The variables' shapes by path."""
    tree = jax.eval_shape(partial(module.init, **options), jax.random.key(0), jnp.zeros((2, inputs)))
    return {path: leaf.shape for path, leaf in leaves(tree).items()}


def variables_of(module, x):
    """Kernels and biases of layers drawn by NumPy, which compiles nothing; norms as they start."""
    rng, start = np.random.default_rng(3), {"scale": 1, "var": 1}

    def draw(path, leaf):
        *_, layer, name = path.split("/")
        values = np.full(leaf.shape, start.get(name, 0)) if "norm" in layer else rng.normal(size=leaf.shape) * 0.5
        return values.astype(np.float32)

    init = partial(module.init, train=False)
    return map_with_path(draw, {"batch_stats": {}, **jax.eval_shape(init, jax.random.key(0), x)})


@cache
def applied(module):
    """(outputs of X in training, variables)."""
    variables = variables_of(module, X)
    go = jax.jit(partial(module.apply, train=True, mutable=["batch_stats"]))
    return jax.device_get(go(variables, X)[0]), variables


# ---- MLP -------------------------------------------------------------------------------------------------------------

FC1, FC2, FC3 = ((f"params/fc{i}/kernel", shape) for i, shape in ((1, (6, 5)), (2, (5, 4)), (3, (4, 3))))


def bias(i, size):
    return {f"params/fc{i}/bias": (size,)}


def norm(i, size, affine=True):
    """A norm's parameters and statistics."""
    parameters = {f"params/norm{i}/{name}": (size,) for name in ("scale", "bias")} if affine else {}
    return parameters | {f"batch_stats/norm{i}/{name}": (size,) for name in ("mean", "var")}


@pytest.mark.parametrize(
    ("between", "last", "want"),
    [
        (True, None, norm(1, 5) | norm(2, 4) | bias(3, 3)),
        (True, "affine", norm(1, 5) | norm(2, 4) | norm(3, 3)),
        (True, "plain", norm(1, 5) | norm(2, 4) | norm(3, 3, affine=False)),
        (False, None, bias(1, 5) | bias(2, 4) | bias(3, 3)),
        (False, "affine", bias(1, 5) | bias(2, 4) | norm(3, 3)),
        (False, "plain", bias(1, 5) | bias(2, 4) | norm(3, 3, affine=False)),
    ],
)
def test_layers_have_a_norm_or_a_bias(between, last, want):
    mlp = MLP((5, 4, 3), norm=between, last_norm=last)
    assert shapes(mlp, train=False) == dict([FC1, FC2, FC3]) | want


def test_layers_follow_one_another():
    """Product, bias or norm, activation; none after the last layer."""
    for between, activation in ((False, nn.gelu), (True, nn.relu)):
        out, variables = applied(MLP((5, 3), norm=between, activation=activation))
        p = variables["params"]
        hidden = X @ p["fc1"]["kernel"] + p["fc1"].get("bias", 0)
        if between:
            hidden = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5)
        want = np.asarray(activation(hidden)) @ p["fc2"]["kernel"] + p["fc2"]["bias"]
        np.testing.assert_allclose(out, want, atol=1e-5)
        assert (out < 0).any()


@pytest.mark.parametrize("last", ["affine", "plain"])
def test_last_norm_standardises(last):
    """By the batch in training; afterwards by the running statistics, which start at mean 0 and variance 1."""
    mlp = MLP((5, 3), norm=False, last_norm=last)
    out, variables = applied(mlp)
    np.testing.assert_allclose(out.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(out.std(0), 1, atol=1e-3)
    p = variables["params"]
    want = np.maximum(X @ p["fc1"]["kernel"] + p["fc1"]["bias"], 0) @ p["fc2"]["kernel"] / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(jax.jit(partial(mlp.apply, train=False))(variables, X), want, atol=1e-5)


def test_unknown_last_norm():
    with pytest.raises(ValueError, match="last_norm must be None, 'affine' or 'plain', got 'batch'"):
        shapes(MLP((5, 3), last_norm="batch"), train=False)


@pytest.mark.parametrize("last", [None, "affine"])
def test_bfloat16_computes_low_and_returns_float32(last):
    exact, variables = applied(MLP((5, 3), last_norm=last))
    low, low_variables = applied(MLP((5, 3), last_norm=last, dtype=jnp.bfloat16))
    assert low.dtype == np.float32
    assert {x.dtype for x in jax.tree.leaves(low_variables)} == {np.dtype(np.float32)}
    jax.tree.map(np.testing.assert_array_equal, low_variables, variables)
    np.testing.assert_allclose(low, exact, atol=0.1)
    assert np.abs(low - exact).max() > 1e-5


# ---- prototypes ------------------------------------------------------------------------------------------------------


def test_prototypes_are_cosines():
    """So lengths mean nothing, neither of an embedding nor of a direction; an embedding of length 0 has cosine 0."""
    kernel = np.random.default_rng(1).normal(size=(6, 10)).astype(np.float32)
    x = np.concatenate([X, 0 * X[:1]])
    got = jax.jit(lambda kernel, x: Prototypes(10).apply({"params": {"kernel": kernel}}, x))(kernel, x)
    want = [[row @ k / np.linalg.norm(row) / np.linalg.norm(k) for k in kernel.T] for row in X]
    np.testing.assert_allclose(got, [*want, np.zeros(10)], atol=1e-6)
    assert shapes(Prototypes(10)) == {"params/kernel": (6, 10)}


# ---- network ---------------------------------------------------------------------------------------------------------


class Pool(nn.Module):
    """An encoder of no parameters: the mean, in half precision; or what is there before it."""

    pooled: bool = True

    def __call__(self, x, *, train):
        return x.mean((1, 2)).astype(jnp.bfloat16) if self.pooled else x


IMAGES = np.random.default_rng(0).random((8, 4, 4, 3), np.float32)


@pytest.mark.parametrize("predictor", [None, MLP((7, 5))])
@pytest.mark.parametrize("prototypes", [None, Prototypes(9)])
def test_network_names_what_it_puts_out(predictor, prototypes):
    network = Network(Pool(), MLP((6, 5)), predictor, prototypes)
    variables = jax.eval_shape(partial(network.init, train=False), jax.random.key(0), IMAGES)
    heads = {"projector": True, "predictor": predictor, "prototypes": prototypes}
    assert variables["params"].keys() == {name for name, head in heads.items() if head}
    for predict in (True, False):
        out = jax.eval_shape(partial(network.apply, train=False, predict=predict), variables, IMAGES)
        want = {"features": 3, "projection": 5}
        want |= {"prediction": 5} if predictor and predict else {}
        want |= {"scores": 9} if prototypes else {}
        assert {name: (x.shape, x.dtype) for name, x in out.items()} == {
            name: ((8, size), jnp.float32) for name, size in want.items()
        }


def test_heads_stand_on_one_another():
    """Predictor and prototypes on the projection, that on the features; a target's variables lack the predictor."""
    network = Network(Pool(), MLP((6, 5)), MLP((7, 5), norm=False), Prototypes(9))

    @jax.jit
    def go(variables, images):
        out = network.apply(variables, images, train=False)
        p, stats = variables["params"], variables["batch_stats"]
        projector = {"params": p["projector"], "batch_stats": stats["projector"]}
        want = {"features": Pool()(images, train=False).astype(jnp.float32)}
        want["projection"] = network.projector.apply(projector, want["features"], train=False)
        want["prediction"] = network.predictor.apply({"params": p["predictor"]}, want["projection"], train=False)
        want["scores"] = network.prototypes.apply({"params": p["prototypes"]}, want["projection"])
        target = {"params": {k: v for k, v in p.items() if k != "predictor"}, "batch_stats": stats}
        return out, want, network.apply(target, images, train=False, predict=False)

    out, want, of_target = jax.device_get(go(variables_of(network, IMAGES), IMAGES))
    assert out.keys() == want.keys()
    for name, x in out.items():
        np.testing.assert_allclose(x, want[name], atol=1e-6)
    want.pop("prediction")
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), of_target, want)


def test_encoder_without_pooled_features():
    network = Network(Pool(pooled=False), MLP((6, 5)))
    with pytest.raises(ValueError, match=r"returns \(8, 4, 4, 3\), not pooled features \[B, F\]: build it with num_cl"):
        jax.eval_shape(partial(network.init, train=False), jax.random.key(0), IMAGES)


# ---- sizes -----------------------------------------------------------------------------------------------------------

# On the 2,048 features of a ResNet-50, parameters of projector, predictor and prototypes: products, biases where no
# norm follows, two numbers for each norm.
PUBLISHED = {
    "simclr": (2 * 2048 * 2048 + 2048 * 128 + 2 * 2 * 2048 + 2 * 128, 0, 0),
    "supcon": (2048 * 2048 + 2048 + 2048 * 128 + 128, 0, 0),
    "mocov2": (2048 * 2048 + 2048 + 2048 * 128 + 128, 0, 0),
    "mocov3": (2048 * 4096 + 2 * 4096 + 4096 * 256, 256 * 4096 + 2 * 4096 + 4096 * 256 + 256, 0),
    "byol": (2048 * 4096 + 2 * 4096 + 4096 * 256 + 256, 256 * 4096 + 2 * 4096 + 4096 * 256 + 256, 0),
    "simsiam": (3 * 2048 * 2048 + 2 * 2 * 2048, 2048 * 512 + 2 * 512 + 512 * 2048 + 2048, 0),
    "barlow": (2048 * 8192 + 2 * 8192 * 8192 + 2 * 2 * 8192 + 8192, 0, 0),
    "vicreg": (2048 * 8192 + 2 * 8192 * 8192 + 2 * 2 * 8192 + 8192, 0, 0),
    "nnclr": (2 * 2048 * 2048 + 2048 * 256 + 2 * 2 * 2048 + 2 * 256, 256 * 4096 + 2 * 4096 + 4096 * 256 + 256, 0),
    "swav": (2048 * 2048 + 2 * 2048 + 2048 * 128 + 128, 0, 128 * 3000),
    "dino": (2 * 2048 * 2048 + 2 * 2048 + 2048 * 256 + 256, 0, 256 * 65536),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_heads_are_as_large_as_published(name):
    o = OBJECTIVES[name]

    def parameters(module, inputs, **options):
        variables = jax.eval_shape(partial(module.init, **options), jax.random.key(0), jnp.zeros((1, inputs)))
        return count(variables["params"])

    embedding = o.projector[-1]
    assert PUBLISHED[name] == (
        parameters(MLP(o.projector, norm=o.norm, last_norm=o.last_norm), 2048, train=False),
        parameters(MLP(o.predictor), embedding, train=False) if o.predictor else 0,
        parameters(Prototypes(o.prototypes), embedding) if o.prototypes else 0,
    )
