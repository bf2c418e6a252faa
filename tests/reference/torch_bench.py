"""Time our train step and PyTorch's, interleaved: `python -m tests.reference.torch_bench --result FILE.json`.

PyTorch runs in a process of its own, so that the threads of the two libraries do not compete; the two alternate block
by block, and each waits while the other runs. Both do the same: float32 on CPU, bfloat16 (autocast there) on
GPU; uint8 images to [0, 1], forward in training mode, cross entropy, backward, SGD with momentum; PyTorch in
channels_last, eager, and with --compiled also by torch.compile. With --keep-memory both keep the memory that they
free (`train.runtime.keep_memory`).
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

# model: batch, side, classes
CASES = {
    "cpu": {"resnet20": (128, 32, 10), "resnet18_cifar": (64, 32, 10), "resnet50": (16, 128, 1000)},
    "gpu": {"resnet50": (256, 224, 1000), "resnet18_cifar": (1024, 32, 10)},
}


# ---- PyTorch: a process that answers each line "N" with the seconds of N steps -------------------------------------


def serve(name: str, batch: int, side: int, classes: int, *, compiled: bool) -> None:
    """Print what this is, then the seconds of as many steps as each line on stdin asks for."""
    import torch
    from torch.nn import functional as F

    from tests.reference.torch_twin import TWINS

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    torch.backends.cudnn.benchmark = True
    model = TWINS[name](num_classes=classes).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=gpu)
    images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(0, classes, (batch,), device=device)

    def loss() -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=gpu):
            return F.cross_entropy(model(images.float().div_(255)), labels)

    forward = torch.compile(loss) if compiled else loss

    def step() -> float:
        value = forward()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        return value.item()  # waits

    began = time.perf_counter()
    step()
    first = time.perf_counter() - began
    described = {"torch": torch.__version__, "threads": torch.get_num_threads(), "first_step_s": round(first, 2)}
    print(json.dumps(described), flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
        print(json.dumps(seconds), flush=True)


class Served:
    """The process that `serve` runs in."""

    def __init__(self, python: str, arguments: list[str]) -> None:
        command = [python, "-m", "tests.reference.torch_bench", "--serve", *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.described = self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("PyTorch's process has ended; what it said is above")
        return json.loads(line)

    def __call__(self, steps: int) -> list[float]:
        """Seconds of so many steps."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self._answer()


# ---- ours ----------------------------------------------------------------------------------------------------------


def ours(name: str, batch: int, side: int, classes: int, kernels: str) -> tuple[Callable[[int], list[float]], str]:
    """(seconds of so many steps, what convolutions are computed by) of the pipelines' own train step."""
    import jax
    import numpy as np

    from resnet_jax import MODELS
    from resnet_jax.parallel import compile_step, make_mesh, place, replicated, shard_batch
    from train.from_config import compute_dtype, make_kernels
    from train.optim import make_optimizer, make_schedule
    from train.runtime import compiler_options
    from train.state import init_state, init_variables
    from train.steps import train_step

    fields, _ = make_kernels(kernels)
    dtype, mesh = compute_dtype("auto"), make_mesh()
    model = MODELS[name](num_classes=classes, dtype=dtype, **fields)
    tx = make_optimizer("sgd", make_schedule("constant", peak=1e-3, steps=1000), momentum=0.9)
    state = place(init_state(init_variables(model, jax.random.key(0), (side, side, 3)), tx, jax.random.key(1)),
                  replicated(mesh))  # fmt: skip
    rng = np.random.default_rng(0)
    drawn = {"image": rng.integers(0, 256, (batch, side, side, 3), np.uint8),
             "label": rng.integers(0, classes, batch, np.int32)}  # fmt: skip
    options = compiler_options(dtype, plain=not fields)
    step = compile_step(partial(train_step, model=model, tx=tx), mesh=mesh, compiler_options=options or None)
    batch_ = shard_batch(drawn, mesh)
    held = [step(state, batch_)[0]]

    def run(steps: int) -> list[float]:
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            held[0], metrics = step(held[0], batch_)
            float(metrics["loss"])
            jax.block_until_ready(held[0])
            seconds.append(time.perf_counter() - began)
        return seconds

    return run, "onednn" if fields else "plain"


