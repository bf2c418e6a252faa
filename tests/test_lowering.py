"""Steps lower for TPU and CUDA as runs build them there, and contain nothing that only a CPU can do.

Lowering needs no such device. It does not show that a step compiles there, or that its numbers are right.
"""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

from pretrain.config import PretrainConfig, ViewConfig
from pretrain.presets import DIGITS
from pretrain.run import run as pretrain_run
from resnet_jax import onednn
from resnet_jax.layers import CifarStem
from resnet_jax.parallel import compile_step, make_mesh, sum_over
from resnet_jax.resnet import MODELS, BasicBlock, ResNet
from tests.reference.nets import CLASSES, Mlp, tiny_state, tiny_tx
from tests.test_architecture import FILES
from tests.train.detect.quick_run import CONFIG
from train.config import AugmentConfig, OptimConfig, TrainConfig
from train.data import from_arrays
from train.data.batches import batch_like
from train.detect.run import run as detect_run
from train.from_config import compute_dtype, make_kernels
from train.prune.config import PruneConfig, PruningConfig
from train.prune.run import run as prune_run
from train.run import run
from train.runtime import compiler_options
from train.session import Session
from train.state import init_variables
from train.steps import train_step
from train.weights import save_encoder

BACKENDS = {"tpu": "tpu", "cuda": "gpu"}  # platforms of `jax.export`, and their names in `jax.default_backend()`
# Code outside the module that it may call. Kernels of our own for one of these platforms would be listed here.
CALLS = {"tpu": set(), "cuda": {"cu_threefry2x32_ffi"}}  # JAX's random numbers
TWO_BLOCKS = partial(ResNet, (1, 1), BasicBlock, stem=CifarStem, width=8)
CONVOLUTIONS = 6  # of TWO_BLOCKS: the stem, two in each block, one in a shortcut
ALIKE = {"model": "two_blocks", "batch": 32}
PIXELS = {"mean": (0.5,) * 3, "std": (0.2,) * 3}

MODES = ("jit", "shard_map")
JIT_TPU, SHARD_MAP_CUDA = ("jit", "tpu"), ("shard_map", "cuda")  # each mode and each platform once
CROSSED = ("jit", "cuda"), ("shard_map", "tpu")


def everywhere(cases, **fast):
    """Parametrise over cases, and over modes and platforms: by default only the `fast` ones of each case run.

    Cases with fast ones run in all combinations.
    """
    values = []
    for case in cases:
        for where in (JIT_TPU, SHARD_MAP_CUDA, *(CROSSED if case in fast else ())):
            marks = () if where in fast.get(case, ()) else pytest.mark.slow
            values.append(pytest.param(case, *where, marks=marks))
    return pytest.mark.parametrize(("case", "mode", "platform"), values)


class Captured(Exception):
    """A run has built all its programs, and is stopped."""


@pytest.fixture(scope="module", autouse=True)
def two_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "two_blocks", TWO_BLOCKS)
        yield


@pytest.fixture(scope="module")
def dataset():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (160, 8, 8, 3)).astype(np.uint8)
    return from_arrays(images, rng.integers(0, CLASSES, 160), classes=["a", "b", "c", "d"])


def lower(step, arguments, platform):
    """Lower a step of `compile_step` for a platform and check what the module needs there; returns its text."""
    exported = jax.export.export(step, platforms=[platform])(*arguments)
    assert exported.nr_devices == jax.device_count()
    assert not (exported.ordered_effects or exported.unordered_effects), "has side effects"
    text = exported.mlir_module()
    calls = re.findall(r'custom_call @"?([^\s"(]+)|call_target_name = "([^"]+)"', text)
    outside = {a or b for a, b in calls} - CALLS[platform]
    assert not outside, f"calls {', '.join(outside)}"
    assert not re.search(r"[<x]f64\b", text), "computes in float64"  # tensor<f64>, tensor<8xf64>
    return text


def lower_run(run, config, dataset, platform, backend=None):
    """Lower all programs that a run hands to the compiler on this backend, the train step first."""
    found = []

    def capture(pool, step, state, batches, **options):
        found.extend(lower(step, (state, batch), platform) for batch in batches)
        return lambda: (step, 0.0)

    def stop(session, state):
        raise Captured

    with pytest.MonkeyPatch.context() as patch:
        # All that the code asks about the backend, see `test_only_the_default_backend_decides`.
        patch.setattr(jax, "default_backend", lambda: backend or BACKENDS[platform])
        patch.setattr("train.session.compile_in", capture)
        patch.setattr(Session, "resume", stop)
        with pytest.raises(Captured):
            run(config, dataset=dataset)
    return found


