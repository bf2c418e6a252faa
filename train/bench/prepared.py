"""One step made ready and measured: compiled, held against the memory, timed, described."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from resnet_jax.parallel import batch_sharding, compile_step, place, replicated
from resnet_jax.tree import PyTree
from train.bench import work
from train.bench.compilation import compile_rows, one_line_faults, start
from train.bench.config import BenchConfig
from train.bench.device import available_bytes, forget_peak, peak_memory
from train.bench.workload import Step, Workload, compiler_options, kernels, make_batch
from train.data.batches import ResidentBatches
from train.data.sources import Arrays
from train.errors import UsageError
from train.from_config import compute_dtype
from train.timing import Runner, interleaved, summary


class Stepper:
    """Calls a step as a loop does: with `carried` the new state goes into the next call. Notes each dispatch.

    Attributes:
      dispatched: host seconds until each call returned, [calls]; the device may go on after that.
    """

    def __init__(self, step: Any, state: PyTree, batch: PyTree, *, carried: bool) -> None:
        self.step, self.state, self.batch, self.carried = step, state, batch, carried
        self.dispatched: list[float] = []

    def __call__(self) -> Any:
        began = time.perf_counter()
        result = self.step(self.state, self.batch)
        self.dispatched.append(time.perf_counter() - began)
        if self.carried:
            self.state = result[0]
        return result

    def ahead(self) -> Any:
        """A call whose result may be waited for after the next, which consumes the state of this one."""
        result = self()
        return result[1] if self.carried else result


@dataclass(eq=False)
class Counted:
    """A step that counts how often it is traced."""

    step: Step
    traces: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.traces += 1
        return self.step(*args, **kwargs)


@dataclass(kw_only=True)
class Prepared:
    """A compiled step with its arguments on their devices.

    `peak_before`: bytes of `device.peak_memory` just before it ran; `seconds` by way of timing: `each` and `ahead`
    [repeats, steps], `dispatch` [calls].
    """

    config: BenchConfig
    mesh: Mesh
    workload: Workload
    stepper: Stepper
    compiled: Any
    start: dict[str, Any]
    counted: Counted
    peak_before: int
    seconds: dict[str, np.ndarray] = field(default_factory=dict)


def say(line: str) -> None:
    """Tell people what they are waiting for."""
    print(f"... {line}", file=sys.stderr, flush=True)


def prepare(config: BenchConfig, mesh: Mesh, workload: Workload) -> Prepared:
    """Compile a workload's step, make sure that it fits, and call it once.

    Raises:
      UsageError: a batch that the devices do not divide or hold, unknown compiler options.
    """
    counters: list[Counted] = []

    def build() -> Any:
        counters.append(Counted(workload.step))
        return compiled_for(config, mesh, rows=workload.rows, donate=workload.carried and config.donate)(counters[-1])

    say(f"compiling {config.task} of {config.model}, batch {config.batch}")
    state = place(workload.state, replicated(mesh))
    with one_line_faults(lambda: f"compiling for --batch {config.batch}", config.xla):
        step, compiled, figures = start(build, (state, laid_out_shapes(workload.batch, mesh, config)), config.cache)
    check_fits(config, mesh, compiled)
    forget_peak()
    peak_before = peak_memory(mesh.devices.flat[0])[0]
    with one_line_faults(lambda: f"--batch {config.batch}, with {_planned(compiled) / 2**30:.1f} GiB planned"):
        batch = laid_out(make_batch(workload.batch, config.classes), mesh, config)
        stepper = Stepper(step, state, batch, carried=workload.carried)
        began = time.perf_counter()
        jax.block_until_ready(stepper())
        figures["first_run_s"] = time.perf_counter() - began
    return Prepared(
        config=config,
        mesh=mesh,
        workload=workload,
        stepper=stepper,
        compiled=compiled,
        start=figures,
        counted=counters[0],
        peak_before=peak_before,
    )


def compiled_for(config: BenchConfig, mesh: Mesh, *, rows: bool, donate: bool = False) -> Callable[[Step], Any]:
    """What compiles a step for the config's mode and options; `rows` as in `Workload`."""
    options: dict[str, Any] = {"mesh": mesh, "mode": config.mode, "compiler_options": compiler_options(config) or None}
    return partial(compile_rows, **options) if rows else partial(compile_step, donate=donate, **options)


