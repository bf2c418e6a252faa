"""Train the CIFAR ResNet-20 of He et al. 2015 (https://arxiv.org/abs/1512.03385) in PyTorch, on a CPU.

A reference for the JAX trainer: same split, order of examples, augmentation and optimisation, written independently.
Needs `torch` and `tensorflow_datasets`; run from the repository root:

    python -m tests.reference.torch_train --data-dir ../shared/data --epochs 3 --seed 0 --result FILE.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.reference.torch_twin import TWINS

BATCH = 128
VALIDATION = 5000
PAD = 4
MEAN = torch.tensor((0.4914, 0.4822, 0.4465)).view(1, 3, 1, 1)
STD = torch.tensor((0.2470, 0.2435, 0.2616)).view(1, 3, 1, 1)


def load(data_dir: Path, name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Decode a whole split: images uint8 [n, 32, 32, 3], labels int64 [n]."""
    import tensorflow_datasets as tfds

    folder = max(path for path in (data_dir / name).iterdir() if path.is_dir())  # the newest version
    source = tfds.builder_from_directory(folder).as_data_source(split)
    with ThreadPoolExecutor(2) as pool:
        examples = list(pool.map(source.__getitem__, range(len(source))))
    return np.stack([e["image"] for e in examples]), np.array([e["label"] for e in examples], np.int64)


def batches(n: int, *, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Yield `steps` index batches from one stream of shuffled epochs; a batch may straddle two epochs."""
    stream, epoch = np.empty(0, np.int64), 0
    for _ in range(steps):
        while len(stream) < BATCH:
            stream = np.concatenate([stream, np.random.default_rng([seed, epoch]).permutation(n)])
            epoch += 1
        yield stream[:BATCH]
        stream = stream[BATCH:]


def augment(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Zero-pad, crop at a random place, flip half of the images, each with its own draw; uint8 [b, h, w, c]."""
    b, h, w, _ = images.shape
    padded = np.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)))
    top, left = rng.integers(0, 2 * PAD + 1, (2, b, 1))
    flip = rng.random((b, 1)) < 0.5
    rows, columns = top + np.arange(h), left + np.where(flip, np.arange(w)[::-1], np.arange(w))
    return padded[np.arange(b)[:, None, None], rows[:, :, None], columns[:, None, :]]


def to_input(images: np.ndarray) -> Tensor:
    """Normalise uint8 [b, h, w, c] to float32 [b, c, h, w] in the channels_last memory format."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255)
    return x.sub_(MEAN).div_(STD)


@torch.inference_mode()
def accuracy(model: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of examples whose largest logit is the label's, every example counted once."""
    model.eval()
    correct = 0
    for i in range(0, len(images), 500):
        correct += int((model(to_input(images[i : i + 500])).argmax(1).numpy() == labels[i : i + 500]).sum())
    return correct / len(images)


def make_optimizer(model: nn.Module) -> torch.optim.SGD:
    """SGD with weight decay on the weights of convolutions and linear layers alone."""
    decayed = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    ids = {id(p) for p in decayed}
    plain = [p for p in model.parameters() if id(p) not in ids]
    groups = [{"params": decayed, "weight_decay": 1e-4}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=False)


def git_commit() -> str | None:
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def train(data_dir: Path, *, name: str, epochs: int, seed: int) -> dict[str, object]:
    images, labels = load(data_dir, name, "train")
    perm = np.random.default_rng(0).permutation(len(images))  # the split is the same for every seed
    held, kept = np.sort(perm[:VALIDATION]), np.sort(perm[VALIDATION:])
    validation, images, labels = (images[held], labels[held]), images[kept], labels[kept]
    n = len(images)
    steps = epochs * n // BATCH
    ends = {(e + 1) * n // BATCH: e + 1 for e in range(epochs)}

    torch.manual_seed(seed)
    model = TWINS["resnet20"](num_classes=10).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model)
    rng = np.random.default_rng([seed, 0, 1])  # apart from the generators of the order, [seed, epoch]
    history: list[dict[str, float]] = []
    losses: list[float] = []
    seconds, start = 0.0, time.perf_counter()
    model.train()
    for step, index in enumerate(batches(n, steps=steps, seed=seed)):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * 0.1 ** ((2 * step >= steps) + (4 * step >= 3 * steps))
        logits = model(to_input(augment(images[index], rng)))
        loss = F.cross_entropy(logits, torch.from_numpy(labels[index]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if not np.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is {losses[-1]} at step {step}")
        if step + 1 in ends:
            spent = time.perf_counter() - start
            seconds += spent
            row = {"epoch": ends[step + 1], "train_loss": float(np.mean(losses))}
            row["validation_accuracy"] = accuracy(model, *validation)
            history.append(row)
            rate = len(losses) * BATCH / spent
            print(
                f"epoch {row['epoch']}/{epochs} loss {row['train_loss']:.4f} "
                f"validation accuracy {row['validation_accuracy']:.4f} {rate:.0f} images/s",
                file=sys.stderr,
                flush=True,
            )
            losses, start = [], time.perf_counter()
            model.train()
    return {
        "seed": seed,
        "epochs": epochs,
        "steps": steps,
        "seconds": round(seconds, 3),
        "images_per_second": round(steps * BATCH / seconds, 1),
        "validation_accuracy": history[-1]["validation_accuracy"],
        "test_accuracy": accuracy(model, *load(data_dir, name, "test")),
        "history": history,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="TFDS data_dir with the prepared set")
    parser.add_argument("--name", default="cifar10", help="the prepared set's name")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error("--epochs must be at least 1")
    commit = git_commit()
    torch.set_num_threads(2)
    result: dict[str, object] = {
        "command": "python -m tests.reference.torch_train " + shlex.join(sys.argv[1:]),
        "commit": commit,
    }
    result |= train(args.data_dir, name=args.name, epochs=args.epochs, seed=args.seed)
    result["versions"] = {"torch": torch.__version__, "python": platform.python_version(), "numpy": np.__version__}
    result["hardware"] = {"cpu": cpu_name(), "cores": os.cpu_count()}
    args.result.parent.mkdir(parents=True, exist_ok=True)
    args.result.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
