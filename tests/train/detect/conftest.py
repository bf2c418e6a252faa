"""A finished run of detection."""

import contextlib
import io

import pytest

from tests.conftest import on_one_device
from tests.train.detect.quick_run import quick
from train.detect.__main__ import main


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """(stdout, stderr, run folder) of one quick run."""
    out = tmp_path_factory.mktemp("detect") / "quick"
    one_device, said, told = contextlib.contextmanager(on_one_device), io.StringIO(), io.StringIO()
    with one_device(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
        main(quick(out))
    return said.getvalue(), told.getvalue(), out
