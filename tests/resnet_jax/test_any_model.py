"""Masks, scores and schedules on any Flax module: a ResNet, a LayerNorm MLP, a small Vision Transformer."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.losses import softmax_cross_entropy
from resnet_jax.mask_schedules import alternating, gradual, rigl
from resnet_jax.masks import (
    apply_masks,
    check_masks,
    make_masks,
    no_masks,
    pack,
    sparsity_of,
    unpack,
)
from resnet_jax.scores import SCORES, magnitude, synflow
from resnet_jax.tree import is_kernel, leaves, map_with_path, select
from tests.reference.nets import CLASSES, Mlp, VisionTransformer, batch_of, quick_jit, score_arguments, tiny

pytestmark = pytest.mark.usefixtures("unoptimised")

KEY = jax.random.key(0)
NETS = {"resnet": tiny(), "mlp": Mlp(), "vit": VisionTransformer()}


@cache
def variables_of(name):
    return quick_jit(NETS[name].init)(KEY, jnp.zeros((1, 8, 8, 3)))


@pytest.mark.parametrize("name", ["resnet", "mlp", pytest.param("vit", marks=pytest.mark.slow)])
def test_scores_of_a_net_that_is_half_pruned(name, images):
    """Their structure is that of the parameters, and they are 0 where a weight is 0, except for `random`."""
    model, variables = NETS[name], variables_of(name)
    rng = np.random.default_rng(0)
    masks = map_with_path(lambda path, w: rng.random(w.shape) < 0.5, variables["params"])
    params = jax.tree.map(np.asarray, quick_jit(apply_masks)(variables["params"], masks))
    rest = {collection: tree for collection, tree in variables.items() if collection != "params"}

    def loss(params, batch):
        logits = model.apply({**rest, "params": params}, batch["image"] / 255.0)
        return softmax_cross_entropy(logits, jax.nn.one_hot(batch["label"], CLASSES))

    def forward(params):
        neutral = map_with_path(lambda path, s: jnp.full_like(s, path.endswith("/var")), rest)
        no_bias = map_with_path(lambda path, w: jnp.zeros_like(w) if path.endswith("/bias") else w, params)
        return model.apply({**neutral, "params": no_bias}, jnp.ones((1, 8, 8, 3)))

    batches = [jax.tree.map(lambda x, i=i: x[i : i + 4], batch_of(images)) for i in (0, 4)]
    for score_name, score in SCORES.items():
        got = score(params, **score_arguments(score_name, loss, batches, forward))
        assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, params)
        for path, s in leaves(jax.tree.map(np.asarray, got)).items():
            assert np.isfinite(s).all() and s.min() >= 0, (score_name, path)
            if score_name != "random":
                assert not s[leaves(params)[path] == 0].any(), (score_name, path)
        assert any(np.any(s) for s in jax.tree.leaves(got)), score_name

    if name == "resnet":  # every path goes through the head, and through the stem
        flow = leaves(synflow(params, forward=forward))
        total = float(quick_jit(forward)(jax.tree.map(np.abs, params)).sum())
        for path in ("stem/conv/kernel", "stem/norm/scale", "head/kernel"):
            assert np.asarray(flow[path]).sum() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("name", NETS)
def test_masks_and_schedules(name):
    """All scopes prune the exact number of all kernels; schedules end where they should; masks fit and are packed."""
    params = variables_of(name)["params"]
    kernels = [path for path, chosen in leaves(select(params, is_kernel)).items() if chosen]

    def make(params, grads, masks, key, sparsity):
        return make_masks(magnitude(params), sparsity, masks=masks)

    @quick_jit
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
