"""`python -m train.bench`: what its figures mean, and what it refuses. How fast anything is, it does not test."""

import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_jax.resnet import MODELS
from train.bench import BenchConfig, bench, compilation, prepared, work
from train.bench import gate as gate_module
from train.bench.__main__ import main
from train.bench.compare import verdict
from train.bench.config import PRESETS, STEP_TASKS, check, other
from train.bench.table import render
from train.bench.workload import half_masks
from train.cli import parse
from train.errors import RunError, UsageError
from train.timing import interleaved, ratio, summary

TINY = {
    "model": "resnet8",
    "image_size": 8,
    "batch": 16,
    "kernels": "plain",
    "steps": 2,
    "repeats": 2,
    "warmup": 1,
    "peak": 0.1,
}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]


def tiny(**fields):
    return BenchConfig(**{**TINY, "shares": False, **fields})


# ---- timing -------------------------------------------------------------------------------------------------------

blocks = st.integers(2, 6).flatmap(
    lambda n: st.lists(st.lists(st.floats(1e-4, 10), min_size=3, max_size=3), min_size=n, max_size=n).map(np.array)
)


@given(blocks)
@settings(deadline=None, max_examples=10)
def test_ratio_to_itself_is_one(seconds):
    assert ratio(seconds, seconds) == {"value": 1.0, "low": 1.0, "high": 1.0}


@given(blocks, st.floats(0.01, 100))
@settings(deadline=None, max_examples=10)
def test_ratio_scales_and_its_interval_too(a, factor):
    b = a[::-1] * np.linspace(1, 2, a.size).reshape(a.shape)
    want = {name: pytest.approx(factor * value) for name, value in ratio(a, b).items()}
    assert ratio(factor * a, b) == want
    assert ratio(a, b) == ratio(a, b)  # the seed is fixed
    turned, one = ratio(b, a), ratio(a, b)
    assert one["low"] <= one["value"] <= one["high"]
    assert turned["value"] == pytest.approx(1 / one["value"])


def test_interval_holds_the_truth_as_often_as_it_says(monkeypatch):
    """Blocks of equal runners that drift: 95 % intervals leave out 1 in about one of twenty comparisons."""
    monkeypatch.setattr("train.timing.RESAMPLES", 100)
    rng = np.random.default_rng(0)

    def drifting(n):
        return np.exp(rng.normal(0, 0.05, (n, 1)) + rng.exponential(0.05, (n, 5)))

    for n in (3, 5):
        found = [ratio(drifting(n), drifting(n)) for _ in range(100)]
        assert sum(not one["low"] <= 1 <= one["high"] for one in found) <= 12


def test_ratio_needs_pairs_of_blocks():
    with pytest.raises(ValueError, match="two or more pairs of blocks"):
        ratio(np.ones((1, 3)), np.ones((1, 3)))
    with pytest.raises(ValueError, match="two or more pairs of blocks"):
        ratio(np.ones((3, 3)), np.ones((2, 3)))


def test_summary_has_known_quartiles():
    found = summary(np.arange(1, 101).reshape(10, 10) / 1e3)
    assert found["step_ms"] == pytest.approx(50.5)
    assert (found["step_ms_q1"], found["step_ms_q3"]) == pytest.approx((25.75, 75.25))
    assert (found["step_ms_min"], found["step_ms_max"]) == pytest.approx((1, 100))
    assert found["spread"] == pytest.approx(49.5 / 50.5)


