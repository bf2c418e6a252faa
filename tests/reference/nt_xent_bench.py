"""Time NT-Xent and its gradient, whole and in blocks: `python -m tests.reference.nt_xent_bench`.

Both are timed interleaved in one process, with two views of each example and float32 embeddings. Memory is what XLA
allocates in addition to inputs and outputs. `contrast` chooses the blocks (all rows for small batches), or --block.
"""

import argparse
import json
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from resnet_jax import contrastive
from train.run_folder import environment
from train.timing import interleaved, ratio, summary

COLUMNS = "{:>6} {:>7} {:>7} {:>26} {:>26} {:>21} {:>10} {:>10}"
HEADER = ("batch", "rows", "block", "plain ms", "blocks ms", "blocks / plain", "plain MiB", "blocks MiB")


def compare(batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Step times, their ratio with its 95 % interval, and memory, of one batch."""
    rows = 2 * batch
    block = min(arguments.block or max(contrastive.MAX_SIMILARITIES // rows, 1), rows)
    views = jax.device_put(np.random.default_rng(0).normal(size=(2, batch, arguments.dim)).astype(np.float32))

    def compiled(block: int) -> Any:
        return jax.jit(jax.value_and_grad(lambda v: contrastive.nt_xent(*v, block=block).mean())).lower(views).compile()

    steps = {"plain": compiled(rows), "blocks": compiled(block)}
    runners = {name: partial(step, views) for name, step in steps.items()}
    first = interleaved(runners, steps=1, repeats=1, warmup=1)
    count = max(1, round(arguments.seconds / min(float(s.min()) for s in first.values())))
    seconds = interleaved(runners, steps=count, repeats=arguments.repeats, warmup=0)
    memory = {name: step.memory_analysis().temp_size_in_bytes for name, step in steps.items()}
    return {
        "batch": batch, "dim": arguments.dim, "rows": rows, "block": block, "steps": count,
        **{name: {**summary(seconds[name]), "temp_bytes": memory[name]} for name in steps},
        "blocks_over_plain": ratio(seconds["blocks"], seconds["plain"]),
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A row of the table: medians with their quartiles, the ratio with its interval."""
    times = [f"{t['step_ms']:.1f} ({t['step_ms_q1']:.1f}-{t['step_ms_q3']:.1f})" for t in (row["plain"], row["blocks"])]
    memory = [f"{row[name]['temp_bytes'] / 2**20:.1f}" for name in ("plain", "blocks")]
    over = "{value:.2f} ({low:.2f}-{high:.2f})".format(**row["blocks_over_plain"])
    return COLUMNS.format(row["batch"], row["rows"], row["block"], *times, over, *memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--block", type=int, help="rows at a time; else what `contrast` chooses")
    parser.add_argument("--repeats", type=int, default=5, help="timed blocks of each")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a timed block")
    arguments = parser.parse_args()
    print(COLUMNS.format(*HEADER))
    rows = []
    for batch in arguments.batches:
        rows.append(compare(batch, arguments))
        print(line(rows[-1]), flush=True)
    result = {"rows": rows, "date": datetime.now(UTC).isoformat(timespec="seconds"), **environment()}
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
