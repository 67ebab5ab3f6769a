"""Checks of arguments: each error names the argument, its value and the remedy."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def check_callable(name: str, value: object, expected: str) -> None:
    """Raise ``TypeError`` unless ``value`` can be called and is no class."""
    if not callable(value) or isinstance(value, type):
        shown = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
        raise TypeError(f"{name} must be {expected}, got {shown}")


def check_integer(name: str, value: Any, *, at_least: int) -> int:
    """``value`` as an int; ``TypeError`` if it is none, ``ValueError`` if it is too small."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(
            f"{name} must be an integer of at least {at_least} (a number of steps), got {value!r}"
        )
    if number < at_least:
        raise ValueError(f"{name} must be at least {at_least} (a number of steps), got {value!r}")
    return number


def check_params(params: Iterable[Tensor], optimizer: Optimizer) -> list[Tensor]:
    """``params`` as a list; an error unless they are tensors that ``optimizer`` updates."""
    if isinstance(params, Tensor):
        raise TypeError("params must be an iterable of tensors, got one tensor; pass [tensor]")
    if not isinstance(params, Iterable):
        raise TypeError(f"params must be an iterable of tensors, got {params!r}")
    chosen = list(params)
    wrong = [value for value in chosen if not isinstance(value, Tensor)]
    if wrong:
        raise TypeError(
            f"params must be an iterable of tensors, got a {type(wrong[0]).__name__} in it "
            f"({wrong[0]!r}); pass model.parameters(), not named_parameters() or param groups"
        )
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    unknown = [value for value in chosen if id(value) not in known]
    if unknown:
        raise ValueError(
            f"params holds {len(unknown)} of {len(chosen)} tensors that optimizer does not update "
            f"(the first has shape {tuple(unknown[0].shape)}); choose among those in "
            "optimizer.param_groups"
        )
    return chosen
