"""Time our detectors and torchvision's: `python results/detection_speed.py OUT.json [--threads N] [--small]`.

A training step and a predicted batch of Faster R-CNN, with a ResNet-50 on one image of 480x640, and with the ResNet-18
of bccd_fasterrcnn on 8 images of 192x256; NMS and ROIAlign alone. torchvision runs in a process of its own, and each of
the two waits while the other runs. In every round each runs for a quarter of a second, or once if a call takes longer;
the ratio of their times has its 95 % interval. Times are those of a call, of the whole batch.

Both sides do equal work: the same weights, images, objects, numbers of proposals, samples and detections, without
augmentation and padding. Steps include scaling to [0, 1], normalisation, gradients, and SGD with momentum, at a rate so
low that the weights stay. Predictions suppress about the most candidates that ours takes; trained detectors have
fewer, which only torchvision gains from. Float32 on CPU, bfloat16 (autocast there) on GPU. Ours are the steps of
`train.detect`, compiled as it does; torchvision runs eagerly, in its usual memory format. Both keep the memory that
they free (`train.runtime.keep_memory`), and use N cores (all by default). Needs torchvision; takes about six minutes on
two cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BLOCK = 0.25  # seconds of a side in a round
ROUNDS = (5, 40)  # fewest and most
Timed = Callable[[int], list[float]]


class Torchvision:
    """The process of tests/reference/torchvision_detectors.py."""

    def __init__(self, python: str, folder: str, threads: int, small: bool) -> None:
        command = [python, "-m", "tests.reference.torchvision_detectors", folder, str(threads), *["small"] * small]
        paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
        options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
        self.process = subprocess.Popen(command, env=os.environ | paths, **options)

    def __call__(self, task: str, case: str, calls: int) -> Any:
        """Describe the first result if `calls` is 0, else return the seconds of each call."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([task, case, calls]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("error: torchvision's process has ended; its message is above")
        return json.loads(line)


def timed(runner: Callable[[], Any]) -> Timed:
    """Make a function that times a number of calls."""
    import jax

    def run(calls: int) -> list[float]:
        seconds = []
        for _ in range(calls):
            began = time.perf_counter()
            jax.block_until_ready(runner())
            seconds.append(time.perf_counter() - began)
        return seconds

    return run


def our_detector(task: str, case: Any, weights: Path) -> tuple[Callable[[], Any], dict[str, Any]]:
    """(a call that trains one step or predicts one batch as `train.detect` does, what its first result is)."""
    from functools import partial

    import jax
    import numpy as np

    from resnet_jax.detection.torch_weights import from_torchvision
    from resnet_jax.masks import no_masks
    from resnet_jax.parallel import compile_step, make_mesh, place, replicated, shard_batch
    from tests.reference.torchvision_detectors import inputs
    from train.detect.from_config import SIDE, eval_augment, is_trained, make_detector
    from train.detect.steps import detect_step, detection
    from train.from_config import compute_dtype, draw_variables, make_kernels, make_tx
    from train.runtime import compiler_options
    from train.state import init_state
    from train.steps import train_step

    config, mesh = case.config, make_mesh()
    dtype = compute_dtype(config.dtype)
    kernels, _ = make_kernels(config.kernels, config.mode, dtype)
    options = compiler_options(dtype, plain=not kernels) or None
    model = make_detector(config, case.classes, kernels)
    with np.load(weights) as file:
        variables = from_torchvision(file, draw_variables(config, model, jax.random.key(0), (SIDE, SIDE, 3)))
    batch, normalize = inputs(case), eval_augment(config.augment)
    if task == "predict":
        step = partial(detect_step, model=model, preprocess=normalize)
        predict = compile_step(step, mesh=mesh, donate=False, compiler_options=options)
        variables, placed = place(variables, replicated(mesh)), shard_batch(batch, mesh)
        found = predict(variables, placed)
        return lambda: predict(variables, placed), {"detections": int((np.asarray(found["labels"]) >= 0).sum())}

    del batch["valid"]
    tx, _ = make_tx(config.optim, 1000, 1000.0, trainable=is_trained(config))
    state = init_state(variables, tx, jax.random.key(1), masks=no_masks(variables["params"]))
    step = partial(train_step, model=model, tx=tx, objective=detection(augment=normalize))
    train = compile_step(step, mesh=mesh, compiler_options=options)
    placed = shard_batch(batch, mesh)
    held, first = train(place(state, replicated(mesh)), placed)

    def call() -> Any:
        nonlocal held
        held, metrics = train(held, placed)
        return held, metrics

    losses = ("objectness_loss", "proposal_loss", "class_loss", "box_loss")
    return call, {name: round(float(first[name]), 4) for name in losses}


