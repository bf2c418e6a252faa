"""Comparisons of trees of arrays that the tests share."""

from typing import Any

import jax
import numpy as np

from resnet_jax.tree import leaves


def assert_equal(got: Any, want: Any) -> None:
    """Assert that two trees have equal values at the same paths."""
    got, want = leaves(got), leaves(want)
    assert got.keys() == want.keys(), f"not in both: {sorted(got.keys() ^ want.keys())}"
    for path, leaf in want.items():
        np.testing.assert_array_equal(got[path], leaf, err_msg=path)


def assert_close(got: Any, want: Any, **tolerance: float) -> None:
    """Assert that two trees of one structure are equal up to `atol` and `rtol`, as in NumPy's `assert_allclose`."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), jax.device_get(got), jax.device_get(want))


def assert_near(got: Any, want: Any, tolerance: float = 1e-5, what: str = "", floor: float = 1e-3) -> None:
    """Assert that two trees are equal up to `tolerance` of the largest value of each leaf, or of `floor` if larger."""
    for (path, leaf), other in zip(leaves(want).items(), jax.tree.leaves(got), strict=True):
        assert np.shape(other) == np.shape(leaf), f"{what} {path}"
        error = np.abs(np.asarray(other, np.float64) - leaf).max(initial=0) / max(np.abs(leaf).max(initial=0), floor)
        assert error <= tolerance, f"{what} {path}: {error:.2e}"
