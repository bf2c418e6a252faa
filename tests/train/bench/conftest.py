"""Measuring that takes no longer than compiling the step that is measured."""

import pytest

from train import timing
from train.bench import work


@pytest.fixture(scope="package")
def quick_measuring():
    """Ceilings of tiny matrices and a tiny copy; no collection of what other tests left, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "CPU_SIDES", (32, 64))
        patch.setattr(work, "CPU_COPIED", 1 << 16)
        patch.setattr(work, "CHAIN", 2e-3)
        patch.setattr(timing.gc, "collect", lambda: 0)
        yield
