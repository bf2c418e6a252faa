"""Pretraining presets: complete recipes by name. Each one gives the method, the command and the expected result.

Figures marked "measured" have their runs in results/; the others are reported by the sources and not reproduced here.
On CIFAR-10 the sources train and probe on all 50,000 training images; here 5,000 are held out for validation.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from pretrain.config import ObjectiveConfig, PretrainConfig, ViewConfig
from resnet_jax.augment import IMAGENET_MEAN, IMAGENET_STD
from train.config import DataConfig, OptimConfig
from train.presets import CIFAR10_MEAN, CIFAR10_STD


class Recipe(NamedTuple):
    """A config, with the text of its preset: the method, then the hardware and the expected result."""

    about: str
    expect: str
    config: PretrainConfig


def recipe(base: PretrainConfig, about: str, expect: str, **changes: Any) -> Recipe:
    """Make a recipe from the settings that a family shares and its own changes."""
    return Recipe(about, expect, replace(base, **changes))


def make_preset(name: str, recipe: Recipe) -> Callable[[], PretrainConfig]:
    """Make the preset of a recipe; its docstring also gives the command."""
    data = recipe.config.data.name
    prepare = "" if data == "digits" else f"python -m train.data prepare {data} && "

    def preset() -> PretrainConfig:
        return recipe.config

    preset.__doc__ = f"{recipe.about}\n\nCommand: {prepare}python -m pretrain {name}\nHardware: {recipe.expect}"
    return preset


# ---- handwritten digits: every method on one budget ----------------------------------------------------------------

# Heads, queues and prototypes are sized for an encoder of 64 features and 1,293 training images.
DIGITS: dict[str, ObjectiveConfig] = {
    "simclr": ObjectiveConfig(name="simclr", projector=(128, 64)),
    "supcon": ObjectiveConfig(name="supcon", projector=(128, 64)),
    "mocov2": ObjectiveConfig(name="mocov2", projector=(128, 64), queue=1024, target_momentum=0.99),
    "mocov3": ObjectiveConfig(
        name="mocov3", projector=(128, 64), predictor=(128, 64), temperature=0.2, target_momentum=0.99
    ),
    "byol": ObjectiveConfig(name="byol", projector=(128, 64), predictor=(128, 64), target_momentum=0.99),
    "simsiam": ObjectiveConfig(name="simsiam", projector=(128, 128), predictor=(32, 128)),
    "barlow": ObjectiveConfig(name="barlow", projector=(256, 256), scale=0.1),
    "vicreg": ObjectiveConfig(name="vicreg", projector=(256, 256)),
    "nnclr": ObjectiveConfig(name="nnclr", projector=(128, 64), predictor=(128, 64), queue=1024, temperature=0.2),
    "swav": ObjectiveConfig(name="swav", projector=(128, 64), prototypes=128, frozen_prototypes=1),
    "dino": ObjectiveConfig(
        name="dino", projector=(128, 128, 64), prototypes=256, target_momentum=0.99, frozen_prototypes=1
    ),
}
DIGITS_OPTIM = OptimConfig(lr=0.1, nesterov=True, weight_decay=5e-4, warmup_epochs=5)
# DINO learns little in this few steps of SGD: kNN on validation reaches 82 %, and 90 % with Adam.
DIGITS_OPTIMS = {"dino": replace(DIGITS_OPTIM, name="adamw", lr=3e-3)}

DIGITS_BASE = PretrainConfig(
    model="resnet8",
    data=DataConfig(name="digits"),
    augment=ViewConfig(min_scale=0.4, flip=False, jitter=(0.4, 0.4, 0.0, 0.0), grayscale=0.0),
    epochs=100,
    batch=128,
    log_every=20,
    eval_every=10,
)
DIGITS_RECIPES = {
    f"digits_{method}": recipe(
        DIGITS_BASE,
        f"{method} on scikit-learn's handwritten digits, on any machine, offline; all on the same budget.",
        "2 CPU cores, a minute or two. The README's table has the accuracies (measured).",
        objective=objective,
        optim=DIGITS_OPTIMS.get(method, DIGITS_OPTIM),
    )
    for method, objective in DIGITS.items()
}

# ---- CIFAR-10: ResNet-18 with a 3x3 stem -----------------------------------------------------------------------------

SYMMETRIC = ViewConfig(resized_crop=32, mean=CIFAR10_MEAN, std=CIFAR10_STD)
ASYMMETRIC = replace(SYMMETRIC, jitter=(0.4, 0.4, 0.2, 0.1), solarize=(0.0, 0.2))
MULTI_CROP: dict[str, Any] = {"min_scale": 0.25, "small_views": 4, "small_crop": 16, "small_scale": (0.08, 0.25)}

# The optimizer of solo-learn's CIFAR scripts, where the rate caps the trust ratio and does not scale it.
SOLO_LEARN = OptimConfig(name="lars", trust_coefficient=0.02, schedule="cosine", warmup_epochs=10)
CIFAR10 = PretrainConfig(
    model="resnet18_cifar",
    data=DataConfig(name="cifar10"),
    augment=SYMMETRIC,
    optim=SOLO_LEARN,
    epochs=1000,
    batch=256,
    eval_every=10,
)

cifar10 = partial(recipe, CIFAR10)
CIFAR10_RECIPES = {
    "cifar10_simclr_resnet18": cifar10(
        "SimCLR (https://arxiv.org/abs/2002.05709), the recipe of google-research/simclr for CIFAR-10.",
        "one GPU. The source reports about 91 % by a linear probe; others, 87.9 % by kNN after 800 epochs.",
        objective=ObjectiveConfig(name="simclr", projector=(512, 512, 128), temperature=0.5),
        optim=OptimConfig(name="lars", lr=2.0, weight_decay=1e-4, warmup_epochs=10),
        batch=512,
    ),
    "cifar10_simclr_resnet20": cifar10(
        "SimCLR with the smallest ResNet of He et al. for half an hour of CPU: to see that it learns, not to compare.",
        "one CPU core, 35 minutes: 57.5 % by kNN and 60.4 % by a linear probe on test (measured).",
        model="resnet20",
        objective=ObjectiveConfig(name="simclr", projector=(128, 128), temperature=0.2),
        optim=OptimConfig(lr=0.12, nesterov=True, weight_decay=5e-4, warmup_epochs=1),
        epochs=7,
        eval_every=1,
        neighbour_images=10_000,
    ),
    "cifar10_supcon_resnet18": cifar10(
        "SupCon (https://arxiv.org/abs/2004.11362), which uses labels, after HobbitLong/SupContrast.",
        "one GPU. solo-learn reports 93.82 % (online linear).",
        objective=ObjectiveConfig(name="supcon", projector=(512, 128), temperature=0.1),
        optim=OptimConfig(lr=0.5, weight_decay=1e-4, warmup_epochs=10),
        augment=replace(SYMMETRIC, min_scale=0.2),
        batch=1024,
    ),
    "cifar10_mocov2_resnet18": cifar10(
        "MoCo v2 (https://arxiv.org/abs/2003.04297), symmetric, with the settings of lightly's CIFAR-10 benchmark.",
        "one GPU. lightly reports 89.9 % by kNN after 800 epochs, with each batch norm in eight splits, which this\n"
        "code does not have.",
        objective=ObjectiveConfig(
            name="mocov2", projector=(512, 128), temperature=0.1, queue=4096, target_momentum=0.99
        ),
        optim=OptimConfig(lr=0.24, weight_decay=5e-4),
        epochs=800,
        batch=512,
    ),
    "cifar10_mocov3_resnet18": cifar10(
        "MoCo v3 (https://arxiv.org/abs/2104.02057), with the settings of solo-learn's CIFAR script.",
        "one GPU. solo-learn reports 93.10 % (online linear).",
        objective=ObjectiveConfig(name="mocov3", temperature=0.2, target_momentum=0.99),
        optim=replace(SOLO_LEARN, lr=0.3, weight_decay=1e-6),
        augment=ASYMMETRIC,
    ),
    "cifar10_byol_resnet18": cifar10(
        "BYOL (https://arxiv.org/abs/2006.07733), with the settings of solo-learn's CIFAR script.",
        "one GPU. solo-learn reports 92.58 % (online linear), lightly 91.0 % by kNN (best test epoch).",
        objective=ObjectiveConfig(name="byol", target_momentum=0.99),
        optim=replace(SOLO_LEARN, lr=1.0, weight_decay=1e-5),
        augment=ASYMMETRIC,
    ),
    "cifar10_simsiam_resnet18": cifar10(
        "SimSiam (https://arxiv.org/abs/2011.10566), after its appendix on CIFAR-10, with a projector of two layers.",
        "one GPU. The paper reports 91.8 % by a linear probe after 800 epochs.",
        objective=ObjectiveConfig(name="simsiam", projector=(2048, 2048), predictor=(512, 2048)),
        optim=OptimConfig(lr=0.06, weight_decay=5e-4),
        augment=replace(SYMMETRIC, min_scale=0.2),
        epochs=800,
        batch=512,
    ),
    "cifar10_barlow_resnet18": cifar10(
        "Barlow Twins (https://arxiv.org/abs/2103.03230), with the settings of solo-learn's CIFAR script.",
        "one GPU. solo-learn reports 92.10 % (online linear); a user measured 91.56 % offline with that checkpoint.",
        objective=ObjectiveConfig(name="barlow", projector=(2048, 2048, 2048), scale=0.1),
        optim=replace(SOLO_LEARN, lr=0.3, weight_decay=1e-4),
        augment=ASYMMETRIC,
    ),
    "cifar10_vicreg_resnet18": cifar10(
        "VICReg (https://arxiv.org/abs/2105.04906), with the optimizer of Barlow Twins above.",
        "one GPU. solo-learn, whose settings may differ, reports 92.07 %.",
        objective=ObjectiveConfig(name="vicreg", projector=(2048, 2048, 2048)),
        optim=replace(SOLO_LEARN, lr=0.3, weight_decay=1e-4),
        augment=replace(ASYMMETRIC, min_scale=0.2, solarize=(0.1, 0.1)),
    ),
    "cifar10_nnclr_resnet18": cifar10(
        "NNCLR (https://arxiv.org/abs/2104.14548), with the settings of solo-learn's CIFAR script.",
        "one GPU. solo-learn reports 91.88 % (online linear).",
        objective=ObjectiveConfig(name="nnclr", temperature=0.2, queue=65536),
        optim=replace(SOLO_LEARN, lr=0.4, weight_decay=1e-5),
        augment=ASYMMETRIC,
    ),
    "cifar10_swav_resnet18": cifar10(
        "SwAV (https://arxiv.org/abs/2006.09882), with two views and four small ones of 16 pixels.\n\n"
        "It has only 512 prototypes, because it lacks the queue with which a small batch can be assigned to thousands.",
        "one GPU. solo-learn, with a queue and two views, reports 89.17 % (online linear).",
        objective=ObjectiveConfig(name="swav", prototypes=512, frozen_prototypes=1),
        optim=replace(SOLO_LEARN, lr=0.6, weight_decay=1e-6),
        augment=replace(SYMMETRIC, **MULTI_CROP),
    ),
    "cifar10_dino_resnet18": cifar10(
        "DINO (https://arxiv.org/abs/2104.14294) for a convnet, with two views and four small ones of 16 pixels.",
        "one GPU. solo-learn, with two views, reports 89.52 % (online linear).",
        objective=ObjectiveConfig(name="dino", prototypes=4096, target_momentum=0.9995, frozen_prototypes=1),
        optim=replace(SOLO_LEARN, lr=0.3, weight_decay=1e-6),
        augment=replace(ASYMMETRIC, **MULTI_CROP),
    ),
}

# ---- ImageNet: 100 epochs at a batch of 4,096 ------------------------------------------------------------------------

IMAGENET = PretrainConfig(
    model="resnet50",
    zero_init=True,
    data=DataConfig(name="imagenet2012", image_size=256, validation=0.01),
    augment=ViewConfig(resized_crop=224, mean=IMAGENET_MEAN, std=IMAGENET_STD),
    optim=OptimConfig(name="lars", weight_decay=1e-6, warmup_epochs=10),
    epochs=100,
    batch=4096,
    eval_every=10,
    neighbour_images=100_000,
)

imagenet = partial(recipe, IMAGENET)
IMAGENET_RECIPES = {
    "imagenet_simclr_resnet50": imagenet(
        "SimCLR (https://arxiv.org/abs/2002.05709), 100 epochs at a batch of 4,096.",
        "32 TPU v3 cores or 16 GPUs. The source reports about 64.5 % by a linear probe. ImageNet's validation\n"
        "split is the test split here. Views are cropped from the central square; the source's, from the whole image.",
        objective=ObjectiveConfig(name="simclr", temperature=0.1),
        optim=replace(IMAGENET.optim, lr=4.8),
        augment=replace(IMAGENET.augment, jitter=(0.8, 0.8, 0.8, 0.2), blur=(0.5, 0.5)),
    ),
    "imagenet_mocov3_resnet50": imagenet(
        "MoCo v3 (https://arxiv.org/abs/2104.02057), 100 epochs at a batch of 4,096, with the views of BYOL.",
        "16 GPUs or TPU cores. The source reports 68.9 % by a linear probe. Views are cropped from the central\n"
        "square; the source's, from the whole image.",
        objective=ObjectiveConfig(name="mocov3", temperature=1.0, target_momentum=0.99),
        optim=replace(IMAGENET.optim, lr=9.6),
        augment=replace(
            IMAGENET.augment, min_scale=0.2, jitter=(0.4, 0.4, 0.2, 0.1), blur=(1.0, 0.1), solarize=(0.0, 0.2)
        ),
    ),
}

RECIPES = DIGITS_RECIPES | CIFAR10_RECIPES | IMAGENET_RECIPES
PRESETS = {name: make_preset(name, recipe) for name, recipe in RECIPES.items()}
