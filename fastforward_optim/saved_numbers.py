"""Checks of the numbers in a checkpoint."""

from __future__ import annotations

import math
import reprlib
from typing import Any

from torch import Tensor

# The repr of a value, cut to a length that fits an error message.
shortened = reprlib.repr


def is_real(value: Any) -> bool:
    """Return True if ``value`` is a Python int or float; it may be infinite or NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Return True if ``value`` is a finite Python int or float."""
    return is_real(value) and math.isfinite(value)


def number_of(value: Any) -> Any:
    """Return the number in a tensor of one element; return any other value unchanged."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def as_count(value: Any, *, at_least: int) -> int:
    """Return ``value``. Raise ``ValueError`` unless it is an int >= ``at_least``."""
    if type(value) is not int or value < at_least:
        raise ValueError(f"expected a step count of at least {at_least}, got {shortened(value)}")
    return value
