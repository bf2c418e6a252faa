"""A run of pretraining, from config to result; to be read from top to bottom."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from pretrain.config import PretrainConfig, check, check_images, make_objective
from pretrain.features import Extractor, Features, FrozenAccuracy, frozen_accuracy
from pretrain.from_config import init_network, make_network, make_pretrain_state, make_views, step_options
from pretrain.heads import Network
from pretrain.health import collapse_step, health, verdict
from pretrain.knn import knn_accuracy
from pretrain.linear import BLOCK
from pretrain.objectives import Objective
from pretrain.state import PretrainState, encoder_of, pretrain_digest, probe_logits
from pretrain.steps import augmented_views, contrastive_step, feature_step, view_step
from resnet_jax.augment import Augment
from resnet_jax.layers import PooledProjection
from resnet_jax.parallel import axis_of
from resnet_jax.tree import PyTree, count
from train.data.sets import Dataset
from train.data.sources import sample
from train.errors import RunError
from train.from_config import eval_augment, make_tx
from train.loop import Hook, read_rows
from train.run_folder import unlocked
from train.runtime import say
from train.session import Session, open_session
from train.weights import ENCODER, save_encoder

HEALTH_IMAGES = 2048  # validation images on which the health of the representations is measured


@unlocked()
def run(
    config: PretrainConfig,
    preset: str = "custom",
    *,
    model: nn.Module | None = None,
    tx: optax.GradientTransformation | None = None,
    objective: Objective | None = None,
    augment: Sequence[Augment] | None = None,
    dataset: Dataset | None = None,
    hooks: Sequence[Hook] = (),
) -> dict[str, Any]:
    """Pretrain, monitor on validation, evaluate the frozen encoder at the end; the result is in `out`/result.json.

    The encoder is saved to `out`/encoder.safetensors: `python -m train --init OUT` starts from it. Run again with the
    same `out` to resume from the newest valid checkpoint.

    Args:
      model, tx, objective, augment, dataset: your own pieces in place of those that the config describes. The model
        is an encoder that returns features [B, F], see `train.state.forward`; `augment` holds the views, large ones
        first.
      hooks: called with the state while training, see `train.loop.fit`.

    Raises:
      UsageError: an error that the user can fix. RunError: a failure that stopped the run.
    """
    check(config)
    own: dict[str, Any] = {"model": model, "tx": tx, "objective": objective, "augment": augment}
    session = open_session(config, preset, dataset=dataset, longer=True, **own)
    if session.finished is not None:
        return session.finished

    # ---- pieces and state ----
    config, shape, classes = session.config, session.dataset.image_shape, len(session.dataset.classes)
    check_images(config, shape)
    objective = objective or make_objective(config.objective)
    views = tuple(augment or make_views(config.augment))
    network = make_network(config, objective, axis_of(config.mode), session.kernels, encoder=model)
    described, schedule = make_tx(config.optim, session.steps, session.epoch_steps)
    tx = tx or described
    state = session.place(make_pretrain_state(config, objective, network, tx, shape, classes))
    parameters, heads = count(state.params["encoder"]), count(state.params) - count(state.params["encoder"])
    method = "objective" if "objective" in session.own else config.objective.name
    session.announce(f"{method} with {session.model_name}: {parameters:,} parameters and {heads:,} in its heads,")

    # ---- compile, resume, train ----
    options = step_options(config, objective, network, tx, views, session.steps, session.epoch_steps)
    shapes = jax.eval_shape(lambda: state.encoder())
    step, programs = session.compile(
        partial(contrastive_step, **options),
        [
            (partial(feature_step, encoder=network.encoder, preprocess=eval_augment(config.augment)), shapes),
            (partial(view_step, encoder=network.encoder, views=views[:2]), shapes),
        ],
        state,
        evaluated=("train", "validation", "test"),
    )
    features, pairs = (Extractor(program, session.eval_batch, session.mesh, config.mode) for program in programs)
    state = session.resume(state)
    monitor = make_monitor(session, objective, features, pairs)
    labelled = classes > 1
    state = session.fit(
        step,
        state,
        validate=monitor,
        schedule=schedule,
        hooks=hooks,
        see=partial(augmented_views, views=views),
        shown=("loss", "probe_accuracy", "projection_std") if labelled else ("loss", "projection_std"),
        validate_first=True,  # the curve starts at random weights
    )

    # ---- the end: one look at the test split ----
    variables = state.encoder(target=objective.evaluate_target)
    if session.main:
        pooled = pools_first(network.encoder)
        save_encoder(session.out / ENCODER, variables, flax_names=model is not None, pooled=pooled)
    rows = read_rows(session.out / "metrics.jsonl") if session.main else []
    last = session.last_validation(state, monitor)
    last = {name: value for name, value in last.items() if not name.startswith("validation_")}
    sentence = verdict(rows, last)
    accuracies: dict[str, Any] = {}
    if labelled:
        accuracies = final_accuracies(session, network, features, state, variables)
    else:
        say("no labels, so only the encoder's health is reported: evaluate it with pretrain.evaluate on a labelled set")
    say(sentence)
    return session.finish(
        {
            "objective": method,
            **accuracies,
            "health": last,
            "verdict": sentence,
            "collapsed_at": collapse_step(rows),
            "parameters": parameters,
            "params_digest": pretrain_digest(state),
        }
    )


def pools_first(encoder: nn.Module) -> bool:
    """Whether the shortcuts pool first, as in ResNet-D; ResNet-C has the same stem and parameters."""
    return getattr(getattr(encoder, "block", None), "keywords", {}).get("shortcut") is PooledProjection


def make_monitor(
    session: Session[PretrainConfig], objective: Objective, features: Extractor, pairs: Extractor
) -> Callable[[PretrainState], tuple[dict[str, float], str]]:
    """Make `state -> (figures, line)`, which measures the encoder's accuracy and health on validation images.

    Without labels it measures only the health. `features` and `pairs` extract features of images, and of two views of
    each image.
    """
    config, dataset = session.config, session.dataset
    classes = len(dataset.classes)
    neighbours = partial(knn_accuracy, classes=classes, k=config.neighbours, temperature=config.neighbour_temperature)
    searched = features.batches(sample(dataset.train, config.neighbour_images))
    validation = features.batches(dataset.validation)
    viewed = pairs.batches(sample(dataset.validation, HEALTH_IMAGES))

    def monitor(state: PretrainState) -> tuple[dict[str, float], str]:
        variables = state.encoder(target=objective.evaluate_target)
        pair = pairs.arrays(variables, viewed)
        try:
            figures = health(pair["a"], pair["b"])
        except ValueError as error:
            raise RunError(f"at step {int(state.step)}: {error}") from None
        line = f"effective rank {figures['effective_rank']:.1f}"
        if classes > 1:
            bank, held = features(variables, searched), features(variables, validation)
            knn = neighbours(held.features, held.labels, bank.features, bank.labels)
            online = online_accuracy(state, held)
            figures |= {"validation_knn_accuracy": knn, "validation_online_linear_accuracy": online}
            line = f"validation kNN {knn:.4f}, online linear {online:.4f}, {line}"
        return figures, line

    return monitor


def final_accuracies(
    session: Session[PretrainConfig],
    network: Network,
    features: Extractor,
    state: PretrainState,
    variables: dict[str, PyTree],
) -> dict[str, Any]:
    """Measure the frozen encoder's accuracies on the test split, and those of the same encoder with random weights."""
    config, dataset = session.config, session.dataset

    def accuracy(variables: dict[str, PyTree]) -> tuple[FrozenAccuracy, float]:
        splits = features.splits(variables, dataset)
        return evaluate_features(config, splits, len(dataset.classes)), online_accuracy(state, splits[-1])

    trained, online = accuracy(variables)
    random, _ = accuracy(session.place(encoder_of(init_network(config, network, dataset.image_shape)[0])))
    say(f"test accuracy of the frozen encoder: kNN {trained.knn:.2%} (random weights {random.knn:.2%}), "
        f"offline linear probe {trained.linear:.2%} (random weights {random.linear:.2%})")  # fmt: skip
    return {
        "knn_accuracy": trained.knn,
        "linear_accuracy": trained.linear,
        "random_knn_accuracy": random.knn,
        "random_linear_accuracy": random.linear,
        "online_linear_accuracy": online,
        "validation_knn_accuracy": trained.validation_knn,
        "validation_linear_accuracy": trained.validation_linear,
        "linear_learning_rate": trained.learning_rate,
        "test_images": len(dataset.test),
    }


def evaluate_features(config: PretrainConfig, splits: Sequence[Features], classes: int) -> FrozenAccuracy:
    """Compute `frozen_accuracy` of (training, validation, test) features with the config's settings."""
    return frozen_accuracy(
        *splits,
        classes=classes,
        neighbours=config.neighbours,
        temperature=config.neighbour_temperature,
        seed=config.seed,
    )


def online_accuracy(state: PretrainState, held: Features) -> float:
    """Accuracy in [0, 1] of the online probe on features of held-out images."""
    probe, count = jax.device_get(state.probe), len(held.labels)
    # In blocks of rows, so that no logits [N, K] are held.
    blocks = (held.features[at : at + BLOCK] for at in range(0, count, BLOCK))
    predicted = [np.asarray(probe_logits(probe, jnp.asarray(block))).argmax(-1) for block in blocks]
    return float((np.concatenate(predicted) == held.labels).mean())
