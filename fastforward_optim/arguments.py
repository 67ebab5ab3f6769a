"""Checks of arguments: each error names the argument, its value and the remedy."""

from __future__ import annotations

import numbers
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


def check_integer(name: str, value: Any, *, at_least: int, unit: str = "a number of steps") -> int:
    """``value`` as an int; ``TypeError`` if it is none, ``ValueError`` if it is too small."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer of at least {at_least} ({unit}), got {value!r}")
    if number < at_least:
        raise ValueError(f"{name} must be at least {at_least} ({unit}), got {value!r}")
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


def check_optimizer(optimizer: object, wrapper: type) -> None:
    """Raise unless ``optimizer`` is an optimizer that is not wrapped in ``wrapper`` already."""
    if isinstance(optimizer, type):
        raise TypeError(
            f"optimizer must be an instance, got the class {optimizer.__name__}; construct it "
            f"first: FastForward({optimizer.__name__}(params, lr=...), val_fn)"
        )
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            "optimizer must be an instance of torch.optim.Optimizer, got "
            f"{type(optimizer).__name__}; pass the optimizer itself"
        )
    if isinstance(optimizer, wrapper):
        raise ValueError(
            "optimizer is wrapped in FastForward already; wrap it once, or pass "
            "optimizer.optimizer, the wrapped one"
        )


def check_learning_rates(optimizer: Optimizer) -> None:
    """Raise ``ValueError`` unless each param group has a learning rate, a number or a tensor."""
    for index, group in enumerate(optimizer.param_groups):
        rate = group.get("lr")
        if isinstance(rate, bool) or not isinstance(rate, numbers.Real | Tensor):
            raise ValueError(
                f"calibrate_lr=True needs a learning rate in every param group, group {index} of "
                f"{type(optimizer).__name__} has lr = {rate!r}; pass lr=, or calibrate_lr=False"
            )
