"""Checks of numbers that a checkpoint holds."""

from __future__ import annotations

import math
import reprlib
from typing import Any

from torch import Tensor

# The beginning of a value, short enough for an error.
shortened = reprlib.repr


def is_real(value: Any) -> bool:
    """Whether it is a Python number, which may be infinite or NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether it is a Python number that is finite."""
    return is_real(value) and math.isfinite(value)


def number_of(value: Any) -> Any:
    """The number in a tensor of one element; anything else as it is."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def as_count(value: Any, *, at_least: int) -> int:
    """Return ``value``. Raise ``ValueError`` unless it is a whole number of at least that."""
    if type(value) is not int or value < at_least:
        raise ValueError(f"expected a step count of at least {at_least}, got {shortened(value)}")
    return value
