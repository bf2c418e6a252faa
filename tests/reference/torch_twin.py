"""PyTorch twins of the residual networks, for parity tests and reference training runs only.

State-dict names and the order of parameters equal torchvision's `resnet.py`
(https://github.com/pytorch/vision/blob/main/torchvision/models/resnet.py) and, for squeeze-excite and ResNet-D, timm's
(https://github.com/huggingface/pytorch-image-models/blob/main/timm/models/resnet.py), so that published weights load.
One size differs: squeeze-excite has exactly `channels // 16` hidden units, as in its paper, where timm has at least 8.
Pre-activation nets follow the same scheme: their last norm is `bn`, the 1x1 convolution of their shortcut
`downsample.0`.

`TWINS["resnet50"](num_classes=10, in_channels=3, width=16)` builds a small one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv(inplanes: int, outplanes: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A square convolution without bias, padded by half its size."""
    return nn.Conv2d(inplanes, outplanes, size, stride, (size - 1) // 2, groups=groups, bias=False)


class PadShortcut(nn.Module):
    """Option A of https://arxiv.org/abs/1512.03385: every stride-th pixel, zeros for the new channels on both sides."""

    def __init__(self, inplanes: int, outplanes: int, stride: int) -> None:
        super().__init__()
        self.stride, self.before = stride, (outplanes - inplanes) // 2
        self.after = outplanes - inplanes - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


def conv_shortcut(inplanes: int, outplanes: int, stride: int) -> nn.Module:
    """Option B of https://arxiv.org/abs/1512.03385."""
    return nn.Sequential(conv(inplanes, outplanes, 1, stride), nn.BatchNorm2d(outplanes))


def pool_shortcut(inplanes: int, outplanes: int, stride: int) -> nn.Module:
    """The shortcut of ResNet-D, https://arxiv.org/abs/1812.01187 figure 2c."""
    pool = nn.Identity() if stride == 1 else nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)
    return nn.Sequential(pool, conv(inplanes, outplanes, 1), nn.BatchNorm2d(outplanes))


def plain_shortcut(inplanes: int, outplanes: int, stride: int) -> nn.Module:
    """The shortcut of pre-activation blocks, https://arxiv.org/abs/1603.05027: a convolution alone."""
    return nn.Sequential(conv(inplanes, outplanes, 1, stride))