def convolutions(text):
    """Number of convolutions in a module, all of which are in bfloat16."""
    dtypes = re.findall(r"stablehlo\.convolution.*-> tensor<[0-9x]*x(\w+)>", text)
    assert set(dtypes) == {"bf16"}
    assert len(dtypes) == text.count("stablehlo.convolution")
    return len(dtypes)


# ---- what runs compile -----------------------------------------------------------------------------------------------

SUPERVISED = {
    "usual": {
        "augment": AugmentConfig(crop_padding=1, flip=True, cutout=2, mixup=0.2, cutmix=1.0, **PIXELS),
        "optim": OptimConfig(nesterov=True, weight_decay=1e-3, clip_norm=1.0),
    },
    "rand_augment": {
        "augment": AugmentConfig(resized_crop=8, rand_augment=9, color_jitter=0.3, erasing=0.2, **PIXELS),
        "optim": OptimConfig(name="lamb", schedule="one_cycle"),
        "loss": "sigmoid",
    },
    "trivial_augment": {
        "augment": AugmentConfig(crop_padding=1, crop_mode="reflect", trivial_augment=True, mixup=0.2, **PIXELS),
        "optim": OptimConfig(name="lars", schedule="step", clip_norm=1.0),
    },
}


@everywhere(SUPERVISED, usual=(JIT_TPU, SHARD_MAP_CUDA))
def test_supervised(case, mode, platform, dataset, tmp_path):
    options = {"ema": 0.99, "drop_path": 0.1, "label_smoothing": 0.1, "accumulate": 4}
    config = TrainConfig(out=str(tmp_path / "run"), mode=mode, **ALIKE, **options, **SUPERVISED[case])
    step, evaluation = lower_run(run, config, dataset, platform)
    assert convolutions(evaluation) == CONVOLUTIONS
    # The first of the parts, and the loop over the others, have all passes: forward, and backward to every kernel and
    # every input except the image.
    assert convolutions(step) == 2 * (3 * CONVOLUTIONS - 1)


@everywhere(DIGITS, simclr=[JIT_TPU], dino=[SHARD_MAP_CUDA])
def test_contrastive(case, mode, platform, dataset, tmp_path):
    small = {"small_views": 2, "small_crop": 4} if case in ("swav", "dino") else {}
    views = ViewConfig(resized_crop=8, blur=(0.5, 0.1), solarize=(0.0, 0.2), **small, **PIXELS)
    config = PretrainConfig(out=str(tmp_path / "run"), mode=mode, **ALIKE, augment=views, objective=DIGITS[case])
    programs = lower_run(pretrain_run, config, dataset, platform)
    assert len(programs) == 3  # the step, the features of images, and those of pairs of views
    for program in programs:
        assert convolutions(program)


