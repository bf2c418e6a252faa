"""Build the pieces of a run of detection from its config."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from resnet_jax import augment as pixels
from resnet_jax.detection.augment import BoxAugment, color_jitter, compose, on_pixels, random_flip, scale_jitter
from resnet_jax.detection.box_head import BoxHead
from resnet_jax.detection.detector import Detector, FasterRCNN
from resnet_jax.detection.pyramid import FeaturePyramid
from resnet_jax.detection.retinanet import RetinaNet
from resnet_jax.mask_schedules import MaskSchedule, gradual
from resnet_jax.masks import full_masks, kernels_except, make_masks, no_masks
from resnet_jax.parallel import Mode, axis_of
from resnet_jax.scores import magnitude
from resnet_jax.tree import Predicate, PyTree
from train.detect.config import BoxAugmentConfig, DetectConfig, NormalizeConfig, ObjectDataConfig, parse_buckets
from train.detect.sets import ObjectSet, load
from train.errors import UsageError
from train.from_config import draw_variables, make_model
from train.state import TrainState, init_state
from train.weights import load_masks, load_weights

SIDE = 64  # of the images that variables are initialised with; it does not change their shapes


def open_objects(data: ObjectDataConfig) -> ObjectSet:
    """Load the object set of a config."""
    fields = dataclasses.asdict(data)
    return load(fields.pop("name"), **{**fields, "buckets": parse_buckets(data.buckets)})


def train_augment(config: BoxAugmentConfig) -> BoxAugment:
    """Build the training augmentation, from images in [0, 1] to normalised ones."""
    strength = config.color_jitter
    parts = [
        config.flip and random_flip(),
        config.scale != (1.0, 1.0) and scale_jitter(config.scale),
        strength and color_jitter(strength, strength, strength, strength / 4),
        eval_augment(config),
    ]
    return compose(*(part for part in parts if callable(part)))


def eval_augment(config: NormalizeConfig) -> BoxAugment:
    """Build the preprocessing for evaluation and prediction."""
    assert config.mean is not None and config.std is not None
    return on_pixels(pixels.normalize(config.mean, config.std))


def make_detector(
    config: DetectConfig, classes: int, kernels: dict[str, Any] | None = None, *, mode: Mode | None = None
) -> Detector:
    """Make the config's detector for this number of classes, to be compiled in `mode` (None is the config's).

    Raises:
      UsageError: a backbone without one of the levels, levels out of order, or with a gap before the second stage.
    """
    backbone: Any = make_model(config, None, axis_of(mode or config.mode), kernels)
    two_stages = config.detector == "faster_rcnn"
    stages = [f"stage{number}" for number in range(1, len(backbone.stage_sizes) + 1)]
    levels = config.levels or tuple(stages if two_stages else stages[1:])
    if unknown := [level for level in levels if level not in stages]:
        raise UsageError(f"--levels {unknown[0]}: {config.model} has {', '.join(stages)}")
    if list(levels) != sorted(levels) or len({*levels}) != len(levels):
        raise UsageError(f"--levels {' '.join(levels)}: name each once, the finest first")
    numbers = [stages.index(level) for level in levels]
    if two_stages and numbers != [*range(numbers[0], numbers[-1] + 1)]:
        raise UsageError(f"--levels {' '.join(levels)}: the second stage needs all levels between the first and last")
    fields: dict[str, Any] = {"backbone": backbone, "levels": levels, "classes": classes}
    fields["frozen_stats"] = config.frozen_stats
    if config.anchor_scale is not None:
        fields["anchor_scale"] = config.anchor_scale
    if not two_stages:
        neck = partial(FeaturePyramid, features=config.features, coarser="conv")
        return RetinaNet(**fields, neck=neck, rules=config.one_stage)
    return FasterRCNN(
        **fields,
        neck=partial(FeaturePyramid, features=config.features),
        head=partial(BoxHead, hidden=config.hidden, shared_boxes=config.shared_boxes),
        proposals=config.proposals,
        regions=config.regions,
        pooled_levels=len(levels),
        canonical_size=config.canonical_size,
    )


def is_trained(config: DetectConfig) -> Predicate:
    """Select the parameters that a run trains: all except the frozen parts of the backbone and its frozen norms."""
    frozen = ["stem", *(f"stage{number}" for number in range(1, config.freeze))][: config.freeze]

    def trained(path: str, leaf: jax.Array) -> bool:
        module, _, rest = path.partition("/")
        if module != "backbone":
            return True
        part = rest.split("/")[0].split("_block")[0]
        is_norm = path.endswith(("/scale", "/bias")) and "/attention/" not in path
        return part not in frozen and not (config.frozen_stats and is_norm)

    return trained


def is_prunable(config: DetectConfig) -> Predicate:
    """Select the kernels that `--sparsity` prunes: those that are trained, except the stem's and the outputs'."""
    kernel, trained = kernels_except(("stem/", "objectness/", "logits/", "deltas/")), is_trained(config)
    return lambda path, leaf: kernel(path, leaf) and trained(path, leaf)


def make_remask(config: DetectConfig, steps: int) -> MaskSchedule | None:
    """Make the schedule of `--sparsity` over a run of this length; None without."""
    if config.sparsity is None:
        return None
    prunable = is_prunable(config)

    def mask_fn(params: PyTree, grads: PyTree, masks: PyTree, key: jax.Array, sparsity: jax.Array) -> PyTree:
        return make_masks(magnitude(params), sparsity, prunable=prunable, masks=masks)

    begin, end = steps // 4, max(3 * steps // 4, 1)
    return gradual(mask_fn, final=config.sparsity, begin_step=begin, end_step=end, every=max((end - begin) // 20, 1))


def make_state(config: DetectConfig, model: Any, tx: optax.GradientTransformation) -> TrainState:
    """Make the state at step 0, with the backbone's weights from `--init`, of which what is pruned stays pruned.

    Raises:
      UsageError: weights that cannot be read, or of a different model.
    """
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    variables = draw_variables(config, model, init_key, (SIDE, SIDE, 3))
    if config.init is not None:
        own = {kind: variables[kind].get("backbone", {}) for kind in variables}
        loaded = load_weights(config.init, own)
        variables = {kind: {**variables[kind], **({"backbone": loaded[kind]} if own[kind] else {})} for kind in own}
    params = variables["params"]
    masks = no_masks(params)
    if config.sparsity is not None:
        masks = full_masks(params, is_prunable(config))
    if config.init is not None and not config.dense:
        given = load_masks(config.init, params["backbone"])
        if given is not None:
            masks["backbone"] = jax.tree.map(jnp.logical_and, masks["backbone"], given)
    return init_state(variables, tx, run_key, masks=masks, ema=config.ema is not None)