class Result:
    """Notes when it is waited for."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def block_until_ready(self):
        self.log.append(f"wait {self.name}")
        return self


def test_runners_take_turns_in_both_orders():
    log = []
    runners = {name: lambda name=name: log.append(name) for name in "ab"}
    seconds = interleaved(runners, steps=2, repeats=3, warmup=1, settle=0)
    assert "".join(log) == "ab" + "aabb" + "bbaa" + "aabb"
    assert {name: s.shape for name, s in seconds.items()} == {"a": (3, 2), "b": (3, 2)}
    log.clear()
    interleaved(runners, steps=1, repeats=2, warmup=1)
    assert "".join(log) == "ab" + "aabb" + "bbaa"  # one untimed call after each change


@pytest.mark.parametrize(
    ("ahead", "order"),
    [
        (False, ["call 1", "wait 1", "call 2", "wait 2", "call 3", "wait 3"]),
        (True, ["call 1", "call 2", "wait 1", "call 3", "wait 2", "wait 3"]),
    ],
)
def test_each_call_is_waited_for(ahead, order):
    log, number = [], iter(range(99))

    def runner():
        name = next(number)
        log.append(f"call {name}")
        return Result(log, name)

    interleaved({"a": runner}, steps=3, repeats=1, warmup=1, ahead=ahead)
    assert log == ["call 0", "wait 0", *order]


def test_times_are_those_of_the_runner():
    seconds = interleaved({"a": lambda: time.sleep(0.01)}, steps=3, repeats=2, warmup=0)["a"]
    assert (seconds >= 0.01).all()


def test_shares_are_differences_and_add_up():
    found = prepared.split({"input": 1.0, "augmentation": 1.0, "forward": 3.0, "backward": 7.0, "optimizer": 7.0})
    want = {"input": 0.125, "augmentation": 0.125, "forward": 0.25, "backward": 0.5, "optimizer": 0.0}
    assert found == pytest.approx(want)
    # The loss was timed slower than with its gradient: the gradient adds nothing, and no share is negative.
    assert prepared.split({"forward": 4.0, "backward": 3.0, "optimizer": 5.0}) == pytest.approx(
        {"forward": 0.6, "backward": 0.0, "optimizer": 0.4}
    )


def test_verdict():
    assert verdict({"value": 1.32, "low": 1.28, "high": 1.36}) == "A is 1.32x (1.28-1.36) as fast as B"
    assert verdict({"value": 1.01, "low": 0.97, "high": 1.05}).startswith("no difference beyond noise")


# ---- work ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "macs", "source"),
    [
        ("resnet20", 32, 40.8e6, "https://github.com/akamaster/pytorch_resnet_cifar10"),
        ("resnet18_cifar", 32, 0.56e9, "https://github.com/kuangliu/pytorch-cifar"),
        ("resnet18", 224, 1.814e9, "https://pytorch.org/vision/stable/models.html"),
        ("resnet50", 224, 4.089e9, "https://pytorch.org/vision/stable/models.html"),
    ],
)
def test_flops_equal_published_ones(name, size, macs, source):
    found = work.forward(MODELS[name](), size)
    assert found.flops == pytest.approx(2 * macs, rel=0.01), source
    assert 0 < found.padding < 0.15 * found.flops
    trained = work.training(found)
    assert trained.flops == 3 * found.flops - found.first
    assert found.first == 2 * {32: 9 * 3 * 32**2, 224: 49 * 3 * 112**2}[size] * (16 if name == "resnet20" else 64)


@pytest.mark.parametrize("strides", [1, 2])
def test_xla_counts_the_same_but_for_padding(strides):
    """Also of the gradient for the images, whose zeros between strided rows neither counts."""
    x, kernel = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32), jax.ShapeDtypeStruct((3, 3, 4, 8), jnp.float32)

    def conv(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        pad = ((1, 1), (1, 1))
        return jax.lax.conv_general_dilated(x, kernel, (strides, strides), pad, dimension_numbers=numbers)

    found = work.count(conv, x, kernel)
    counted = jax.jit(conv).lower(x, kernel).compile().cost_analysis()["flops"]
    assert counted == pytest.approx(found.flops - found.padding)
    grown = jax.eval_shape(conv, x, kernel)
    back = jax.jit(lambda x, k, g: jax.vjp(lambda x: conv(x, k), x)[1](g)).lower(x, kernel, grown).compile()
    assert back.cost_analysis()["flops"] == counted


@pytest.mark.parametrize(
    ("counted", "said"), [(100.0, "and adds 10.0% for norms"), (60.0, "and 30.0% more: what it hands to libraries")]
)
def test_the_difference_to_xlas_count_is_explained(counted, said):
    class Compiled:
        cost_analysis = staticmethod(lambda: {"flops": counted / 4, "bytes accessed": 5.0})

    ceilings = {"peak_tflops": 1e-12, "copy_gb_s": 0.5e-9}
    done = work.Work(flops=100.0, padding=10.0)
    found = work.figures(done, Compiled, images=1, devices=4, seconds=200.0, ceilings=ceilings)
    assert found["work"]["ratio"] == counted / 100 and said in found["work"]["explained"]
    assert found["mfu"] == 0.5
    # 100 operations for 4 x 5 bytes; the machine does 2 a byte.
    assert (found["work"]["intensity_flops_per_byte"], found["work"]["ridge_flops_per_byte"]) == (5.0, pytest.approx(2))
    assert found["work"]["bound"] == "compute"


def test_flops_inside_loops_and_branches():
    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    once = work.count(lambda x: x @ x, x).flops
    assert once == 2 * 4**3
    assert work.count(lambda x: jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=5)[0], x).flops == 5 * once
    assert work.count(lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x, x), x).flops == once
    assert work.count(jax.jit(lambda x: jnp.vdot(x, x)), x).flops == 2 * 16


# ---- tasks, end to end --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The result of the train task, with everything that it measures."""
    out, trace = tmp_path_factory.mktemp("bench"), tmp_path_factory.mktemp("trace")
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    result = bench(tiny(shares=True, out=str(out), profile=str(trace), peak=None))
    assert before == (jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs)
    return result, out, trace


