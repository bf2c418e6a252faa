"""`python -m train` with up to K steps in one program: `python results/scan_train.py K PRESET [--FIELD VALUE ...]`.

Everything is `train.run.run` (data, model, optimizer, keys, order of examples, validation, checkpoints, result) except
the loop: K steps are one `lax.scan` over rows of indices from `train.data.batches.stream_indices` into a training split
that lives on the device. At the end the network is exported as `network.safetensors` with torchvision's names. The test
split is evaluated once, as always.

An experiment script, not part of the packages: it replaces functions of `train.session`. It ran on an NVIDIA H200 on
the code of commit 9ac8e3e; its imports were adapted to later names afterwards.
"""

import json
import math
import sys
from pathlib import Path

import jax
import numpy as np

import train.session as session_module
from resnet_jax.parallel import compile_step, replicated
from resnet_jax.torch_weights import to_torch
from train.cli import parse
from train.data.batches import stream_indices
from train.errors import RunError, one_line
from train.presets import PRESETS
from train.run import run
from train.run_folder import load_state

K = int(sys.argv[1])
opened = {}
real_open = session_module.open_measured


def open_measured(config):
    config, dataset = real_open(config)
    opened["train"] = dataset.train
    return config, dataset


class Scanned:
    """Stands in for the compiled step: takes a state, the resident arrays and indices [k, batch]."""

    def __init__(self, step, mesh, options):
        self.mesh = mesh
        rep = replicated(mesh)

        def many(state, arrays, indices):
            def body(state, index):
                return step(state, jax.tree.map(lambda x: x[index], arrays), axis_name=None)

            return jax.lax.scan(body, state, indices)

        self.jitted = jax.jit(many, donate_argnums=0, compiler_options=options, in_shardings=rep, out_shardings=rep)
        self.program = None

    def lower(self, state, batch):
        image, label = batch["image"], batch["label"]
        count = len(opened["train"])
        arrays = {"image": jax.ShapeDtypeStruct((count, *image.shape[1:]), image.dtype),
                  "label": jax.ShapeDtypeStruct((count,), label.dtype)}  # fmt: skip
        lowered = self.jitted.lower(state, arrays, jax.ShapeDtypeStruct((K, label.shape[0]), np.int32))
        outer = self

        class Lowered:
            def compile(self):
                outer.program = lowered.compile()
                return outer

        return Lowered()

    def __call__(self, state, arrays, indices):
        call = self.program if len(indices) == K else self.jitted
        return call(state, arrays, jax.device_put(indices, replicated(self.mesh)))


def compile_any(step, *, mesh, mode="jit", donate=True, compiler_options=None):
    if not donate:
        return compile_step(step, mesh=mesh, mode=mode, donate=False, compiler_options=compiler_options)
    return Scanned(step, mesh, compiler_options)


def fit(step, state, data, *, steps, hooks=(), log=lambda number, metrics: None):
    number, late = int(state.step), None

    def look():
        if late is None:
            return
        metrics = {name: np.asarray(values) for name, values in jax.device_get(late[1]).items()}
        for i in range(len(next(iter(metrics.values())))):
            one = {name: float(values[i]) for name, values in metrics.items()}
            if not all(map(math.isfinite, one.values())):
                raise RunError(f"{one} at step {late[0] + i + 1} is not finite")
            log(late[0] + i + 1, one)

    while number < steps:
        due_at = min([steps, *((number // every + 1) * every for every, _ in hooks)])
        count = min(K, due_at - number)
        indices = stream_indices(data.count, data.seed, data.position, count * data.batch)
        data.position += count * data.batch
        state, metrics = step(state, data.arrays, indices.astype(np.int32).reshape(count, -1))
        look()
        late = number, metrics
        number += count
        due = [call for every, call in hooks if number % every == 0 or number == steps]
        if due:
            look()
            late = None
            for call in due:
                call(state)
    look()
    return state


def main():
    preset, config = parse("scan_train", PRESETS, sys.argv[2:], default="digits")
    session_module.open_measured, session_module.compile_step, session_module.fit = open_measured, compile_any, fit
    result = run(config, preset)
    out = Path(result["out"])
    result["steps_per_call"] = K
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    try:
        from safetensors.numpy import save_file

        save_file(
            {n: np.ascontiguousarray(x) for n, x in to_torch(load_state(out).variables).items()},
            out / "network.safetensors",
        )
    except Exception as error:  # the checkpoints are there all the same
        print(f"no export: {error!r}", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    with one_line():
        main()