def check_fits(config: BenchConfig, mesh: Mesh, compiled: Any) -> None:
    """Refuse, before anything is run, a step that needs more memory than there is by the compiler's own plan."""
    device = mesh.devices.flat[0]
    sharing = mesh.size if device.platform == "cpu" else 1
    planned, there = _planned(compiled) * sharing, available_bytes(device)
    if there is not None and planned > there:
        fitting = int(config.batch * there / planned * 0.9) // mesh.size * mesh.size
        hint = f"about {fitting} would" if fitting else "choose a smaller model or --image-size"
        raise UsageError(
            f"--batch {config.batch} does not fit: the compiled step needs {planned / 2**30:.1f} GiB of the "
            f"{there / 2**30:.1f} GiB there are; {hint}"
        )


def _planned(compiled: Any) -> int:
    """Bytes that a compiled program needs on each device."""
    return memory(compiled)["planned_bytes"]


def memory(compiled: Any) -> dict[str, int]:
    """The compiler's plan, in bytes on each device: arguments, results, what lies between, what shares a place."""
    stats = compiled.memory_analysis()
    parts = {
        "arguments_bytes": stats.argument_size_in_bytes,
        "outputs_bytes": stats.output_size_in_bytes,
        "temporaries_bytes": stats.temp_size_in_bytes,
        "aliased_bytes": stats.alias_size_in_bytes,
        "code_bytes": stats.generated_code_size_in_bytes,
    }
    return {**parts, "planned_bytes": sum(parts.values()) - 2 * parts["aliased_bytes"]}


def laid_out(batch: dict[str, np.ndarray], mesh: Mesh, config: BenchConfig) -> PyTree:
    """A batch on the devices, as steps compiled in the config's mode take it; pmap has an axis of devices first."""
    if config.mode == "pmap":
        batch = {name: x.reshape(mesh.size, -1, *x.shape[1:]) for name, x in batch.items()}
    return place(batch, batch_sharding(mesh))


