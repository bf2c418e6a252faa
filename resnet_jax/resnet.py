"""Residual networks as pure Flax modules, and a table of published ones.

`MODELS["resnet50"](num_classes=1000)` is a `ResNet` whose parameter count and, given the same weights, logits equal
torchvision's (V1.5). Members of the family differ only in blocks, stems, shortcuts and integers.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax.layers import (
    BatchNorm,
    CifarPreActStem,
    CifarStem,
    DeepStem,
    DropPath,
    ImageNetStem,
    ModuleDef,
    NormAct,
    PlainProjection,
    PooledProjection,
    PreActStem,
    Projection,
    SqueezeExcite,
    ZeroPad,
    conv,
    dense_init,
    max_pool,
    norm_relu,
)


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
    shortcut: ModuleDef = Projection
    attention: ModuleDef | None = None
    zero_init: bool = False
    widths: Sequence[int] | None = None

    expansion = 1

    @property
    def default_widths(self) -> tuple[int, ...]:
        """Output channels of each convolution before pruning."""
        raise NotImplementedError

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

    def apply_shortcut(self, x: jax.Array) -> jax.Array:
        """Apply the shortcut, [B, H, W, C] to [B, H / strides, W / strides, features[-1]]."""
        if not self.changes_shape:
            return x
        return self.shortcut(self.features[-1], self.strides, conv=self.conv, norm=self.norm, name="shortcut")(x)

    def apply_attention(self, x: jax.Array) -> jax.Array:
        return x if self.attention is None else self.attention(dtype=x.dtype, name="attention")(x)

    @property
    def last_scale(self) -> nn.initializers.Initializer:
        return nn.initializers.zeros if self.zero_init else nn.initializers.ones


class BasicBlock(Block):
    """Two 3x3 convolutions, https://arxiv.org/abs/1512.03385."""

    @property
    def default_widths(self) -> tuple[int, ...]:
        return self.filters, self.filters

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        first, last = self.features
        y = self.conv(first, 3, self.strides, name="conv1")(x)
        y = norm_relu(self.norm(name="norm1"), y)
        y = self.conv(last, 3, name="conv2")(y)
        y = self.apply_attention(self.norm(name="norm2", scale_init=self.last_scale)(y))
        return nn.relu(self.apply_shortcut(x) + self.drop_path(name="drop_path")(y, train=train))


class Bottleneck(Block):
    """1x1, 3x3 and 1x1 convolutions with the stride on the 3x3 ("V1.5"), like torchvision.

    `groups` and `group_width` turn it into ResNeXt (https://arxiv.org/abs/1611.05431) or a wide ResNet
    (https://arxiv.org/abs/1605.07146): the 3x3 has `filters * group_width / 64 * groups` channels.
    """

    groups: int = 1
    group_width: int = 64

    expansion = 4

    @property
    def default_widths(self) -> tuple[int, ...]:
        width = self.filters * self.group_width // 64 * self.groups
        return width, width, self.filters * self.expansion

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        first, middle, last = self.features
        y = self.conv(first, 1, name="conv1")(x)
        y = norm_relu(self.norm(name="norm1"), y)
        y = self.conv(middle, 3, self.strides, groups=self.groups, name="conv2")(y)
        y = norm_relu(self.norm(name="norm2"), y)
        y = self.conv(last, 1, name="conv3")(y)
        y = self.apply_attention(self.norm(name="norm3", scale_init=self.last_scale)(y))
        return nn.relu(self.apply_shortcut(x) + self.drop_path(name="drop_path")(y, train=train))


class PreActBlock(Block):
    """Norm and ReLU before each convolution, and nothing after the sum: https://arxiv.org/abs/1603.05027.

    The branch ends in a convolution: `zero_init` zeroes its kernel, as a zero scale before a ReLU gets no gradient.
    """

    shortcut: ModuleDef = PlainProjection
    kernel_sizes: Sequence[int] = (3, 3)

    @property
    def default_widths(self) -> tuple[int, ...]:
        return (self.filters,) * (len(self.kernel_sizes) - 1) + (self.filters * self.expansion,)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = norm_relu(self.norm(name="norm1"), x)
        # A projection takes the activated input; an identity takes the input itself.
        skip = self.apply_shortcut(y) if self.changes_shape else x
        last = len(self.kernel_sizes)
        for i, (features, size) in enumerate(zip(self.features, self.kernel_sizes, strict=True), start=1):
            strides = self.strides if i == self.stride_index else 1
            zero = {"kernel_init": nn.initializers.zeros} if self.zero_init and i == last else {}
            y = self.conv(features, size, strides, name=f"conv{i}", **zero)(y)
            if i < last:
                y = norm_relu(self.norm(name=f"norm{i + 1}"), y)
        return skip + self.drop_path(name="drop_path")(self.apply_attention(y), train=train)

    @property
    def stride_index(self) -> int:
        """Number of the convolution that has the stride, counted from 1: the first 3x3."""
        return list(self.kernel_sizes).index(3) + 1


