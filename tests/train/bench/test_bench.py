"""`python -m train.bench` from end to end: the contents of a result, never speed."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from resnet_jax.resnet import MODELS
from tests.train.bench.toy import FLAGS, TOY, tiny, toy
from train.bench import bench, feeding, work
from train.bench.table import render
from train.bench.tasks import TASKS

pytestmark = pytest.mark.usefixtures("unoptimised")


@pytest.fixture(scope="module", autouse=True)
def small_ceilings():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "CPU_SIDES", (32, 64))
        patch.setattr(work, "COPIED", 1 << 16)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The result of the train task, with everything that it measures."""
    out, trace = tmp_path_factory.mktemp("bench"), tmp_path_factory.mktemp("trace")
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    result = bench(tiny(shares=True, out=str(out), profile=str(trace), peak=None))
    assert before == (jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs)
    return result, out, trace


def test_start(trained):
    start = trained[0]["start"]
    assert trained[0]["traces"] == 1
    assert (start["cache_hits"], start["cache_misses"]) == (1, 1)
    assert start["compile_cold_s"] > start["compile_warm_s"] > 0
    assert min(start["trace_s"], start["lower_s"], start["first_run_s"]) > 0
    assert start["executable_bytes"] > 10_000


def test_steady_state(trained):
    result, steady = trained[0], trained[0]["steady"]
    assert result["images_per_second"] == pytest.approx(16 / steady["step_ms"] * 1e3)
    assert result["images_per_second"] == steady["images_per_second"] == 8 * steady["images_per_second_per_device"]
    assert steady["step_ms_min"] <= steady["step_ms_q1"] <= result["step_ms"] <= steady["step_ms_q3"]
    assert steady["step_ms_q3"] <= steady["step_ms_p95"] <= steady["step_ms_max"]
    assert 0 < steady["dispatch_ms"] <= steady["step_ms_max"] and steady["pipelined_images_per_second"] > 0


def test_work(trained):
    result, done = trained[0], trained[0]["work"]
    forward = work.forward(MODELS["resnet8"](num_classes=10), 8)
    assert done["analytic_flops_per_image"] == 3 * forward.flops - forward.first
    assert 0.5 < done["ratio"] < 2
    achieved = done["analytic_flops_per_image"] * result["images_per_second"] / 1e12
    assert result["mfu"] == pytest.approx(achieved / result["ceilings"]["matmul_tflops"])
    assert result["ceilings"]["peak_source"] == "measured matrix products" and result["ceilings"]["copy_gb_s"] > 0
    assert (done["bound"] == "compute") == (done["intensity_flops_per_byte"] >= done["ridge_flops_per_byte"])
    assert result["parameters"] == 75290


def test_memory(trained):
    memory = trained[0]["memory"]
    kept = memory["arguments_bytes"] + memory["outputs_bytes"] + memory["temporaries_bytes"] + memory["code_bytes"]
    assert memory["planned_bytes"] == kept - memory["aliased_bytes"] > 4 * 75290
    assert memory["aliased_bytes"] > 4 * 75290  # the state is donated
    assert memory["peak_bytes"] > memory["planned_bytes"]


def test_shares(trained):
    shares = trained[0]["shares"]
    assert list(shares) == ["input", "augmentation", "forward", "backward", "optimizer"]
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) >= 0


def test_result_is_complete_and_on_file(trained):
    result, out, trace = trained
    path = out / "train-resnet8-16x8-auto-jit-cpu.json"
    assert result["file"] == str(path)
    assert json.loads(path.read_text()) == json.loads(json.dumps({k: v for k, v in result.items() if k != "file"}))
    assert result["config"]["image_size"] == 8 and result["devices"] == "8 x cpu" and result["versions"]["jax"]
    assert "load_average" in result and "environment_variables" in result and result["time"].endswith("Z")
    assert list(trace.rglob("*.xplane.pb"))
    table = render(result)
    assert "input" in table and "traced 1x" in table and f"written to {path}" in table


