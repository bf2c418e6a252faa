"""Train torchvision's detector on our images.

    python results/torchvision_detect.py PRESET --minutes M --out FILE.json [--stock] [--frozen] [--FIELD VALUE ...]

PRESET and fields are those of `python -m train.detect`: images, sizes, seed, backbone, and its weights (`--init`).
With `--stock` pyramid, head, anchors and proposals are torchvision's defaults; with `--frozen` the backbone's norms,
stem and first stage are frozen, as in `fasterrcnn_resnet50_fpn` with a pretrained backbone.

The recipe is that of torchvision's references/detection/train.py: SGD with momentum 0.9, decay 1e-4, and a rate of 0.02
for 16 images, scaled to the batch; a linear warm-up over the first epoch; a tenth of the rate from 16/26 of the time,
and a hundredth from 22/26. Flips, and scale jitter as in the references, between the factors of the config.

Training ends after M minutes, without evaluation. The last weights are evaluated by `train.detect.metrics`, on
validation and then once on test. Needs torchvision.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

try:
    import torch
    import torchvision
    from torchvision.transforms.v2 import functional as F
except ImportError:
    raise SystemExit("error: this needs torchvision, from the extra parity-full") from None

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from resnet_jax.detection.box_head import BoxRules
from resnet_jax.detection.rpn import ProposalRules
from resnet_jax.torch_weights import to_torch
from tests.reference.torchvision_detectors import faster_rcnn
from train.cli import parse, start
from train.detect.config import DetectConfig, check
from train.detect.from_config import open_objects
from train.detect.metrics import Detections, coco_metrics, truths_of, voc_ap
from train.detect.objects import Objects
from train.detect.presets import PRESETS
from train.errors import RunError, UsageError
from train.from_config import draw_variables, make_model
from train.run_folder import environment, write_json
from train.weights import load_weights

STOCK: dict[str, Any] = {
    "features": 256,
    "hidden": (1024, 1024),
    "anchor_scale": None,
    "canonical_size": 224,
    "proposals": ProposalRules(),
    "regions": BoxRules(),
}
RATE, RATE_BATCH, DROPS = 0.02, 16, (16 / 26, 22 / 26)
LOG_EVERY = 10
Target = dict[str, torch.Tensor]


def backbone_weights(config: DetectConfig) -> dict[str, torch.Tensor]:
    """The weights of `--init` by torchvision's names."""
    model = make_model(config, None)
    variables = load_weights(config.init or "", draw_variables(config, model, jax.random.key(0), (64, 64, 3)))
    return {name: torch.from_numpy(np.array(x)) for name, x in to_torch(variables).items()}


def example(source: Objects, index: int) -> tuple[torch.Tensor, Target, float]:
    """(image float32 [3, h, w] in [0, 1], its boxes and labels from 1, its scale), without padding and crowds."""
    one = source[index]
    height, width = one["size"]
    image = torch.from_numpy(one["image"][:height, :width].transpose(2, 0, 1).copy()).float().div_(255)
    real = (one["labels"] >= 0) & ~one["crowd"]
    boxes, labels = torch.from_numpy(one["boxes"][real]), torch.from_numpy(one["labels"][real]).long() + 1
    return image, {"boxes": boxes, "labels": labels}, float(one["scale"])


def augment(
    image: torch.Tensor, target: Target, rng: np.random.Generator, config: DetectConfig
) -> tuple[torch.Tensor, Target]:
    """Scale jitter, a crop to the size that the image had, and a flip."""
    boxes, labels = target["boxes"], target["labels"]
    height, width = image.shape[1:]
    if config.augment.scale != (1.0, 1.0):
        factor = rng.uniform(*config.augment.scale)
        image = F.resize(image, [max(int(side * factor), 1) for side in (height, width)], antialias=True)
        high, wide = (min(a, b) for a, b in zip(image.shape[1:], (height, width), strict=True))
        top, left = (int(rng.integers(a - b + 1)) for a, b in zip(image.shape[1:], (high, wide), strict=True))
        image = F.crop(image, top, left, high, wide)
        moved = boxes * factor - torch.tensor([left, top, left, top])
        boxes = moved.clamp(torch.zeros(4), torch.tensor([wide, high, wide, high]).float())
        areas = [(x[:, 2:] - x[:, :2]).prod(1) for x in (boxes, moved)]
        kept = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1) & (areas[0] >= 0.25 * areas[1])
        boxes, labels = boxes[kept], labels[kept]
    if config.augment.flip and rng.random() < 0.5:
        image, width = F.horizontal_flip(image), image.shape[2]
        boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
    return image, {"boxes": boxes, "labels": labels}


