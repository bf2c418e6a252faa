"""PyTorch's outputs for the parity tests: `python -m tests.reference.make_golden` writes golden/parity.npz.

Weights and inputs depend only on a net's name (`weights`, `batch`), so only PyTorch's outputs are stored.
"""

import zlib
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "parity.npz"
CLASSES = 5
# One of each kind, narrow and shallow: width, image height and width (some odd).
CASES = {
    "resnet18": (8, 33, 40),
    "resnet50": (8, 32, 35),
    "resnext50_32x4d": (16, 32, 32),
    "wide_resnet50_2": (8, 32, 32),
    "seresnet18": (16, 32, 32),
    "resnet50d": (8, 37, 34),
    "preact_resnet18": (8, 33, 32),
    "preact_resnet50": (8, 32, 32),
    "resnet20": (8, 17, 16),
    "seresnet50_cifar": (8, 16, 16),
    "wrn_16_4": (16, 16, 15),
}


def shallow(stages: int) -> tuple[int, ...]:
    """Stage sizes of the tests' nets: identity shortcuts in one stage, changing ones in all."""
    return (1, 2, 1, 1)[:stages]


def weights(name: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A state dict drawn from the net's name: kernels of He scale, scales near 1, statistics that are not trivial."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    drawn = {}
    for key in sorted(shapes):
        shape = shapes[key]
        if len(shape) > 1:
            values = rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif key.endswith("running_var"):
            values = rng.uniform(0.5, 1.5, shape)
        else:
            values = 0.1 * rng.normal(size=shape) + (1.0 if key.endswith("weight") else 0.0)
        drawn[key] = values.astype(np.float32)
    return drawn


def batch(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images float32 [4, H, W, 3] and labels int32 [4]."""
    _, height, width = CASES[name]
    rng = np.random.default_rng(zlib.crc32(name.encode()) + 1)
    return rng.normal(size=(4, height, width, 3)).astype(np.float32), rng.integers(0, CLASSES, 4).astype(np.int32)


def torch_reference(name: str) -> dict[str, np.ndarray]:
    """What PyTorch makes of a case: `eval`, `train` logits, `stage1`.. maps, and `stats/...`, `grad/...` by name.

    Updated variances are given as ours are: PyTorch's running_var takes the unbiased variance, n / (n - 1) of ours.
    """
    import torch

    from tests.reference.torch_twin import TWINS

    factory = TWINS[name]
    blocks = shallow(len(factory.args[0]))
    net = factory.func(
        blocks, *factory.args[1:], **{**factory.keywords, "num_classes": CLASSES, "width": CASES[name][0]}
    )
    shapes = {k: tuple(v.shape) for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    given = weights(name, shapes)
    net.load_state_dict({k: torch.from_numpy(v) for k, v in given.items()}, strict=False)
    images, labels = batch(name)
    x = torch.from_numpy(images).permute(0, 3, 1, 2)

    found: dict[str, Any] = {}
    hooks = [
        getattr(net, f"layer{i}").register_forward_hook(
            lambda module, args, out, i=i: found.update({f"stage{i}": out.permute(0, 2, 3, 1)})
        )
        for i in range(1, len(blocks) + 1)
    ]
    if hasattr(net, "bn"):  # pre-activation: the last level is what the final norm and ReLU make of it
        last = f"stage{len(blocks)}"
        hooks.append(
            net.bn.register_forward_hook(lambda m, a, out: found.update({last: out.relu().permute(0, 2, 3, 1)}))
        )
    with torch.no_grad():
        found["eval"] = net.eval()(x)
    for hook in hooks:
        hook.remove()

    counts: dict[str, int] = {}
    for key, module in net.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(
                lambda m, args, out, key=key: counts.update({key: args[0].numel() // args[0].shape[1]})
            )
    found["train"] = net.train()(x)
    torch.nn.functional.cross_entropy(found["train"], torch.from_numpy(labels).long()).backward()
    for key, value in net.state_dict().items():
        if key.endswith("running_mean"):
            found[f"stats/{key}"] = value
        elif key.endswith("running_var"):
            n, old = counts[key.removesuffix(".running_var")], 0.9 * given[key]
            found[f"stats/{key}"] = old + (value.numpy() - old) * (n - 1) / n
    found |= {f"grad/{key}": p.grad for key, p in net.named_parameters()}
    return {k: v.detach().numpy() if isinstance(v, torch.Tensor) else v for k, v in found.items()}


def summary(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The part that is stored: logits whole, of everything else its norm and its first value."""
    digest = {k: v for k, v in found.items() if k in ("eval", "train")}
    for kind in ("stage", "stats", "grad"):
        values = [found[k].astype(np.float64) for k in sorted(found) if k.startswith(kind)]
        digest[kind] = np.asarray([(np.linalg.norm(v), v.flat[0]) for v in values], np.float32)
    return digest


def main() -> None:
    """Write the golden file."""
    GOLDEN.parent.mkdir(exist_ok=True)
    stored = {f"{name}/{k}": v for name in CASES for k, v in summary(torch_reference(name)).items()}
    np.savez_compressed(GOLDEN, **stored)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
