"""Experiments on the GPU train step, each against the step as it is: `python gpu_step_experiments.py GROUP`.

Every variant is the project's own `train.steps.train_step` with a different `max_pool`, `conv` or `norm` passed to the
model, a different optimizer, XLA options, or several steps in one program (`lax.scan`). A group appends one JSON line
per figure to $RES/GROUP.jsonl. With TURNS=DIR it writes DIR/GROUP.compiled once everything is compiled and waits for
DIR/GROUP.go before it measures, so that `gpu_step_driver.py` can give it the card alone. TINY=1 tries the file on CPU
with a small network.

An experiment script, not part of the packages. It ran on one NVIDIA H200 on the code of commit 9ac8e3e; its imports
were adapted to later names afterwards and it has not run on a GPU since. In that run other processes compiled on the
same card and CPU while steps were timed, so the timings are void and are not published.
"""

import json
import os
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

import train.steps as steps_module
from resnet_jax import layers
from resnet_jax.augment import identity
from resnet_jax.parallel import compile_step, make_mesh, place, replicated
from resnet_jax.resnet import MODELS
from resnet_jax.tree import is_kernel, select
from train.bench.tasks import sgd, train_augment
from train.data.batches import ResidentBatches, stream_indices
from train.data.sources import Arrays
from train.from_config import compute_dtype
from train.loop import fit
from train.state import init_state, init_variables
from train.steps import train_step
from train.timing import interleaved, ratio, summary

TINY = bool(os.environ.get("TINY"))
INTERPRET = jax.default_backend() == "cpu"
RES = Path(os.environ.get("RES", "runs/gpu_steps"))
TURNS = os.environ.get("TURNS")
BLOCK_ROWS, BLOCK_CHANNELS = (4, 8) if TINY else (64, 64)


# ---- max-pool: which of the nine was largest is kept as a byte -----------------------------------------------------


def _windows(x):
    _, h, w, _ = x.shape
    ho, wo = (h + 1) // 2, (w + 1) // 2
    low = jnp.array(-jnp.inf, x.dtype)
    padded = lax.pad(x, low, ((0, 0, 0), (1, 2 * ho - h, 0), (1, 2 * wo - w, 0), (0, 0, 0)))
    return [padded[:, u : u + 2 * ho - 1 : 2, v : v + 2 * wo - 1 : 2] for u in range(3) for v in range(3)]


@jax.custom_vjp
def max_pool(x):
    return _pool(x)[0]


def _pool(x):
    best, index = None, None
    for k, window in enumerate(_windows(x)):
        if best is None:
            best, index = window, jnp.zeros(window.shape, jnp.uint8)
        else:
            larger = window > best
            best, index = jnp.where(larger, window, best), jnp.where(larger, jnp.uint8(k), index)
    return best, index


def _pool_forward(x):
    y, index = _pool(x)
    return y, (index, jnp.empty((0, *x.shape), x.dtype))


def _pool_backward(saved, g):
    index, like = saved
    _, _, h, w, _ = like.shape
    zero, total = jnp.zeros((), g.dtype), 0
    for k in range(9):
        u, v = divmod(k, 3)
        part = jnp.where(index == k, g, zero)
        # output (i, j) took input (2 i - 1 + u, 2 j - 1 + v)
        ho, wo = g.shape[1:3]
        total += lax.pad(
            part, zero,
            ((0, 0, 0), (u - 1, h - (2 * ho - 2 + u), 1), (v - 1, w - (2 * wo - 2 + v), 1), (0, 0, 0)),
        )  # fmt: skip
    return (total,)


max_pool.defvjp(_pool_forward, _pool_backward)


# ---- stem: 7x7 of stride 2 as 4x4 of stride 1 on 2x2 blocks --------------------------------------------------------


