"""ResNets in JAX/Flax as pure functions: models, augmentations, losses, masks, and one step for three compilers.

The names in `__all__` are the public interface. Names that would be ambiguous here stay in their modules, such as
`mix.mix`, `scores.random`, `contrastive.cosine` and `masks.pack`; so do the oneDNN kernels in `resnet_jax.onednn`.
"""

from resnet_jax.augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augment,
    augment_batch,
    center_crop,
    choose,
    color_jitter,
    compose,
    cutout,
    gaussian_blur,
    grayscale,
    identity,
    normalize,
    preprocess_batch,
    random_crop,
    random_erasing,
    random_flip,
    random_resized_crop,
    randomly,
    resize,
    solarize,
)
from resnet_jax.auto_augment import rand_augment, trivial_augment
from resnet_jax.channels import (
    ChannelGroup,
    channel_groups,
    channel_masks,
    channel_scores,
    compact,
    kept_channels,
    widths_of,
)
from resnet_jax.contrastive import (
    barlow_twins,
    byol,
    dino,
    enqueue,
    info_nce,
    nearest,
    nt_xent,
    sinkhorn,
    sup_con,
    swav,
    update_center,
    vicreg,
)
from resnet_jax.keys import example_index, example_keys, step_key
from resnet_jax.layers import (
    BatchNorm,
    CifarPreActStem,
    CifarStem,
    DeepStem,
    DropPath,
    ImageNetStem,
    NormAct,
    PlainProjection,
    PooledProjection,
    PreActStem,
    Projection,
    SqueezeExcite,
    Stem,
    ZeroPad,
)
from resnet_jax.losses import LOSSES, sigmoid_cross_entropy, smooth_labels, softmax_cross_entropy
from resnet_jax.mask_schedules import MaskFn, MaskSchedule, alternating, cubic_sparsity, gradual, rigl
from resnet_jax.masks import (
    apply_masks,
    check_masks,
    erk_shares,
    full_masks,
    kernels_except,
    make_masks,
    no_masks,
    sparsity_of,
)
from resnet_jax.mix import cutmix, mixup
from resnet_jax.parallel import (
    Mode,
    all_rows,
    axis_of,
    batch_sharding,
    compile_step,
    make_mesh,
    mean_over,
    place,
    replicated,
    shard_batch,
    sum_over,
    vary,
)
from resnet_jax.resnet import MODELS, BasicBlock, Block, Bottleneck, PreActBlock, PreActBottleneck, ResNet
from resnet_jax.scores import SCORES, fisher, magnitude, norm_scale, snip, synflow, taylor
from resnet_jax.torch_weights import from_torch, to_torch
from resnet_jax.tree import Predicate, count, ema, global_norm, is_head, is_kernel, leaves, map_with_path, select

__version__ = "0.2.0"

# fmt: off
__all__ = [  # noqa: RUF022 (by subject)
    # models
    "MODELS", "BasicBlock", "Block", "Bottleneck", "PreActBlock", "PreActBottleneck", "ResNet",
    # parts of models
    "BatchNorm", "CifarPreActStem", "CifarStem", "DeepStem", "DropPath", "ImageNetStem", "NormAct",
    "PlainProjection", "PooledProjection", "PreActStem", "Projection", "SqueezeExcite", "Stem", "ZeroPad",
    # augmentation
    "IMAGENET_MEAN", "IMAGENET_STD", "Augment", "augment_batch", "center_crop", "choose", "color_jitter", "compose",
    "cutout", "gaussian_blur", "grayscale", "identity", "normalize", "preprocess_batch", "random_crop",
    "random_erasing", "random_flip", "random_resized_crop", "randomly", "resize", "solarize",
    # automatic augmentation
    "rand_augment", "trivial_augment",
    # mixing
    "cutmix", "mixup",
    # losses
    "LOSSES", "sigmoid_cross_entropy", "smooth_labels", "softmax_cross_entropy",
    # self-supervised losses
    "barlow_twins", "byol", "dino", "enqueue", "info_nce", "nearest", "nt_xent", "sinkhorn", "sup_con", "swav",
    "update_center", "vicreg",
    # masks
    "apply_masks", "check_masks", "erk_shares", "full_masks", "kernels_except", "make_masks", "no_masks",
    "sparsity_of",
    # pruning scores
    "SCORES", "fisher", "magnitude", "norm_scale", "snip", "synflow", "taylor",
    # mask schedules
    "MaskFn", "MaskSchedule", "alternating", "cubic_sparsity", "gradual", "rigl",
    # channel pruning
    "ChannelGroup", "channel_groups", "channel_masks", "channel_scores", "compact", "kept_channels", "widths_of",
    # devices
    "Mode", "all_rows", "axis_of", "batch_sharding", "compile_step", "make_mesh", "mean_over", "place",
    "replicated", "shard_batch", "sum_over", "vary",
    # random keys
    "example_index", "example_keys", "step_key",
    # parameter trees
    "Predicate", "count", "ema", "global_norm", "is_head", "is_kernel", "leaves", "map_with_path", "select",
    # PyTorch weights
    "from_torch", "to_torch",
]
# fmt: on
