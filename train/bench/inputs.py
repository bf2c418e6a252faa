"""The speed of the ways to feed a step, alone and while it trains: does the device wait for its images?"""

import io
import tempfile
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from PIL import Image

from train.bench.config import BenchConfig
from train.bench.device import usable_cores
from train.bench.prepared import prepare, say
from train.bench.tasks import TASKS
from train.data import folder
from train.data.batches import Batches, ResidentBatches, StreamedBatches
from train.data.sources import decode_all
from train.timing import Runner, interleaved, summary

IMAGES = 512


def inputs(config: BenchConfig, mesh: Mesh) -> dict[str, Any]:
    """Images a second of each pipeline beside a plain loop, and the share of a training step that waits for each.

    `resident` gathers on the device, `encoded` decodes a folder of JPEGs in threads, `plain_pil` is one thread that
    opens, decodes and resizes the same files. `wait_share` is (fed - alone) / fed, at least 0, of steps run one ahead.
    """
    size, batch = config.image_size, config.batch
    with tempfile.TemporaryDirectory() as scratch:
        files = write_jpegs(Path(scratch), IMAGES, size)
        jpeg_bytes = sum(file.stat().st_size for file in files) / len(files)
        source = folder.read(Path(scratch), size=size, skip_broken=False)[1]["train"]
        streams: dict[str, Batches] = {
            "resident": ResidentBatches(decode_all(source), batch=batch, seed=0, mesh=mesh, mode=config.mode),
            "encoded": StreamedBatches(source, batch=batch, seed=0, mesh=mesh, mode=config.mode),
        }
        encoded = streams["encoded"]
        assert isinstance(encoded, StreamedBatches)
        # Untimed before each block: what was decoded ahead while others were timed.
        counts: dict[str, Any] = {"steps": config.steps, "repeats": config.repeats, "settle": encoded.ahead + 1}
        alone: dict[str, Runner] = {name: stream.__next__ for name, stream in streams.items()}
        alone["plain_pil"] = plain_loop(files, batch, size).__next__
        say("timing the pipelines alone")
        timed = interleaved(alone, **counts, warmup=config.warmup)

        one = prepare(config, mesh, TASKS["train"](config))
        same = one.stepper.batch

        def fed(stream: Iterator[Any] | Batches | None) -> Runner:
            def call() -> Any:
                one.stepper.batch = same if stream is None else next(stream)
                return one.stepper.ahead()

            return call

        steps = {"alone": fed(None), **{name: fed(stream) for name, stream in streams.items()}}
        say("timing the training step that they feed")
        with_step = interleaved(steps, **counts, warmup=config.warmup, ahead=True)
        encoded.iterator.close()  # its threads still read files

    # A batch that was decoded ahead costs nothing, the next all the more: blocks, not steps, tell the rate.
    rates = {name: config.steps * batch / float(np.median(s.sum(1))) for name, s in timed.items()}
    medians = {name: float(np.median(s.mean(1))) for name, s in with_step.items()}
    pipelines = {
        name: {
            "images_per_second": rate,
            "images_per_second_per_core": rate / (1 if name == "plain_pil" else usable_cores()),
            **summary(timed[name].mean(1)),
        }
        for name, rate in rates.items()
    }
    for name in streams:
        pipelines[name] |= {
            "speedup_over_plain_pil": rates[name] / rates["plain_pil"],
            "fed_step_ms": medians[name] * 1e3,
            "wait_share": max(0.0, (medians[name] - medians["alone"]) / medians[name]),
        }
    return {
        "task": config.task,
        "model": config.model,
        "batch": batch,
        "image_size": size,
        "mode": config.mode,
        "images_per_second": rates["encoded"],
        "step_ms": pipelines["encoded"]["step_ms"],
        "cores": usable_cores(),
        "jpeg_bytes": jpeg_bytes,
        "train_step_ms": medians["alone"] * 1e3,
        "pipelines": pipelines,
    }


def write_jpegs(root: Path, count: int, size: int) -> list[Path]:
    """Seeded synthetic JPEGs of quality 90, smooth with a little noise, in two class folders."""
    rng = np.random.default_rng(0)
    files = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        smooth = coarse.resize((size, size), Image.Resampling.BICUBIC)
        pixels = np.asarray(smooth, np.int16) + rng.integers(-12, 13, (size, size, 3), np.int16)
        files.append(root / f"class{number % 2}" / f"{number:05}.jpg")
        files[-1].parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(files[-1], quality=90)
    return files


def plain_loop(files: list[Path], batch: int, size: int) -> Iterator[np.ndarray]:
    """What one would write first: open, decode, resize, one file after the other; uint8 [batch, size, size, 3]."""
    endless = cycle(files)
    while True:
        images = []
        for _ in range(batch):
            with Image.open(io.BytesIO(next(endless).read_bytes())) as file:
                images.append(np.asarray(file.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)))
        yield np.stack(images)
