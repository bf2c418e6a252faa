"""Preparing TFDS sets as ArrayRecord: the stock ones with TensorFlow, `digits` without."""

import contextlib
import difflib
import io
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from train.errors import UsageError
from train.reachable import connect


def prepare(name: str, root: Path) -> Path:
    """Prepare a stock TFDS set (or `digits`) as ArrayRecord under `root`; returns its folder.

    Raises:
      UsageError: no such set, TensorFlow is missing, the source cannot be reached (after seconds, not minutes).
    """
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    if name == "digits":
        from train.data.digits import Digits

        make: Callable[..., Any] = Digits
    else:
        stock = tfds.list_builders(with_community_datasets=False)  # listing those needs the network
        base = re.split("[/:]", name)[0]
        if base not in stock:
            near = " or ".join(difflib.get_close_matches(base, stock)) or "one of https://www.tensorflow.org/datasets"
            raise UsageError(f"TFDS has no set {base!r}: did you mean {near}?")
        try:
            import tensorflow  # noqa: F401
        except ImportError:
            raise UsageError('preparing a stock TFDS set needs TensorFlow: pip install -e ".[prepare]"') from None
        make = partial(tfds.builder, name)
    folder = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        builder = make(data_dir=root, file_format="array_record")
        folder = Path(builder.data_dir)
        if not folder.is_dir():
            if name != "digits":
                _check_reachable(builder.info.homepage)
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints; stdout is for results
                builder.download_and_prepare()
    except (AssertionError, ImportError, OSError, ValueError, tfds.download.DownloadError) as error:
        # TFDS raises AssertionError for files that must be downloaded by hand, such as ImageNet's.
        if folder is None or not folder.is_dir():  # otherwise a concurrent run has just prepared it
            raise UsageError(f"cannot prepare {name} in {root}: {error}") from None
    return folder


def _check_reachable(homepage: str) -> None:
    """Check once that the set's site can be reached, as TFDS retries a dead network for minutes."""
    host = urlsplit(homepage).hostname
    if not host or getproxies():
        return
    try:
        connect(homepage)
    except OSError as error:
        raise UsageError(f"cannot reach {host} to download the set: {error}") from None
