"""With timm's weights, by timm's names, networks give timm's logits; `make_timm_golden` stores them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.resnet import MODELS
from resnet_jax.torch_weights import from_torch
from resnet_jax.tree import leaves
from tests.reference.make_golden import CLASSES, weights
from tests.reference.make_timm_golden import NAMES, TIMM, images

# One of each kind of layer and of names; the others share them.
BY_DEFAULT = {"resnetv2_50x1_bit", "legacy_seresnet50", "seresnet18"}


@pytest.mark.parametrize("name", [n if n in BY_DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_logits_are_timm_s(name):
    with np.load(TIMM) as stored:
        want, shapes = stored[name], json.loads(str(stored[f"{name}/shapes"]))
    model = MODELS[name](num_classes=CLASSES).clone(stage_sizes=(1, 1, 1, 1))
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    variables = from_torch(weights(name, {k: tuple(v) for k, v in shapes.items()}), dict(like))
    got = jax.jit(model.apply)(variables, images())
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * want.std())
    if name == "seresnet18":
        assert leaves(variables)["params/stage1_block1/attention/fc1/bias"].shape == (8,)
