"""From scores to masks: rounds, sparsities per layer, inputs of the scores, recomputed statistics."""

from functools import partial

import flax.linen as nn
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
from tests.reference.nets import CLASSES, tiny
from tests.train.prune.runs import LAYERS
from train.errors import UsageError
from train.prune.config import PruningConfig
from train.prune.scoring import bind_score, in_step, neutral_forward, per_example_loss, prune_at_once, recalibrate
from train.prune.start import make_target
from train.state import init_variables

IMAGE = (8, 8, 3)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
PREPROCESS = normalize(MEAN, STD)
CHANNELS = {"structure": "channels", "round_to": 4, "sparsity": 0.5, "scope": "uniform"}


def target_of(params, **pruning):
    """What is pruned of a tiny network."""
    return make_target(PruningConfig(**({"sparsity": 0.75, "schedule": "one_shot"} | pruning)), tiny(), params)


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


def pruned(variables, score, masks=None, *, final=0.75, rounds=1):
    params = variables["params"]
    masks = full_masks(params, kernels_except(["stem", "head"])) if masks is None else masks
    return prune_at_once(params, masks, score=score, target=target_of(params), final=final, rounds=rounds)


def held(masks):
    return {path: np.asarray(mask) for path, mask in leaves(masks).items() if mask.ndim}


def kept(masks):
    return sum(int(mask.sum()) for mask in held(masks).values())


# ---- rounds ----------------------------------------------------------------------------------------------------------


def test_each_round_prunes_the_same_share_of_what_is_left(variables):
    """And scores what the round before has left, pruned weights being zero; with magnitude, rounds change nothing."""
    shares = []

    def watched(params):
        weights = np.concatenate([np.asarray(leaves(params)[path]).ravel() for path in LAYERS])
        shares.append(float((weights != 0).mean()))
        return scores.magnitude(params)

    in_rounds, at_once = (held(pruned(variables, watched, rounds=rounds)) for rounds in (4, 1))
    np.testing.assert_allclose(shares, [*0.25 ** (np.arange(4) / 4), 1], atol=1e-3)
    assert sorted(in_rounds) == LAYERS
    size = sum(mask.size for mask in in_rounds.values())
    assert kept(in_rounds) == size - round(0.75 * size)
    for path in LAYERS:
        np.testing.assert_array_equal(in_rounds[path], at_once[path])
    assert [PruningConfig(score=score).scoring_rounds for score in ("synflow", "snip")] == [100, 1]


def test_what_was_pruned_stays_so_and_counts(variables):
    """Random masks depend on the key, not on the order of calls."""
    score = bind_score("random", key=jax.random.key(7), loss=None)
    before, again = (pruned(variables, score, final=0.5) for _ in range(2))
    after = pruned(variables, scores.magnitude, before, rounds=2)
    for path, mask in held(after).items():
        np.testing.assert_array_equal(held(before)[path], held(again)[path])
        assert not (mask & ~held(before)[path]).any()
    size = sum(mask.size for mask in held(after).values())
    assert kept(after) == size - round(0.75 * size)


# ---- what is selected ------------------------------------------------------------------------------------------------


def test_shares_of_layers_grow_together(variables):
    """On the way to the final sparsity each layer is as far as all are: a schedule takes them along."""
    params = variables["params"]
    target, found = target_of(params, layers=("stage1=0.4", "conv1=0.9")), scores.magnitude(params)
    select = jax.jit(target.select)
    for progress in (0.0, 0.5, 1.0):
        masks = held(select(found, jnp.float32(0.75 * progress)))
        shares = {path: 1 - mask.mean() for path, mask in masks.items()}
        # The first pattern that matches holds.
        wanted = dict(zip(LAYERS, (0.4, 0.4, 0.9, 0.75, 0.75), strict=True))
        assert shares == pytest.approx({path: share * progress for path, share in wanted.items()}, abs=5e-3)
    with pytest.raises(UsageError, match=r"--prune.layers stage9 matches no prunable kernel: stage1_block1/conv1"):
        target_of(params, layers=("stage9=0.4",))


def test_taylor_in_the_step_is_of_the_step_s_gradient(variables):
    params = variables["params"]
    grads = map_with_path(lambda path, w: jnp.cos(1e3 * w), params)
    masks = full_masks(params, kernels_except(["stem", "head"]))
    found = jax.jit(in_step("taylor", target_of(params)))(params, grads, masks, jax.random.key(0), jnp.float32(0.75))
    products = {path: np.abs(w * leaves(grads)[path]) for path, w in leaves(params).items() if path in LAYERS}
    kept_ones = np.concatenate([np.asarray(products[path])[mask] for path, mask in held(found).items()])
    gone = np.concatenate([np.asarray(products[path])[~mask] for path, mask in held(found).items()])
    assert gone.max() <= kept_ones.min() and len(gone) == round(0.75 * (len(gone) + len(kept_ones)))


