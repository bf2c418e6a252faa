"""Masks and schedules on any Flax module: a ResNet, a LayerNorm MLP, a small Vision Transformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.mask_schedules import alternating, gradual, rigl
from resnet_jax.masks import apply_masks, check_masks, make_masks, no_masks, pack, sparsity_of, unpack
from resnet_jax.scores import magnitude
from resnet_jax.tree import is_kernel, leaves, select
from tests.reference.nets import Mlp, VisionTransformer, tiny

KEY = jax.random.key(0)
NETS = {"resnet": tiny(), "mlp": Mlp(), "vit": VisionTransformer()}


@pytest.mark.parametrize("name", ["mlp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vit", "resnet"))])
def test_masks_and_schedules(name):
    """All scopes prune the exact number of all kernels; schedules end where they should; masks fit and are packed."""
    params = jax.jit(NETS[name].init)(KEY, jnp.zeros((1, 8, 8, 3)))["params"]
    kernels = [path for path, chosen in leaves(select(params, is_kernel)).items() if chosen]

    def make(params, grads, masks, key, sparsity):
        return make_masks(magnitude(params), sparsity, masks=masks)

    @jax.jit
    def prune(params):
        by_scope = {s: make_masks(magnitude(params), 0.6, scope=s) for s in ("global", "uniform", "erk", "lamp")}
        schedules = {
            "gradual": gradual(make, final=0.6, begin_step=0, end_step=4, every=2),
            "alternating": alternating(make, final=0.6, begin_step=1, end_step=4, every=1),
            "rigl": rigl(end_step=8, every=4),
        }
        start = by_scope["uniform"]
        return by_scope | {s: f(4, apply_masks(params, start), params, start, KEY) for s, f in schedules.items()}

    for how, masks in prune(params).items():
        assert [path for path, mask in leaves(masks).items() if mask.ndim] == kernels
        assert float(sparsity_of(masks)) == pytest.approx(0.6, abs=0.02), how
        check_masks(masks, params)
        jax.tree.map(np.testing.assert_array_equal, unpack(pack(masks), params), masks)
    check_masks(no_masks(params), params)