def laid_out_shapes(batch: dict[str, jax.ShapeDtypeStruct], mesh: Mesh, config: BenchConfig) -> PyTree:
    """The shapes and shardings that `laid_out` gives."""

    def shape(spec: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        b, *rest = spec.shape
        laid = (mesh.size, b // mesh.size, *rest) if config.mode == "pmap" else spec.shape
        return jax.ShapeDtypeStruct(laid, spec.dtype, sharding=batch_sharding(mesh))

    return {name: shape(spec) for name, spec in batch.items()}


def time_steps(prepared: dict[str, Prepared], config: BenchConfig) -> None:
    """Time steps in turns, each waited for; then as training runs them, one ahead. Fills `seconds` of each."""
    say(f"timing {config.repeats} blocks of {config.steps} steps")
    counts: dict[str, Any] = {"steps": config.steps, "repeats": config.repeats}
    calls = {name: len(one.stepper.dispatched) for name, one in prepared.items()}
    runners: dict[str, Runner] = {name: one.stepper for name, one in prepared.items()}
    each = interleaved(runners, **counts, warmup=config.warmup)
    for name, one in prepared.items():
        one.seconds["each"] = each[name]
        one.seconds["dispatch"] = np.asarray(one.stepper.dispatched[calls[name] + config.warmup :])
    ahead = interleaved({n: one.stepper.ahead for n, one in prepared.items()}, **counts, warmup=1, ahead=True)
    for name, one in prepared.items():
        one.seconds["ahead"] = ahead[name]


def shares(one: Prepared) -> dict[str, float]:
    """Shares of a fed step's time, adding up to 1: drawing the batch on the device (training), then the step's parts.

    Growing parts of the step are compiled apart and timed in turns; each part is the difference of medians to the one
    before. As XLA fuses across their borders, that is approximate.
    """
    config, mesh = one.config, one.mesh
    counts: dict[str, Any] = {"steps": config.steps, "repeats": config.repeats, "warmup": config.warmup}
    runners: dict[str, Runner] = {}
    state = jax.tree.map(lambda x: x.copy(), one.stepper.state)  # the whole step consumes its own
    for name, part in one.workload.parts.items():
        if part is None:
            runners[name] = one.stepper
        else:
            step = compiled_for(config, mesh, rows=name in one.workload.part_rows)(part)
            runners[name] = Stepper(step, state, one.stepper.batch, carried=False)
    if "label" in one.workload.batch and one.workload.carried:
        drawn = make_batch(one.workload.batch, config.classes)
        arrays = Arrays(images=drawn["image"], labels=drawn["label"])
        batches = ResidentBatches(arrays, batch=config.batch, seed=0, mesh=mesh, mode=config.mode)
        runners = {"input": batches.__next__, **runners}
    say(f"compiling and timing the parts: {', '.join(runners)}")
    medians = {name: float(np.median(s)) for name, s in interleaved(runners, **counts).items()}
    return split(medians)


def split(medians: dict[str, float]) -> dict[str, float]:
    """Shares by part, each at least 0 and 1 together, of the seconds of growing parts; `input` stands by itself."""
    given = {name: seconds for name, seconds in medians.items() if name != "input"}
    # From the last back: a part that seems slower than what contains it adds nothing.
    reached = np.minimum.accumulate(list(given.values())[::-1])[::-1]
    added = dict(zip(given, np.diff(reached, prepend=0.0).tolist(), strict=True))
    added = {name: medians[name] for name in medians if name == "input"} | added
    whole = sum(added.values())
    return {name: seconds / whole for name, seconds in added.items()}


def described(one: Prepared, ceilings: dict[str, Any]) -> dict[str, Any]:
    """The figures of a timed step."""
    config, devices, batch = one.config, one.mesh.size, one.config.batch
    steady = summary(one.seconds["each"])
    chosen, _, remark = kernels(config)
    peak, source = peak_memory(one.mesh.devices.flat[0])
    rate = batch / (steady["step_ms"] / 1e3)
    pipelined = batch * config.steps / float(np.median(one.seconds["ahead"].sum(1)))
    done = work.figures(
        one.workload.work,
        one.compiled,
        images=batch,
        devices=devices,
        seconds=steady["step_ms"] / 1e3,
        ceilings=ceilings,
    )
    return {
        "task": config.task,
        "model": config.model,
        "parameters": one.workload.parameters,
        "batch": batch,
        "image_size": config.image_size,
        "dtype": np.dtype(compute_dtype(config.dtype)).name,
        "mode": config.mode,
        "kernels": chosen,
        "kernels_remark": remark,
        "compiler_options": compiler_options(config),
        "images_per_second": rate,
        "step_ms": steady["step_ms"],
        "start": one.start,
        "traces": one.counted.traces,
        "steady": {
            "warmup": config.warmup,
            "steps": config.steps,
            "repeats": config.repeats,
            **steady,
            "dispatch_ms": float(np.median(one.seconds["dispatch"]) * 1e3),
            "images_per_second": rate,
            "images_per_second_per_device": rate / devices,
            "pipelined_images_per_second": pipelined,
        },
        **done,
        # A peak that was there before says only that this step needed no more.
        "memory": {
            **memory(one.compiled),
            "peak_bytes": peak,
            "peak_before_bytes": one.peak_before,
            "peak_source": source,
        },
    }