def test_train_says_how_it_started(trained):
    start = trained[0]["start"]
    assert trained[0]["traces"] == 1
    assert (start["cache_hits"], start["cache_misses"]) == (1, 1)
    assert start["compile_cold_s"] > start["compile_warm_s"] > 0
    assert min(start["trace_s"], start["lower_s"], start["first_run_s"]) > 0
    assert start["executable_bytes"] > 10_000


def test_train_says_how_fast_it_is(trained):
    result, steady = trained[0], trained[0]["steady"]
    assert result["images_per_second"] == pytest.approx(16 / steady["step_ms"] * 1e3)
    assert result["images_per_second"] == steady["images_per_second"] == 8 * steady["images_per_second_per_device"]
    assert steady["step_ms_min"] <= steady["step_ms_q1"] <= result["step_ms"] <= steady["step_ms_q3"]
    assert steady["step_ms_q3"] <= steady["step_ms_p95"] <= steady["step_ms_max"]
    assert 0 < steady["dispatch_ms"] <= steady["step_ms_max"] and steady["pipelined_images_per_second"] > 0


def test_train_says_what_it_does(trained):
    result, done = trained[0], trained[0]["work"]
    forward = work.forward(MODELS["resnet8"](num_classes=10), 8)
    assert done["analytic_flops_per_image"] == 3 * forward.flops - forward.first
    assert 0.5 < done["ratio"] < 2 and done["explained"].startswith("XLA leaves out the")
    achieved = done["analytic_flops_per_image"] * result["images_per_second"] / 1e12
    assert result["mfu"] == pytest.approx(achieved / result["ceilings"]["matmul_tflops"])
    assert result["ceilings"]["peak_source"] == "measured matrix products" and result["ceilings"]["copy_gb_s"] > 0
    assert (done["bound"] == "compute") == (done["intensity_flops_per_byte"] >= done["ridge_flops_per_byte"])
    assert result["parameters"] == 75290


def test_train_says_what_it_needs(trained):
    memory = trained[0]["memory"]
    kept = memory["arguments_bytes"] + memory["outputs_bytes"] + memory["temporaries_bytes"] + memory["code_bytes"]
    assert memory["planned_bytes"] == kept - memory["aliased_bytes"] > 4 * 75290
    assert memory["aliased_bytes"] > 4 * 75290  # the state is donated
    assert memory["peak_bytes"] > memory["planned_bytes"] and memory["peak_bytes"] >= memory["peak_before_bytes"]


