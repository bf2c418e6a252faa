"""A supervised run, from a config to a result; read it from top to bottom."""

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import flax.linen as nn
import jax
import optax

from resnet_jax.augment import Augment
from resnet_jax.losses import LOSSES
from resnet_jax.mask_schedules import MaskSchedule
from resnet_jax.parallel import axis_of
from resnet_jax.resnet import MODELS
from resnet_jax.tree import PyTree, count, is_head
from train.config import TrainConfig, check, check_images
from train.data.batches import EvalBatches
from train.data.sets import Dataset
from train.errors import DivergedError, UsageError, unknown
from train.from_config import eval_augment, make_model, make_objective, make_state, make_tx, train_augment
from train.hub import read_card
from train.loop import ADVICE, Hook, evaluate
from train.optim import Schedule
from train.presets import PRESETS
from train.run_folder import unlocked, write_confusion
from train.session import Session, Validated, open_session
from train.state import TrainState, digest
from train.steps import Batch, Objective, augmented_images, eval_step, train_step
from train.weights import widths_of

Config = TypeVar("Config", bound=TrainConfig)


@unlocked()
def run(
    config: TrainConfig,
    preset: str = "custom",
    *,
    model: nn.Module | None = None,
    tx: optax.GradientTransformation | None = None,
    objective: Objective | None = None,
    augment: Augment | None = None,
    dataset: Dataset | None = None,
    hooks: Sequence[Hook] = (),
    validated: Validated = lambda row: None,
    test: bool = True,
) -> dict[str, Any]:
    """Train, select on validation, evaluate once on the test split; the result is also written to `out`/result.json.

    Called again with the same `out`, resume from the newest good checkpoint; a finished run only returns its result.

    Args:
      model, tx, objective, augment, dataset: objects to use in place of those that the config describes; all other
        settings come from the config. The model returns logits [B, classes], see `train.state.forward`; `augment` maps
        images in [0, 1] to the model's normalised inputs. Pass the same objects to resume a run, and the model to
        `train.predict.load`.
      hooks: called with the state while training, see `train.loop.fit`.
      validated: called with the row of each validation, such as {"step", "epoch", "validation_accuracy", ...}; an
        exception that it raises ends the run.
      test: evaluate on the test split; otherwise the result has only figures of the validation split.

    Raises:
      UsageError: an error that the user can fix.
      RunError: the run stopped; the message says where, and what was kept.
    """
    check(config)
    own: dict[str, Any] = {"model": model, "tx": tx, "objective": objective, "augment": augment}
    described = with_card(with_widths(config), preset)
    session = open_session(described, preset, dataset=dataset, longer=True, **own)
    if session.finished is not None:
        return session.finished
    pieces = make_pieces(session)
    state = session.place(start_state(session, pieces))
    training = Training(session, pieces, state)
    state = training.fit(session.resume(state), hooks, validated)
    return session.finish(training.figures(session.selected(state), test=test))


def with_widths(config: Config) -> Config:
    """Fill in `widths` from the pruned network that `init` names, unless the config gives its own."""
    if config.init is None or config.widths:
        return config
    model, widths = widths_of(Path(config.init))
    return dataclasses.replace(config, widths=widths) if model == config.model else config


def with_card(config: TrainConfig, preset: str) -> TrainConfig:
    """Take model, image size and normalisation from the card of the model that `init` names.

    Models in `train.hub.ZOO` and on the hub have one, and folders laid out like these. Fields that the user has
    changed from the preset's stay.

    Raises:
      UsageError: the model cannot be read, or is not in `MODELS`.
    """
    card = None if config.init is None else read_card(config.init)
    if card is None:
        return config
    default = PRESETS.get(preset, TrainConfig)()
    if config.model == default.model and card.model not in MODELS:
        raise unknown("model", card.model, MODELS)
    data, augment = config.data, config.augment
    for name in ("mean", "std"):
        if getattr(card, name) and getattr(augment, name) == getattr(default.augment, name):
            augment = dataclasses.replace(augment, **{name: getattr(card, name)})
    # Sets that come as arrays keep their size.
    resized = data.name.startswith("folder:") or data.image_size is not None
    sizes = [(c.data.image_size, c.augment.resized_crop) for c in (config, default)]
    if card.size and resized and sizes[0] == sizes[1]:
        data = dataclasses.replace(data, image_size=card.resize)
        augment = dataclasses.replace(augment, resized_crop=card.size)
    model = card.model if config.model == default.model else config.model
    # Not `say`, which needs the other hosts.
    print(f"{config.init}: {card}{'' if resized else f' (images of {data.name} keep their size)'}", file=sys.stderr)
    return dataclasses.replace(config, model=model, data=data, augment=augment)


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """The parts of a supervised run; replace any with `dataclasses.replace`.

    Attributes:
      schedule: learning rate by step, for the log.
      augment, preprocess: map images in [0, 1] to the model's inputs, in training and in evaluation.
      remask: schedule that changes the masks inside the step; None keeps them fixed.
    """

    model: nn.Module
    tx: optax.GradientTransformation
    schedule: Schedule
    objective: Objective
    augment: Augment
    preprocess: Augment
    remask: MaskSchedule | None = None


