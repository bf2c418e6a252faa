"""Residual networks as pure Flax modules, and a table of published ones.

`MODELS["resnet50"](num_classes=1000)` is a `ResNet` whose parameter count and, given the same weights, logits equal
torchvision's (V1.5). Members of the family differ only in blocks, stems, shortcuts and integers.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax import layers
from resnet_jax.layers import ModuleDef, norm_relu


class Block(nn.Module):
    """Base class of residual blocks: shared fields and the shortcut.

    Attributes:
      filters: nominal width of the stage; a block outputs `filters * expansion` channels.
      in_channels: input channels before any pruning; with `strides` they decide whether the shortcut is a module.
      attention: module at the end of the residual branch, or None.
      zero_init: start the residual branch at zero, https://arxiv.org/abs/1706.02677.
      widths: output channels of each convolution in order, if pruning has changed them from `default_widths`.
    """

    filters: int
    strides: int
    in_channels: int
    conv: ModuleDef
    norm: ModuleDef
    drop_path: ModuleDef
    shortcut: ModuleDef = layers.Projection
    attention: ModuleDef | None = None
    zero_init: bool = False
    widths: Sequence[int] | None = None

    expansion = 1
    kernel_sizes: ClassVar[tuple[int, ...]] = (3, 3)

    @property
    def default_widths(self) -> tuple[int, ...]:
        """Output channels of each convolution before pruning."""
        return (self.filters,) * (len(self.kernel_sizes) - 1) + (self.filters * self.expansion,)

    @property
    def features(self) -> tuple[int, ...]:
        """Output channels of each convolution.

        Raises:
          ValueError: `widths` does not have one entry per convolution.
        """
        default = self.default_widths
        if self.widths is not None and len(self.widths) != len(default):
            raise ValueError(f"{self.name} has {len(default)} convolutions, got {len(self.widths)} widths for them")
        return default if self.widths is None else tuple(self.widths)

    @property
    def changes_shape(self) -> bool:
        """Whether the shape changes before pruning; a pruned network keeps the kind of its shortcuts."""
        return self.strides > 1 or self.in_channels != self.filters * self.expansion

    @property
    def strided(self) -> int:
        """Index of the convolution with the strides: the first 3x3 ("V1.5")."""
        return self.kernel_sizes.index(3)

    def convolutions(self) -> list[tuple[int, int, int]]:
        """Return (features, kernel size, strides) of each convolution."""
        strides = [self.strides if i == self.strided else 1 for i in range(len(self.kernel_sizes))]
        return list(zip(self.features, self.kernel_sizes, strides, strict=True))

    def apply_shortcut(self, x: jax.Array) -> jax.Array:
        """Apply the shortcut, [B, H, W, C] to [B, H / strides, W / strides, features[-1]]."""
        if not self.changes_shape:
            return x
        return self.shortcut(self.features[-1], self.strides, conv=self.conv, norm=self.norm, name="shortcut")(x)

    def end_branch(self, y: jax.Array, *, train: bool) -> jax.Array:
        """Apply attention, if any, and stochastic depth, which end the residual branch."""
        if self.attention is not None:
            y = self.attention(dtype=y.dtype, name="attention")(y)
        return self.drop_path(name="drop_path")(y, train=train)


class BasicBlock(Block):
    """Two 3x3 convolutions, each followed by a norm, and ReLU between and after: https://arxiv.org/abs/1512.03385."""

    groups = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y, last = x, len(self.kernel_sizes)
        for i, (features, size, strides) in enumerate(self.convolutions(), start=1):
            y = self.conv(features, size, strides, groups=self.groups if size > 1 else 1, name=f"conv{i}")(y)
            if i < last:
                y = norm_relu(self.norm(name=f"norm{i}"), y)
        scale_init = nn.initializers.zeros if self.zero_init else nn.initializers.ones
        y = self.end_branch(self.norm(name=f"norm{last}", scale_init=scale_init)(y), train=train)
        return nn.relu(self.apply_shortcut(x) + y)


