"""ResNets in JAX/Flax as pure functions: models, augmentations, losses, masks, and one step for three compilers."""

from resnet_jax.resnet import MODELS, ResNet

__all__ = ["MODELS", "ResNet"]
