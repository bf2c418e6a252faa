"""The compile cache is reused, and the memory that XLA frees stays with the process."""

import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tests.reference.nets import Mlp
from train.errors import UsageError, one_line
from train.runtime import cpu_only, keep_compiled, run_once, use_own_precision
from train.state import init_variables


@pytest.fixture
def settings():
    """JAX's settings, put back afterwards."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_platforms")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_where_programs_are_kept(settings, monkeypatch, tmp_path):
    own = jax.config.jax_compilation_cache_dir
    assert str(keep_compiled("auto")) == own  # what JAX was told is left alone
    assert keep_compiled("none") is None and jax.config.jax_compilation_cache_dir is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = keep_compiled("auto")
    assert path.parent == tmp_path / "resnet-jax" / "compiled" and path.is_dir()
    assert jax.config.jax_compilation_cache_dir == str(path)
    assert keep_compiled(str(tmp_path / "mine")) == tmp_path / "mine" / "compiled"
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--cache .*file/x: cannot create it: Not a directory"):
        keep_compiled(str(tmp_path / "file" / "x"))


def test_platform_that_does_not_exist(fails, monkeypatch):
    def start():
        raise RuntimeError("Unable to initialize backend 'tpu4': Backend 'tpu4' is not in the list of known backends")

    assert "Unable to initialize backend 'tpu4'" in fails(2, start)
    monkeypatch.setenv(
        "JAX_PLATFORMS", "cuda"
    )  # of a platform that it was built without, JAX asserts that one is there
    assertion = compile("assert None is not None", "jax/_src/xla_bridge.py", "exec")
    assert "no device of the platforms in JAX_PLATFORMS=cuda" in fails(2, exec, assertion)
    with pytest.raises(AssertionError, match="ours"), one_line():
        raise AssertionError("ours")


def test_ctrl_c_in_a_callback_is_delivered_again(monkeypatch):
    """Python drops what a callback of the garbage collector raises, and a run would go on."""
    monkeypatch.setattr(sys, "unraisablehook", None)
    with pytest.raises(SystemExit, match="130"), one_line():
        sys.unraisablehook(SimpleNamespace(exc_type=KeyboardInterrupt, exc_value=KeyboardInterrupt()))
        time.sleep(60)


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), MemoryError("Out")])
def test_out_of_memory(error, fails):
    def run():
        raise error

    assert "out of memory: lower --batch" in fails(1, run)


def test_files_without_permission(fails):
    def start():
        raise PermissionError(13, "Permission denied", "/home/else/data")

    assert "no permission for /home/else/data" in fails(2, start)


def test_commands_compute_in_their_own_precision():
    before = jax.config.jax_numpy_dtype_promotion
    with jax.enable_x64(False):
        jax.config.update("jax_numpy_dtype_promotion", "strict")
        use_own_precision()
        assert jax.config.jax_numpy_dtype_promotion == "standard" == before
        assert jax.numpy.zeros(3).dtype == "float32"


@pytest.mark.slow
def test_second_start_compiles_nothing(command, tmp_path):
    """A first run fills the cache; a second one, of another seed, finds each program that takes time in it."""
    cache = tmp_path / "cache"

    def start(seed):
        fields = ("--steps", 3, "--width", 8, "--seed", seed, "--cache", cache, "--out", tmp_path / str(seed))
        done = command("train", *fields, env={"XLA_FLAGS": ""})  # programs that compile too fast are not kept
        assert done.returncode == 0, done.stderr
        # Small programs compile in about the shortest time that is kept, so which of them are kept is chance.
        return {path.name for path in cache.glob("compiled/*-cache") if path.stat().st_size > 25_000}

    first = start(0)
    assert {"jit_steps", "jit_eval_step"} <= {name.removesuffix("-cache").rpartition("-")[0] for name in first}
    assert start(1) == first


FAULTS = """
import resource, sys
from train.runtime import keep_memory
kept = keep_memory() if sys.argv[1] == "kept" else False
import jax, jax.numpy as jnp
f = jax.jit(lambda x: jnp.sort(x * 2) + jnp.sort(x + 1))  # temporaries as large as its input, 32 MB
x = jnp.ones(1 << 23)
for _ in range(2): f(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2): f(x).block_until_ready()
print(kept, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 2)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_memory_stays_with_the_process(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")

    def faults(how):
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        kept, count = done.stdout.split()
        assert kept == str(how == "kept")
        return int(count)

    assert faults("kept") < faults("plain") / 4


@pytest.mark.parametrize(("platforms", "expected"), [("cpu", True), ("cuda,cpu", False), ("tpu", False)])
def test_cpu_alone(settings, platforms, expected):
    jax.config.update("jax_platforms", platforms)
    assert cpu_only() == expected


def test_less_optimized_programs_draw_the_same_weights():
    def draw(key):
        return init_variables(Mlp(), key, (8, 8, 1))

    key = jax.random.key(0)
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        once, whole = run_once(draw, key), draw(key)
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), once, whole)
    several = jax.vmap(draw)(jax.random.split(key, 2))  # it may be traced, as `run_once` may not
    assert jax.tree.map(np.shape, several) == jax.tree.map(lambda x: (2, *x.shape), whole)
