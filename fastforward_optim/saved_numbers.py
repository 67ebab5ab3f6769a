"""Checks of numbers that a checkpoint holds: whoever edited it may have left anything there."""

from __future__ import annotations

import reprlib
import sys
from typing import Any

import torch
from torch import Tensor

# Of a count of steps: ranks compare them as float64, which holds every whole number up to here.
LARGEST = 2**53


def is_real(value: Any) -> bool:
    """Whether it is a Python number, which may be infinite or NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether it is a Python number that a float can hold."""
    return is_real(value) and abs(value) <= sys.float_info.max  # isfinite raises at larger integers


def number_of(value: Any) -> Any:
    """The number in a tensor of one element; anything else as it is."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        return value
    has_data = value.layout == torch.strided and not value.is_meta
    return value.item() if has_data else value


def shortened(value: Any) -> str:
    """Its beginning, in words that fit into an error, whatever it is."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return f"{type(value).__name__} of too many digits"


def as_count(value: Any, *, at_least: int) -> int:
    """``value``, which must be a number of steps: a ``ValueError`` if not."""
    if type(value) is not int or not at_least <= value <= LARGEST:
        raise ValueError(f"{shortened(value)} is no number of steps")
    return value
