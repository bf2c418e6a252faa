"""Operations by convention, against published figures; a step against the ceilings."""

from itertools import pairwise

import jax.numpy as jnp
import pytest

from resnet_jax.parallel import make_mesh
from resnet_jax.resnet import MODELS
from train.bench import work


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
    assert work.training(found) == 3 * found.flops - found.first
    assert found.first == 2 * {32: 9 * 3 * 32**2, 224: 49 * 3 * 112**2}[size] * (16 if name == "resnet20" else 64)


@pytest.mark.parametrize(("flops", "bound"), [(100.0, "compute"), (30.0, "memory")])
def test_a_step_against_the_ceilings(flops, bound):
    class Compiled:
        cost_analysis = staticmethod(lambda: {"flops": flops / 3, "bytes accessed": 5.0})

    ceilings = {"peak_tflops": 1e-12, "copy_gb_s": 0.5e-9}
    found = work.figures(flops, Compiled, images=1, devices=4, seconds=200.0, ceilings=ceilings)
    assert found["mfu"] == flops / 200 and found["work"]["ratio"] == pytest.approx(4 / 3)
    # The step moves 4 x 5 bytes; the machine does 2 operations per byte.
    assert found["work"]["intensity_flops_per_byte"] == flops / 20
    assert found["work"]["ridge_flops_per_byte"] == pytest.approx(2)
    assert found["work"]["bound"] == bound


def test_ceilings(quick_measuring):
    found = work.ceilings(make_mesh(), jnp.float32, None)
    assert found["peak_tflops"] == found["matmul_tflops"] > 0 and found["copy_gb_s"] > 0
    assert found["peak_source"] == "measured matrix products"
    stated = work.ceilings(make_mesh(), jnp.float32, 2.0)
    assert (stated["peak_tflops"], stated["matmul_tflops"], stated["peak_source"]) == (16.0, None, "stated")


def test_short_calls_are_timed_in_chains(monkeypatch):
    """Calls that take less than dispatching them are waited for together, so that only the device's time counts."""
    now, calls, waits = [0.0], [], []

    def call():
        calls.append(now[0])
        now[0] += 1e-3

    monkeypatch.setattr(work.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(work.jax, "block_until_ready", lambda x: waits.append(len(calls)))
    assert work._quickest(call) == pytest.approx(1e-3)
    chains = [after - before for before, after in pairwise(waits)]
    assert waits[0] == chains[0] == 1 and all(19 <= chain <= 20 for chain in chains[1:])