def test_train_says_where_its_time_goes(trained):
    shares = trained[0]["shares"]
    assert list(shares) == ["input", "augmentation", "forward", "backward", "optimizer"]
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) >= 0


def test_result_is_complete_and_on_file(trained):
    result, out, trace = trained
    path = out / "train-resnet8-16x8-auto-jit-cpu.json"
    assert result.pop("file") == str(path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert result["config"]["image_size"] == 8 and result["devices"] == "8 x cpu" and result["versions"]["jax"]
    assert "load_average" in result and "environment_variables" in result and result["time"].endswith("Z")
    assert list(trace.rglob("*.xplane.pb"))
    assert "input" in render(result) and "traced 1x" in render(result)


def test_nothing_is_overwritten(tmp_path):
    for name in ("predict-resnet8-16x8-auto-jit-cpu.json", "predict-resnet8-16x8-auto-jit-cpu-2.json"):
        (tmp_path / name).write_text("mine")
    result = bench(tiny(task="predict", out=str(tmp_path), cache="none"))
    assert result["file"].endswith("-3.json")
    assert [p.read_text() for p in sorted(tmp_path.iterdir()) if p.name != Path(result["file"]).name] == ["mine"] * 2
    assert set(result["latency_ms"]) == {"batch", "p50", "p95"} and result["latency_ms"]["batch"] == 1
    assert result["start"]["compile_warm_s"] is None and result["start"]["cache_hits"] == 0
    assert result["work"]["analytic_flops_per_image"] == work.forward(MODELS["resnet8"](num_classes=10), 8).flops


@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
@pytest.mark.parametrize("task", ["eval", "predict"])
def test_other_modes(mode, task):
    result = bench(tiny(task=task, mode=mode, shares=task == "eval"))
    assert result["traces"] == 1 and (result["start"]["cache_hits"], result["start"]["cache_misses"]) == (1, 1)
    assert (result["start"]["trace_s"] is None) == (mode == "pmap")
    assert 0.5 < result["work"]["ratio"] < 2
    if task == "eval":
        assert sum(result["shares"].values()) == pytest.approx(1)


def test_contrastive():
    result = bench(tiny(task="contrastive", cache=jax.config.jax_compilation_cache_dir))
    encoder = work.training(work.forward(MODELS["resnet8"](num_classes=128), 8)).flops
    products = 3 * 2 * 32 * 32 * 128 / 16  # every view with every view, forward and two gradients
    assert result["work"]["analytic_flops_per_image"] == pytest.approx(2 * encoder + products)
    assert result["traces"] == 1


def test_prune():
    result = bench(tiny(task="prune", cache=jax.config.jax_compilation_cache_dir))
    start = result["start"]
    assert (start["compile_cold_s"] is None) == (start["cache_hits"] == 1 and start["cache_misses"] == 0)
    over = result["masking_overhead"]
    assert 0 < over["low"] <= over["value"] <= over["high"]
    assert over["value"] == pytest.approx(result["step_ms"] / result["dense_step_ms"])
    assert result["new_masks_ms"] >= 0
    masks = half_masks({"conv": {"kernel": np.arange(12.0).reshape(3, 4)}, "norm": {"scale": np.ones(4)}})
    assert masks["conv"]["kernel"].sum() == 6 and not masks["conv"]["kernel"][0].any()
    assert masks["norm"]["scale"].shape == ()


def test_augment():
    result = bench(tiny(task="augment"))
    assert {"random_crop", "color_jitter", "simclr_two_views", "train"} <= set(result["augments"])
    for one in result["augments"].values():
        assert one["us_per_image"] == pytest.approx(1e6 / one["images_per_second"])
    assert "us/image" in render(result)


def test_input():
    result = bench(tiny(task="input", cache=jax.config.jax_compilation_cache_dir))
    assert set(result["pipelines"]) == {"resident", "encoded", "plain_pil"}
    for name in ("resident", "encoded"):
        one = result["pipelines"][name]
        assert 0 <= one["wait_share"] < 1
        waits = 1 - result["train_step_ms"] / one["fed_step_ms"]
        assert one["wait_share"] == pytest.approx(max(0, waits))
    assert "waits" in render(result)


def test_every_task(monkeypatch):
    done = []
    monkeypatch.setattr("train.bench.measure.measured", lambda config, *_: done.append(config) or {"task": config.task})
    result = bench(tiny(all=True, batch=64))
    assert list(result["all"]) == [*STEP_TASKS, "augment", "input"] == [config.task for config in done]
    assert {config.batch for config in done} == {32}


# ---- comparisons --------------------------------------------------------------------------------------------------


def test_versus_measures_both(tmp_path, capsys):
    """And the file that it leaves is one to compare with."""
    result = bench(tiny(task="eval", versus="--batch 32", out=str(tmp_path)))
    versus = result["versus"]
    assert (result["batch"], versus["result"]["batch"]) == (16, 32)
    steps, rates = versus["step_ms_ratio"], versus["images_per_second_ratio"]
    assert steps["value"] == pytest.approx(result["step_ms"] / versus["result"]["step_ms"])
    assert rates["value"] == pytest.approx(0.5 / steps["value"])
    assert " as fast as B" in versus["verdict"] and versus["verdict"] in render(result)

    path = Path(result["file"])
    path.write_text(json.dumps({**result, "host": "another", "images_per_second": 1.0}))
    again = bench(tiny(task="eval", compare=str(path)))["versus"]
    assert again["result"]["batch"] == 16 and again["stored"]["images_per_second"] == 1.0
    assert again["stored"]["now_over_then"] == again["result"]["images_per_second"]
    assert f"warning: {path} was measured elsewhere: host another (here " in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--no-donate", "--batch 64 --no-donate"])
def test_versus_takes_flags_for_its_value(flags):
    _, config = parse("bench", PRESETS, ["--versus", flags, "--batch", "32"], default="step")
    assert (config.versus, config.batch) == (flags, 32)
    assert not other(config).donate


def test_state_is_donated_unless_told_otherwise():
    aliased = [bench(tiny(donate=donate, shares=False))["memory"]["aliased_bytes"] for donate in (True, False)]
    assert aliased[0] > 0 and aliased[1] == 0


def test_versus_applies_flags_over_the_config():
    second = other(tiny(task="eval", versus="--batch 64 --kernels onednn"))
    assert (second.batch, second.kernels, second.task, second.model) == (64, "onednn", "eval", "resnet8")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("{", "is not JSON"),
        ("[1]", "is not a benchmark's result"),
        ('{"images_per_second": 3}', "it has no 'config'"),
        ('{"images_per_second": "fast", "config": {}}', "is not a benchmark's result"),
        ('{"images_per_second": 3, "config": {"batch": "x"}}', "is not a benchmark's result"),
        ('{"images_per_second": 3, "config": {"model": "vgg"}}', "unknown model 'vgg'"),
        ('{"images_per_second": 3, "config": {"task": "augment"}}', "has no step to compare"),
        (b"\xff\xfe", "is not a text file"),
    ],
)
def test_broken_comparisons(content, said, tmp_path, fails):
    path = tmp_path / "earlier.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said in fails(2, main, [*FLAGS, "--compare", str(path)])


