"""A prepared step: errors for steps that cannot be compiled or held, JAX's settings restored."""

from functools import partial

import jax
import pytest

from tests.train.bench.toy import FLAGS, TOY
from train.bench import prepared, work
from train.bench.__main__ import main
from train.errors import RunError

pytestmark = pytest.mark.usefixtures("quick_measuring")
toy_main = partial(main, tasks=TOY)
LINE = [*FLAGS, "--task", "toy"]


def test_unknown_compiler_option(fails):
    assert "xla_no_such" in fails(2, toy_main, [*LINE, "--xla", "xla_no_such=1"])


def test_batch_that_does_not_fit_is_refused_before_it_runs(monkeypatch, fails):
    monkeypatch.setattr(work, "available_bytes", lambda device: 1 << 21)
    monkeypatch.setattr(prepared.Stepper, "__call__", lambda self: pytest.fail("it was run"))
    said = fails(2, toy_main, [*LINE, "--task", "predict", "--batch", "4096"])
    assert "--batch 4096 does not fit: the compiled step needs" in said and "would" in said


def test_running_out_of_memory_is_one_line(monkeypatch, fails):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")
    monkeypatch.setattr(prepared.Stepper, "__call__", lambda self: (_ for _ in ()).throw(error))
    assert "out of memory with --batch 16: choose a smaller one" in fails(2, toy_main, LINE)
    error = jax.errors.JaxRuntimeError("INTERNAL: a bug")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        toy_main(LINE)


def test_failing_leaves_jax_as_it_was(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    with pytest.raises(RunError), prepared.cache_in(str(tmp_path)):
        raise RunError("stop")
    assert jax.config.jax_compilation_cache_dir == before