PRUNING = {
    "gradual": {"schedule": "gradual"},
    "rigl": {"schedule": "rigl"},
    "set": {"schedule": "set", "scope": "erk"},
    "acdc": {"schedule": "acdc", "score": "taylor", "scope": "lamp"},
    "n:m": {"schedule": "gradual", "structure": "2:4", "score": "random"},
    "channels": {"schedule": "gradual", "structure": "channels", "score": "norm_scale", "sparsity": 0.5},
    "one_shot": {"schedule": "one_shot", "structure": "4x1"},
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file with weights of TWO_BLOCKS, all of them zero."""
    path = tmp_path_factory.mktemp("weights") / "two_blocks.safetensors"
    model = TWO_BLOCKS(num_classes=CLASSES)
    shapes = jax.eval_shape(lambda key: init_variables(model, key, (8, 8, 3)), jax.random.key(0))
    save_encoder(path, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes))
    return path


@everywhere(PRUNING, gradual=[JIT_TPU], rigl=[SHARD_MAP_CUDA])
def test_pruning(case, mode, platform, dataset, weights, tmp_path):
    pruning = PruningConfig(every=4, epochs=10, **PRUNING[case])
    config = PruneConfig(
        out=str(tmp_path / "run"), init=str(weights), mode=mode, **ALIKE, augment=AugmentConfig(**PIXELS), prune=pruning
    )
    step, evaluation = lower_run(prune_run, config, dataset, platform)
    assert convolutions(step) == 3 * convolutions(evaluation) - 1
    # Masks change in some steps only: see `resnet_jax.mask_schedules`.
    assert ("stablehlo.case" in step) == (case != "one_shot")


@everywhere(["faster_rcnn", "retinanet"], faster_rcnn=[JIT_TPU])
def test_detection(case, mode, platform, tmp_path):
    config = replace(CONFIG, out=str(tmp_path / "run"), mode=mode, kernels="auto", detector=case)
    step, evaluation = lower_run(detect_run, config, None, platform)
    assert convolutions(step) > convolutions(evaluation)
    assert "stablehlo.while" in evaluation  # the rounds of NMS


def test_only_the_default_backend_decides():
    """Steps depend on the device only through `jax.default_backend()`, which `lower_run` patches."""
    for path in FILES:
        if "bench" not in path.parts:
            assert not re.search(r"(?<!\bsys)\.platform\b|import default_backend", path.read_text()), path


@pytest.mark.parametrize("backend", BACKENDS.values())
def test_nothing_chosen_for_the_cpu(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert compute_dtype("auto") == jnp.bfloat16
    for dtype in (jnp.float32, jnp.bfloat16):
        assert compiler_options(dtype) == {}
        for mode in MODES:
            assert make_kernels("auto", mode, dtype) == ({}, "")


@pytest.mark.parametrize(("backend", "loops"), [("tpu", 1), ("gpu", 1), ("cpu", 0)])
def test_accumulation_is_unrolled_only_on_cpu(backend, loops, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    state = jax.eval_shape(lambda: tiny_state(tiny_tx(), model=Mlp()))
    step = compile_step(partial(train_step, model=Mlp(), tx=tiny_tx(), accumulate=4), mesh=make_mesh())
    assert lower(step, (state, batch_like(32, (8, 8, 3))), "tpu").count("stablehlo.while") == loops


# ---- what is refused -------------------------------------------------------------------------------------------------


def double(x):
    with jax.enable_x64(True):
        return jnp.full(2, x, jnp.float64).sum().astype(jnp.float32)


def debugged(x):
    jax.debug.print("{}", x)
    return x


LIKE = jax.ShapeDtypeStruct((), jnp.float32)
BACKEND = "callback|specified backend cpu"  # JAX places a callback on the devices of the mesh, which are CPUs here
# What a step may do on CPU, and how that is refused.
REFUSED = {
    "callback": (lambda x: jax.pure_callback(np.sin, LIKE, x), BACKEND),
    "io_callback": (lambda x: io_callback(np.sin, LIKE, x, ordered=True), BACKEND),
    "debug_print": (debugged, BACKEND),
    "onednn": (lambda x: jax.ffi.ffi_call("resnet_jax_onednn_norm", LIKE)(x), "resnet_jax_onednn_norm"),
    # LAPACK is in JAX's own list of calls to allow, whatever the platform.
    "lapack": (lambda x: jax.ffi.ffi_call("lapack_sgetrf_ffi", LIKE)(x), "calls lapack_sgetrf_ffi"),
    "float64": (double, "computes in float64"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("platform", BACKENDS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_only_a_cpu_can_do_is_refused(name, platform, mode):
    def program(change):
        def step(state, batch, *, axis_name=None):
            return change(state + sum_over(batch.sum(), axis_name))

        return compile_step(step, mesh=make_mesh(), mode=mode)

    change, message = REFUSED[name]
    arguments = LIKE, jax.ShapeDtypeStruct((8,), jnp.float32)
    assert "stablehlo.sine" in lower(program(jnp.sin), arguments, platform)
    with pytest.raises((AssertionError, NotImplementedError, ValueError), match=message):
        lower(program(change), arguments, platform)


def test_onednn_in_a_run_is_refused(dataset, tmp_path):
    """A run as it is built on CPU does not lower for a different platform."""
    try:
        onednn.check(jnp.float32)
    except onednn.Unavailable as error:
        pytest.skip(str(error))
    config = TrainConfig(out=str(tmp_path / "run"), mode="shard_map", **ALIKE, augment=AugmentConfig(**PIXELS))
    with pytest.raises(ValueError, match="resnet_jax_onednn_convolution"):
        lower_run(run, config, dataset, "tpu", backend="cpu")