def compare(name: str, case: tuple[int, int, int], arguments: argparse.Namespace) -> dict[str, Any]:
    """Blocks of both, interleaved, and the ratio of their step times with its 95 % interval."""
    import numpy as np

    from train.timing import ratio, summary

    batch, side, classes = case
    shape = [name, str(batch), str(side), str(classes)]
    flags = ["--keep-memory"] if arguments.keep_memory else []
    sides: dict[str, Any] = {"torch": Served(arguments.torch_python, [*shape, *flags])}
    if arguments.compiled:
        sides["torch compiled"] = Served(arguments.torch_python, [*shape, *flags, "--compiled"])
    about = {who: one.described for who, one in sides.items()}
    sides["ours"], chosen = ours(name, *case, arguments.kernels)
    if arguments.kernels != "plain" and arguments.plain:
        sides["ours plain"], _ = ours(name, *case, "plain")
    for run in sides.values():
        run(2)
    counts = {who: max(1, round(arguments.seconds / float(np.median(run(2))))) for who, run in sides.items()}
    blocks: dict[str, list[list[float]]] = {who: [] for who in sides}
    for number in range(arguments.blocks):
        for who in list(sides)[:: -1 if number % 2 else 1]:
            sides[who](1)
            blocks[who].append(sides[who](counts[who]))
    seconds = {who: np.array(rows) for who, rows in blocks.items()}
    row = {
        "model": name, "batch": batch, "side": side, "kernels": chosen, "keep_memory": arguments.keep_memory,
        **{who: {**summary(times), **about.get(who, {})} for who, times in seconds.items()},
        "time_over_torch": {who: ratio(seconds[who], seconds["torch"]) for who in seconds if who != "torch"},
    }  # fmt: skip
    for who, found in row["time_over_torch"].items():
        print(f"{name} {who}: {row[who]['step_ms']:.1f} ms, torch {row['torch']['step_ms']:.1f} ms, "
              f"{found['value']:.3f} ({found['low']:.3f}-{found['high']:.3f}) of torch's time",
              file=sys.stderr, flush=True)  # fmt: skip
    for one in sides.values():
        if isinstance(one, Served):
            one.process.stdin.close()  # type: ignore[union-attr]
            one.process.wait()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, help="JSON file to write")
    parser.add_argument("--model", nargs="*", help="some of the cases alone")
    parser.add_argument("--batch", type=int, help="another batch than the case's")
    parser.add_argument("--kernels", default="auto", choices=["auto", "plain", "onednn"])
    parser.add_argument("--plain", action="store_true", help="also our step without oneDNN")
    parser.add_argument("--compiled", action="store_true", help="also torch.compile")
    parser.add_argument("--keep-memory", action="store_true")
    parser.add_argument("--torch-python", default=sys.executable, help="a Python that has PyTorch, if this has not")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a block")
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.keep_memory:
        from train.runtime import keep_memory

        keep_memory()
    if arguments.serve:
        name, *sizes = arguments.serve
        batch, side, classes = map(int, sizes)
        return serve(name, batch, side, classes, compiled=arguments.compiled)
    import jax

    from train.run_folder import environment

    cases = CASES["cpu" if jax.default_backend() == "cpu" else "gpu"]
    chosen = {name: case for name, case in cases.items() if not arguments.model or name in arguments.model}
    if arguments.batch:
        chosen = {name: (arguments.batch, *case[1:]) for name, case in chosen.items()}
    rows = [compare(name, case, arguments) for name, case in chosen.items()]
    result = {"rows": rows, "date": datetime.now(UTC).isoformat(timespec="seconds"), **environment()}
    if arguments.result:
        arguments.result.parent.mkdir(parents=True, exist_ok=True)
        arguments.result.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return None


if __name__ == "__main__":
    main()
