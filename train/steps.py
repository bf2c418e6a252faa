"""The supervised steps: pure functions of (state, batch), compiled by `resnet_jax.parallel.compile_step`.

A batch is a dict whose arrays share their first axis: `image` uint8 [B, H, W, C], other arrays that the objective reads
(`label` int32 [B] for `classify`), and in evaluation `valid` bool [B], False where a row is padding. Bind everything
static with `functools.partial`; only `state` and `batch` are arrays.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from resnet_jax.augment import Augment, augment_batch, identity, preprocess_batch
from resnet_jax.keys import Key, example_index, example_keys, step_key
from resnet_jax.losses import smooth_labels, softmax_cross_entropy
from resnet_jax.mask_schedules import MaskSchedule
from resnet_jax.masks import apply_masks, sparsity_of
from resnet_jax.parallel import all_rows, mean_over, sum_over, vary
from resnet_jax.tree import PyTree, ema, global_norm
from train.state import TrainState, forward, like

State = TypeVar("State", bound=TrainState)
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# (key, images [B, H, W, C], soft labels [B, K], axis_name) -> (images, soft labels)
Mix = Callable[..., tuple[jax.Array, jax.Array]]
# (logits [B, K], soft labels [B, K]) -> loss [B]
Loss = Callable[[jax.Array, jax.Array], jax.Array]

CALIBRATION_BINS = 15


class Objective(Protocol):
    """The function of the parameters that a train step minimises; `classify` makes the usual one."""

    def __call__(
        self,
        variables: PyTree,
        batch: Batch,
        *,
        model: nn.Module,
        rngs: dict[str, jax.Array],
        axis_name: str | None,
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        """Compute the loss of a batch, with new statistics and metrics.

        Args:
          variables: {"params", "batch_stats"}; the gradient is taken with respect to "params".
          batch: as the step received it, `image` augmented (float [B, H, W, C]), and `index` int32 [B], the examples'
            global indices.
          rngs: keys `mix`, `drop_path` and `dropout`, the same on every device.
          axis_name: the axis that the batch is split over under `pmap` and `shard_map`, else None.

        Returns:
          (loss, (batch_stats, metrics)): a float32 scalar that is a mean over the batch, the new running statistics
          (see `train.state.forward`), and float32 scalars to log.
        """
        ...


def classify(
    *,
    loss: Loss = softmax_cross_entropy,
    label_smoothing: float = 0.0,
    mix: Mix | None = None,
    classes: Any = None,
    frozen_stats: bool = False,
) -> Objective:
    """The objective of supervised classification: `loss` between the model's logits and `batch["label"]`.

    Args:
      label_smoothing: in [0, 1].
      mix: mixup or cutmix on the augmented batch, `resnet_jax.mix.mix` with its alphas bound; needs `classes`, the
        number of classes.
      frozen_stats: use the running statistics and leave them unchanged (a frozen backbone).

    Returns:
      An objective whose metric is `accuracy`, on the augmented batch.

    Raises:
      ValueError: `mix` without `classes`.
    """
    if mix and classes is None:
        raise ValueError("mix needs the number of classes: classify(mix=..., classes=...)")

    def objective(
        variables: PyTree, batch: Batch, *, model: nn.Module, rngs: dict[str, jax.Array], axis_name: str | None = None
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        images, label = batch["image"], batch["label"]
        if mix is not None:
            images, targets = mix(rngs["mix"], images, jax.nn.one_hot(label, classes), axis_name=axis_name)
        logits, stats = forward(model, variables, images, train=not frozen_stats, rngs=rngs)
        if mix is None:
            targets = jax.nn.one_hot(label, logits.shape[-1])
        value = loss(logits, smooth_labels(targets, label_smoothing)).mean()
        return value, (stats, {"accuracy": (logits.argmax(-1) == label).astype(jnp.float32).mean()})

    return objective


class StepKeys(NamedTuple):
    """The keys that one step draws its numbers with."""

    augment: Key
    mix: Key
    drop: Key
    remask: Key


def step_keys(state: TrainState) -> StepKeys:
    """Derive the next step's keys from the run's key and the step, so that a resumed run draws the same numbers."""
    key = step_key(state.key, state.step)
    augment, mix, drop = jax.random.split(key, 3)
    return StepKeys(augment, mix, drop, jax.random.fold_in(key, 3))


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    objective: Objective = classify(),  # noqa: B008, a pure function
    augment: Augment = identity,
    ema_decay: float | None = None,
    accumulate: int = 1,
    remask: MaskSchedule | None = None,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimizer update: augment, differentiate the objective, average over shards, `update`.

    Args:
      model: any Flax module; see `train.state.forward` for how it is called.
      objective: the loss to minimise, see `Objective`.
      augment: applied to each example under its own key.
      ema_decay, remask: see `update`.
      accumulate: number of parts whose gradients are averaged before the update; must divide the shard's batch.

    Returns:
      The new state, and float32 scalars: the objective's metrics, `loss`, and those of `update`.

    Raises:
      ValueError: `accumulate` does not divide the shard's batch.
    """
    keys = step_keys(state)
    count = len(batch["image"])
    if count % accumulate:
        raise ValueError(f"a shard's batch of {count} is not divisible into {accumulate} parts")

    def loss_of(params: PyTree, stats: PyTree, part: Batch, number: jax.Array) -> tuple[jax.Array, Any]:
        images = augment_batch(augment, example_keys(keys.augment, part["index"]), part["image"])
        drop = jax.random.fold_in(keys.drop, number)
        rngs = {"mix": jax.random.fold_in(keys.mix, number), "drop_path": drop, "dropout": jax.random.fold_in(drop, 1)}
        variables = {"params": params, "batch_stats": stats}
        value, (stats, metrics) = objective(
            variables, {**part, "image": images}, model=model, rngs=rngs, axis_name=axis_name
        )
        return value, (stats, {**metrics, "loss": value})

    # Differentiate on each shard, then average, so that all devices apply the same update.
    gradient = jax.grad(loss_of, has_aux=True)
    params, stats = vary((state.params, state.batch_stats), axis_name)
    rows = {**batch, "index": example_index(count, axis_name)}
    if accumulate == 1:
        grads, (stats, metrics) = gradient(params, stats, rows, jnp.zeros((), jnp.int32))
    else:
        grads, (stats, metrics) = _accumulated(gradient, params, stats, rows, accumulate)
    grads, stats, metrics = mean_over((grads, stats, metrics), axis_name)
    state, figures = update(state, grads, stats, tx=tx, ema_decay=ema_decay, remask=remask, key=keys.remask)
    return state, metrics | figures


