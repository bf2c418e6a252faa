"""`python -m train.bench` from end to end: the contents of a result, never speed."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from resnet_jax.resnet import MODELS
from tests.train.bench.toy import FLAGS, TOY, quick_variables, tiny, toy
from train.bench import bench, feeding, free_path, tasks, work
from train.bench.__main__ import main
from train.bench.table import render
from train.bench.tasks import TASKS

pytestmark = pytest.mark.usefixtures("quick_measuring")


@pytest.fixture(scope="module")
def timed(tmp_path_factory, quick_measuring):
    """The result of the toy task, with everything that it measures."""
    out, trace = tmp_path_factory.mktemp("bench"), tmp_path_factory.mktemp("trace")
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    result = bench(toy(shares=True, out=str(out), profile=str(trace), peak=None), tasks=TOY)
    assert before == (jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs)
    return result, out, trace


def test_start(timed):
    start = timed[0]["start"]
    assert timed[0]["traces"] == 1
    assert (start["cache_hits"], start["cache_misses"]) == (1, 1)
    assert min(start[name] for name in start if name.endswith("_s")) > 0
    assert start["executable_bytes"] > 1_000


def test_steady_state(timed):
    result, steady = timed[0], timed[0]["steady"]
    assert result["images_per_second"] == pytest.approx(16 / steady["step_ms"] * 1e3)
    assert result["images_per_second"] == steady["images_per_second"] == 8 * steady["images_per_second_per_device"]
    assert steady["step_ms_min"] <= steady["step_ms_q1"] <= result["step_ms"] <= steady["step_ms_q3"]
    assert steady["step_ms_q3"] <= steady["step_ms_p95"] <= steady["step_ms_max"]
    assert result["counts"] == {
        "step": {"warmup": 2, "settle": 0, "steps": 2, "repeats": 2},
        "ahead": {"warmup": 0, "settle": 0, "steps": 2, "repeats": 2},
        "parts": {"warmup": 2, "settle": 1, "steps": 2, "repeats": 2},
    }
    assert "step 2 x 2, ahead 2 x 2, parts 2 x 2 (blocks x steps)" in render(result)
    assert 0 < steady["dispatch_ms"] <= steady["step_ms_max"] and steady["pipelined_images_per_second"] > 0


def test_work_and_memory(timed):
    result, done, memory = timed[0], timed[0]["work"], timed[0]["memory"]
    achieved = done["analytic_flops_per_image"] * result["images_per_second"] / 1e12
    assert result["mfu"] == pytest.approx(achieved / result["ceilings"]["matmul_tflops"])
    assert result["ceilings"]["peak_source"] == "measured matrix products" and result["ceilings"]["copy_gb_s"] > 0
    assert (done["bound"] == "compute") == (done["intensity_flops_per_byte"] >= done["ridge_flops_per_byte"])
    kept = memory["arguments_bytes"] + memory["outputs_bytes"] + memory["temporaries_bytes"] + memory["code_bytes"]
    assert memory["planned_bytes"] == kept - memory["aliased_bytes"] > 4 * 1000
    assert memory["peak_bytes"] > memory["planned_bytes"]


def test_shares(timed):
    shares = timed[0]["shares"]
    assert list(shares) == ["input", "augmentation", "optimizer"]
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) >= 0


def test_result_is_complete_and_on_file(timed):
    result, out, trace = timed
    path = out / "toy-resnet8-16x8-auto-jit-cpu.json"
    assert result["file"] == str(path)
    assert json.loads(path.read_text()) == json.loads(json.dumps({k: v for k, v in result.items() if k != "file"}))
    assert result["config"]["image_size"] == 8 and result["devices"] == "8 x cpu" and result["versions"]["jax"]
    assert "load_average" in result and "environment_variables" in result and result["time"].endswith("Z")
    assert list(trace.rglob("*.xplane.pb"))
    table = render(result)
    assert "input" in table and "traced 1x" in table and f"written to {path}" in table
    # Nothing is overwritten.
    assert free_path(out, result) == out / "toy-resnet8-16x8-auto-jit-cpu-2.json"


@pytest.mark.parametrize(
    ("task", "mode"),
    [
        ("toy", "pmap"),
        ("predict", "shard_map"),
        pytest.param("toy", "shard_map", marks=pytest.mark.slow),
        pytest.param("predict", "pmap", marks=pytest.mark.slow),
    ],
)
def test_other_modes(task, mode):
    result = bench(toy(task=task, mode=mode, shares=True), tasks=TOY)
    assert result["traces"] == 1 and (result["start"]["cache_hits"], result["start"]["cache_misses"]) == (1, 1)
    assert (result["start"]["trace_s"] is None) == (mode == "pmap")
    assert sum(result["shares"].values()) == pytest.approx(1)
    assert ("input" in result["shares"]) == (task == "toy")
    if task == "predict":
        assert set(result["latency_ms"]) == {"batch", "p50", "p95"} and result["latency_ms"]["batch"] == 1
        assert "latency" in render(result)


def test_variants_are_timed_with_the_step():
    result = bench(toy(task="prune"), tasks=TOY)
    over = result["masking_overhead"]
    assert 0 < over["low"] <= over["value"] <= over["high"]
    assert over["value"] == pytest.approx(result["step_ms"] / result["dense_step_ms"])
    assert result["new_masks_ms"] >= 0 and "masking" in render(result)


# ---- the tasks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["train", "eval", "predict"])
def test_workloads(task, monkeypatch):
    """Their work by convention, and a step of which every part can be traced by itself."""
    monkeypatch.setattr(tasks, "init_variables", quick_variables)
    workload = TASKS[task](tiny())
    forward = work.forward(MODELS["resnet8"](num_classes=10), 8)
    assert workload.flops == (work.training(forward) if task == "train" else forward.flops)
    assert workload.parameters == 75290
    training = ["augmentation", "forward", "backward", "optimizer"]
    assert list(workload.parts) == (training if task == "train" else ["preprocessing", "forward"])
    assert all(part is None for part in list(workload.parts.values())[-1:])
    for part in (workload.step, *list(workload.parts.values())[:-1]):
        assert jax.eval_shape(part, workload.state, workload.batch) is not None


def test_prune_starts_half_pruned(monkeypatch):
    monkeypatch.setattr(tasks, "init_variables", quick_variables)
    workload = TASKS["prune"](tiny())
    sizes = [(m.sum(), m.size) for m in jax.tree.leaves(workload.state.masks) if m.ndim]
    assert sum(kept for kept, _ in sizes) == pytest.approx(sum(size for _, size in sizes) / 2, abs=1)
    assert list(workload.variants) == ["dense", "every"]
    assert all(m.ndim == 0 for m in jax.tree.leaves(workload.variants["dense"].state.masks))
    state, _ = jax.eval_shape(workload.step, workload.state, workload.batch)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, workload.state)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "mode"), [("train", "jit"), ("prune", "jit"), ("eval", "shard_map"), ("predict", "jit")]
)
def test_tasks(task, mode):
    result = bench(tiny(task=task, mode=mode, shares=True))
    assert result["traces"] == 1 and 0.5 < result["work"]["ratio"] < 2
    assert sum(result["shares"].values()) == pytest.approx(1)
    assert ("masking_overhead" in result, "latency_ms" in result) == (task == "prune", task == "predict")


def test_augment():
    def chosen(size):
        return {name: feeding.augmentations(size)[name] for name in ("random_crop", "train")}

    result = bench(tiny(task="augment"), augmentations=chosen)
    assert list(result["augments"]) == ["random_crop", "train"]
    for one in result["augments"].values():
        assert one["us_per_image"] == pytest.approx(1e6 / one["images_per_second"])
    assert result["images_per_second"] == result["augments"]["train"]["images_per_second"]
    assert result["counts"]["augmentations"]["repeats"] == 2 and "augmentations 2 x 2" in render(result)
    assert "us/image" in render(result)


@pytest.mark.parametrize("size", [8, 72])
def test_augmentations_keep_the_shape(size):
    image = jax.ShapeDtypeStruct((size, size, 3), jnp.float32)
    for name, augment in feeding.augmentations(size).items():
        assert jax.eval_shape(augment, jax.random.key(0), image).shape == image.shape, name


def test_input(monkeypatch):
    monkeypatch.setattr(feeding, "IMAGES", 32)
    monkeypatch.setattr(feeding, "TASKS", {"train": TOY["toy"]})
    result = bench(tiny(task="input"))
    assert set(result["pipelines"]) == {"resident", "encoded", "plain_pil"}
    for name in ("resident", "encoded"):
        one = result["pipelines"][name]
        waits = 1 - result["train_step_ms"] / one["fed_step_ms"]
        assert 0 <= one["wait_share"] < 1 and one["wait_share"] == pytest.approx(max(0, waits))
    assert "waiting" in render(result) and "pipelines 2 x 2, fed steps 2 x 2" in render(result)


# ---- as a user starts it ------------------------------------------------------------------------------------------


def test_command_line(capsys):
    partial(main, tasks=TOY)([*FLAGS, "--task", "toy", "--no-shares"])
    said = capsys.readouterr()
    result = json.loads(said.out.splitlines()[-1])
    assert result["task"] == "toy" and result["traces"] == 1 and "steps" in result["config"]
    assert "images/s" in said.err


@pytest.mark.slow
def test_importing_starts_no_device():
    program = "import train.bench.__main__, jax; print(jax._src.xla_bridge.backends_are_initialized())"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
