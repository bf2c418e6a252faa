"""Which explanation to trust, and what it costs: `python results/explanations.py RUN OUT.json [--FIELD VALUE ...]`.

Explains images of the run's set by every method (fields as in `python -m train.explain`), and keeps each method's score
as mean and standard error over images, and its difference to a random map image by image. Then times each compiled
method on 16 images: the median of three calls, or one call where that takes over `LONG` seconds. If OUT.json is there
already, it keeps its scores, and only the times are measured.
"""

import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.explain import METHODS, Network, class_score
from train.cli import parse, start
from train.explain.attributions import options_of
from train.explain.config import ExplainConfig
from train.explain.images import pixels_of
from train.explain.run import explain
from train.run_folder import write_json
from train.runtime import compiler_options
from train.trained import load_trained

BATCH, CALLS, LONG = 16, 3, 10


def scores(images: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Summarise each method's scores; `gain` is insertion minus deletion, `over_random` that minus a random map's."""
    table = {}
    for name in images[0]["scores"]:
        columns = {
            score: np.asarray([one["scores"][name][score] for one in images]) for score in images[0]["scores"][name]
        }
        chance = np.asarray(
            [one["scores"]["random"]["insertion"] - one["scores"]["random"]["deletion"] for one in images]
        )
        columns["gain"] = columns["insertion"] - columns["deletion"]
        columns["over_random"] = columns["gain"] - chance
        table[name] = {score: float(x.mean()) for score, x in columns.items()}
        table[name] |= {f"{score}_se": float(x.std(ddof=1) / len(x) ** 0.5) for score, x in columns.items()}
    return table


def seconds(source: str) -> dict[str, float]:
    """Time each method on a batch of noise, compiled before."""
    trained = load_trained(source, encoders=True, kernels="auto")
    network = Network(trained.model, trained.variables)
    noise = np.random.default_rng(0).integers(0, 256, (BATCH, *trained.shape), np.uint8)
    images, key, found = pixels_of(trained).see(noise), jax.random.key(0), {}
    for name, method in METHODS.items():
        bound = partial(method, **options_of(name, trained.shape))
        arguments = network, images, class_score(jnp.zeros(BATCH, jnp.int32))
        compiled = jax.jit(bound, compiler_options=compiler_options(trained.dtype)).lower(*arguments, key=key).compile()
        times: list[float] = []
        while len(times) < (CALLS if sum(times) < LONG else 1):
            began = time.perf_counter()
            jax.block_until_ready(compiled(*arguments, key=key))
            times.append(time.perf_counter() - began)
        found[name] = statistics.median(times)
        print(f"{name}: {found[name]:.2f} s", file=sys.stderr, flush=True)
    return found


def measure(source: str, flags: list[str]) -> dict[str, Any]:
    """Explain the images, and summarise the scores."""
    _, config = parse("results/explanations.py", {"explain": ExplainConfig}, flags, default="explain")
    with tempfile.TemporaryDirectory() as folder:
        result = explain(source, [], replace(config, methods=tuple(METHODS), out=f"{folder}/out"))
    kept = {name: value for name, value in result.items() if name not in ("images", "methods", "out", "page")}
    return {**kept, "images": len(result["images"]), "methods": scores(result["images"])}


def main() -> None:
    """Parse, measure and write the file."""
    source, out, *flags = sys.argv[1:]
    path = Path(out)
    measured = json.loads(path.read_text()) if path.exists() else measure(source, flags)
    write_json(path, measured)  # the times take long
    write_json(path, {**measured, "seconds_of_16": seconds(source)})


if __name__ == "__main__":
    start(main)