def augmented_images(state: TrainState, batch: Batch, *, augment: Augment, axis_name: str | None = None) -> jax.Array:
    """The images, float [B, H, W, C], that the next `train_step` passes to its objective for the first B examples."""
    index = example_index(len(batch["image"]), axis_name)
    return augment_batch(augment, example_keys(step_keys(state).augment, index), batch["image"])


def update(
    state: State,
    grads: PyTree,
    stats: PyTree,
    *,
    tx: optax.GradientTransformation,
    ema_decay: float | None = None,
    remask: MaskSchedule | None = None,
    key: Any = None,
) -> tuple[State, Metrics]:
    """The state after one optimizer update; every pipeline's step ends here.

    Pruned weights are zero before and after it: their gradients reach neither the optimizer nor the clipping norm.

    Args:
      grads: gradients shaped like `state.params`, those of pruned weights included.
      stats: the new running statistics.
      ema_decay: decay of the moving average in `state.ema`, in [0, 1); it starts lower and grows with the steps.
      remask: a schedule of `resnet_jax.mask_schedules` that changes the masks after the update, drawing from `key`.

    Returns:
      The new state, and float32 scalars `grad_norm` and, with a `remask`, `sparsity`.
    """
    # `remask` sees the gradients of pruned weights too, as it may regrow weights by them; the optimizer does not.
    masked = apply_masks(grads, state.masks)
    updates, opt_state = tx.update(masked, state.opt_state, state.params)
    params, masks = apply_masks(optax.apply_updates(state.params, updates), state.masks), state.masks
    metrics = {"grad_norm": global_norm(masked)}
    if remask is not None:
        # Momentum may move weights that were pruned until now, so the old masks are applied first.
        masks = remask(state.step + 1, params, grads, masks, key)
        params = apply_masks(params, masks)
        metrics |= {"sparsity": sparsity_of(masks)}
    average = state.ema
    if ema_decay is not None:
        # Warm up the decay so that early averages are not dominated by the initial weights.
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        average = ema(average, {"params": params, "batch_stats": stats}, decay)
        average["params"] = apply_masks(average["params"], masks)
    arrays = {"params": params, "batch_stats": stats, "opt_state": opt_state, "ema": average}
    arrays = like(arrays, {name: getattr(state, name) for name in arrays})
    return state.replace(step=state.step + 1, masks=masks, **arrays), metrics


