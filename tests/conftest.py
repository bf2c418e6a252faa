"""Every test runs on 8 forced CPU devices, with warnings and silent rank promotion as errors, without a network."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

CACHE = Path(__file__).parent.parent / ".pytest_cache" / "jax"

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Nets that several tests, or several processes of one test, compile are compiled once.
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


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
