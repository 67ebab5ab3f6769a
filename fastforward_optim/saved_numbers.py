"""Checks of numbers that a checkpoint holds: whoever edited it may have left anything there."""

from __future__ import annotations

import sys
from typing import Any

# Of a count of steps: ranks compare them as float64, which holds every whole number up to here.
LARGEST = 2**53


def is_real(value: Any) -> bool:
    """Whether it is a Python number, which may be infinite or NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether it is a Python number that a float can hold."""
    return is_real(value) and abs(value) <= sys.float_info.max  # isfinite raises at larger integers


def as_count(value: Any, *, at_least: int) -> int:
    """``value``, which must be a number of steps: a ``ValueError`` if not."""
    if type(value) is not int or not at_least <= value <= LARGEST:
        raise ValueError(f"{value!r} is no number of steps")
    return value