class SqueezeExcite(nn.Module):
    """Channels reweighted by a gate on their means, https://arxiv.org/abs/1709.01507; the names are timm's."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


Shortcut = Callable[[int, int, int], nn.Module]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, https://arxiv.org/abs/1512.03385."""

    expansion = 1

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, *, shortcut: Shortcut = conv_shortcut, se: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = conv(inplanes, planes, 3, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3)
        self.bn2 = nn.BatchNorm2d(planes)
        self.se = SqueezeExcite(planes) if se else nn.Identity()
        same = stride == 1 and inplanes == planes
        self.downsample = nn.Identity() if same else shortcut(inplanes, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.se(self.bn2(self.conv2(out)))
        return F.relu(out + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with the stride on the 3x3 ("V1.5"); groups make it ResNeXt, https://arxiv.org/abs/1611.05431."""

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        *,
        shortcut: Shortcut = conv_shortcut,
        se: bool = False,
        groups: int = 1,
        group_width: int = 64,
    ) -> None:
        super().__init__()
        outplanes, width = planes * self.expansion, planes * group_width // 64 * groups
        self.conv1 = conv(inplanes, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride, groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, outplanes, 1)
        self.bn3 = nn.BatchNorm2d(outplanes)
        self.se = SqueezeExcite(outplanes) if se else nn.Identity()
        same = stride == 1 and inplanes == outplanes
        self.downsample = nn.Identity() if same else shortcut(inplanes, outplanes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.se(self.bn3(self.conv3(out)))
        return F.relu(out + self.downsample(x))


class PreActBlock(nn.Module):
    """Norm and ReLU before each of two 3x3 convolutions, https://arxiv.org/abs/1603.05027.

    A projection starts from the activated input, an identity from before it.
    """

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inplanes)
        self.conv1 = conv(inplanes, planes, 3, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3)
        same = stride == 1 and inplanes == planes
        self.downsample = None if same else plain_shortcut(inplanes, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        skip = x if self.downsample is None else self.downsample(out)
        out = self.conv1(out)
        return skip + self.conv2(F.relu(self.bn2(out)))


class PreActBottleneck(nn.Module):
    """The pre-activation bottleneck, https://arxiv.org/abs/1603.05027, with the stride on the 3x3."""

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        outplanes = planes * self.expansion
        self.bn1 = nn.BatchNorm2d(inplanes)
        self.conv1 = conv(inplanes, planes, 1)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3, stride)
        self.bn3 = nn.BatchNorm2d(planes)
        self.conv3 = conv(planes, outplanes, 1)
        same = stride == 1 and inplanes == outplanes
        self.downsample = None if same else plain_shortcut(inplanes, outplanes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        skip = x if self.downsample is None else self.downsample(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        return skip + self.conv3(F.relu(self.bn3(out)))


class ResNet(nn.Module):
    """A residual network: normalised float images [b, c, h, w] to logits [b, num_classes].

    `num_classes=None` ends at the pooled features [b, c]. `width` is the first stage's nominal width, doubled by each
    further one; `stem` is "imagenet" (7x7 of stride 2, max-pool), "deep" (three 3x3, max-pool) or "cifar" (3x3);
    `stem_width` are its channels, `width` if None.
    """

    def __init__(
        self,
        layers: Sequence[int],
        block: Callable[..., nn.Module],
        *,
        num_classes: int | None = 1000,
        in_channels: int = 3,
        width: int = 64,
        stem: str = "imagenet",
        stem_width: int | None = None,
        preact: bool = False,
    ) -> None:
        super().__init__()
        inplanes = stem_width or width
        if stem == "deep":
            half = inplanes // 2
            self.conv1: nn.Module = nn.Sequential(
                *(conv(in_channels, half, 3, 2), nn.BatchNorm2d(half), nn.ReLU()),
                *(conv(half, half, 3), nn.BatchNorm2d(half), nn.ReLU()),
                conv(half, inplanes, 3),
            )
        else:
            self.conv1 = conv(in_channels, inplanes, *((7, 2) if stem == "imagenet" else (3, 1)))
        self.preact = preact
        if not preact:
            self.bn1 = nn.BatchNorm2d(inplanes)
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, 2, 1)
        self.stages = [f"layer{i}" for i in range(1, len(layers) + 1)]
        for i, (name, size) in enumerate(zip(self.stages, layers, strict=True)):
            blocks: list[nn.Module] = []
            for j in range(size):
                blocks.append(block(inplanes, width * 2**i, 2 if i > 0 and j == 0 else 1))
                inplanes = width * 2**i * blocks[-1].expansion
            self.add_module(name, nn.Sequential(*blocks))
        if preact:
            self.bn = nn.BatchNorm2d(inplanes)
        self.fc = nn.Identity() if num_classes is None else nn.Linear(inplanes, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.maxpool(x if self.preact else F.relu(self.bn1(x)))
        for name in self.stages:
            x = getattr(self, name)(x)
        if self.preact:
            x = F.relu(self.bn(x))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


# Blocks of the four-stage nets by depth, https://arxiv.org/abs/1512.03385 table 1.
STAGES: dict[int, tuple[tuple[int, ...], type[nn.Module]]] = {
    18: ((2, 2, 2, 2), BasicBlock),
    34: ((3, 4, 6, 3), BasicBlock),
    50: ((3, 4, 6, 3), Bottleneck),
    101: ((3, 4, 23, 3), Bottleneck),
    152: ((3, 8, 36, 3), Bottleneck),
}
PREACT: dict[type[nn.Module], type[nn.Module]] = {BasicBlock: PreActBlock, Bottleneck: PreActBottleneck}
CIFAR_DEPTHS = (8, 20, 32, 44, 56, 110)

imagenet_preact = partial(ResNet, preact=True)
cifar = partial(ResNet, num_classes=10, stem="cifar")
cifar_preact = partial(cifar, preact=True)

TWINS: dict[str, Callable[..., nn.Module]] = {
    "resnext50_32x4d": partial(ResNet, (3, 4, 6, 3), partial(Bottleneck, groups=32, group_width=4)),
    "resnext101_32x8d": partial(ResNet, (3, 4, 23, 3), partial(Bottleneck, groups=32, group_width=8)),
    # https://arxiv.org/abs/1605.07146; the 3x3 convolutions alone are wider.
    "wide_resnet50_2": partial(ResNet, (3, 4, 6, 3), partial(Bottleneck, group_width=128)),
    "wide_resnet101_2": partial(ResNet, (3, 4, 23, 3), partial(Bottleneck, group_width=128)),
}
for depth, (layers, block) in STAGES.items():
    se_block, d_block = partial(block, se=True), partial(block, shortcut=pool_shortcut)
    TWINS[f"resnet{depth}"] = partial(ResNet, layers, block)
    TWINS[f"resnet{depth}d"] = partial(ResNet, layers, d_block, stem="deep")
    TWINS[f"seresnet{depth}"] = partial(ResNet, layers, se_block)
    TWINS[f"preact_resnet{depth}"] = partial(imagenet_preact, layers, PREACT[block])
    TWINS[f"resnet{depth}_cifar"] = partial(cifar, layers, block)
    TWINS[f"seresnet{depth}_cifar"] = partial(cifar, layers, se_block)
    TWINS[f"preact_resnet{depth}_cifar"] = partial(cifar_preact, layers, PREACT[block])
for depth in CIFAR_DEPTHS:  # https://arxiv.org/abs/1512.03385 section 4.2
    layers = ((depth - 2) // 6,) * 3
    TWINS[f"resnet{depth}"] = partial(cifar, layers, partial(BasicBlock, shortcut=PadShortcut), width=16)
    TWINS[f"preact_resnet{depth}"] = partial(cifar_preact, layers, PreActBlock, width=16)
for depth, factor in ((16, 4), (28, 10), (40, 2)):  # https://arxiv.org/abs/1605.07146
    layers = ((depth - 4) // 6,) * 3
    TWINS[f"wrn_{depth}_{factor}"] = partial(cifar_preact, layers, PreActBlock, width=16 * factor, stem_width=16)
