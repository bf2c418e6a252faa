"""Residual networks as pure Flax modules, and the table of published ones.

`MODELS["resnet50"](num_classes=1000)` is a `ResNet` whose parameter count and logits equal torchvision's (V1.5) for the
same weights. Everything that varies between members of the family is a block, a stem, a shortcut or an integer.
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
    """What residual blocks have in common: their fields, and the way past them.

    `filters` is the stage's nominal width; a block puts out `filters * expansion` channels. `widths` are the output
    channels of its convolutions in turn, the last one's those of the block, where they are not `default_widths` because
    the network has been pruned. The shortcut is a module only where the nominal shape changes: from `in_channels`,
    those of the whole network. `attention()` ends the residual branch; `zero_init` starts it at zero
    (https://arxiv.org/abs/1706.02677).
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
        """Output channels of each convolution before any pruning."""
        raise NotImplementedError

    @property
    def features(self) -> tuple[int, ...]:
        """Output channels of each convolution.

        Raises:
          ValueError: `widths` are not one for each convolution.
        """
        default = self.default_widths
        if self.widths is not None and len(self.widths) != len(default):
            raise ValueError(f"{self.name} has {len(default)} convolutions, got {len(self.widths)} widths for them")
        return default if self.widths is None else tuple(self.widths)

    @property
    def changes_shape(self) -> bool:
        """Whether the shape changes; a pruned network, where counts may coincide, keeps its shortcuts' kind."""
        return self.strides > 1 or self.in_channels != self.filters * self.expansion

    def apply_shortcut(self, x: jax.Array) -> jax.Array:
        """The shortcut: [B, H, W, C] to [B, H / strides, W / strides, features[-1]]."""
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
    """1x1, 3x3, 1x1 with the stride on the 3x3: "V1.5", as torchvision's.

    `groups` and `group_width` make it ResNeXt (https://arxiv.org/abs/1611.05431) or a wide ResNet
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
    """Norm and ReLU before each convolution, nothing after the sum, https://arxiv.org/abs/1603.05027.

    A convolution ends the branch, so `zero_init` zeroes its kernel: a zero scale before a ReLU would never move.
    """

    shortcut: ModuleDef = PlainProjection
    kernel_sizes: Sequence[int] = (3, 3)

    @property
    def default_widths(self) -> tuple[int, ...]:
        return (self.filters,) * (len(self.kernel_sizes) - 1) + (self.filters * self.expansion,)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = norm_relu(self.norm(name="norm1"), x)
        # A projection starts from the activated input; an identity is taken from before it.
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
        """Which convolution carries the stride: the first 3x3."""
        return list(self.kernel_sizes).index(3) + 1


class PreActBottleneck(PreActBlock):
    """The pre-activation bottleneck, https://arxiv.org/abs/1603.05027, with the stride on the 3x3."""

    kernel_sizes: Sequence[int] = (1, 3, 1)

    expansion = 4


def split_widths(widths: Sequence[int] | None, blocks: int) -> tuple[int | None, list[Sequence[int] | None]]:
    """The stem's part of `ResNet.widths` and each block's; None where they are the model's own.

    Raises:
      ValueError: they cannot be one of the stem and as many of each block.
    """
    if widths is None:
        return None, [None] * blocks
    each, rest = divmod(len(widths) - 1, blocks)
    if each < 1 or rest:
        raise ValueError(f"widths are one of the stem and as many of each of {blocks} blocks, got {len(widths)}")
    return widths[0], [widths[i : i + each] for i in range(1, len(widths), each)]


class ResNet(nn.Module):
    """A residual network: images [B, H, W, C] to float32 logits [B, num_classes], or features if that is None.

    Images are float, normalised. Parameters, batch statistics, pooling and head are float32; convolutions compute in
    `dtype`. `train=True` uses and updates batch statistics (`mutable=["batch_stats"]`) and, with `drop_path` > 0,
    draws from `rngs={"drop_path": key}`.

    Attributes:
      stage_sizes: blocks in each stage; every stage after the first halves the resolution.
      block: a `Block`, or a `functools.partial` of one.
      num_classes: size of the head; None ends at the pooled features [B, C].
      width: channels of the first stage, doubled by each further one.
      stem: `ImageNetStem`, `CifarStem`, `DeepStem`, ...; `stem_width` are its channels, `width` if None.
      final: what follows the last stage: `NormAct` in pre-activation nets.
      drop_path: stochastic depth of the last block, in [0, 1); it grows linearly from 0 at the first.
      zero_init: start each residual branch at zero.
      dtype: of convolutions, norms and activations.
      axis_name: the axis that the batch is split over under `pmap` or `shard_map`; None under `jit`.
      sync_bn: statistics over the whole batch, or (False; not under `jit`) over each shard's own part of it.
      conv, norm, max_pool: the kernels, for those who bring their own, as `resnet_jax.onednn` does.
      widths: output channels of each convolution in turn (the stem, then each block's), where a pruned network's are
        not the model's own. A shortcut's follow the block's last; `resnet_jax.channels.compact` sets them.
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
        """Every level of the network: `stem`, `stage1`.. [B, H, W, C], `pooled` [B, C] and, with a head, `logits`.

        For detection and explanation: `model.apply(variables, images, method="maps")`. What is not used is not
        computed under `jit`.
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
        """Logits [B, num_classes], or pooled features [B, C] where `num_classes` is None; float32."""
        levels = self.maps(images, train=train)
        return levels["pooled" if self.num_classes is None else "logits"]


# Blocks of the four-stage nets by depth, https://arxiv.org/abs/1512.03385 table 1.
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
    """WRN-`depth`-`factor` for 32x32 images, https://arxiv.org/abs/1605.07146."""
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
"""Published networks by name: callables that take the fields of `ResNet` and return one."""
