"""The supervised steps: pure functions of (state, batch), compiled by `resnet_jax.parallel.compile_step`.

A batch is a dict: `image` uint8 [B, H, W, C], `label` int32 [B], and in evaluation `valid` bool [B], False where a row
is padding. Bind what is static with `functools.partial`; only `state` and `batch` are arrays.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from resnet_jax.augment import Augment, augment_batch, identity
from resnet_jax.keys import example_index, example_keys, step_key
from resnet_jax.losses import smooth_labels, softmax_cross_entropy
from resnet_jax.mask_schedules import MaskSchedule
from resnet_jax.masks import apply_masks, sparsity_of
from resnet_jax.parallel import mean_over, sum_over, vary
from resnet_jax.tree import PyTree, ema, global_norm
from train.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# (key, images [B, H, W, C], soft labels [B, K], axis_name) -> (images, soft labels)
Mix = Callable[..., tuple[jax.Array, jax.Array]]
# (logits [B, K], soft labels [B, K]) -> loss [B]
Loss = Callable[[jax.Array, jax.Array], jax.Array]

CALIBRATION_BINS = 15


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    augment: Augment = identity,
    mix: Mix | None = None,
    loss: Loss = softmax_cross_entropy,
    label_smoothing: float = 0.0,
    ema_decay: float | None = None,
    accumulate: int = 1,
    frozen_stats: bool = False,
    remask: MaskSchedule | None = None,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimizer update: augment, differentiate, average over shards, update, mask.

    Pruned weights are zero before and after it: their gradients reach neither the optimizer nor the clipping norm.

    Args:
      augment: applied to each example under its own key.
      mix: mixup or cutmix on the augmented batch, `resnet_jax.mix.mix` with its alphas bound.
      label_smoothing: in [0, 1].
      ema_decay: of the moving average in `state.ema`, in [0, 1); it starts lower and grows with the steps.
      accumulate: number of parts whose gradients are averaged before the update; must divide the shard's batch.
      frozen_stats: use the running statistics and leave them (a frozen backbone).
      remask: a schedule of `resnet_jax.mask_schedules` that changes the masks after the update.

    Returns:
      The new state, and float32 scalars `loss`, `accuracy` (on the augmented batch), `grad_norm` and, with a `remask`,
      `sparsity`.
    """
    key = step_key(state.key, state.step)
    augment_key, mix_key, drop_key = jax.random.split(key, 3)
    count = batch["label"].shape[0]
    if count % accumulate:
        raise ValueError(f"a shard's batch of {count} is not divisible into {accumulate} parts")

    def objective(params: PyTree, stats: PyTree, part: Batch, number: jax.Array) -> tuple[jax.Array, Any]:
        images = augment_batch(augment, example_keys(augment_key, part["index"]), part["image"])
        targets = jax.nn.one_hot(part["label"], model.num_classes)
        if mix is not None:
            images, targets = mix(jax.random.fold_in(mix_key, number), images, targets, axis_name=axis_name)
        logits, updated = model.apply(
            {"params": params, "batch_stats": stats},
            images,
            train=not frozen_stats,
            rngs={"drop_path": jax.random.fold_in(drop_key, number)},
            mutable=["batch_stats"],
        )
        value = loss(logits, smooth_labels(targets, label_smoothing)).mean()
        accuracy = (logits.argmax(-1) == part["label"]).astype(jnp.float32).mean()
        return value, (updated.get("batch_stats", stats), {"loss": value, "accuracy": accuracy})

    gradient = jax.grad(objective, has_aux=True)
    params, stats = vary((state.params, state.batch_stats), axis_name)
    rows = {"image": batch["image"], "label": batch["label"], "index": example_index(count, axis_name)}
    if accumulate == 1:
        grads, (stats, metrics) = gradient(params, stats, rows, jnp.zeros((), jnp.int32))
    else:
        grads, (stats, metrics) = _accumulated(gradient, params, stats, rows, accumulate)
    grads, stats, metrics = mean_over((grads, stats, metrics), axis_name)

    masked = apply_masks(grads, state.masks)
    updates, opt_state = tx.update(masked, state.opt_state, state.params)
    params, masks = apply_masks(optax.apply_updates(state.params, updates), state.masks), state.masks
    metrics |= {"grad_norm": global_norm(masked)}
    if remask is not None:
        # Momentum may move what was pruned until now, so the masks of before come first.
        masks = remask(state.step + 1, params, grads, masks, jax.random.fold_in(key, 3))
        params = apply_masks(params, masks)
        metrics |= {"sparsity": sparsity_of(masks)}
    average = state.ema
    if ema_decay is not None:
        # Young averages forget faster, or they would remember the initial weights for 1 / (1 - decay) steps.
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        average = ema(average, {"params": params, "batch_stats": stats}, decay)
        average["params"] = apply_masks(average["params"], masks)
    state = state.replace(
        step=state.step + 1, params=params, batch_stats=stats, opt_state=opt_state, masks=masks, ema=average
    )
    return state, metrics


