"""Masks, scores and schedules on any Flax module: a ResNet, a LayerNorm MLP, a small Vision Transformer."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_jax.losses import softmax_cross_entropy
from resnet_jax.mask_schedules import alternating, gradual, rigl
from resnet_jax.masks import (
    apply_masks,
    check_masks,
    full_masks,
    kernels_except,
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


def sentences(seed, size, length=8):
    """Random one-hot tokens [size, length, 1, 8], in which a marker 0 precedes a word 1..4, the label."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 8, (size, length))
    labels, places = rng.integers(0, CLASSES, size), rng.integers(0, length - 1, size)
    tokens[np.arange(size), places] = 0
    tokens[np.arange(size), places + 1] = 1 + labels
    return np.eye(8, dtype=np.float32)[tokens][:, :, None], labels


def test_a_transformer_is_pruned_in_training():
    """80 % of all kernels except the head's, gradually, in a step that knows nothing of ResNets."""
    model, tx, prunable = VisionTransformer(patch=1, width=32), optax.adam(5e-3), kernels_except(["^head/"])

    def make(params, grads, masks, key, sparsity):
        return make_masks(magnitude(params), sparsity, prunable=prunable, masks=masks)

    remask = gradual(make, final=0.8, begin_step=60, end_step=180, every=20)
    traces = []

    def loss(params, x, labels):
        logits = model.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @quick_jit
    def step(number, params, opt_state, masks, x, labels):
        traces.append(1)
        grads = jax.grad(loss)(params, x, labels)
        updates, opt_state = tx.update(apply_masks(grads, masks), opt_state, params)
        params = apply_masks(optax.apply_updates(params, updates), masks)
        masks = remask(number + 1, params, grads, masks, KEY)
        return apply_masks(params, masks), opt_state, masks

    params = quick_jit(model.init)(KEY, sentences(0, 1)[0])["params"]
    masks, opt_state = full_masks(params, prunable), tx.init(params)
    for number in range(240):
        params, opt_state, masks = step(number, params, opt_state, masks, *sentences(number, 64))
    assert len(traces) == 1

    chosen = {path: np.asarray(m) for path, m in leaves(masks).items() if m.ndim}
    parts = ["down", "patches", "up", *(f"attention/{name}" for name in ("key", "out", "query", "value"))]
    assert chosen.keys() == {f"{name}/kernel" for name in parts}
    assert chosen["attention/query/kernel"].shape == (32, 4, 8)
    assert sum((~m).sum() for m in chosen.values()) == round(0.8 * sum(m.size for m in chosen.values()))
    for path, mask in chosen.items():
        np.testing.assert_array_equal(np.asarray(leaves(params)[path]) != 0, mask)
    assert (np.asarray(params["head"]["kernel"]) != 0).all() and (np.asarray(params["places"]) != 0).all()

    x, labels = sentences(10_000, 512)
    assert (quick_jit(model.apply)({"params": params}, x).argmax(-1) == labels).mean() > 0.9