def our_operator(task: str, small: bool) -> tuple[Callable[[], Any], dict[str, Any]]:
    """(a call of NMS or ROIAlign alone, what its first result is)."""
    from functools import partial

    import jax
    import jax.numpy as jnp

    from resnet_jax.detection import multilevel_roi_align, nms
    from tests.reference.torchvision_detectors import NMS, NMS_THRESHOLD, POOLED, align_inputs, nms_inputs
    from train.from_config import make_kernels
    from train.runtime import compiler_options

    options = compiler_options(jnp.float32, plain=not make_kernels("auto")[0])
    if task in NMS:
        suppress = jax.jit(jax.vmap(partial(nms, threshold=NMS_THRESHOLD)), compiler_options=options)
        boxes, scores = map(jnp.asarray, nms_inputs(task, small))
        return lambda: suppress(boxes, scores), {"kept": int(suppress(boxes, scores).sum())}

    maps, strides, boxes, gradient = align_inputs(small)
    features, boxes, back = [jnp.asarray(x) for x in maps], jnp.asarray(boxes), jnp.asarray(gradient)

    def align(features: Any, boxes: Any, back: Any) -> Any:
        pool = partial(multilevel_roi_align, boxes=boxes, strides=strides, size=POOLED)
        if task == "roi_align":
            return pool(features)
        pooled, pullback = jax.vjp(pool, features)
        return pooled, *pullback(back)[0]

    program = jax.jit(align, compiler_options=options)
    first = program(features, boxes, back)
    squares = jnp.square(first if task == "roi_align" else first[1]).sum()
    return lambda: program(features, boxes, back), {"sum_of_squares": round(float(squares), 3)}


def compare(ours: Timed, theirs: Timed, budget: float) -> dict[str, Any]:
    """Time both interleaved for about `budget` seconds, and return their times and the ratio with its interval."""
    import numpy as np

    from train.timing import ratio, summary

    sides = {"ours": ours, "torchvision": theirs}
    calls = {}
    for who, run in sides.items():
        calls[who] = max(1, round(BLOCK / run(1)[0]))  # it has been called once already
    blocks: dict[str, list[list[float]]] = {who: [] for who in sides}
    began, least, most = time.perf_counter(), *ROUNDS
    for number in range(most):
        if number >= least and time.perf_counter() - began > budget:
            break
        for who in list(sides)[:: -1 if number % 2 else 1]:
            if calls[who] > 1:  # the caches hold the other side's data
                sides[who](1)
            blocks[who].append(sides[who](calls[who]))
    seconds = {who: np.array(rows) for who, rows in blocks.items()}
    return {
        "rounds": len(blocks["ours"]),
        **{who: {"calls_per_round": calls[who], **summary(times)} for who, times in seconds.items()},
        "time_over_torchvision": ratio(seconds["ours"], seconds["torchvision"]),
    }


def measure(arguments: argparse.Namespace, folder: str) -> list[dict[str, Any]]:
    """Time all cases, with a line on stderr for each."""
    from tests.reference.torchvision_detectors import ALIGN, NMS, cases

    torchvision = Torchvision(arguments.torch_python, folder, arguments.threads, arguments.small)
    known = cases(arguments.small)
    tasks = [(task, "alone") for task in (*NMS, *ALIGN)]
    tasks += [(task, name) for name in reversed(known) for task in ("predict", "train")]
    rows = []
    for task, name in tasks:
        began = time.perf_counter()
        theirs = torchvision(task, name, 0)
        row: dict[str, Any] = {"task": task}
        if name in known:
            case = known[name]
            runner, first = our_detector(task, case, Path(folder) / f"{name}.npz")
            row |= {"case": name, "model": case.config.model, "batch": case.batch, "size": list(case.size)}
        else:
            runner, first = our_operator(task, arguments.small)
        row["first_result"] = {"ours": first, "torchvision": theirs}
        prepared = time.perf_counter() - began
        row |= compare(timed(runner), lambda n, task=task, name=name: torchvision(task, name, n), arguments.seconds)
        rows.append(row)
        found, (mine, other) = row["time_over_torchvision"], (row[who]["step_ms"] for who in ("ours", "torchvision"))
        print(
            f"{task} {name}: {mine:.2f} ms, torchvision {other:.2f} ms, {found['value']:.3f} "
            f"({found['low']:.3f}-{found['high']:.3f}) of its time; {row['rounds']} rounds, "
            f"prepared in {prepared:.0f} s, "
            f"{time.perf_counter() - began:.0f} s in all; {row['first_result']}",
            file=sys.stderr,
            flush=True,
        )
    assert torchvision.process.stdin is not None
    torchvision.process.stdin.close()
    torchvision.process.wait()
    return rows


def limit(threads: int | None) -> int:
    """Limit this process and its children to this number of cores; call it before threads start."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]
    count = min(threads or len(cores), len(cores))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores[:count])  # XLA has a thread for each core it may use
    os.environ["OMP_NUM_THREADS"] = str(count)
    return count


def main() -> None:
    """Parse, measure and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--threads", type=int, help="cores to use; all by default")
    parser.add_argument("--seconds", type=float, default=14.0, help="of a case, if its fewest rounds take less")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--torch-python", default=sys.executable, help="a Python that has torchvision, if this has not")
    arguments = parser.parse_args()
    arguments.threads = limit(arguments.threads)
    from train.run_folder import environment, write_json
    from train.runtime import keep_compiled, keep_memory

    keep_memory()
    keep_compiled()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments, folder)
    about = {"threads": arguments.threads, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    write_json(arguments.out, {"rows": rows, **about, **environment()})


if __name__ == "__main__":
    main()