def _accumulated(gradient: Callable[..., Any], params: PyTree, stats: PyTree, rows: Batch, parts: int) -> Any:
    """Gradients and metrics averaged over `parts` slices of the batch, statistics carried from one to the next."""

    def split(x: jax.Array) -> jax.Array:
        # Part p takes rows p, p + parts, ...: every device keeps its own rows, and all modes the same parts.
        return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

    def body(stats: PyTree, numbered: tuple[jax.Array, Batch]) -> tuple[PyTree, Any]:
        number, part = numbered
        grads, (stats, metrics) = gradient(params, stats, part, number)
        return stats, (grads, metrics)

    numbered = (jnp.arange(parts), jax.tree.map(split, rows))
    # Convolution gradients inside a loop run some 35 times slower on CPU (jax-ml/jax issue 12868), so unroll it there.
    unroll = jax.default_backend() == "cpu"

    def add(carry: Any, x: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        stats, total = carry
        stats, new = body(stats, x)
        return (stats, jax.tree.map(jnp.add, total, new)), None

    first, rest = jax.tree.map(lambda x: x[0], numbered), jax.tree.map(lambda x: x[1:], numbered)
    (stats, total), _ = jax.lax.scan(add, body(stats, first), rest, unroll=unroll)
    grads, metrics = jax.tree.map(lambda x: x / parts, total)
    return grads, (stats, metrics)


def eval_step(
    variables: PyTree,
    batch: Batch,
    *,
    model: nn.Module,
    preprocess: Augment = identity,
    loss: Loss = softmax_cross_entropy,
    axis_name: str | None = None,
) -> Metrics:
    """Sums over the valid rows of a batch, for `summarize` to divide once at the end.

    Returns:
      float32 `count`, `loss`, `correct`, `top5`; `confusion` [K, K] (true class, predicted class); `calibration`
      [3, bins]: count, confidence and correct by confidence of the predicted class.
    """
    keys = example_keys(jax.random.key(0), jnp.arange(batch["label"].shape[0]))
    images = augment_batch(preprocess, keys, batch["image"])
    logits: Any = model.apply(variables, images, train=False)
    classes = logits.shape[-1]
    label, valid = batch["label"], batch["valid"].astype(jnp.float32)
    targets = jax.nn.one_hot(label, classes)

    confidence, predicted = jax.nn.softmax(logits).max(-1), logits.argmax(-1)
    correct = (predicted == label) * valid
    _, top = jax.lax.top_k(logits, min(5, classes))
    bins = jnp.clip((confidence * CALIBRATION_BINS).astype(jnp.int32), 0, CALIBRATION_BINS - 1)
    by_bin = jax.nn.one_hot(bins, CALIBRATION_BINS) * valid[:, None]
    sums = {
        "count": valid.sum(),
        "loss": (loss(logits, targets) * valid).sum(),
        "correct": correct.sum(),
        "top5": ((top == label[:, None]).any(-1) * valid).sum(),
        "confusion": (targets * valid[:, None]).T @ jax.nn.one_hot(predicted, classes),
        "calibration": jnp.stack([by_bin.sum(0), confidence @ by_bin, correct @ by_bin]),
    }
    return sum_over(sums, axis_name)


def summarize(sums: dict[str, np.ndarray]) -> dict[str, Any]:
    """Divide the sums of `eval_step`, added over batches, once.

    Returns:
      `accuracy`, `top5_accuracy`, `loss` (nats) and `calibration_error` (expected calibration error over equal-width
      bins of confidence, https://arxiv.org/abs/1706.04599) as floats; `count`; `per_class_accuracy` [K] (nan for a
      class without examples); `confusion` [K, K] counts, true class by row.
    """
    count = float(sums["count"])
    if count == 0:
        raise ValueError("no examples were evaluated")
    confusion = np.asarray(sums["confusion"], np.float64)
    binned, confidence, correct = np.asarray(sums["calibration"], np.float64)
    totals = confusion.sum(1)
    with np.errstate(invalid="ignore"):
        per_class = np.diag(confusion) / totals
    return {
        "count": int(count),
        "accuracy": float(sums["correct"]) / count,
        "top5_accuracy": float(sums["top5"]) / count,
        "loss": float(sums["loss"]) / count,
        "calibration_error": float(np.abs(confidence - correct).sum() / binned.sum()),
        "per_class_accuracy": per_class,
        "confusion": np.rint(confusion).astype(np.int64),
    }
