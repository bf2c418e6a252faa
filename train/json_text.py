"""The text of everything that is written or printed as JSON."""

import json
import math
from typing import Any

import numpy as np


def to_json(content: Any, *, indent: int | None = None) -> str:
    """Format as JSON (RFC 8259), which has no NaN and no infinity: both become null. NumPy arrays become lists."""
    return json.dumps(_plain(content), indent=indent, allow_nan=False)


def _plain(content: Any) -> Any:
    match content:
        case dict():
            return {name: _plain(value) for name, value in content.items()}
        case list() | tuple():
            return [_plain(value) for value in content]
        case np.ndarray() | np.generic():
            return _plain(content.tolist())
        case float() if not math.isfinite(content):
            return None
    return content