def _accumulated(gradient: Callable[..., Any], params: PyTree, stats: PyTree, rows: Batch, parts: int) -> Any:
    """Average gradients and metrics over `parts` slices of the batch, carrying statistics from one to the next."""

    def part(numbers: Any) -> Batch:
        # Part p takes rows p, p + parts, ...: every device keeps its own rows, and all modes the same parts.
        return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)[numbers], rows)

    def add(carry: Any, numbered: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        stats, total = carry
        number, rows = numbered
        grads, (stats, metrics) = gradient(params, stats, rows, number)
        return (stats, jax.tree.map(jnp.add, total, (grads, metrics))), None

    grads, (stats, metrics) = gradient(params, stats, part(0), jnp.zeros((), jnp.int32))
    # Convolution gradients inside a loop run some 35 times slower on CPU (jax-ml/jax issue 12868), so unroll it there.
    others = (jnp.arange(1, parts), part(slice(1, None)))
    unroll = jax.default_backend() == "cpu"
    (stats, total), _ = jax.lax.scan(add, (stats, (grads, metrics)), others, unroll=unroll)
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
    """Sum metrics over the valid rows of a batch; `summarize` divides the totals at the end.

    Returns:
      float32 sums `count`, `loss`, `correct`, `top5`, and `calibration` [3, bins]: count, confidence and correct by
      confidence of the predicted class. `by_class` float32 [2, K]: examples, and correct ones, by true class. `pairs`
      int32 [B, 2], not summed: true and predicted class of every row of the whole batch, -1 where it is padding.
    """
    logits, _ = forward(model, variables, preprocess_batch(preprocess, batch["image"]))
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
        # Sums of whole numbers are exact, so the order in which a scatter adds them does not matter.
        "by_class": jnp.zeros((2, classes)).at[:, label].add(jnp.stack([valid, correct])),
        "calibration": jnp.stack([by_bin.sum(0), confidence @ by_bin, correct @ by_bin]),
    }
    # A confusion matrix has K x K numbers, so it is counted from these pairs at the end.
    pairs = jnp.where(batch["valid"][:, None], jnp.stack([label, predicted], axis=1).astype(jnp.int32), -1)
    return {**sum_over(sums, axis_name), "pairs": all_rows(pairs, axis_name)}


def summarize(sums: dict[str, np.ndarray]) -> dict[str, Any]:
    """Turn what `eval_step` returned for all batches, its sums added and its `pairs` concatenated, into means.

    Returns:
      `accuracy`, `top5_accuracy`, `loss` (nats) and `calibration_error` (expected calibration error over equal-width
      bins of confidence, https://arxiv.org/abs/1706.04599) as floats; `count`; `per_class_accuracy` [K] (nan for a
      class without examples); `confusion` int64 [P, 3]: true class, predicted class and how often this pair occurred,
      which is never 0, sorted by class (`confusion_matrix` makes it a matrix).

    Raises:
      ValueError: there were no examples.
    """
    count = float(sums["count"])
    if count == 0:
        raise ValueError("no examples were evaluated")
    examples, correct_by_class = np.asarray(sums["by_class"], np.float64)
    binned, confidence, correct = np.asarray(sums["calibration"], np.float64)
    with np.errstate(invalid="ignore"):
        per_class = correct_by_class / examples
    pairs = np.asarray(sums["pairs"], np.int64)
    different, times = np.unique(pairs[pairs[:, 0] >= 0], axis=0, return_counts=True)
    return {
        "count": int(count),
        "accuracy": float(sums["correct"]) / count,
        "top5_accuracy": float(sums["top5"]) / count,
        "loss": float(sums["loss"]) / count,
        "calibration_error": float(np.abs(confidence - correct).sum() / binned.sum()),
        "per_class_accuracy": per_class,
        "confusion": np.concatenate([different, times[:, None]], axis=1),
    }


def most_confused(confusion: np.ndarray, count: int) -> np.ndarray:
    """The most frequent errors, rows [true class, predicted class, how often] of the `confusion` of `summarize`.

    At most `count` of them; ties stay in the order of classes.
    """
    errors = confusion[confusion[:, 0] != confusion[:, 1]]
    return errors[np.argsort(-errors[:, 2], kind="stable")][:count]


def confusion_matrix(confusion: np.ndarray, classes: int) -> np.ndarray:
    """Make the matrix of counts, int64 [K, K], true class by row, from the `confusion` of `summarize`."""
    matrix = np.zeros((classes, classes), np.int64)
    matrix[confusion[:, 0], confusion[:, 1]] = confusion[:, 2]
    return matrix
