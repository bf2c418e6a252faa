"""Explanations by captum and pytorch-grad-cam of a small torchvision ResNet: the maker of `golden/explain.npz`.

`pip install -e ".[parity-full]"`, then `python -m tests.reference.make_explain_golden`. NumPy draws weights and images
from names, so the result is deterministic; the file holds every second row of what is as large as the images.
"""

import zlib
from importlib.metadata import version
from pathlib import Path

import numpy as np

from tests.reference.make_golden import weights

GOLDEN = Path(__file__).parent / "golden" / "explain.npz"
CLASSES, TARGETS, WIDTH, STEM_WIDTH, BLOCKS = 5, (3, 1), 8, 64, (1, 1, 1, 1)
PACKAGES = ("torch", "torchvision", "captum", "grad-cam")
STEPS, WINDOW, STRIDE, SAMPLES = 20, 8, 4, 6


def arrays() -> dict[str, np.ndarray]:
    """Inputs: images [2, 32, 32, 3], noise [SAMPLES, 2, 32, 32, 3] for infidelity, pixels to impute [2, 32, 32]."""
    rng = np.random.default_rng(zlib.crc32(b"explain"))
    images = rng.normal(size=(2, 32, 32, 3)).cumsum(1) / 4  # neighbours resemble each other
    noise = 0.3 * rng.normal(size=(SAMPLES, *images.shape))
    removed = rng.uniform(size=(2, 32, 32)) < 0.7
    return {"images": images.astype(np.float32), "noise": noise.astype(np.float32), "removed": removed}


def torch_network():
    """torchvision's ResNet with one block per stage and an eighth of its width, in evaluation mode."""
    import torch
    from torchvision.models import resnet

    class Small(resnet.ResNet):
        """The stem keeps its width, so that the first shortcut is a projection."""

        def _make_layer(self, block, planes, *args, **kwargs):
            return super()._make_layer(block, planes * WIDTH // 64, *args, **kwargs)

    net = Small(resnet.BasicBlock, BLOCKS)
    net.fc = torch.nn.Linear(WIDTH * 8, CLASSES)
    for module in net.modules():
        if isinstance(module, torch.nn.ReLU):
            module.inplace = False  # captum's hooks need the values from before
    net.load_state_dict({name: torch.from_numpy(value) for name, value in state_dict(net).items()}, strict=False)
    return net.eval()


def state_dict(net) -> dict[str, np.ndarray]:
    """Weights drawn from the name of each tensor."""
    shapes = {name: tuple(x.shape) for name, x in net.state_dict().items() if not name.endswith("num_batches_tracked")}
    return weights("explain", shapes)


def torch_reference() -> dict[str, np.ndarray]:
    """Compute all explanations with the installed packages, images last in channels as ours are."""
    import captum.attr
    import captum.metrics
    import pytorch_grad_cam as cams
    import torch
    from pytorch_grad_cam.metrics.road import NoisyLinearImputer
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    given, net = arrays(), torch_network()
    images = torch.from_numpy(given["images"]).permute(0, 3, 1, 2).contiguous()
    target = torch.tensor(TARGETS)

    def last(x) -> np.ndarray:
        return x.detach().permute(0, 2, 3, 1).numpy()

    methods = {
        "saliency": lambda: captum.attr.Saliency(net).attribute(images, target, abs=False),
        "input_x_gradient": lambda: captum.attr.InputXGradient(net).attribute(images, target),
        "integrated_gradients": lambda: captum.attr.IntegratedGradients(net).attribute(
            images, target=target, n_steps=STEPS
        ),
        "guided_backprop": lambda: captum.attr.GuidedBackprop(net).attribute(images, target),
        "occlusion": lambda: captum.attr.Occlusion(net).attribute(
            images, (3, WINDOW, WINDOW), (3, STRIDE, STRIDE), target=target
        ),
    }
    found = {name: last(method().float()) for name, method in methods.items()}
    found["occlusion"] = found["occlusion"][..., 0]

    noise = torch.from_numpy(given["noise"]).permute(1, 0, 4, 2, 3).reshape(-1, *images.shape[1:])
    gradient = torch.from_numpy(found["saliency"]).permute(0, 3, 1, 2)
    for name, scaled in (("infidelity", False), ("scaled_infidelity", True)):
        found[name] = (
            captum.metrics.infidelity(
                net,
                lambda x: (noise, x - noise),
                images,
                gradient,
                target=target,
                n_perturb_samples=SAMPLES,
                normalize=scaled,
            )
            .detach()
            .numpy()
        )

    for name in ("GradCAM", "GradCAMPlusPlus", "HiResCAM", "LayerCAM", "ScoreCAM", "EigenCAM"):
        with getattr(cams, name)(net, [net.layer2]) as cam:
            found[name] = cam(images.clone(), [ClassifierOutputTarget(index) for index in TARGETS])

    imputer = NoisyLinearImputer(noise=0)
    kept = torch.from_numpy(~given["removed"]).float()
    found["impute"] = last(torch.stack([imputer(x, mask) for x, mask in zip(images, kept, strict=True)]))
    return found


def stored(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The part that is stored: every second row of what is as large as the images."""
    return {name: value[:, ::2] if value.ndim == 4 else value for name, value in found.items()}


def main() -> None:
    """Write the golden file."""
    versions = np.asarray([f"{name} {version(name)}" for name in PACKAGES])
    shapes = {f"shape/{name}": np.asarray(value.shape) for name, value in state_dict(torch_network()).items()}
    np.savez_compressed(GOLDEN, versions=versions, **shapes, **stored(torch_reference()))
    print(f"{GOLDEN}: {GOLDEN.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
