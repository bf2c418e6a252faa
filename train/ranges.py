"""Ranges of numbers: one table per config, {interval: fields}, and the one function that checks it."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from train.errors import UsageError

LOW = {"[": "at least", "(": "above"}
HIGH = {"]": "at most", ")": "below"}
INTEGERS = 2**31


def check_ranges(values: Mapping[str, Any], ranges: Mapping[str, str]) -> None:
    """Check numbers, and the elements of tuples of numbers, by field name; None and missing fields are in range.

    Args:
      ranges: {interval: field names}, such as {"[0, 1)": "optim.momentum ema"}. `inf` as a bound admits any finite
        number, of integers those of 32 bits; words after the interval are appended to the message.

    Raises:
      UsageError: a number out of range or not finite; the message gives the range.
    """
    for interval, names in ranges.items():
        for name in names.split():
            value = values.get(name)
            for number in value if isinstance(value, Iterable) else [] if value is None else [value]:
                if not _contains(interval, number):
                    raise UsageError(f"--{name.replace('_', '-')} must be {_described(interval, number)}, got {number}")


def _bounds(interval: str) -> tuple[str, str, str, str]:
    """Split `[0, 1) and more` into `[0`, `1`, `)`, ` and more`, with the opening bracket still on the first part."""
    end = min(place for place in (interval.find(")"), interval.find("]")) if place >= 0)
    low, high = interval[:end].split(", ")
    return low, high, interval[end], interval[end + 1 :]


def _contains(interval: str, number: float) -> bool:
    low, high, closing, _ = _bounds(interval)
    if high == "inf" and isinstance(number, int):
        high = str(INTEGERS)
    above = number >= float(low[1:]) if low[0] == "[" else number > float(low[1:])
    below = number <= float(high) if closing == "]" else number < float(high)
    return abs(number) < math.inf and above and below


def _described(interval: str, number: float) -> str:
    low, high, closing, note = _bounds(interval)
    bottom, top = f"{LOW[low[0]]} {low[1:]}", f" and {HIGH[closing]} {high}"
    if high == "inf":
        top = f" and below {INTEGERS}" if isinstance(number, int) and number >= INTEGERS else ""
        top = top if abs(number) < math.inf else " and finite"
    return f"{bottom}{top}{note}"