# ---- the gate -----------------------------------------------------------------------------------------------------


def sleeper(seconds, calls=None):
    def run():
        if calls is not None:
            calls.append(seconds)
        time.sleep(seconds)

    return run


def test_gate_fails_what_is_slower_twice_and_passes_the_rest(capsys):
    calls = []
    runners = {
        "same": (sleeper(0.004), sleeper(0.004)),
        "slowed": (sleeper(0.008, calls), sleeper(0.004)),
        "slow as ever": (sleeper(0.008), sleeper(0.004)),
    }
    limits = {"same": 1.0, "slowed": 1.0, "slow as ever": 2.0}
    found = gate_module.judged(runners.__getitem__, list(runners), limits, steps=3, repeats=5, warmup=1)
    assert {name: one["passed"] for name, one in found.items()} == {"same": True, "slowed": False, "slow as ever": True}
    assert found["slowed"]["measured"] == 2 and len(calls) == 2 * (1 + 5 * (1 + 3))
    assert "slowed: ours takes " in capsys.readouterr().err


def test_gate_forgives_one_bad_measurement(monkeypatch):
    measured = iter([{"value": 2.0, "low": 1.9, "high": 2.1}, {"value": 1.0, "low": 0.9, "high": 1.1}])
    monkeypatch.setattr(gate_module, "ratio", lambda a, b: next(measured))
    runners = {"eval": (sleeper(0), sleeper(0))}
    found = gate_module.judged(runners.__getitem__, ["eval"], {"eval": 1.0}, steps=1, repeats=2, warmup=1)
    assert found["eval"]["passed"] and found["eval"]["measured"] == 2