def make_pieces(session: Session[Any]) -> Pieces:
    """Build the pieces that a session's config describes, and take those that were passed to the run.

    Raises:
      UsageError: a config that does not fit the data.
    """
    config, dataset = session.config, session.dataset
    classes = len(dataset.classes)
    if classes < 2:
        raise UsageError(
            f"{dataset.name} has only one class: training needs two or more (a folder needs one subfolder per class)"
        )
    check_images(config, dataset.image_shape)
    trainable = is_head if config.freeze else None
    tx, schedule = make_tx(config.optim, session.steps, session.epoch_steps, trainable=trainable)
    pieces = Pieces(
        model=make_model(config, classes, axis_of(config.mode), session.kernels, drop_path=config.drop_path),
        tx=tx,
        schedule=schedule,
        objective=make_objective(config, classes),
        augment=train_augment(config.augment),
        preprocess=eval_augment(config.augment),
    )
    return dataclasses.replace(pieces, **session.own)


def start_state(session: Session[Any], pieces: Pieces) -> TrainState:
    """Make the state at step 0: random, or from `--init`, whose pruned weights stay pruned unless `--dense` is set."""
    config, dataset = session.config, session.dataset
    return make_state(config, pieces.model, pieces.tx, dataset.image_shape, config.init, classes=dataset.classes)


class Training:
    """Supervised training in a session: the compiled steps, the loop, and the final figures."""

    def __init__(self, session: Session[Any], pieces: Pieces, state: TrainState) -> None:
        config = session.config
        self.session, self.pieces = session, pieces
        session.announce(f"{session.model_name}: {count(state.params):,} parameters")
        self.step, (self.eval_program,) = session.compile(
            partial(
                train_step,
                model=pieces.model,
                tx=pieces.tx,
                objective=pieces.objective,
                augment=pieces.augment,
                ema_decay=config.ema,
                accumulate=config.accumulate,
                remask=pieces.remask,
            ),
            [
                (
                    partial(eval_step, model=pieces.model, preprocess=pieces.preprocess, loss=LOSSES[config.loss]),
                    jax.eval_shape(lambda: state.variables),
                )
            ],
            state,
        )
        options = {"batch": session.eval_batch, "mesh": session.mesh, "mode": config.mode}
        self.batches = {split: EvalBatches(source, **options) for split, source in session.dataset.splits.items()}

    def measure(self, variables: PyTree, split: str) -> dict[str, Any]:
        """Evaluate a split, see `train.steps.summarize`; evaluate the test split only at the end."""
        return evaluate(self.eval_program, variables, self.batches[split])

    def fit(self, state: TrainState, hooks: Sequence[Hook] = (), validated: Validated = lambda row: None) -> TrainState:
        """Train to the end, evaluating on the validation split."""

        def validate(state: TrainState) -> tuple[dict[str, float], str]:
            figures = self.measure(state.variables, "validation")
            row = {f"validation_{name}": figures[name] for name in ("accuracy", "loss", "calibration_error")}
            return row, f"validation accuracy {figures['accuracy']:.4f}, loss {figures['loss']:.4f}"

        def see(state: TrainState, batch: Batch) -> dict[str, jax.Array]:
            return {"images": augmented_images(state, batch, augment=self.pieces.augment)}

        return self.session.fit(
            self.step,
            state,
            validate=validate,
            schedule=self.pieces.schedule,
            hooks=hooks,
            see=see,
            validated=validated,
        )

    def figures(self, state: TrainState, *, test: bool = True) -> dict[str, Any]:
        """Compute a trained state's figures for the result; with `test` also on the test split, see `test_figures`."""
        validation = self.measure(state.variables, "validation")
        if not math.isfinite(validation["loss"]):
            raise DivergedError(f"the validation loss at step {int(state.step)} is not finite: {ADVICE}")
        return {
            "selected_step": int(state.step),
            **(self.test_figures(state) if test else {}),
            "validation_accuracy": validation["accuracy"],
            "parameters": count(state.params),
            "params_digest": digest(state),
        }

    def test_figures(self, state: TrainState) -> dict[str, Any]:
        """Evaluate a trained state on the test split, and write confusion.json; call it once, at the end."""
        session, test = self.session, self.measure(state.variables, "test")
        if session.main:
            write_confusion(session.out, test["confusion"], session.dataset.classes)
        return {
            "test_accuracy": test["accuracy"],
            "test_top5_accuracy": test["top5_accuracy"],
            "test_loss": test["loss"],
            "test_calibration_error": test["calibration_error"],
            "test_images": test["count"],
            "test_per_class_accuracy": [round(float(a), 4) for a in test["per_class_accuracy"]],
        }
