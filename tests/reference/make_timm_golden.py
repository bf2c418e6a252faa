"""timm's logits for its names and kinds of networks: `python -m tests.reference.make_timm_golden` (needs timm).

Writes golden/timm.npz: logits, and the names and shapes of each state dict. Weights are drawn by `make_golden.weights`.
"""

import json
from functools import partial

import numpy as np

from tests.reference.make_golden import CLASSES, GOLDEN, weights

TIMM = GOLDEN.with_name("timm.npz")
# One block in each stage; each has a layer or a name that torchvision's networks lack.
NAMES = (
    "resnet26d",
    "resnet50c",
    "resnet50_gn",
    "seresnet18",
    "resnetv2_18",
    "resnetv2_50",
    "resnetv2_50x1_bit",
    "legacy_seresnet50",
)


def images() -> np.ndarray:
    """Images float32 [2, 44, 33, 3], on which Caffe's pooling differs from torchvision's."""
    return np.random.default_rng(0).normal(size=(2, 44, 33, 3)).astype(np.float32)


def main() -> None:
    """Write the golden file."""
    import timm
    import torch
    from timm.layers import StdConv2d
    from timm.models.resnetv2 import ResNetV2

    stored = {}
    for name in NAMES:
        if name.endswith("bit"):  # `_create_resnetv2_bit` takes no other layers
            conv = partial(StdConv2d, eps=1e-8)
            net = ResNetV2((1, 1, 1, 1), num_classes=CLASSES, stem_type="fixed", conv_layer=conv).eval()
        else:
            net = timm.create_model(name, layers=(1, 1, 1, 1), num_classes=CLASSES).eval()
        shapes = {k: tuple(v.shape) for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
        net.load_state_dict({k: torch.from_numpy(v) for k, v in weights(name, shapes).items()}, strict=False)
        with torch.no_grad():
            stored[name] = net(torch.from_numpy(images()).permute(0, 3, 1, 2)).numpy()
        stored[f"{name}/shapes"] = np.array(json.dumps(shapes))
    np.savez_compressed(TIMM, **stored)
    print(f"{TIMM}: {TIMM.stat().st_size:,} bytes, timm {timm.__version__}")


if __name__ == "__main__":
    main()
