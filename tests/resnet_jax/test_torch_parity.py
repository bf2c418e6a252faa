"""With the same weights, results equal PyTorch's: evaluation, every stage, training mode, statistics, gradients.

The tests always compare with the stored outputs of `make_golden.py`, and with the whole twins if torch is installed.
"""

import importlib.util
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_jax.resnet import MODELS, ResNet
from resnet_jax.torch_weights import from_torch, to_torch
from resnet_jax.tree import leaves
from tests.reference.compare import assert_near
from tests.reference.make_golden import CASES, CLASSES, GOLDEN, batch, shallow, summary, torch_reference, weights

HAS_TORCH = importlib.util.find_spec("torch") is not None


def net(name: str, num_classes: int | None = CLASSES) -> ResNet:
    model = MODELS[name](num_classes=num_classes, width=CASES[name][0])
    return model.clone(stage_sizes=shallow(len(model.stage_sizes)))


@cache
def template(name: str) -> dict:
    """Zeros in the shape of the model's variables."""
    shapes = jax.eval_shape(net(name).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), dict(shapes))


@cache
def filled(name: str) -> dict:
    """The model's variables with the case's weights, through `from_torch`."""
    zeros = template(name)
    return from_torch(weights(name, {k: v.shape for k, v in to_torch(zeros).items()}), zeros)


@cache
def ours(name: str) -> dict[str, np.ndarray]:
    """What `make_golden.torch_reference` returns, by this project's model."""
    model, variables = net(name), filled(name)
    images, labels = batch(name)

    @jax.jit
    def answers(variables):
        levels = model.apply(variables, images, method="maps")

        def loss(params):
            logits, new = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), (logits, new["batch_stats"])

        grads, (logits, stats) = jax.grad(loss, has_aux=True)(variables["params"])
        return levels, logits, stats, grads

    levels, logits, stats, grads = jax.device_get(answers(variables))
    found = {k: v for k, v in levels.items() if k.startswith("stage")}
    found |= {"eval": levels["logits"], "train": logits}
    named = to_torch({"params": grads, "batch_stats": stats})
    return found | {f"{'stats' if '.running_' in k else 'grad'}/{k}": v for k, v in named.items()}


# By default, one net of each stem; the others are slow tests.
KINDS = {"resnet20", "resnext50_32x4d"}


KINDS_BY_DEFAULT = [k if k in KINDS else pytest.param(k, marks=pytest.mark.slow) for k in CASES]


@pytest.mark.parametrize("name", KINDS_BY_DEFAULT)
def test_golden(name):
    found = ours(name)
    with np.load(GOLDEN) as stored:
        for key, got in summary(found).items():
            want = stored[f"{name}/{key}"]
            if key in found:
                assert_near(got, want, 2e-4, key)
                continue
            # A row for each tensor, (norm, first value): each is held to its own norm, not to the largest one.
            names = sorted(k for k in found if k.startswith(key))
            assert len(want) == len(names), key
            for row, ours_, theirs in zip(names, got, want, strict=True):
                assert_near(ours_, theirs, 5e-4 if key == "grad" else 2e-4, row)


@pytest.mark.skipif(not HAS_TORCH, reason="needs the extra parity")
@pytest.mark.parametrize("name", KINDS_BY_DEFAULT)
def test_live(name):
    want, got = torch_reference(name), ours(name)
    assert want.keys() == got.keys()
    for key, value in want.items():
        assert_near(got[key], value, 5e-4 if key.startswith("grad") else 1e-4, key)


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS_BY_DEFAULT)
def test_round_trip_is_bit_equal(name):
    variables = filled(name)
    again = from_torch(to_torch(variables), template(name))
    for path, leaf in leaves(again).items():
        np.testing.assert_array_equal(leaf, leaves(variables)[path], err_msg=path)


@pytest.fixture
def state():
    """(state dict of a small net, zeros in its variables' shape)."""
    return to_torch(filled("resnet18")), template("resnet18")


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "backbone.", "module.backbone."])
def test_wrappers_counters_and_names_of_the_cifar_repositories(state, prefix):
    source, zeros = state
    theirs = {k.replace("fc.", "linear.").replace("downsample", "shortcut"): v for k, v in source.items()}
    assert theirs.keys() != source.keys()
    for named in (source, theirs):
        wrapped = {prefix + k: v for k, v in named.items()} | {prefix + "bn1.num_batches_tracked": np.asarray(7)}
        jax.tree.map(np.testing.assert_array_equal, from_torch(wrapped, zeros), from_torch(source, zeros))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layer1.0.conv1.weight"), "missing 1: layer1.0.conv1.weight"),
        (lambda s: s.update({"layer9.0.conv1.weight": np.zeros(3)}), "unexpected 1: layer9.0.conv1.weight"),
        (lambda s: s.update({"fc.bias": np.zeros(9)}), r"of a different shape 1: fc.bias \[9\]"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("layer4")], "missing .*, ..."),
    ],
)
def test_every_tensor_is_accounted_for(state, change, message):
    source, zeros = state
    change(source)
    with pytest.raises(ValueError, match=message) as error:
        from_torch(source, zeros)
    assert "\n" not in str(error.value)


def test_new_head_keeps_the_model_s_own(state):
    source, zeros = state
    source["fc.weight"], source["fc.bias"] = np.ones((9, 64), np.float32), np.ones(9, np.float32)
    got = from_torch(source, zeros, new_head=True)
    assert (np.asarray(got["params"]["head"]["kernel"]) == 0).all()
    assert np.abs(got["params"]["stem"]["conv"]["kernel"]).max() > 0


def test_variables_of_something_else():
    with pytest.raises(ValueError, match="dense/kernel has no PyTorch name"):
        to_torch({"params": {"dense": {"kernel": np.zeros((2, 2))}}})
