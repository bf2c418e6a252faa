"""A run of object detection, from a config to a result; read it from top to bottom."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

from resnet_jax.detection.augment import BoxAugment
from resnet_jax.masks import sparsity_of
from resnet_jax.tree import PyTree, count, leaves
from train.data.batches import Batch, Batches
from train.detect.batches import BucketBatches, EvalBatches, batch_like
from train.detect.config import DetectConfig, check
from train.detect.from_config import (
    eval_augment,
    is_prunable,
    is_trained,
    make_detector,
    make_remask,
    make_state,
    open_objects,
    train_augment,
)
from train.detect.metrics import Detections, coco_metrics, truths_of, voc_ap
from train.detect.outputs import DETECTIONS, write_detections
from train.detect.sets import ObjectSet, has_objects
from train.detect.steps import detect_step, detection, seen_images
from train.errors import UsageError
from train.from_config import make_tx
from train.loop import Hook
from train.run_folder import unlocked
from train.session import Session, Validated, open_session
from train.state import TrainState, digest
from train.steps import Objective, train_step

LOSSES = {
    "faster_rcnn": ("objectness_loss", "proposal_loss", "class_loss", "box_loss"),
    "retinanet": ("class_loss", "box_loss"),
}


class DetectSession(Session[DetectConfig]):
    """A run in progress, on images with boxes, in buckets of a few sizes."""

    def open_set(self, dataset: ObjectSet | None) -> None:
        """Load the set, and record the sizes of its buckets in the config."""
        self.dataset = dataset or open_objects(self.config.data)
        if not has_objects(self.dataset.validation):
            raise UsageError(f"{self.dataset.name} validation holds no objects to measure: raise --data.validation")
        buckets = tuple(f"{height}x{width}" for height, width in self.dataset.layout.buckets)
        data = dataclasses.replace(self.config.data, buckets=buckets)
        self.config = dataclasses.replace(self.config, data=data)

    def read_set(self) -> None:
        """Nothing is left to do: `load` has read what fits in memory."""

    def shapes(self, batch: int, *, valid: bool = False) -> list[dict[str, jax.ShapeDtypeStruct]]:
        layout = self.dataset.layout
        return [batch_like(layout, bucket, batch, valid=valid) for bucket in range(len(layout.buckets))]

    def open_stream(self) -> Batches:
        config = self.config
        return BucketBatches(self.dataset.train, batch=config.batch, seed=config.seed, mesh=self.mesh, mode=config.mode)


@unlocked()
def run(
    config: DetectConfig,
    preset: str = "custom",
    *,
    model: nn.Module | None = None,
    tx: optax.GradientTransformation | None = None,
    objective: Objective | None = None,
    augment: BoxAugment | None = None,
    dataset: ObjectSet | None = None,
    hooks: Sequence[Hook] = (),
    validated: Validated = lambda row: None,
    test: bool = True,
) -> dict[str, Any]:
    """Train a detector, select on validation, evaluate once on the test split; the result is in `out`/result.json.

    Called again with the same `out`, resume from the newest good checkpoint; a finished run only returns its result.

    Args:
      model, tx, objective, augment, dataset: objects to use in place of those that the config describes. The model has
        the methods of `resnet_jax.detection.FasterRCNN`; `augment` maps images in [0, 1] and their boxes to its inputs.
      hooks, validated, test: see `train.run.run`.

    Raises:
      UsageError: an error that the user can fix.
      RunError: the run stopped; the message says where, and what was kept.
    """
    check(config)
    own: dict[str, Any] = {"model": model, "tx": tx, "objective": objective, "augment": augment}
    session: DetectSession = open_session(config, preset, dataset=dataset, longer=True, kind=DetectSession, **own)
    if session.finished is not None:
        return session.finished

    # ---- pieces and state ----
    config, dataset = session.config, session.dataset
    model = model or make_detector(config, len(dataset.classes), session.kernels)
    described, schedule = make_tx(config.optim, session.steps, session.epoch_steps, trainable=is_trained(config))
    tx = tx or described
    augment = augment or train_augment(config.augment)
    objective = objective or detection(augment=augment)
    state = session.place(make_state(config, model, tx))
    session.announce(f"{config.detector} on {session.model_name}: {count(state.params):,} parameters")

    # ---- compile, resume, train ----
    step, (program,) = session.compile(
        partial(
            train_step,
            model=model,
            tx=tx,
            objective=objective,
            ema_decay=config.ema,
            accumulate=config.accumulate,
            remask=make_remask(config, session.steps),
        ),
        [
            (
                partial(detect_step, model=model, preprocess=eval_augment(config.augment)),
                jax.eval_shape(lambda: state.variables),
            )
        ],
        state,
    )
    measure = partial(measure_split, session, program)

    def validate(state: TrainState) -> tuple[dict[str, float], str]:
        figures, _ = measure(state.variables, "validation")
        row = {f"validation_{name}": figures[name] for name in ("ap", "ap50", "ap75")}
        return row, f"validation AP {figures['ap']:.4f}, AP50 {figures['ap50']:.4f}"

    def see(state: TrainState, batch: Batch) -> dict[str, jax.Array]:
        return {"images": seen_images(state, batch, augment=augment)}

    state = session.fit(
        step,
        session.resume(state),
        validate=validate,
        schedule=schedule,
        hooks=hooks,
        see=None if "objective" in session.own else see,
        shown=("loss",) if "objective" in session.own else ("loss", *LOSSES[config.detector]),
        validated=validated,
    )

    # ---- the end: one look at the test split ----
    state = session.selected(state)
    row = session.last_validation(state, validate)
    figures = {"detector": config.detector, "selected_step": int(state.step)}
    if test:
        tested, found = measure(state.variables, "test")
        voc = voc_ap(found, truths_of(dataset.test), dataset.classes)
        tested |= {"voc_ap": voc["all_points"], "voc07_ap": voc["eleven_points"]}
        figures |= {f"test_{name}": value for name, value in tested.items()}
        figures["test_images"] = len(found)
        if session.main:
            write_detections(session.out / DETECTIONS, found)
    return session.finish(
        {
            **figures,
            "validation_ap": row["validation_ap"],
            "validation_ap50": row["validation_ap50"],
            "parameters": count(state.params),
            **({"sparsity": pruned} if (pruned := pruned_share(config, state.masks)) else {}),
            "params_digest": digest(state),
        }
    )


def pruned_share(config: DetectConfig, masks: PyTree) -> float:
    """Share of the prunable kernels' weights that are pruned."""
    prunable = is_prunable(config)
    return float(sparsity_of([mask for path, mask in leaves(masks).items() if prunable(path, mask)]))


def measure_split(
    session: DetectSession, program: Any, variables: PyTree, split: str
) -> tuple[dict[str, Any], list[Detections]]:
    """Compute (COCO's metrics, the detections of each image) of a split; of test only at the end."""
    source = session.dataset.splits[split]
    batches = EvalBatches(source, batch=session.eval_batch, mesh=session.mesh, mode=session.config.mode)
    found = detect(program, variables, batches)
    return coco_metrics(found, truths_of(source), session.dataset.classes), found


def detect(program: Any, variables: PyTree, batches: EvalBatches) -> list[Detections]:
    """Detect the objects in each image of a split, in order, with a compiled `detect_step`."""
    rows: dict[int, Detections] = {}
    for batch in batches:
        found = {name: np.asarray(x) for name, x in program(variables, batch).items()}
        for row, image in enumerate(found["id"].tolist()):
            if image >= 0:
                boxes, scores, labels = (found[name][row] for name in ("boxes", "scores", "labels"))
                rows[image] = Detections.unpadded(boxes, scores, labels)
    return [rows[image] for image in sorted(rows)]