def shuffled(count: int, batch: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless batches of positions, from one stream of shuffled epochs."""
    order = np.empty(0, np.int64)
    while True:
        while len(order) < batch:
            order = np.concatenate([order, rng.permutation(count)])
        yield order[:batch]
        order = order[batch:]


def train(net: Any, source: Objects, config: DetectConfig, minutes: float, device: torch.device) -> dict[str, Any]:
    """Train `net` in place, and describe how.

    Raises:
      RunError: the loss is not finite.
    """
    peak = RATE * config.batch / RATE_BATCH
    parameters = [x for x in net.parameters() if x.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=peak, momentum=0.9, weight_decay=1e-4)
    rng = np.random.default_rng(config.seed)
    warmup = max(min(1000, len(source) // config.batch), 1)
    history: list[dict[str, float]] = []
    began, steps, sums, elapsed = time.perf_counter(), 0, [], 0.0
    net.train()
    for rows in shuffled(len(source), config.batch, rng):
        elapsed = time.perf_counter() - began
        if elapsed >= 60 * minutes:
            break
        rate = peak * min((steps + 1) / warmup, 1) * 0.1 ** sum(elapsed >= 60 * minutes * drop for drop in DROPS)
        for group in optimizer.param_groups:
            group["lr"] = rate
        pairs = [augment(*example(source, int(row))[:2], rng, config) for row in rows]
        images = [image.to(device) for image, _ in pairs]
        losses = net(images, [{name: x.to(device) for name, x in target.items()} for _, target in pairs])
        loss = torch.stack([*losses.values()]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        sums.append(loss.item())
        if not np.isfinite(sums[-1]):
            raise RunError(f"the loss is {sums[-1]} at step {steps}")
        steps += 1
        if steps % LOG_EVERY == 0 or steps == 1:
            row = {"step": steps, "loss": round(float(np.mean(sums)), 4), "learning_rate": rate}
            history.append({**row, "seconds": round(time.perf_counter() - began, 1)})
            print(
                f"step {steps} loss {row['loss']:.4f} {elapsed / 60:.1f} of {minutes:g} min",
                file=sys.stderr,
                flush=True,
            )
            sums = []
    return {
        "steps": steps,
        "epochs": round(steps * config.batch / len(source), 3),
        "seconds": round(elapsed, 2),
        "images_per_second": round(steps * config.batch / elapsed, 2),
        "history": history,
    }


@torch.inference_mode()
def evaluate(
    net: Any, source: Objects, classes: tuple[str, ...], device: torch.device
) -> tuple[dict[str, Any], list[Detections]]:
    """(COCO's metrics and VOC's, the detections of each image) of a split, as `train.detect` computes them."""
    net.eval()
    found = []
    for index in range(len(source)):
        image, _, scale = example(source, index)
        rows = {name: x.cpu().numpy() for name, x in net([image.to(device)])[0].items()}
        found.append(Detections.unpadded(rows["boxes"], rows["scores"], rows["labels"] - 1, scale))
    truths = truths_of(source)
    voc = voc_ap(found, truths, classes)
    return {
        **coco_metrics(found, truths, classes),
        "voc_ap": voc["all_points"],
        "voc07_ap": voc["eleven_points"],
    }, found


def main() -> None:
    """Parse, train, evaluate and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="of training")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--stock", action="store_true", help="torchvision's own sizes, not the preset's")
    parser.add_argument("--frozen", action="store_true", help="freeze the backbone's norms, stem and first stage")
    own, flags = parser.parse_known_args()
    preset, config = parse("results/torchvision_detect.py", PRESETS, flags, default="bccd_fasterrcnn")
    if own.minutes <= 0:
        raise UsageError(f"--minutes must be above 0, got {own.minutes:g}")
    if config.detector != "faster_rcnn" or config.width or config.widths or config.levels or config.shared_boxes:
        raise UsageError("only Faster R-CNN on all stages of a ResNet of the usual width can be compared")
    config = replace(config, **(STOCK if own.stock else {}))
    config = replace(config, frozen_stats=own.frozen, freeze=2 if own.frozen else 0)
    check(config)
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset = open_objects(config.data)
    net = faster_rcnn(config, len(dataset.classes))
    if config.init is not None:
        unused = net.backbone.body.load_state_dict(backbone_weights(config), strict=False)
        left = [name for name in unused.missing_keys if not name.endswith("num_batches_tracked")]
        if left or unused.unexpected_keys:
            raise UsageError(f"--init {config.init} does not fit: {left[:3] + unused.unexpected_keys[:3]}")
    net.to(device)
    trained = train(net, dataset.train, config, own.minutes, device)
    figures: dict[str, Any] = {}
    for split in ("validation", "test"):
        measured, found = evaluate(net, dataset.splits[split], dataset.classes, device)
        figures |= {f"{split}_{name}": value for name, value in measured.items()} | {f"{split}_images": len(found)}
        print(f"{split} AP {measured['ap']:.4f}, AP50 {measured['ap50']:.4f}", file=sys.stderr, flush=True)
    about = environment()
    about["versions"] |= {"torch": torch.__version__, "torchvision": torchvision.__version__}
    about["devices"] = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    result = {
        "preset": preset,
        "dataset": dataset.name,
        "model": config.model,
        "detector": "torchvision's Faster R-CNN" + ", its own sizes" * own.stock,
        "seed": config.seed,
        "minutes": own.minutes,
        "batch": config.batch,
        "frozen": own.frozen,
        **figures,
        "parameters": sum(x.numel() for x in net.parameters()),
        **trained,
        "images": dataset.images,
        "config": asdict(config),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **about,
    }
    own.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(own.out, result)


if __name__ == "__main__":
    start(main)