@pytest.fixture
def stubbed(tmp_path, monkeypatch):
    """A gate's file with plain steps of 3 ms; `stubbed.seconds` is what ours take."""

    class Stub:
        seconds, path = 0.003, tmp_path / "plain.py"

    class Ours:
        def __init__(self, *_):
            self.stepper = sleeper(Stub.seconds)

    Stub.path.write_text("import time\nPIPELINES = {n: lambda batch: lambda: time.sleep(0.003) for n in ('a', 'b')}\n")
    monkeypatch.setattr(gate_module, "OURS", {"a": lambda config: None, "b": lambda config: None})
    monkeypatch.setattr(gate_module, "prepare", Ours)
    return Stub


def test_gate_by_command_line(stubbed, fails, capsys, tmp_path):
    line = ["--gate", str(stubbed.path), "--steps", "3", "--repeats", "5"]
    assert "write them with --gate-record" in fails(2, main, line)
    main([*line, "--gate-record"])
    limits = json.loads((tmp_path / "gate.json").read_text())
    assert set(limits) == {"cpu plain"} and set(limits["cpu plain"]) == {"a", "b"}
    main(line)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(one["passed"] for one in result["gate"]["pipelines"].values())
    stubbed.seconds = 0.006
    said = fails(1, main, line)
    assert "a takes " in said and "b takes " in said and "15% more" in said


def test_limits_of_another_kind_of_device_do_not_count(stubbed, fails, tmp_path):
    (tmp_path / "gate.json").write_text('{"gpu plain": {"a": 1.0, "b": 1.0}}')
    assert "has no limit on cpu plain for a, b: write them with" in fails(2, main, ["--gate", str(stubbed.path)])
    (tmp_path / "gate.json").write_text('["gpu"]')
    assert "cannot read the limits" in fails(2, main, ["--gate", str(stubbed.path)])


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (None, "is no Python file"),
        ("1 / 0", "cannot be loaded: ZeroDivisionError"),
        ("x = 1", "defines no PIPELINES"),
        ("PIPELINES = {'trian': None}", "unknown pipeline 'trian': did you mean train?"),
    ],
)
def test_broken_gates(program, said, tmp_path, fails):
    path = tmp_path / "plain.py"
    if program is not None:
        path.write_text(program)
    assert said in fails(2, main, ["--gate", str(path)])


def test_the_projects_gate_can_be_held_against():
    """Every pipeline has a counterpart, and a limit that was recorded."""
    plain = gate_module.load_gate(Path(__file__).parents[2] / "reference" / "plain_step.py", record=False)
    assert set(plain.pipelines) == set(gate_module.OURS)
    for limits in plain.limits.values():
        assert set(limits) == set(plain.pipelines) and all(0 < limit < 1.1 for limit in limits.values())


