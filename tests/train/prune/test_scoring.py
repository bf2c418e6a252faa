"""From scores to masks: rounds, sparsities per layer, inputs of the scores, recomputed statistics."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax import scores
from resnet_jax.augment import normalize
from resnet_jax.layers import BatchNorm
from resnet_jax.losses import sigmoid_cross_entropy, softmax_cross_entropy
from resnet_jax.masks import apply_masks, full_masks, kernels_except, no_masks, sparsity_of
from resnet_jax.tree import leaves, map_with_path
from tests.reference.nets import CLASSES, quick_jit, tiny
from train.prune.config import PruningConfig
from train.prune.scoring import (
    in_step,
    neutral_forward,
    per_example_loss,
    prunable_groups,
    prune_at_once,
    pruned_share,
    recalibrate,
    select,
)
from train.state import init_variables

pytestmark = pytest.mark.usefixtures("unoptimised")

IMAGE = (8, 8, 3)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
LAYERS = [
    "stage1_block1/conv1/kernel",
    "stage1_block1/conv2/kernel",
    "stage2_block1/conv1/kernel",
    "stage2_block1/conv2/kernel",
    "stage2_block1/shortcut/conv/kernel",
]


PREPROCESS = normalize(MEAN, STD)


def config(**pruning):
    """How a tiny network is pruned."""
    return PruningConfig(**({"sparsity": 0.75, "schedule": "one_shot"} | pruning))


@pytest.fixture(scope="module")
def variables():
    """Of a network whose biases, scales and statistics are those of no fresh one."""
    rng = np.random.default_rng(0)

    def shifted(path, x):
        return x if path.endswith("kernel") else x + jnp.asarray(rng.uniform(0.1, 0.5, x.shape), jnp.float32)

    return map_with_path(shifted, init_variables(tiny(), jax.random.key(0), IMAGE))


@pytest.fixture(scope="module")
def batches(images):
    """Four batches of 4."""
    return [{"image": images[0][i : i + 4], "label": images[1][i : i + 4]} for i in range(0, 16, 4)]


def normalised(batch):
    return (batch["image"].astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)


def start_masks(params, p):
    return full_masks(params, kernels_except(p.exclude))


def pruned(variables, batches, masks=None, **pruning):
    made = config(**pruning)
    return prune_at_once(
        variables["params"],
        variables["batch_stats"],
        start_masks(variables["params"], made) if masks is None else masks,
        config=made,
        model=tiny(),
        loss=softmax_cross_entropy,
        preprocess=PREPROCESS,
        batches=batches,
        image_shape=IMAGE,
        key=jax.random.key(7),
    )


def held(masks):
    return {path: np.asarray(mask) for path, mask in leaves(masks).items() if mask.ndim}


def kept(masks):
    return sum(int(mask.sum()) for mask in held(masks).values())


# ---- rounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["magnitude", "random", "snip", "synflow"])
def test_rounds_reach_the_same_sparsity(variables, batches, score):
    size = sum(leaves(variables["params"])[path].size for path in LAYERS)
    for rounds in (1, 2, 5):
        masks = pruned(variables, batches, score=score, rounds=rounds)
        assert sorted(held(masks)) == LAYERS
        assert kept(masks) == size - round(0.75 * size)


def test_each_round_prunes_the_same_share_of_what_is_left(variables, batches, monkeypatch):
    """And scores what the round before has left, pruned weights being zero."""
    shares = []

    def watched(params):
        weights = np.concatenate([np.asarray(leaves(params)[path]).ravel() for path in LAYERS])
        shares.append(float((weights != 0).mean()))
        return scores.magnitude(params)

    monkeypatch.setitem(scores.SCORES, "magnitude", watched)
    pruned(variables, batches, rounds=4)
    np.testing.assert_allclose(shares, 0.25 ** (np.arange(4) / 4), atol=1e-3)


def test_synflow_takes_a_hundred_rounds_and_others_one(variables, batches, monkeypatch):
    calls = []

    def counting(name):
        monkeypatch.setitem(scores.SCORES, name, lambda params: calls.append(name) or scores.magnitude(params))

    for name in ("synflow", "magnitude"):
        counting(name)
        pruned(variables, batches, score=name)
    assert (calls.count("synflow"), calls.count("magnitude")) == (100, 1)


def test_in_rounds_of_magnitude_nothing_changes(variables, batches):
    once, thrice = (held(pruned(variables, batches, rounds=rounds)) for rounds in (1, 3))
    for path in LAYERS:
        np.testing.assert_array_equal(once[path], thrice[path])


def test_what_was_pruned_stays_so_and_counts(variables, batches):
    before = pruned(variables, batches, score="random", sparsity=0.5)
    after = pruned(variables, batches, before, rounds=2)
    assert all(not (mask & ~held(before)[path]).any() for path, mask in held(after).items())
    size = sum(mask.size for mask in held(after).values())
    assert kept(after) == size - round(0.75 * size)


def test_random_masks_are_of_the_key(variables, batches):
    """Not of the order of calls; magnitude would choose others."""
    first, again, other = (pruned(variables, batches, score=score) for score in ("random", "random", "magnitude"))
    for path in LAYERS:
        np.testing.assert_array_equal(held(first)[path], held(again)[path])
        assert not np.array_equal(held(first)[path], held(other)[path])


@pytest.mark.parametrize("score", ["snip", "taylor", "fisher"])
def test_scores_that_are_not_finite_are_refused(variables, batches, score):
    broken = {**variables, "params": jax.tree.map(lambda w: w * jnp.nan, variables["params"])}
    with pytest.raises(ValueError, match=f"{score}: scores are not finite"):
        pruned(broken, batches, score=score)


# ---- what is selected ------------------------------------------------------------------------------------------------


def test_shares_of_layers_grow_together(variables):
    """On the way to the final sparsity each layer is as far as all are: a schedule takes them along."""
    p = config(layers=("stage1=0.4", "conv1=0.9"))
    found = scores.magnitude(variables["params"])
    for progress in (0.0, 0.5, 1.0):
        masks = held(quick_jit(partial(select, config=p, model=tiny()))(found, jnp.float32(0.75 * progress), None))
        shares = {path: 1 - mask.mean() for path, mask in masks.items()}
        # The first pattern that matches holds.
        wanted = dict(zip(LAYERS, (0.4, 0.4, 0.9, 0.75, 0.75), strict=True))
        assert shares == pytest.approx({path: share * progress for path, share in wanted.items()}, abs=5e-3)
    with pytest.raises(ValueError, match=r"--prune.layers stage9 matches no prunable kernel: stage1_block1/conv1"):
        select(found, 0.5, None, config=config(layers=("stage9=0.4",)), model=tiny())


def test_taylor_in_the_step_is_of_the_step_s_gradient(variables):
    p, params = config(score="taylor"), variables["params"]
    grads = map_with_path(lambda path, w: jnp.cos(1e3 * w), params)
    masks = quick_jit(in_step(p, tiny()))(
        params, grads, start_masks(params, p), jax.random.key(0), jnp.float32(0.75)
    )  # fmt: skip
    products = {path: np.abs(w * leaves(grads)[path]) for path, w in leaves(params).items() if path in LAYERS}
    kept_ones = np.concatenate([np.asarray(products[path])[mask] for path, mask in held(masks).items()])
    gone = np.concatenate([np.asarray(products[path])[~mask] for path, mask in held(masks).items()])
    assert gone.max() <= kept_ones.min() and len(gone) == round(0.75 * (len(gone) + len(kept_ones)))


@pytest.mark.parametrize("score", ["magnitude", "random", "norm_scale", "taylor"])
def test_scores_of_the_step_trace(variables, score):
    """Whatever the sparsity and the step, once; channels too."""
    p = config(score=score, structure="channels", round_to=4, sparsity=0.5, scope="uniform")
    params, traces = variables["params"], []

    def make(*arguments):
        traces.append(1)
        return in_step(p, tiny())(*arguments)

    made = quick_jit(make)
    masks = select(scores.magnitude(params), 0.0, None, config=p, model=tiny())
    for share in (0.25, 0.5):
        masks = made(params, params, masks, jax.random.key(0), jnp.float32(share))
        assert share_of(masks, params, p) == pytest.approx(share, abs=0.13)
    assert len(traces) == 1


def share_of(masks, params, p):
    return pruned_share(masks, params, config=p, model=tiny())


# ---- shares ----------------------------------------------------------------------------------------------------------


def test_share_of_weights(variables):
    p, params = config(), variables["params"]
    assert share_of(no_masks(params), params, p) == 0
    masks = select(scores.magnitude(params), 0.75, None, config=p, model=tiny())
    assert share_of(masks, params, p) == pytest.approx(float(sparsity_of(masks))) == pytest.approx(0.75)


def test_share_of_channels(variables):
    """Of those that can be pruned, whatever they are wide: the share of weights is another."""
    p = config(structure="channels", round_to=4, sparsity=0.5, scope="uniform")
    params = variables["params"]
    groups = prunable_groups(tiny(), params, p)
    found = scores.magnitude(params)
    assert share_of(select(found, 0.0, None, config=p, model=tiny()), params, p) == 0
    masks = select(found, 0.5, None, config=p, model=tiny())
    assert share_of(masks, params, p) == pytest.approx(0.5)
    assert float(sparsity_of(masks)) > 0.5

    fewer = dataclasses.replace(p, exclude=("stream", "stem"))
    names = [group.name for group in prunable_groups(tiny(), params, fewer)]
    assert (
        names
        == [group.name for group in groups if "conv1" in group.name]
        == [
            "stage1_block1/conv1",
            "stage2_block1/conv1",
        ]
    )


# ---- what scores are given -------------------------------------------------------------------------------------------


def test_loss_of_each_example(variables, batches):
    """Cross entropy of normalised images that are neither augmented nor mixed, by running statistics, unsmoothed."""
    loss = per_example_loss(tiny(), variables["batch_stats"], softmax_cross_entropy, PREPROCESS)
    found = np.asarray(loss(variables["params"], batches[0]))
    logits = np.float64(tiny().apply(variables, normalised(batches[0]), train=False))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert found.shape == (4,)
    np.testing.assert_allclose(found, -np.log(probabilities[range(4), batches[0]["label"]]), rtol=1e-5)
    half = {name: x[:2] for name, x in batches[0].items()}
    np.testing.assert_allclose(loss(variables["params"], half), found[:2], rtol=1e-5)

    sigmoid = per_example_loss(tiny(), variables["batch_stats"], sigmoid_cross_entropy, PREPROCESS)
    found = np.asarray(sigmoid(variables["params"], batches[0]))
    targets = np.eye(CLASSES)[batches[0]["label"]]
    want = -(targets * np.log(1 / (1 + np.exp(-logits))) + (1 - targets) * np.log(1 / (1 + np.exp(logits))))
    assert any(np.allclose(found, reduced, rtol=1e-4) for reduced in (want.sum(-1), want.mean(-1)))


def test_synflow_s_network_does_nothing_but_add(variables):
    """Its scores at the head, which all of the signal passes, sum to the output; biases count for nothing."""
    params = jax.tree.map(jnp.abs, variables["params"])
    forward = neutral_forward(tiny(), variables["batch_stats"], IMAGE)
    total = float(forward(params).sum())
    found = scores.synflow(variables["params"], forward=forward)
    assert total > 0
    assert float(leaves(found)["head/kernel"].sum()) == pytest.approx(total, rel=1e-4)
    assert float(leaves(found)["stem/conv/kernel"].sum()) == pytest.approx(total, rel=1e-4)
    assert not any(score.any() for path, score in leaves(found).items() if path.endswith("/bias"))
    doubled = map_with_path(lambda path, w: 2 * w if path == "head/kernel" else w, params)
    assert float(forward(doubled).sum()) == pytest.approx(2 * total, rel=1e-5)


# ---- statistics ------------------------------------------------------------------------------------------------------


def of_each_batch(variables, batches):
    """Batch statistics, without any memory of running ones: what an update adds to statistics of zero."""
    zero, momentum = jax.tree.map(jnp.zeros_like, variables["batch_stats"]), BatchNorm.keywords["momentum"]
    found = []
    for batch in batches:
        given = {"params": variables["params"], "batch_stats": zero}
        _, new = tiny().apply(given, normalised(batch), train=True, mutable=["batch_stats"])
        found.append({path: np.float64(x) / (1 - momentum) for path, x in leaves(new["batch_stats"]).items()})
    return found


@pytest.mark.parametrize("number", [1, 4])
def test_statistics_measured_anew(variables, batches, number):
    """A mean over batches in which later ones weigh a little more, and nothing of what was remembered."""
    found = leaves(
        recalibrate(
            variables["params"], variables["batch_stats"], batches[:number], model=tiny(), preprocess=PREPROCESS
        )
    )  # fmt: skip
    each, momentum = of_each_batch(variables, batches[:number]), BatchNorm.keywords["momentum"]
    weights = momentum ** np.arange(number - 1, -1, -1.0)
    for path, x in found.items():
        want = sum(w * stats[path] for w, stats in zip(weights / weights.sum(), each, strict=True))
        np.testing.assert_allclose(x, want, rtol=1e-4, atol=1e-5, err_msg=path)


def test_statistics_of_the_stem_by_numpy(variables, batches):
    """Mean and variance over images and positions of what the first convolution makes of normalised images."""
    found = recalibrate(variables["params"], variables["batch_stats"], batches[:1], model=tiny(), preprocess=PREPROCESS)
    images, kernel = (
        normalised(batches[0]).astype(np.float64),
        np.float64(variables["params"]["stem"]["conv"]["kernel"]),
    )
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))  # [B, H, W, C, 3, 3]
    made = np.einsum("bhwcij,ijco->bhwo", windows, kernel)
    norm = found["stem"]["norm"]
    np.testing.assert_allclose(norm["mean"], made.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    size = made.size / made.shape[-1]
    np.testing.assert_allclose(norm["var"], made.var((0, 1, 2)) * size / (size - 1), rtol=1e-2)


def test_statistics_are_of_the_pruned_network(variables, batches):
    """What pruning changes, the statistics follow; a second measurement on the same batches changes nothing."""
    masks = pruned(variables, batches, sparsity=0.9)
    sparse = apply_masks(variables["params"], masks)
    again = partial(recalibrate, model=tiny(), preprocess=PREPROCESS)
    dense_stats = again(variables["params"], variables["batch_stats"], batches)
    stats = again(sparse, variables["batch_stats"], batches)
    assert not np.allclose(leaves(stats)["stage1_block1/norm1/var"], leaves(dense_stats)["stage1_block1/norm1/var"])
    for path, x in leaves(again(sparse, stats, batches)).items():
        np.testing.assert_allclose(x, leaves(stats)[path], rtol=1e-6, err_msg=path)
