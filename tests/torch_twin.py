"""PyTorch twins of the residual networks, for parity tests and reference training runs only."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PadShortcut(nn.Module):
    """Option A of https://arxiv.org/abs/1512.03385: every stride-th pixel, zeros for the new channels on both sides."""

    def __init__(self, inplanes: int, outplanes: int, stride: int) -> None:
        super().__init__()
        self.stride, self.before = stride, (outplanes - inplanes) // 2
        self.after = outplanes - inplanes - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        same = stride == 1 and inplanes == planes
        self.downsample = None if same else PadShortcut(inplanes, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet20(nn.Module):
    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inplanes = width
        for stage in range(3):
            planes, blocks = width * 2**stage, []
            for block in range(3):
                blocks.append(BasicBlock(inplanes, planes, 2 if stage > 0 and block == 0 else 1))
                inplanes = planes
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(inplanes, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


TWINS = {"resnet20": ResNet20}