@pytest.mark.parametrize("score", ["random", "norm_scale"])
def test_channels_in_the_step_trace_once(variables, score):
    """The share counts channels, however wide they are, not weights."""
    params, traces = variables["params"], []
    target = target_of(params, score=score, **CHANNELS)

    def make(*arguments):
        traces.append(1)
        return in_step(score, target)(*arguments)

    made, masks = jax.jit(make), jax.tree.map(lambda x: jnp.ones(x.shape, bool), params)
    assert target.share(no_masks(params)) == target.share(masks) == 0
    for share in (0.25, 0.5):
        masks = made(params, params, masks, jax.random.key(0), jnp.float32(share))
        assert target.share(masks) == pytest.approx(share, abs=0.13)
    assert len(traces) == 1
    assert float(sparsity_of(masks)) != pytest.approx(0.5, abs=0.05)


def test_groups_that_are_excluded(variables):
    groups = [group.name for group in target_of(variables["params"], **CHANNELS).groups]
    fewer = target_of(variables["params"], **CHANNELS, exclude=("stream", "stem")).groups
    assert [group.name for group in fewer] == [name for name in groups if "conv1" in name]
    assert len(fewer) == 2 < len(groups)


# ---- what scores are given -------------------------------------------------------------------------------------------


def test_loss_of_each_example(variables, batches):
    """Cross entropy of normalised images that are neither augmented nor mixed, by running statistics, unsmoothed."""
    loss = per_example_loss(tiny(), variables["batch_stats"], softmax_cross_entropy, PREPROCESS)
    found = np.asarray(jax.jit(loss)(variables["params"], batches[0]))
    logits = np.float64(jax.jit(partial(tiny().apply, train=False))(variables, normalised(batches[0])))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert found.shape == (4,)
    np.testing.assert_allclose(found, -np.log(probabilities[range(4), batches[0]["label"]]), rtol=1e-5)
    half = {name: x[:2] for name, x in batches[0].items()}
    np.testing.assert_allclose(jax.jit(loss)(variables["params"], half), found[:2], rtol=1e-5)

    sigmoid = per_example_loss(tiny(), variables["batch_stats"], sigmoid_cross_entropy, PREPROCESS)
    found = np.asarray(jax.jit(sigmoid)(variables["params"], batches[0]))
    targets = np.eye(CLASSES)[batches[0]["label"]]
    want = -(targets * np.log(1 / (1 + np.exp(-logits))) + (1 - targets) * np.log(1 / (1 + np.exp(logits))))
    assert any(np.allclose(found, reduced, rtol=1e-4) for reduced in (want.sum(-1), want.mean(-1)))


def test_synflow_s_network_does_nothing_but_add(variables):
    """Its scores at the head, which all of the signal passes, sum to the output; biases count for nothing."""
    params = jax.tree.map(jnp.abs, variables["params"])
    forward = jax.jit(neutral_forward(tiny(), variables["batch_stats"], IMAGE))
    total = float(forward(params).sum())
    found = scores.synflow(variables["params"], forward=forward)
    assert total > 0
    assert float(leaves(found)["head/kernel"].sum()) == pytest.approx(total, rel=1e-4)
    assert float(leaves(found)["stem/conv/kernel"].sum()) == pytest.approx(total, rel=1e-4)
    assert not any(score.any() for path, score in leaves(found).items() if path.endswith("/bias"))
    doubled = map_with_path(lambda path, w: 2 * w if path == "head/kernel" else w, params)
    assert float(forward(doubled).sum()) == pytest.approx(2 * total, rel=1e-5)


# ---- statistics ------------------------------------------------------------------------------------------------------


def of_each_batch(model, variables, batches, momentum):
    """Batch statistics, without any memory of running ones: what an update adds to statistics of zero."""
    zero = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    found, given = [], {"params": variables["params"], "batch_stats": zero}
    update = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))
    for batch in batches:
        _, new = update(given, normalised(batch))
        found.append({path: np.float64(x) / (1 - momentum) for path, x in leaves(new["batch_stats"]).items()})
    return found


@pytest.mark.parametrize(("norm", "momentum"), [(BatchNorm, BatchNorm.keywords["momentum"]), (nn.BatchNorm, 0.99)])
def test_statistics_measured_again(variables, batches, norm, momentum):
    """A mean over batches in which later ones weigh a little more, and nothing of what was remembered."""
    model = tiny(norm=norm)
    found = leaves(
        recalibrate(variables["params"], variables["batch_stats"], batches, model=model, preprocess=PREPROCESS)
    )
    each = of_each_batch(model, variables, batches, momentum)
    weights = momentum ** np.arange(3, -1, -1.0)
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
    masks = pruned(variables, scores.magnitude, final=0.9)
    sparse = apply_masks(variables["params"], masks)
    again = partial(recalibrate, model=tiny(), preprocess=PREPROCESS)
    dense_stats = again(variables["params"], variables["batch_stats"], batches)
    stats = again(sparse, variables["batch_stats"], batches)
    assert not np.allclose(leaves(stats)["stage1_block1/norm1/var"], leaves(dense_stats)["stage1_block1/norm1/var"])
    for path, x in leaves(again(sparse, stats, batches)).items():
        np.testing.assert_allclose(x, leaves(stats)[path], rtol=1e-6, err_msg=path)