class Bottleneck(BasicBlock):
    """1x1, 3x3 and 1x1 convolutions with the stride on the 3x3 ("V1.5"), like torchvision.

    `groups` and `group_width` turn it into ResNeXt (https://arxiv.org/abs/1611.05431) or a wide ResNet
    (https://arxiv.org/abs/1605.07146): the 3x3 has `filters * group_width / 64 * groups` channels.
    """

    groups: int = 1
    group_width: int = 64

    expansion = 4
    kernel_sizes = (1, 3, 1)

    @property
    def default_widths(self) -> tuple[int, ...]:
        width = self.filters * self.group_width // 64 * self.groups
        return width, width, self.filters * self.expansion


class CaffeBottleneck(Bottleneck):
    """Bottleneck with the stride on the first 1x1, as in He et al. 2015 and in the weights that come from Caffe."""

    @property
    def strided(self) -> int:
        return 0


class PreActBlock(Block):
    """Norm and ReLU before each 3x3 convolution, and nothing after the sum: https://arxiv.org/abs/1603.05027.

    The branch ends in a convolution: `zero_init` zeroes its kernel, as a zero scale before a ReLU gets no gradient.
    """

    shortcut: ModuleDef = layers.PlainProjection

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = norm_relu(self.norm(name="norm1"), x)
        # A projection takes the activated input; an identity takes the input itself.
        skip = self.apply_shortcut(y) if self.changes_shape else x
        last = len(self.kernel_sizes)
        for i, (features, size, strides) in enumerate(self.convolutions(), start=1):
            zero = {"kernel_init": nn.initializers.zeros} if self.zero_init and i == last else {}
            y = self.conv(features, size, strides, name=f"conv{i}", **zero)(y)
            if i < last:
                y = norm_relu(self.norm(name=f"norm{i + 1}"), y)
        return skip + self.end_branch(y, train=train)


class PreActBottleneck(PreActBlock):
    """Pre-activation bottleneck with the stride on the 3x3, https://arxiv.org/abs/1603.05027."""

    expansion = 4
    kernel_sizes = (1, 3, 1)