# ---- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "resnet19"], "unknown model 'resnet19': did you mean resnet18"),
        (["--task", "trian"], "unknown task 'trian': did you mean train?"),
        (["--batch", "12"], "a batch of 12 is not divisible by 8 devices: choose a multiple of 8"),
        (["--batch", "0"], "--batch 0 is out of range"),
        (["--batch", "many"], "many"),
        (["--steps", "0"], "--steps 0 is out of range"),
        (["--repeats", "1"], "--repeats 1 is out of range"),
        (["--warmup", "0"], "--warmup 0 is out of range"),
        (["--image-size", "4"], "--image-size 4 is out of range"),
        (["--peak", "-1"], "--peak -1.0 is out of range"),
        (["--device", "tpu"], "--device tpu: jax has none here, only 8 x cpu"),
        (["--xla", "fast"], "--xla 'fast' is not of the form NAME=VALUE"),
        (["--xla", "a=b", "--mode", "pmap"], "pmap takes no compiler options"),
        (["--versus", "--bacth 3"], "--versus '--bacth 3': unknown field '--bacth': did you mean --batch or "),
        (["--versus=--model=vgg"], "unknown model 'vgg'"),
        (["--versus=--steps=3"], "--versus cannot change --steps: it holds for both sides"),
        (["--versus=--batch=12"], "a batch of 12 is not divisible"),
        (["--versus", "--batch 32", "--all"], "--versus and --all are two benchmarks"),
        (["--versus", "--batch 32", "--task", "augment"], "task augment has no step to compare"),
        (["--gate-record"], "name its file with --gate"),
        (["--out", "/proc/none"], "cannot make the folder --out /proc/none"),
        (["--stesp", "3"], "unknown field '--stesp': did you mean --steps or "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(flags, said, fails):
    assert said in fails(2, main, [*FLAGS, *flags])


def test_unknown_compiler_option(fails):
    assert "xla_no_such" in fails(2, main, [*FLAGS, "--task", "predict", "--xla", "xla_no_such=1"])


def test_batch_that_does_not_fit_is_refused_before_it_runs(monkeypatch, fails):
    monkeypatch.setattr(prepared, "available_bytes", lambda device: 1 << 21)
    monkeypatch.setattr(prepared.Stepper, "__call__", lambda self: pytest.fail("it was run"))
    said = fails(2, main, [*FLAGS, "--batch", "4096", "--task", "predict"])
    assert "--batch 4096 does not fit: the compiled step needs" in said and "would" in said


def test_batch_that_no_machine_holds_is_refused(fails):
    assert "does not fit" in fails(2, main, [*FLAGS, "--batch", str(1 << 30), "--task", "predict", "--cache", "none"])


def test_running_out_of_memory_is_one_line():
    with pytest.raises(UsageError, match="out of memory: --batch 9; choose a smaller"):  # noqa: SIM117
        with compilation.one_line_faults(lambda: "--batch 9"):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):  # noqa: SIM117
        with compilation.one_line_faults(lambda: "--batch 9"):
            raise jax.errors.JaxRuntimeError("INTERNAL: a bug")


@pytest.mark.parametrize("field", ["dtype", "mode", "kernels", "device"])
def test_configs_from_python_are_checked_as_well(field):
    with pytest.raises(UsageError, match=f"unknown {field} 'x': choose one of"):
        check(BenchConfig(**{field: "x"}))


def test_failing_leaves_jax_as_it_was(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    with pytest.raises(RunError), compilation.cache_in(str(tmp_path)), compilation.cache_events():
        raise RunError("stop")
    assert jax.config.jax_compilation_cache_dir == before


# ---- as a user starts it ------------------------------------------------------------------------------------------


def test_command_line(command):
    done = command("train.bench", *FLAGS, "--task", "predict", "--no-shares", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["task"] == "predict" and result["traces"] == 1 and "steps" in result["config"]
    assert "images/s" in done.stderr


def test_importing_asks_for_no_device():
    program = "import train.bench.__main__, jax; print(jax._src.xla_bridge.backends_are_initialized())"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