def test_nothing_is_overwritten(tmp_path):
    taken = ("predict-resnet8-16x8-auto-jit-cpu.json", "predict-resnet8-16x8-auto-jit-cpu-2.json")
    for name in taken:
        (tmp_path / name).write_text("mine")
    result = bench(toy(task="predict", out=str(tmp_path), cache="none"), tasks=TOY)
    assert result["file"].endswith("-3.json")
    assert [(tmp_path / name).read_text() for name in taken] == ["mine"] * 2
    assert result["start"]["compile_warm_s"] is None and result["start"]["cache_hits"] == 0


@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
@pytest.mark.parametrize("task", ["toy", "predict"])
def test_other_modes(mode, task):
    result = bench(toy(task=task, mode=mode, shares=True), tasks=TOY)
    assert result["traces"] == 1 and (result["start"]["cache_hits"], result["start"]["cache_misses"]) == (1, 1)
    assert (result["start"]["trace_s"] is None) == (mode == "pmap")
    assert sum(result["shares"].values()) == pytest.approx(1)
    assert ("input" in result["shares"]) == (task == "toy")


@pytest.mark.parametrize(("task", "mode"), [("eval", "shard_map"), ("predict", "jit")])
def test_evaluation(task, mode):
    result = bench(tiny(task=task, mode=mode, shares=True, cache="none"))
    assert result["traces"] == 1 and 0.5 < result["work"]["ratio"] < 2
    assert result["work"]["analytic_flops_per_image"] == work.forward(MODELS["resnet8"](num_classes=10), 8).flops
    assert list(result["shares"]) == ["preprocessing", "forward"]
    if task == "predict":
        assert set(result["latency_ms"]) == {"batch", "p50", "p95"} and result["latency_ms"]["batch"] == 1
        assert "latency" in render(result)


def test_variants_are_timed_with_the_step():
    result = bench(toy(task="prune"), tasks=TOY)
    over = result["masking_overhead"]
    assert 0 < over["low"] <= over["value"] <= over["high"]
    assert over["value"] == pytest.approx(result["step_ms"] / result["dense_step_ms"])
    assert result["new_masks_ms"] >= 0 and "masking" in render(result)


def test_prune_starts_half_pruned():
    workload = TASKS["prune"](tiny())
    sizes = [(m.sum(), m.size) for m in jax.tree.leaves(workload.state.masks) if m.ndim]
    assert sum(kept for kept, _ in sizes) == pytest.approx(sum(size for _, size in sizes) / 2, abs=1)
    assert list(workload.variants) == ["dense", "every"]
    assert all(m.ndim == 0 for m in jax.tree.leaves(workload.variants["dense"].state.masks))
    for one in (workload, *workload.variants.values()):
        state, _ = jax.eval_shape(one.step, one.state, one.batch)
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, one.state)


@pytest.mark.slow
def test_prune():
    result = bench(tiny(task="prune", cache=jax.config.jax_compilation_cache_dir))
    start = result["start"]
    assert (start["compile_cold_s"] is None) == (start["cache_hits"] == 1 and start["cache_misses"] == 0)
    assert result["traces"] == 1 and result["masking_overhead"]["value"] > 0


def test_augment():
    def chosen(size):
        return {name: feeding.augmentations(size)[name] for name in ("random_crop", "train")}

    result = bench(tiny(task="augment"), augmentations=chosen)
    assert list(result["augments"]) == ["random_crop", "train"]
    for one in result["augments"].values():
        assert one["us_per_image"] == pytest.approx(1e6 / one["images_per_second"])
    assert result["images_per_second"] == result["augments"]["train"]["images_per_second"]
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
        assert 0 <= one["wait_share"] < 1
        waits = 1 - result["train_step_ms"] / one["fed_step_ms"]
        assert one["wait_share"] == pytest.approx(max(0, waits))
    assert "waiting" in render(result)


# ---- as a user starts it ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_command_line(command):
    done = command("train.bench", *FLAGS, "--task", "predict", "--no-shares", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["task"] == "predict" and result["traces"] == 1 and "steps" in result["config"]
    assert "images/s" in done.stderr


def test_importing_starts_no_device():
    program = "import train.bench.__main__, jax; print(jax._src.xla_bridge.backends_are_initialized())"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