def stride_of(shape: tuple[int, ...], image_shape: tuple[int, ...]) -> int:
    """The stride, a power of two, of maps of this (height, width) over images of `image_shape`.

    Maps of a single cell may have a larger one.
    """
    ratio = max(-(-side // cells) for side, cells in zip(image_shape, shape, strict=True))
    return 1 << (ratio - 1).bit_length()


def split_widths(widths: Sequence[int] | None, blocks: int) -> tuple[int | None, list[Sequence[int] | None]]:
    """Split `ResNet.widths` into the stem's and each block's; None stands for the default widths.

    Raises:
      ValueError: the number of widths is not one for the stem plus the same number for each block.
    """
    if widths is None:
        return None, [None] * blocks
    each, rest = divmod(len(widths) - 1, blocks)
    if each < 1 or rest:
        raise ValueError(f"widths: 1 for the stem and the same number for each of {blocks} blocks, got {len(widths)}")
    return widths[0], [widths[i : i + each] for i in range(1, len(widths), each)]


class ResNet(nn.Module):
    """Residual network: images [B, H, W, C] to float32 logits [B, num_classes], or to features if that is None.

    Images are float and normalized. Parameters, batch statistics, pooling and head are float32; convolutions compute in
    `dtype`. `train=True` uses and updates batch statistics (`mutable=["batch_stats"]`) and, with `drop_path` > 0,
    draws from `rngs={"drop_path": key}`.

    Attributes:
      stage_sizes: number of blocks per stage; each stage after the first halves the resolution.
      block: a `Block`, or a `functools.partial` of one.
      num_classes: output size of the head; None returns the pooled features [B, C].
      width: channels of the first stage; each further stage doubles them.
      stem: `ImageNetStem`, `CifarStem`, `DeepStem`, ...
      stem_width: channels of the stem; None means `width`.
      final: module after the last stage, `NormAct` in pre-activation networks.
      drop_path: drop rate of the last block, in [0, 1), for stochastic depth; it grows linearly from 0 at the first.
      zero_init: start each residual branch at zero.
      dtype: dtype of convolutions, norms and activations.
      axis_name: axis over which the batch is split under `pmap` or `shard_map`; None under `jit`.
      sync_bn: compute statistics over the whole batch; False (no effect under `jit`) computes them per shard.
      conv, norm, max_pool: kernels; `resnet_jax.onednn` provides others.
      widths: output channels of each convolution in order (the stem, then each block), for a pruned network. A shortcut
        has those of its block's last convolution. `resnet_jax.channels.compact` sets them.
    """

    stage_sizes: Sequence[int]
    block: ModuleDef
    num_classes: int | None = 1000
    width: int = 64
    stem: ModuleDef = layers.ImageNetStem
    stem_width: int | None = None
    final: ModuleDef | None = None
    drop_path: float = 0.0
    zero_init: bool = False
    dtype: Any = jnp.float32
    axis_name: str | None = None
    sync_bn: bool = True
    conv: ModuleDef = layers.conv
    norm: ModuleDef = layers.BatchNorm
    max_pool: ModuleDef = layers.max_pool
    widths: Sequence[int] | None = None

    @nn.compact
    def maps(self, images: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
        """Return all levels of the network: `stem`, `stage1`, ... [B, H, W, C], `pooled` [B, C] and `logits` if any.

        Use it for detection or explanation: `model.apply(variables, images, method="maps")`. Under `jit`, unused levels
        are not computed.

        Raises:
          ValueError: `drop_path` is out of range, or `widths` does not fit the network.
        """
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), got {self.drop_path}")
        statistics_axis = self.axis_name if self.sync_bn else None
        conv = partial(self.conv, dtype=self.dtype)
        norm = partial(self.norm, use_running_average=not train, dtype=self.dtype, axis_name=statistics_axis)

        x = images.astype(self.dtype)
        stem = partial(self.stem, conv=conv, norm=norm, max_pool=self.max_pool, name="stem")
        in_channels = self.stem_width or self.width
        stem_width, block_widths = split_widths(self.widths, sum(self.stage_sizes))
        x = stem(stem_width or in_channels)(x)
        levels = {"stem": x}
        block_index, last_index = 0, max(sum(self.stage_sizes) - 1, 1)
        for stage, size in enumerate(self.stage_sizes, start=1):
            for block in range(1, size + 1):
                rate = self.drop_path * block_index / last_index
                layer = self.block(
                    self.width * 2 ** (stage - 1),
                    strides=2 if stage > 1 and block == 1 else 1,
                    in_channels=in_channels,
                    conv=conv,
                    norm=norm,
                    drop_path=partial(layers.DropPath, rate=rate, axis_name=self.axis_name),
                    zero_init=self.zero_init,
                    widths=block_widths[block_index],
                    name=f"stage{stage}_block{block}",
                )
                x = layer(x, train=train)
                in_channels = layer.filters * layer.expansion
                block_index += 1
            levels[f"stage{stage}"] = x
        if self.final is not None:
            x = self.final(norm=norm, name="final")(x)
            levels[f"stage{len(self.stage_sizes)}"] = x
        levels["pooled"] = x.mean((1, 2), dtype=jnp.float32)
        if self.num_classes is not None:
            head = nn.Dense(self.num_classes, kernel_init=layers.dense_init, dtype=jnp.float32, name="head")
            levels["logits"] = head(levels["pooled"])
        return levels

    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Return float32 logits [B, num_classes], or pooled features [B, C] if `num_classes` is None."""
        levels = self.maps(images, train=train)
        return levels["pooled" if self.num_classes is None else "logits"]


# Stage sizes and blocks of four-stage networks by depth, https://arxiv.org/abs/1512.03385 table 1.
STAGES: dict[int, tuple[tuple[int, ...], type[BasicBlock]]] = {
    18: ((2, 2, 2, 2), BasicBlock),
    34: ((3, 4, 6, 3), BasicBlock),
    50: ((3, 4, 6, 3), Bottleneck),
    101: ((3, 4, 23, 3), Bottleneck),
    152: ((3, 8, 36, 3), Bottleneck),
}

MODELS: dict[str, ModuleDef] = {
    # https://arxiv.org/abs/1611.05431
    "resnext50_32x4d": partial(ResNet, (3, 4, 6, 3), partial(Bottleneck, groups=32, group_width=4)),
    "resnext101_32x8d": partial(ResNet, (3, 4, 23, 3), partial(Bottleneck, groups=32, group_width=8)),
    # https://arxiv.org/abs/1605.07146
    "wide_resnet50_2": partial(ResNet, (3, 4, 6, 3), partial(Bottleneck, group_width=128)),
    "wide_resnet101_2": partial(ResNet, (3, 4, 23, 3), partial(Bottleneck, group_width=128)),
    # https://arxiv.org/abs/1803.08494
    "resnet50_gn": partial(ResNet, (3, 4, 6, 3), Bottleneck, norm=layers.GroupNorm),
    # https://arxiv.org/abs/1812.01187: "C" has a deep stem, "D" pools in its shortcuts too
    "resnet50c": partial(ResNet, (3, 4, 6, 3), Bottleneck, stem=layers.DeepStem),
    "resnet101c": partial(ResNet, (3, 4, 23, 3), Bottleneck, stem=layers.DeepStem),
    "resnet26": partial(ResNet, (2, 2, 2, 2), Bottleneck),
    "resnet26d": partial(
        ResNet, (2, 2, 2, 2), partial(Bottleneck, shortcut=layers.PooledProjection), stem=layers.DeepStem
    ),
}
"""Published networks by name: callables that take fields of `ResNet` as keywords and return a `ResNet`."""

for d, (sizes, block) in STAGES.items():
    squeezed = partial(block, attention=layers.SqueezeExcite)
    preact = partial(ResNet, sizes, PreActBlock if block is BasicBlock else PreActBottleneck, final=layers.NormAct)
    cifar: dict[str, Any] = {"num_classes": 10, "stem": layers.CifarStem}
    MODELS |= {
        f"resnet{d}": partial(ResNet, sizes, block),
        f"resnet{d}d": partial(ResNet, sizes, partial(block, shortcut=layers.PooledProjection), stem=layers.DeepStem),
        f"seresnet{d}": partial(ResNet, sizes, squeezed),
        # timm calls pre-activation networks V2.
        f"preact_resnet{d}": partial(preact, stem=layers.PreActStem),
        f"resnetv2_{d}": partial(preact, stem=layers.PreActStem),
        f"resnet{d}_cifar": partial(ResNet, sizes, block, **cifar),
        f"seresnet{d}_cifar": partial(ResNet, sizes, squeezed, **cifar),
        f"preact_resnet{d}_cifar": partial(preact, num_classes=10, stem=layers.CifarPreActStem),
    }

# The networks of https://arxiv.org/abs/1709.01507 as they come from Caffe.
caffe = partial(CaffeBottleneck, attention=layers.SqueezeExcite)
for d in (50, 101, 152):
    MODELS[f"legacy_seresnet{d}"] = partial(ResNet, STAGES[d][0], caffe, max_pool=layers.caffe_max_pool)

# "Big Transfer", https://arxiv.org/abs/1912.11370: group norm and weight standardisation in place of batch norm.
bit = partial(
    ResNet,
    block=PreActBottleneck,
    stem=layers.PreActStem,
    final=layers.NormAct,
    conv=layers.StandardizedConv,
    norm=layers.GroupNorm,
    max_pool=layers.zero_padded_max_pool,
)
for d, factor in ((50, 1), (50, 3), (101, 1), (101, 3), (152, 2), (152, 4)):
    MODELS[f"resnetv2_{d}x{factor}_bit"] = partial(bit, STAGES[d][0], width=64 * factor)

# Three stages for 32x32 images, https://arxiv.org/abs/1512.03385 section 4.2 and https://arxiv.org/abs/1605.07146.
small = partial(ResNet, num_classes=10, width=16, stem=layers.CifarStem)
small_preact = partial(small, block=PreActBlock, stem=layers.CifarPreActStem, final=layers.NormAct)
for d in (8, 20, 32, 44, 56, 110):
    sizes = ((d - 2) // 6,) * 3
    MODELS[f"resnet{d}"] = partial(small, sizes, partial(BasicBlock, shortcut=layers.ZeroPad))
    MODELS[f"preact_resnet{d}"] = partial(small_preact, sizes)
for d, factor in ((16, 4), (28, 10), (40, 2)):
    MODELS[f"wrn_{d}_{factor}"] = partial(small_preact, ((d - 4) // 6,) * 3, width=16 * factor, stem_width=16)
