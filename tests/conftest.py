"""Every test runs on 8 forced CPU devices, without a network; warnings and implicit rank promotion are errors."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parent.parent
# A cache for each process of pytest-xdist: JAX does not write its files in one piece.
CACHE = ROOT / ".pytest_cache" / "jax" / os.environ.get("PYTEST_XDIST_WORKER", "main")

# The tests' programs take longer to compile than to run. XLA's older CPU emitters, which jax 0.11 no longer has, need a
# third of the time; code generation in one part saves more.
FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
FLAGS += ["--xla_cpu_use_fusion_emitters=false"] if jax.__version_info__ < (0, 11) else []
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
# oneDNN's threads wait for each other actively, which two processes on two cores make slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Nets that several tests, or several processes of one test, compile are compiled once.
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
# How fast a machine is decides about no test.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")


def on_one_device():
    """The runs of a test, or of a module's tests, use one device."""
    from resnet_jax.parallel import make_mesh

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.session.make_mesh", lambda: make_mesh(jax.devices()[:1]))
        yield


one_device = pytest.fixture(on_one_device)
one_device_for_all = pytest.fixture(on_one_device, scope="module", name="one_device_for_all")


@pytest.fixture(scope="session")
def tfds_dir(tmp_path_factory):
    """A TFDS data_dir of the tests' own, also for the command lines they start."""
    path = tmp_path_factory.mktemp("tfds")
    os.environ["TFDS_DATA_DIR"] = str(path)
    return path


@pytest.fixture(scope="session")
def images():
    """uint8 [16, 8, 8, 3] and their labels int32 [16], 4 classes."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (16, 8, 8, 3), dtype=np.uint8), rng.integers(0, 4, 16).astype(np.int32)


@pytest.fixture(scope="session")
def command(tfds_dir):
    """`command("train", "--seed", 1)` runs `python -m train --seed 1` as a user does, with warnings as errors."""

    environment = {
        **os.environ,
        "TFDS_DATA_DIR": str(tfds_dir),
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    }

    def run(*arguments, start=False, before=(), env=()):
        line = [*before, sys.executable, "-W", "error", "-m", *map(str, arguments)]
        options = {"cwd": ROOT, "text": True, "env": {**environment, **dict(env)}}
        if start:
            return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
        return subprocess.run(line, capture_output=True, check=False, **options)

    return run


@pytest.fixture(scope="session")
def killed(command):
    """`killed("train", "--seed", 1, when=f)` starts a command, kills it when `f()` holds, and returns its exit code.

    `f()` holds at the kill too: the process is stopped and asked again first. It may go on for `after` seconds before.
    """

    def run(*arguments, when, after=0.0):
        process, deadline = command(*arguments, start=True), time.monotonic() + 600
        try:
            while True:
                while not when():
                    assert process.poll() is None, f"it ended too early: {process.communicate()}"
                    assert time.monotonic() < deadline, "it takes too long"
                    time.sleep(0.001)
                time.sleep(after)
                os.kill(process.pid, signal.SIGSTOP)
                os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
                assert process.poll() is None, f"it ended too early: {process.communicate()}"
                if when():
                    break
                os.kill(process.pid, signal.SIGCONT)
        finally:
            process.kill()
            process.communicate()
            # It may have been writing a file of the cache, which all later processes would read.
            for path in CACHE.glob("*"):
                if path.stat().st_mtime > time.time() - 2:
                    path.unlink()
        return process.returncode

    return run


@pytest.fixture
def fails(capsys):
    """`fails(2, main, [...])`: one line on stderr, this exit code, nothing on stdout; returns the line."""
    from train.errors import one_line

    def run(code, main, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop, one_line():
            main(*arguments)
        said = capsys.readouterr()
        assert stop.value.code == code
        assert said.out == ""
        line = said.err.splitlines()[-1]
        assert line.startswith("error: ")
        assert "Traceback" not in said.err
        return line

    return run