class SpaceToDepthConv(nn.Module):
    features: int
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x):
        b, h, w, c = x.shape
        kernel = self.param("kernel", layers.kernel_init, (7, 7, c, self.features))
        kernel = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0))).reshape(4, 2, 4, 2, c, self.features)
        kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(4, 4, 4 * c, self.features).astype(self.dtype)
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h // 2, w // 2, 4 * c)
        return lax.conv_general_dilated(
            x.astype(self.dtype), kernel, (1, 1), ((2, 1), (2, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )


def conv(features, kernel_size=3, strides=1, groups=1, **kwargs):
    if kernel_size == 7 and strides == 2:
        return SpaceToDepthConv(features, dtype=kwargs["dtype"], name=kwargs["name"])
    return layers.conv(features, kernel_size, strides, groups, **kwargs)


# ---- norm and ReLU, its two pairs of sums by one of several means --------------------------------------------------


def rows_of(x):
    return x.reshape(-1, x.shape[-1])


def largest_divisor(n, limit):
    return next(d for d in range(min(n, limit), 0, -1) if n % d == 0)


def pair_plain(p, q):
    """Sums over rows of two float32 arrays [N, C]."""
    return p.sum(0), q.sum(0)


def pair_split(p, q):
    """The same in two stages: within groups of rows, then over the groups."""
    n, c = p.shape
    groups = largest_divisor(n, 256)
    return p.reshape(groups, -1, c).sum(1).sum(0), q.reshape(groups, -1, c).sum(1).sum(0)


def pair_matmul(p, q):
    """The same as products of bfloat16 with ones."""
    n, c = p.shape
    groups = largest_divisor(n, 256)

    def total(x):
        x = x.astype(jnp.bfloat16).reshape(groups, -1, c)
        ones = jnp.ones((groups, 8, x.shape[1]), jnp.bfloat16)
        return jnp.einsum("gor,grc->goc", ones, x, preferred_element_type=jnp.float32)[:, 0].sum(0)

    return total(p), total(q)


def _tiles(n, c):
    columns = c // BLOCK_CHANNELS
    groups = largest_divisor(n // BLOCK_ROWS, max(1, 1056 // columns))
    return groups, columns, n // groups


def _accumulate(rows, start, values):
    """Sums over `rows` rows from `start` of the two tiles that `values(row)` gives."""
    zero = jnp.zeros((BLOCK_ROWS, BLOCK_CHANNELS), jnp.float32)

    def body(i, sums):
        p, q = values(start + i * BLOCK_ROWS)
        return sums[0] + p, sums[1] + q

    p, q = lax.fori_loop(0, rows // BLOCK_ROWS, body, (zero, zero))
    return p.sum(0), q.sum(0)


def _stats_kernel(x, p, q, *, rows):
    group, column = pl.program_id(0), pl.program_id(1) * BLOCK_CHANNELS
    channels = pl.ds(column, BLOCK_CHANNELS)

    def values(row):
        tile = x[pl.ds(row, BLOCK_ROWS), channels].astype(jnp.float32)
        return tile, tile * tile

    p[group, channels], q[group, channels] = _accumulate(rows, group * rows, values)


def _back_kernel(g, x, a, b, mean, p, q, *, rows, relu):
    group, column = pl.program_id(0), pl.program_id(1) * BLOCK_CHANNELS
    channels = pl.ds(column, BLOCK_CHANNELS)
    a, b, mean = a[channels][None], b[channels][None], mean[channels][None]

    def values(row):
        tile = x[pl.ds(row, BLOCK_ROWS), channels].astype(jnp.float32)
        grad = g[pl.ds(row, BLOCK_ROWS), channels].astype(jnp.float32)
        if relu:
            grad = jnp.where(tile * a + b > 0, grad, 0.0)
        return grad, grad * (tile - mean)

    p[group, channels], q[group, channels] = _accumulate(rows, group * rows, values)


def _call(kernel, n, c, *operands, **options):
    groups, columns, rows = _tiles(n, c)
    out = [jax.ShapeDtypeStruct((groups, c), jnp.float32)] * 2
    params = {} if INTERPRET else {"compiler_params": plt.CompilerParams(num_warps=4, num_stages=3)}
    p, q = pl.pallas_call(
        partial(kernel, rows=rows, **options), out, grid=(groups, columns), interpret=INTERPRET, **params
    )(*operands)
    return p.sum(0), q.sum(0)


def fits(x):
    return x.shape[-1] % BLOCK_CHANNELS == 0 and x.size // x.shape[-1] % BLOCK_ROWS == 0


def stats_sums(x, how):
    if how == "pallas" and fits(x):
        return _call(_stats_kernel, *rows_of(x).shape, rows_of(x))
    x = rows_of(x).astype(jnp.float32)
    return PAIRS.get(how, pair_plain)(x, x * x)


def back_sums(g, x, a, b, mean, how, relu):
    if how == "pallas" and fits(x):
        return _call(_back_kernel, *rows_of(x).shape, rows_of(g), rows_of(x), a, b, mean, relu=relu)
    x, g = rows_of(x).astype(jnp.float32), rows_of(g).astype(jnp.float32)
    g = jnp.where(x * a + b > 0, g, 0.0) if relu else g
    return PAIRS.get(how, pair_plain)(g, g * (x - mean))


PAIRS = {"split": pair_split, "matmul": pair_matmul}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def normalise(statics, x, scale, bias):
    return _normalise(statics, x, scale, bias)[:3]


def _normalise(statics, x, scale, bias):
    epsilon, relu, how = statics
    count = x.size // x.shape[-1]
    total, squares = stats_sums(x, how)
    mean = total / count
    var = jnp.maximum(squares / count - mean * mean, 0.0)
    inverse = lax.rsqrt(var + epsilon)
    a = scale * inverse
    b = bias - mean * a
    y = x.astype(jnp.float32) * a + b
    y = (jnp.maximum(y, 0.0) if relu else y).astype(x.dtype)
    return y, mean, var, (x, a, b, mean, inverse)


def _normalise_forward(statics, x, scale, bias):
    y, mean, var, saved = _normalise(statics, x, scale, bias)
    return (y, mean, var), saved


def _normalise_backward(statics, saved, cotangents):
    _, relu, how = statics
    x, a, b, mean, inverse = saved
    g = cotangents[0]
    count = x.size // x.shape[-1]
    first, second = back_sums(g, x, a, b, mean, how, relu)
    centred = x.astype(jnp.float32) - mean
    grad = g.astype(jnp.float32)
    if relu:
        grad = jnp.where(x.astype(jnp.float32) * a + b > 0, grad, 0.0)
    dx = a * (grad - first / count - centred * (inverse * inverse * second / count))
    return dx.astype(x.dtype), second * inverse, first


normalise.defvjp(_normalise_forward, _normalise_backward)


class Norm(nn.BatchNorm):
    momentum: float = 0.9
    epsilon: float = 1e-5
    how: str = "plain"

    @nn.compact
    def __call__(self, x, *, relu=False):
        if self.use_running_average is not False or self.is_initializing():
            y = super().__call__(x)
            return nn.relu(y) if relu else y
        channels = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        var = self.variable("batch_stats", "var", jnp.ones, channels)
        scale = self.param("scale", self.scale_init, channels)
        bias = self.param("bias", self.bias_init, channels)
        y, batch_mean, batch_var = normalise((self.epsilon, relu, self.how), x.astype(self.dtype), scale, bias)
        mean.value = self.momentum * mean.value + (1 - self.momentum) * lax.stop_gradient(batch_mean)
        var.value = self.momentum * var.value + (1 - self.momentum) * lax.stop_gradient(batch_var)
        return y

    def with_relu(self, x):
        return self(x, relu=True)


# ---- variants ------------------------------------------------------------------------------------------------------

CONV = {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONVOLUTION"}
LOOP = {"xla_gpu_enable_command_buffer": CONV["xla_gpu_enable_command_buffer"] + ",WHILE,CONDITIONAL"}
PLAIN = {"norm": partial(Norm, how="plain")}
PALLAS = {"norm": partial(Norm, how="pallas")}
FIRST = {"max_pool": max_pool, "conv": conv}

# name: fields of the model, XLA options, and `noaug`, `nonorm`, `flat`, `scan` (steps in one program), `batch`
VARIANTS = {
    "base": {},
    "noaug": {"noaug": True},
    "scan8": {"scan": 8},
    "pool": {"fields": {"max_pool": max_pool}},
    "s2d": {"fields": {"conv": conv}},
    "nonorm": {"nonorm": True},
    "flat": {"flat": True},
    "bn_vjp": {"fields": PLAIN},
    "bn_split": {"fields": {"norm": partial(Norm, how="split")}},
    "bn_matmul": {"fields": {"norm": partial(Norm, how="matmul")}},
    "bn_pallas": {"fields": PALLAS},
    "combo_vjp": {"fields": {**FIRST, **PLAIN}, "nonorm": True},
    "combo_pallas": {"fields": {**FIRST, **PALLAS}, "nonorm": True},
    "combo_pallas_scan8": {"fields": {**FIRST, **PALLAS}, "nonorm": True, "scan": 8},
    "combo_vjp_scan8": {"fields": {**FIRST, **PLAIN}, "nonorm": True, "scan": 8},
    "base512": {"batch": 512},
    "combo_vjp512": {"fields": {**FIRST, **PLAIN}, "nonorm": True, "batch": 512},
    "combo_pallas512": {"fields": {**FIRST, **PALLAS}, "nonorm": True, "batch": 512},
    "graphs_off": {"xla": {"xla_gpu_enable_command_buffer": ""}},
    "graphs_conv": {"xla": CONV},
    "graphs_skip_temp": {"xla": {**CONV, "xla_gpu_command_buffer_update_mode": "SKIP_TEMP"}},
    "graphs_min1": {"xla": {"xla_gpu_graph_min_graph_size": 1}},
    "scan8_graphs_loop": {"scan": 8, "xla": LOOP},
    "latency_hiding": {"xla": {"xla_gpu_enable_latency_hiding_scheduler": True}},
    "cublaslt": {"xla": {"xla_gpu_enable_cublaslt": True}},
    "no_triton_gemm": {"xla": {"xla_gpu_enable_triton_gemm": False}},
    "autotune5": {"xla": {"xla_gpu_autotune_level": 5}},
    "fusion_autotuner": {"xla": {"xla_gpu_experimental_enable_fusion_autotuner": True}},
    "conv_fusion": {"xla": {"xla_gpu_experimental_enable_conv_fusion": True}},
}
GROUPS = {
    "first": ["base"],
    "parts": ["base", "scan8", "pool", "s2d", "nonorm", "flat"],
    "norms": ["base", "bn_vjp", "bn_pallas", "bn_split", "bn_matmul"],
    "combos": ["base", "combo_pallas", "combo_vjp", "combo_pallas_scan8"],
    "large": ["base512", "combo_vjp512", "combo_pallas512"],
    "graphs": ["base", "graphs_conv", "graphs_off", "latency_hiding", "conv_fusion", "scan8_graphs_loop"],
    "flags": ["base", "graphs_skip_temp", "graphs_min1", "cublaslt", "no_triton_gemm", "fusion_autotuner"],
}  # fmt: skip
SHAPE = ("resnet18", 4, 32, 10, {"width": 8}) if TINY else ("resnet50", 256, 224, 1000, {})


def say(group, row):
    RES.mkdir(parents=True, exist_ok=True)
    row = {"group": group, "at": round(time.time(), 1), **row}
    with (RES / f"{group}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row)[:300], flush=True)


class Program:
    """A compiled step of a variant with its state, called for one dispatch; `per_call` steps in each."""

    def __init__(self, name, variant, model, batch, side, classes, options, *, augment=None, resident=None, tx=None):
        self.name, self.mesh = name, make_mesh()
        self.per_call, self.batch_size = variant.get("scan", 1), variant.get("batch", batch) if not TINY else batch
        net = MODELS[model](num_classes=classes, dtype=compute_dtype("auto"), **options, **variant.get("fields", {}))
        tx = tx or sgd()
        if variant.get("flat"):
            mask = partial(select, predicate=is_kernel)
            tx = optax.chain(
                optax.add_decayed_weights(5e-4, mask), optax.flatten(optax.sgd(1e-3, momentum=0.9, nesterov=True))
            )
        augment = identity if variant.get("noaug") else augment or train_augment(side)
        one = partial(train_step, model=net, tx=tx, augment=augment)
        # The plain network's variables serve all variants.
        plain = MODELS[model](num_classes=classes, dtype=compute_dtype("auto"), **options)
        state = init_state(init_variables(plain, jax.random.key(0), (side, side, 3)), tx, jax.random.key(1))
        self.state = place(state, replicated(self.mesh))
        rng = np.random.default_rng(0)
        self.resident = resident
        if resident is None:
            self.data = place({"image": rng.integers(0, 256, (self.batch_size, side, side, 3), np.uint8),
                               "label": rng.integers(0, classes, self.batch_size, np.int32)},
                              replicated(self.mesh))  # fmt: skip
        xla = variant.get("xla")
        self.position = 0
        rep = replicated(self.mesh)
        if self.resident is not None and self.per_call > 1:

            def many(state, given):
                arrays, indices = given

                def body(state, index):
                    return one(state, jax.tree.map(lambda x: x[index], arrays))

                return lax.scan(body, state, indices)

            like = jax.ShapeDtypeStruct((self.per_call, batch), np.int32, sharding=rep)
            jitted = jax.jit(many, donate_argnums=0, compiler_options=xla, in_shardings=rep, out_shardings=rep)
            arguments = (self.resident.arrays, like)
        elif self.per_call > 1:

            def many(state, data):
                return lax.scan(lambda s, _: one(s, data), state, None, length=self.per_call)

            jitted = jax.jit(many, donate_argnums=0, compiler_options=xla, in_shardings=rep, out_shardings=rep)
            arguments = self.data
        else:
            jitted = compile_step(one, mesh=self.mesh, compiler_options=xla)
            arguments = self.data if self.resident is None else jax.eval_shape(
                lambda a: jax.tree.map(lambda x: x[:batch], a), self.resident.arrays)  # fmt: skip
        was = steps_module.global_norm
        if variant.get("nonorm"):
            steps_module.global_norm = lambda tree: jnp.zeros((), jnp.float32)
        try:
            began = time.perf_counter()
            self.lowered = jitted.lower(self.state, arguments)
            self.trace_seconds = time.perf_counter() - began
        finally:
            steps_module.global_norm = was
        self.dispatched = []

    def compile(self):
        began = time.perf_counter()
        self.step = self.lowered.compile()
        self.compile_seconds = time.perf_counter() - began
        self.lowered = None
        return self

    def __call__(self):
        if self.resident is not None and self.per_call > 1:
            count, batch = self.resident.count, self.resident.batch
            indices = stream_indices(count, 0, self.position, self.per_call * batch)
            self.position += self.per_call * batch
            data = (
                self.resident.arrays,
                place(indices.astype(np.int32).reshape(self.per_call, batch), replicated(self.mesh)),
            )
        elif self.resident is not None:
            data = next(self.resident)
        else:
            data = self.data
        began = time.perf_counter()
        self.state, metrics = self.step(self.state, data)
        self.dispatched.append(time.perf_counter() - began)
        return metrics

    def described(self):
        row = {"variant": self.name, "batch": self.batch_size, "steps_per_call": self.per_call,
               "trace_s": round(self.trace_seconds, 2), "compile_s": round(self.compile_seconds, 2)}  # fmt: skip
        memory = self.step.memory_analysis()
        if memory:
            row["temporaries_gib"] = round(memory.temp_size_in_bytes / 2**30, 2)
        return row


def turn(group):
    """Say that everything is compiled, and wait until the card is free."""
    if TURNS:
        Path(TURNS, f"{group}.compiled").touch()
        while not Path(TURNS, f"{group}.go").exists():
            time.sleep(0.05)


def build(group, makers):
    """Programs by name, compiled by a few threads while the next is traced; what fails is noted and left out."""
    programs, pool = {}, ThreadPoolExecutor(3)
    tasks = {}
    for name, make in makers.items():
        try:
            program = make()
            tasks[name] = pool.submit(program.compile)
        except Exception as error:
            say(group, {"variant": name, "failed": f"{type(error).__name__}: {error}"[:600]})
            traceback.print_exc()
    for name, task in tasks.items():
        try:
            programs[name] = task.result()
            say(group, programs[name].described())
        except Exception as error:
            say(group, {"variant": name, "failed": f"{type(error).__name__}: {error}"[:600]})
    return programs


def try_out(group, programs):
    """First calls: losses and gradient norms of the first steps, for all variants from the same state and images."""
    for name, program in list(programs.items()):
        try:
            firsts = [jax.device_get(program()) for _ in range(max(1, 3 // program.per_call))]
            losses = np.concatenate([np.atleast_1d(m["loss"]) for m in firsts])[:3]
            norms = np.concatenate([np.atleast_1d(m["grad_norm"]) for m in firsts])[:3]
            say(group, {"variant": name, "first_losses": losses.tolist(), "first_grad_norms": norms.tolist()})
        except Exception as error:
            say(group, {"variant": name, "failed": f"{type(error).__name__}: {error}"[:600]})
            del programs[name]


def measure(group, programs, reference, blocks=4, seconds=0.35):
    """Interleaved blocks, one call ahead; rows with the step's time and its ratio to the reference's."""
    calls = {}
    for name, program in programs.items():
        jax.block_until_ready(program())
        began = time.perf_counter()
        jax.block_until_ready(program())
        calls[name] = time.perf_counter() - began
    most = max(2, round(seconds / min(calls.values())))
    found = {name: [] for name in programs}
    for block in range(blocks):
        for name in list(programs)[:: -1 if block % 2 else 1]:
            count = max(2, min(most, round(seconds / calls[name])))
            one = interleaved({name: programs[name]}, steps=count, repeats=1, warmup=0, settle=1, ahead=True)[name][0]
            found[name].append(one / programs[name].per_call)
    for name, rows in found.items():
        steps = np.array([row.sum() / len(row) for row in rows])  # mean of a block: its end waits for all of it
        program = programs[name]
        row = {"variant": name, "batch": program.batch_size, "steps_per_call": program.per_call,
               "images_per_second": round(program.batch_size / float(np.median(steps)), 1),
               "step_ms_blocks": [round(s * 1e3, 3) for s in steps],
               "step_ms_median_of_calls": round(float(np.median(np.concatenate(rows))) * 1e3, 3),
               "dispatch_ms": round(float(np.median(program.dispatched[3:])) * 1e3, 3)}  # fmt: skip
        if reference in found and name != reference:
            base = np.array([r.sum() / len(r) for r in found[reference]])
            if programs[reference].batch_size == program.batch_size:
                row["time_over_reference"] = {k: round(v, 4) for k, v in ratio(steps[:, None], base[:, None]).items()}
        say(group, row)


def profile(group, program, calls=3):
    """Time by kind of kernel of some calls, from the profiler."""
    import collections
    import re
    import tempfile

    folder = tempfile.mkdtemp()
    with jax.profiler.trace(folder):
        for _ in range(calls):
            jax.block_until_ready(program())
    (path,) = Path(folder).rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(path))
    kinds, busy, first, last, number = collections.Counter(), 0.0, float("inf"), 0.0, 0
    counts = collections.Counter()
    for plane in data.planes:
        if "GPU" not in plane.name:
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                name = re.sub(r"[\d.]+$", "", re.sub(r"_\d+.*$", "", event.name))[:70]
                kinds[name] += event.duration_ns
                counts[name] += 1
                busy += event.duration_ns
                first, last = min(first, event.start_ns), max(last, event.start_ns + event.duration_ns)
                number += 1
    steps = calls * program.per_call
    top = {k: [round(v / steps / 1e6, 3), round(counts[k] / steps, 1)] for k, v in kinds.most_common(45)}
    say(group, {"variant": program.name, "profile": True, "busy_ms": round(busy / steps / 1e6, 3),
                "span_ms": round((last - first) / steps / 1e6, 3), "events": round(number / steps, 1),
                "kinds": top})  # fmt: skip


def resnet50(group):
    model, batch, side, classes, options = SHAPE
    names = GROUPS[group]
    programs = build(group, {n: partial(Program, n, VARIANTS[n], model, batch, side, classes, options) for n in names})
    if group == "first":
        try_out(group, programs)
        return
    turn(group)
    try_out(group, programs)
    if group == "graphs":
        noop(group, programs["base"])
    measure(group, programs, "base512" if group == "large" else "base")
    for name in {"parts": ["base"], "combos": ["combo_pallas"]}.get(group, []):
        if name in programs:
            try:
                profile(group, programs[name])
            except Exception as error:
                say(group, {"variant": name, "profile": True, "failed": f"{type(error).__name__}: {error}"[:300]})


def noop(group, program):
    """What a call costs that takes and gives the whole state and computes nothing."""
    same = jax.jit(lambda s: jax.tree.map(lambda x: x, s), donate_argnums=0)
    state = jax.tree.map(jnp.copy, program.state)
    state = same(state)
    jax.block_until_ready(state)
    times = []
    for _ in range(50):
        began = time.perf_counter()
        state = same(state)
        times.append(time.perf_counter() - began)
    say(
        group,
        {
            "variant": "noop",
            "leaves": len(jax.tree.leaves(state)),
            "dispatch_ms": round(float(np.median(times)) * 1e3, 3),
        },
    )


def small(group):
    """Small nets: the loop as it is, single calls, several steps in one program."""
    model, batch, many = {"rn20": ("resnet20", 128, 50), "rn18": ("resnet18_cifar", 512, 20)}[group]
    classes, side, options = 10, 32, {}
    if TINY:
        batch, many, options = 8, 3, {"width": 8}
    rng = np.random.default_rng(0)
    count = 64 if TINY else 45_000
    arrays = Arrays(
        images=rng.integers(0, 256, (count, 32, 32, 3), np.uint8), labels=rng.integers(0, 10, count, np.int32)
    )
    mesh = make_mesh()
    shared = ResidentBatches(arrays, batch=batch, seed=0, mesh=mesh, mode="jit")
    variants = {
        "single": {},
        "scan": {"scan": many},
        "scan_graphs_loop": {"scan": many, "xla": LOOP},
        "scan_graphs_conv": {"scan": many, "xla": CONV},
        "scan_flat_nonorm": {"scan": many, "flat": True, "nonorm": True},
        "scan_vjp": {"scan": many, "fields": PLAIN},
        "scan_pallas": {"scan": many, "fields": PALLAS},
    }
    if group == "rn20":
        del variants["scan_pallas"]  # its 16 channels are less than a tile
    if group == "rn18":
        del variants["scan_flat_nonorm"], variants["scan_graphs_loop"]
    make = {
        n: partial(Program, n, v, model, batch, side, classes, options, resident=shared) for n, v in variants.items()
    }
    programs = build(group, make)
    turn(group)
    try_out(group, programs)
    measure(group, programs, "single", seconds=0.4)
    if "single" in programs:
        program, blocks = programs["single"], []
        calls = 4 if TINY else 100
        for _ in range(5):
            began = time.perf_counter()
            number = int(program.state.step)
            program.state = fit(program.step, program.state, shared, steps=number + calls)
            jax.block_until_ready(program.state)
            blocks.append((time.perf_counter() - began) / calls)
        say(group, {"variant": "loop", "batch": batch, "images_per_second": round(batch / float(np.median(blocks)), 1),
                    "step_ms_blocks": [round(b * 1e3, 3) for b in blocks]})  # fmt: skip
    for name in ("scan",):
        if name in programs:
            try:
                profile(group, programs[name], calls=2)
            except Exception as error:
                say(group, {"variant": name, "profile": True, "failed": f"{type(error).__name__}: {error}"[:300]})


def torch_compiled(group):
    """torch.compile's step and ours without augmentation, interleaved: the same work in both."""
    from tests.reference.torch_bench import Served

    model, batch, side, classes, options = SHAPE
    task = ThreadPoolExecutor(1).submit(
        Served, sys.executable, [model, str(batch), str(side), str(classes), "--compiled"])  # fmt: skip
    names = ["noaug", "combo_pallas_noaug"]
    extra = {"noaug": True}
    variants = {"noaug": extra, "combo_pallas_noaug": VARIANTS["combo_pallas"] | extra,
                "combo_vjp_noaug": VARIANTS["combo_vjp"] | extra}  # fmt: skip
    programs = build(group, {n: partial(Program, n, variants[n], model, batch, side, classes, options) for n in names})
    theirs = task.result()
    say(group, {"variant": "torch_compile", **theirs.described})
    turn(group)
    try_out(group, programs)
    theirs(3)
    found = {name: [] for name in ["torch_compile", *programs]}
    for block in range(5):
        for name in list(found)[:: -1 if block % 2 else 1]:
            if name == "torch_compile":
                theirs(1)
                seconds = theirs(10)
            else:  # each step waited for, as PyTorch's are
                seconds = interleaved({name: programs[name]}, steps=10, repeats=1, warmup=0, settle=1)[name][0]
            found[name].append(seconds)
    base = np.array(found["torch_compile"])
    for name, rows in found.items():
        row = {
            "variant": name,
            "batch": batch,
            "each_step_waited_for": True,
            **{k: round(v, 3) for k, v in summary(np.array(rows)).items()},
        }
        row["images_per_second"] = round(batch / row["step_ms"] * 1e3, 1)
        if name != "torch_compile":
            row["time_over_torch_compile"] = {k: round(v, 4) for k, v in ratio(np.array(rows), base).items()}
        say(group, row)
    theirs.process.stdin.close()


if __name__ == "__main__":
    group = sys.argv[1]
    folder = os.environ.get("CACHE")
    if folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    try:
        {"rn20": small, "rn18": small, "torch": torch_compiled}.get(group, resnet50)(group)
        say(group, {"done": True})
    except BaseException as error:
        say(group, {"done": True, "failed": f"{type(error).__name__}: {error}"[:600]})
        traceback.print_exc()
    finally:
        if TURNS:
            Path(TURNS, f"{group}.compiled").touch()
            Path(TURNS, f"{group}.done").touch()
