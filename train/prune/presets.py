"""Presets of pruning: complete recipes by name; see `train.presets`.

Figures marked "measured" have their runs in results/; the others are reported by the sources and not reproduced here.
"""

import dataclasses
from collections.abc import Callable

from train import presets
from train.prune.config import PruneConfig, PruningConfig


def digits_prune() -> PruneConfig:
    """scikit-learn's digits: train, then prune to 90 % during further training, on any machine, offline.

    Command: python -m train.prune
    Hardware: 2 CPU cores, about a minute. Expect the pruned network within a point of the dense one (measured).
    """
    return PruneConfig(**vars(presets.digits()), prune=PruningConfig(sparsity=0.9, epochs=20, lr=0.05, every=20))


def cifar10_resnet20_prune() -> PruneConfig:
    """ResNet-20 to 90 % by gradual magnitude pruning, https://arxiv.org/abs/1710.01878.

    Command: python -m train.data prepare cifar10 && python -m train.prune cifar10_resnet20_prune
    Hardware: any GPU, minutes. `--init RUN` prunes an existing run of cifar10_resnet20, `--init cifar10_resnet20` the
    network that comes with the project. With two epochs of training instead of 60, that one reaches 83.0 % on test
    (measured, results/cifar10_prune); the 60 epochs are not measured.
    """
    pruning = PruningConfig(sparsity=0.9, epochs=60, lr=0.02, every=100)
    return PruneConfig(**vars(presets.cifar10_resnet20()), prune=pruning)


def cifar10_resnet56_channels() -> PruneConfig:
    """ResNet-56 without 30 % of its channels, compacted to a smaller network: half of the multiply-adds.

    Command: python -m train.data prepare cifar10 && python -m train.prune cifar10_resnet56_channels
    Hardware: one GPU. Not measured; others at about half the multiply-adds report 92.9-93.8 % (dense 93.5 %).
    """
    dense = dataclasses.replace(presets.cifar10_resnet20(), model="resnet56")
    pruning = PruningConfig(
        structure="channels", sparsity=0.3, scope="uniform", epochs=100, lr=0.02, every=100, end=0.5
    )
    return PruneConfig(**vars(dense), prune=pruning)


def imagenet_resnet50_gmp80() -> PruneConfig:
    """ResNet-50 to 80 % by gradual magnitude pruning, the same share of every layer except the stem and the head.

    Command: python -m train.data prepare imagenet2012 && python -m train.prune imagenet_resnet50_gmp80
    Hardware: 8 GPUs or a TPU v3-8. Not measured; others report 75.5 % top-1 at 80 % (dense 76.7 %).
    `--init resnet50.safetensors` prunes torchvision's weights.
    """
    pruning = PruningConfig(sparsity=0.8, scope="uniform", epochs=30, lr=0.08, every=200, end=0.6)
    return PruneConfig(**vars(presets.imagenet_resnet50()), prune=pruning)


PRESETS: dict[str, Callable[[], PruneConfig]] = {
    "digits_prune": digits_prune,
    "cifar10_resnet20_prune": cifar10_resnet20_prune,
    "cifar10_resnet56_channels": cifar10_resnet56_channels,
    "imagenet_resnet50_gmp80": imagenet_resnet50_gmp80,
}
