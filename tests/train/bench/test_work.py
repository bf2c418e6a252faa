"""Operations by convention, against published figures; a step against the ceilings."""

import jax
import jax.numpy as jnp
import numpy as np
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


def test_short_links_are_timed_in_chains(monkeypatch):
    """Programs last so long that launching one and waiting for it, 0.2 ms here, hardly count."""
    now, counts = [0.0], []

    def run(count):
        counts.append(count)
        now[0] += 2e-4 + count * 1e-3

    monkeypatch.setattr(work, "CHAIN", 0.05)
    monkeypatch.setattr(work.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(work.jax, "block_until_ready", lambda x: x)
    assert work._quickest(run) == pytest.approx(1e-3, rel=0.01)
    # One that compiles, one that is timed alone, and four that last.
    assert counts[:2] == [1, 1] and len(counts) == 6
    assert all(0.8 * work.CHAIN <= count * 1e-3 <= work.CHAIN for count in counts[2:])


def test_no_link_of_a_chain_is_left_out(quick_measuring, monkeypatch):
    """The values show that every product and every pass was computed."""
    results = {}

    def run_thrice(run):
        start, end = np.array(run(0)), np.array(run(3))
        results[start.ndim] = start, end
        return 1.0

    monkeypatch.setattr(work, "_quickest", run_thrice)
    monkeypatch.setattr(work, "CPU_SIDES", (16,))
    work.ceilings(make_mesh(), jnp.float32, None)
    start, end = results[1]
    np.testing.assert_array_equal(end, 2 - (1 - (0 - start)))
    x, a, b = (
        np.asarray(jax.random.normal(key, (8 * 16, 16))).reshape(8, 16, 16) / 4
        for key in jax.random.split(jax.random.key(0), 3)
    )
    for _ in range(3):
        x = x @ a @ b
    np.testing.assert_allclose(results[2][1].reshape(8, 16, 16), x, rtol=1e-4, atol=1e-5)
