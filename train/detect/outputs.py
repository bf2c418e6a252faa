"""What a run of detection found on its test split: `detections.json`, and the page that is made of it."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from train.detect.config import DetectConfig
from train.detect.metrics import Detections, truths_of
from train.errors import OneLineParser, UsageError
from train.json_text import to_json
from train.paths import local_path
from train.run_folder import check_same_images, read_config, read_result, write_json

DETECTIONS = "detections.json"


def write_detections(path: Path, found: Sequence[Detections]) -> None:
    """Write the detections of each image of a split: boxes in pixels of the original, scores, and labels as numbers."""
    images = [
        {
            "boxes": np.asarray(one.boxes, np.float64).round(2).tolist(),
            "scores": np.asarray(one.scores, np.float64).round(5).tolist(),
            "labels": np.asarray(one.labels).tolist(),
        }
        for one in found
    ]
    write_json(path, {"images": images})


def read_detections(path: Path) -> list[Detections]:
    """Read what `write_detections` wrote.

    Raises:
      UsageError: no such file, or a damaged one.
    """
    try:
        images = json.loads(path.read_text())["images"]
        return [
            Detections(
                np.asarray(one["boxes"], np.float32).reshape(-1, 4),
                np.asarray(one["scores"], np.float32),
                np.asarray(one["labels"], np.int32),
            )
            for one in images
        ]
    except FileNotFoundError:
        raise UsageError(f"{path.parent} has no {path.name}: the run is not finished") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None


def report_main(argv: Sequence[str]) -> None:
    """`python -m train.detect report RUN`: show a finished run's detections on its test split, on one page."""
    parser = OneLineParser(prog="python -m train.detect report", description=report_main.__doc__)
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument("--out", help="file to write; by default detections.html in the run folder")
    parser.add_argument("--dir", help="the TFDS data_dir, if it has moved")
    parser.add_argument("--least", type=float, default=0.5, help="lowest score of a detection that is drawn")
    args = parser.parse_args(argv)
    run = local_path(args.run)
    print(to_json({"run": str(run), "files": [str(path) for path in report(run, **_options(args))]}))


def _options(args: argparse.Namespace) -> dict[str, Any]:
    if not 0 <= args.least <= 1:
        raise UsageError(f"--least must be at least 0 and at most 1, got {args.least}")
    return {"out": args.out and local_path(args.out), "dir": args.dir, "least": args.least}


def report(run: Path, *, out: Path | None = None, dir: str | None = None, least: float = 0.5) -> list[Path]:
    """Write the page of a finished run, and pictures of its best and worst images; returns the files.

    Raises:
      UsageError: not a finished run of detection, or its images cannot be read or have changed.
    """
    from train.detect.from_config import open_objects
    from train.detect.page import write_page

    config, saved = read_config(run, DetectConfig)
    found, result = read_detections(run / DETECTIONS), read_result(run) or {}
    data = config.data if dir is None else replace(config.data, dir=dir)
    dataset = open_objects(data)
    check_same_images(run, config, dataset)
    source = dataset.test
    figures = {name.removeprefix("test_"): value for name, value in result.items() if name.startswith("test_")}
    title = f"{saved['preset']}: {config.detector} on {dataset.name}"
    return write_page(
        out or run / "detections.html",
        title,
        figures,
        found,
        truths_of(source),
        dataset.classes,
        lambda at: source.examples[at].decode(None, None),
        least=least,
    )
