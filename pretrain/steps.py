"""The pretraining step: a pure function of (state, batch), compiled by `resnet_jax.parallel.compile_step`.

Batches are those of supervised training, `image` uint8 [B, H, W, C] and `label` int32 [B]. Labels train only the online
probe (no gradient reaches the encoder), and supervised objectives (SupCon).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from pretrain.heads import Outputs
from pretrain.objectives import Objective, Views
from pretrain.state import PretrainState, probe_logits, target_of
from pretrain.views import make_views
from resnet_jax import augment as aug
from resnet_jax.contrastive import cosine, unit
from resnet_jax.keys import example_index, step_key
from resnet_jax.losses import softmax_cross_entropy
from resnet_jax.masks import apply_masks
from resnet_jax.parallel import all_rows, mean_over, vary
from resnet_jax.tree import PyTree, ema, global_norm
from train.state import forward, like
from train.steps import Batch, Metrics, update


def contrastive_step(
    state: PretrainState,
    batch: Batch,
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    probe_tx: optax.GradientTransformation,
    views: Sequence[aug.Augment],
    objective: Objective,
    momentum: Callable[[jax.Array], Any] | None = None,
    frozen_prototypes: int = 0,
    axis_name: str | None = None,
) -> tuple[PretrainState, Metrics]:
    """Do one optimizer update: make the views, compute the objective on the networks' outputs, update, move the target.

    Views of one size go through the network as one batch, so its norms see them together. Nothing here depends on the
    method: all differences between methods are in `objective`.

    Args:
      model: a `heads.Network`.
      probe_tx: optimizer of the online probe, which trains on the first view's features from the network that is
        evaluated, without a gradient into them.
      views: the number that the objective takes: large ones (at least two, of one size) first, then small ones of a
        different size; see `views.view`.
      objective: one of `OBJECTIVES`, with its options bound.
      momentum: step -> momentum of the target network's parameters, in [0, 1]; its batch statistics come from its own
        forward passes.
      frozen_prototypes: number of steps at the start during which the prototypes do not change.

    Returns:
      The new state, and float32 scalars: `loss`, `probe_loss`, `probe_accuracy` (online, on augmented images),
      `grad_norm`, and, for the first two views' projections over the whole batch, `projection_std` (0 when collapsed,
      1 when isotropic), `projection_similarity` and `projection_negative_similarity` (mean cosines of positives and
      of different images).
    """
    # Draw the views by step and global example, so they do not depend on the number of devices.
    index = example_index(batch["label"].shape[0], axis_name)
    images = make_views(views, step_key(state.key, state.step), index, batch["image"])

    target_outputs: Outputs = {}
    target = state.ema
    if target is not None:
        # The target sees only the large views, which come first.
        target_outputs, stats = outputs_of(model, target, images[:1], predict=False)
        target_outputs = jax.lax.stop_gradient(target_outputs)
        target = {**target, "batch_stats": mean_over(stats, axis_name)}

    # The probe shares the gradient pass: stop_gradient keeps its loss away from the network.
    def loss_of(trained: PyTree, stats: PyTree) -> tuple[jax.Array, Any]:
        variables = {"params": trained["network"], "batch_stats": stats}
        online, stats = outputs_of(model, variables, images)
        outputs = Views(online, target_outputs, state.memory, batch["label"], state.step)
        loss = objective.loss(outputs, axis_name=axis_name)
        used = target_outputs if objective.evaluate_target else online
        logits = probe_logits({"params": trained["probe"]}, jax.lax.stop_gradient(used["features"][0]))
        targets = jax.nn.one_hot(batch["label"], logits.shape[-1])
        probe_loss = softmax_cross_entropy(logits, targets).mean()
        accuracy = (logits.argmax(-1) == batch["label"]).astype(jnp.float32).mean()
        metrics = {"loss": loss, "probe_loss": probe_loss, "probe_accuracy": accuracy}
        return loss + probe_loss, (outputs, stats, metrics)

    trained, stats = vary(({"network": state.params, "probe": state.probe["params"]}, state.batch_stats), axis_name)
    grads, (outputs, stats, metrics) = jax.grad(loss_of, has_aux=True)(trained, stats)
    grads, stats, metrics = mean_over((grads, stats, metrics), axis_name)
    gradient = grads["network"]
    frozen = frozen_prototypes > 0 and "prototypes" in gradient
    moves = state.step >= frozen_prototypes
    if frozen:
        gradient = {**gradient, "prototypes": jax.tree.map(lambda g: g * moves, gradient["prototypes"])}

    new, figures = update(state, gradient, stats, tx=tx)
    params = new.params
    if frozen:
        # Weight decay changes parameters without a gradient as well, so restore the frozen ones.
        still = jax.tree.map(partial(jnp.where, moves), params["prototypes"], state.params["prototypes"])
        params = {**params, "prototypes": still}
    probe_updates, probe_opt_state = probe_tx.update(grads["probe"], state.probe["opt_state"], state.probe["params"])
    probe = {"params": optax.apply_updates(state.probe["params"], probe_updates), "opt_state": probe_opt_state}
    # The target follows the updated parameters, under the same masks.
    if target is not None:
        if momentum is None:
            raise ValueError("this objective has a target network, which needs a momentum: pass one")
        followed = target_of({"params": params})["params"]
        target = {**target, "params": ema(target["params"], followed, momentum(state.step))}
        target["params"] = apply_masks(target["params"], target_of({"masks": state.masks})["masks"])
    memory = state.memory
    if objective.remember is not None:
        memory = objective.remember(jax.lax.stop_gradient(outputs), axis_name=axis_name)

    arrays = {"params": params, "ema": target, "memory": memory, "probe": probe}
    state = new.replace(**like(arrays, {name: getattr(state, name) for name in arrays}))
    figures["grad_norm"] = global_norm(gradient)  # includes pruned weights
    spread = similarities(*outputs.online["projection"][:2], axis_name=axis_name)
    return state, metrics | figures | spread


def augmented_views(state: PretrainState, batch: Batch, *, views: Sequence[aug.Augment]) -> dict[str, jax.Array]:
    """The views, float [B V, H, W, C], that the next `contrastive_step` makes of the first B examples.

    The views of an example follow each other; `views` are the large ones and `small_views` the small ones.
    """
    index = example_index(len(batch["image"]))
    made = make_views(views, step_key(state.key, state.step), index, batch["image"])
    return {name: _rows(images) for name, images in zip(("views", "small_views"), made, strict=False)}


def outputs_of(
    model: nn.Module, variables: PyTree, images: Sequence[jax.Array], **options: Any
) -> tuple[Outputs, PyTree]:
    """Compute ({name: [V, B, D]}, statistics) for the views of `views.make_views`, with one pass per size.

    Batch statistics are carried from one pass to the next.
    """
    stats, passes = variables["batch_stats"], []
    for part in images:
        outputs, stats = forward(model, {**variables, "batch_stats": stats}, _rows(part), train=True, **options)
        passes.append({name: _views(x, part.shape[1]) for name, x in outputs.items()})
    return {name: jnp.concatenate([p[name] for p in passes]) for name in passes[0]}, stats


def _rows(views: jax.Array) -> jax.Array:
    """Reshape [B, V, ...] to [B V, ...]."""
    return views.reshape(-1, *views.shape[2:])


def _views(rows: jax.Array, count: int) -> jax.Array:
    """Reshape [B V, D] to [V, B, D]."""
    return rows.reshape(-1, count, rows.shape[-1]).swapaxes(0, 1)


def similarities(a: jax.Array, b: jax.Array, *, axis_name: str | None = None) -> Metrics:
    """Measure the spread of the embeddings [B, D] of two views over the whole batch; see `contrastive_step`."""
    rows = unit(jnp.stack([a, b]))
    mean, square = mean_over((rows.mean(1), jnp.square(rows).mean(1)), axis_name)
    total = a.shape[0] * (1 if axis_name is None else jax.lax.axis_size(axis_name))
    # The sum of all pairs' products is the squared length of the sum.
    pairs = (total * jnp.sum(jnp.square(mean), -1) - jnp.sum(square, -1)) / (total - 1)
    deviation = jnp.sqrt(jnp.maximum(square - jnp.square(mean), 0.0))
    return {
        "projection_std": deviation.mean() * a.shape[-1] ** 0.5,
        "projection_similarity": mean_over(cosine(a, b).mean(), axis_name),
        "projection_negative_similarity": pairs.mean(),
    }


def feature_step(
    variables: PyTree,
    batch: Batch,
    *,
    encoder: nn.Module,
    preprocess: aug.Augment = aug.identity,
    axis_name: str | None = None,
) -> dict[str, jax.Array]:
    """Compute the encoder's pooled features of a batch, with all rows on every device.

    Returns:
      `features` float32 [B, F], `label` int32 [B], `valid` bool [B], False where a row is padding.
    """
    features, _ = forward(encoder, variables, aug.preprocess_batch(preprocess, batch["image"]))
    rows = {"features": features.astype(jnp.float32), "label": batch["label"], "valid": batch["valid"]}
    return all_rows(rows, axis_name)


def view_step(
    variables: PyTree, batch: Batch, *, encoder: nn.Module, views: Sequence[aug.Augment], axis_name: str | None = None
) -> dict[str, jax.Array]:
    """Compute the features of two views of each image, the same views in every call.

    Returns:
      `a` and `b` float32 [B, F], `valid` bool [B], False where a row is padding.
    """
    index = example_index(batch["label"].shape[0], axis_name)
    (images,) = make_views(views, jax.random.key(0), index, batch["image"])
    features, _ = forward(encoder, variables, _rows(images))
    a, b = _views(features.astype(jnp.float32), 2)
    return all_rows({"a": a, "b": b, "valid": batch["valid"]}, axis_name)
