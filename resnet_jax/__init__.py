"""ResNets in JAX/Flax as pure functions: models, augmentations, losses, masks, and one step for three compilers.

The names in `__all__` are the public interface. Names that would be ambiguous here stay in their modules, such as
`mix.mix`, `scores.random`, `contrastive.cosine` and `masks.pack`; so do the oneDNN kernels in `resnet_jax.onednn`
and the explanations in `resnet_jax.explain`.
"""

# fmt: off
# isort: off
from resnet_jax.augment import (
    IMAGENET_MEAN, IMAGENET_STD, Augment, augment_batch, center_crop, choose, color_jitter, compose, cutout,
    gaussian_blur, grayscale, identity, normalize, preprocess_batch, random_crop, random_erasing, random_flip,
    random_resized_crop, randomly, resize, solarize,
)
from resnet_jax.auto_augment import rand_augment, trivial_augment
from resnet_jax.channels import (
    ChannelGroup, channel_groups, channel_masks, channel_scores, compact, kept_channels, widths_of,
)
from resnet_jax.contrastive import (
    barlow_twins, byol, dino, enqueue, info_nce, nearest, nt_xent, sinkhorn, sup_con, swav, update_center, vicreg,
)
from resnet_jax.keys import example_index, example_keys, step_key
from resnet_jax.layers import (
    BatchNorm, CifarPreActStem, CifarStem, DeepStem, DropPath, GroupNorm, ImageNetStem, NormAct, PlainProjection,
    PooledProjection, PreActStem, Projection, SqueezeExcite, StandardizedConv, Stem, ZeroPad,
)
from resnet_jax.losses import LOSSES, sigmoid_cross_entropy, smooth_labels, softmax_cross_entropy
from resnet_jax.mask_schedules import MaskFn, MaskSchedule, alternating, cubic_sparsity, gradual, rigl
from resnet_jax.masks import (
    apply_masks, check_masks, erk_shares, full_masks, kernels_except, make_masks, no_masks, sparsity_of,
)
from resnet_jax.mix import cutmix, mixup
from resnet_jax.parallel import (
    Mode, all_rows, axis_of, batch_sharding, compile_step, make_mesh, mean_over, place, replicated, shard_batch,
    sum_over, vary,
)
from resnet_jax.resnet import (
    MODELS, BasicBlock, Block, Bottleneck, CaffeBottleneck, PreActBlock, PreActBottleneck, ResNet,
)
from resnet_jax.scores import SCORES, fisher, magnitude, norm_scale, snip, synflow, taylor
from resnet_jax.torch_weights import from_torch, to_torch
from resnet_jax.tree import Predicate, count, ema, global_norm, is_head, is_kernel, leaves, map_with_path, select
# isort: on

__version__ = "0.2.0"

__all__ = [
    "IMAGENET_MEAN", "IMAGENET_STD", "LOSSES", "MODELS", "SCORES", "Augment", "BasicBlock", "BatchNorm", "Block",
    "Bottleneck", "CaffeBottleneck", "ChannelGroup", "CifarPreActStem", "CifarStem", "DeepStem", "DropPath",
    "GroupNorm", "ImageNetStem", "MaskFn", "MaskSchedule", "Mode", "NormAct", "PlainProjection", "PooledProjection",
    "PreActBlock", "PreActBottleneck", "PreActStem", "Predicate", "Projection", "ResNet", "SqueezeExcite",
    "StandardizedConv", "Stem", "ZeroPad", "all_rows", "alternating", "apply_masks", "augment_batch", "axis_of",
    "barlow_twins", "batch_sharding", "byol", "center_crop", "channel_groups", "channel_masks", "channel_scores",
    "check_masks", "choose", "color_jitter", "compact", "compile_step", "compose", "count", "cubic_sparsity", "cutmix",
    "cutout", "dino", "ema", "enqueue", "erk_shares", "example_index", "example_keys", "fisher", "from_torch",
    "full_masks", "gaussian_blur", "global_norm", "gradual", "grayscale", "identity", "info_nce", "is_head",
    "is_kernel", "kept_channels", "kernels_except", "leaves", "magnitude", "make_masks", "make_mesh", "map_with_path",
    "mean_over", "mixup", "nearest", "no_masks", "norm_scale", "normalize", "nt_xent", "place", "preprocess_batch",
    "rand_augment", "random_crop", "random_erasing", "random_flip", "random_resized_crop", "randomly", "replicated",
    "resize", "rigl", "select", "shard_batch", "sigmoid_cross_entropy", "sinkhorn", "smooth_labels", "snip",
    "softmax_cross_entropy", "solarize", "sparsity_of", "step_key", "sum_over", "sup_con", "swav", "synflow", "taylor",
    "to_torch", "trivial_augment", "update_center", "vary", "vicreg", "widths_of",
]
# fmt: on