class PreActBottleneck(PreActBlock):
    """Pre-activation bottleneck with the stride on the 3x3, https://arxiv.org/abs/1603.05027."""

    kernel_sizes: Sequence[int] = (1, 3, 1)

    expansion = 4


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
    stem: ModuleDef = ImageNetStem
    stem_width: int | None = None
    final: ModuleDef | None = None
    drop_path: float = 0.0
    zero_init: bool = False
    dtype: Any = jnp.float32
    axis_name: str | None = None
    sync_bn: bool = True
    conv: ModuleDef = conv
    norm: ModuleDef = BatchNorm
    max_pool: ModuleDef = max_pool
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
                    drop_path=partial(DropPath, rate=rate, axis_name=self.axis_name),
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
            head = nn.Dense(self.num_classes, kernel_init=dense_init, dtype=jnp.float32, name="head")
            levels["logits"] = head(levels["pooled"])
        return levels

    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Return float32 logits [B, num_classes], or pooled features [B, C] if `num_classes` is None."""
        levels = self.maps(images, train=train)
        return levels["pooled" if self.num_classes is None else "logits"]


# Stage sizes and blocks of four-stage networks by depth, https://arxiv.org/abs/1512.03385 table 1.
STAGES: dict[int, tuple[tuple[int, ...], ModuleDef]] = {
    18: ((2, 2, 2, 2), BasicBlock),
    34: ((3, 4, 6, 3), BasicBlock),
    50: ((3, 4, 6, 3), Bottleneck),
    101: ((3, 4, 23, 3), Bottleneck),
    152: ((3, 8, 36, 3), Bottleneck),
}
PREACT: dict[ModuleDef, ModuleDef] = {BasicBlock: PreActBlock, Bottleneck: PreActBottleneck}

# Three stages of 2n + 2n + 2n layers for 32x32 images, https://arxiv.org/abs/1512.03385 section 4.2.
cifar_resnet = partial(ResNet, num_classes=10, width=16, stem=CifarStem)
cifar_preact = partial(cifar_resnet, stem=CifarPreActStem, final=NormAct)
CIFAR_DEPTHS = (8, 20, 32, 44, 56, 110)


def wide_resnet(depth: int, factor: int) -> ModuleDef:
    """Return WRN-`depth`-`factor` for 32x32 images, https://arxiv.org/abs/1605.07146."""
    return partial(
        cifar_preact, stage_sizes=((depth - 4) // 6,) * 3, block=PreActBlock, width=16 * factor, stem_width=16
    )


MODELS: dict[str, ModuleDef] = {
    **{f"resnet{d}": partial(ResNet, sizes, block) for d, (sizes, block) in STAGES.items()},
    **{
        f"resnet{d}d": partial(ResNet, sizes, partial(block, shortcut=PooledProjection), stem=DeepStem)
        for d, (sizes, block) in STAGES.items()
    },
    **{
        f"seresnet{d}": partial(ResNet, sizes, partial(block, attention=SqueezeExcite))
        for d, (sizes, block) in STAGES.items()
    },
    **{
        f"preact_resnet{d}": partial(ResNet, sizes, PREACT[block], stem=PreActStem, final=NormAct)
        for d, (sizes, block) in STAGES.items()
    },
    "resnext50_32x4d": partial(ResNet, (3, 4, 6, 3), partial(Bottleneck, groups=32, group_width=4)),
    "resnext101_32x8d": partial(ResNet, (3, 4, 23, 3), partial(Bottleneck, groups=32, group_width=8)),
    "wide_resnet50_2": partial(ResNet, (3, 4, 6, 3), partial(Bottleneck, group_width=128)),
    "wide_resnet101_2": partial(ResNet, (3, 4, 23, 3), partial(Bottleneck, group_width=128)),
    **{
        f"resnet{d}": partial(cifar_resnet, ((d - 2) // 6,) * 3, partial(BasicBlock, shortcut=ZeroPad))
        for d in CIFAR_DEPTHS
    },
    **{f"preact_resnet{d}": partial(cifar_preact, ((d - 2) // 6,) * 3, PreActBlock) for d in CIFAR_DEPTHS},
    **{
        f"resnet{d}_cifar": partial(ResNet, sizes, block, num_classes=10, stem=CifarStem)
        for d, (sizes, block) in STAGES.items()
    },
    **{
        f"seresnet{d}_cifar": partial(
            ResNet, sizes, partial(block, attention=SqueezeExcite), num_classes=10, stem=CifarStem
        )
        for d, (sizes, block) in STAGES.items()
    },
    **{
        f"preact_resnet{d}_cifar": partial(
            ResNet, sizes, PREACT[block], num_classes=10, stem=CifarPreActStem, final=NormAct
        )
        for d, (sizes, block) in STAGES.items()
    },
    "wrn_16_4": wide_resnet(16, 4),
    "wrn_28_10": wide_resnet(28, 10),
    "wrn_40_2": wide_resnet(40, 2),
}
"""Published networks by name: callables that take fields of `ResNet` as keywords and return a `ResNet`."""
