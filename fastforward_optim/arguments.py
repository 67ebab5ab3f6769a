"""Checks of arguments: each error names the argument, its value and the remedy."""

from __future__ import annotations

import inspect
import numbers
import operator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


def check_callable(name: str, value: object, expected: str) -> None:
    """Raise ``TypeError`` unless ``value`` can be called and is not a class."""
    if not callable(value) or isinstance(value, type):
        shown = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
        raise TypeError(f"{name} must be {expected}, got {shown}")


def check_val_fn(val_fn: object) -> None:
    """Raise ``TypeError`` unless ``val_fn`` is a function that can be called without arguments."""
    must = "val_fn must be a function that returns the loss"
    remedy = "pass ValidationLoss(model, batches), or a function without arguments"
    kind = type(val_fn).__name__
    if isinstance(val_fn, nn.Module):
        raise TypeError(f"{must}, got the model itself ({kind}): {remedy}")
    if isinstance(val_fn, type):
        raise TypeError(f"{must}, got the class {val_fn.__name__}: construct it first")
    if not callable(val_fn):
        short = val_fn is None or isinstance(val_fn, int | float | str)
        raise TypeError(f"{must}, got {repr(val_fn) if short else 'a ' + kind}: {remedy}")
    if inspect.iscoroutinefunction(val_fn) or inspect.isgeneratorfunction(val_fn):
        raise TypeError(f"{must}, got an async or a generator function: {remedy}")
    try:
        signature = inspect.signature(val_fn)
    except (TypeError, ValueError):  # functions not written in Python may have no signature
        return
    try:
        signature.bind()
    except TypeError as error:
        raise TypeError(
            f"{must} without arguments, got one with the signature {signature}: pass "
            "lambda: val_fn(...), with its arguments"
        ) from error


def check_integer(name: str, value: Any, *, at_least: int, unit: str = "a number of steps") -> int:
    """Return ``value`` as an int. Raise an error unless it is an integer >= ``at_least``."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer of at least {at_least} ({unit}), got {value!r}")
    if number < at_least:
        raise ValueError(f"{name} must be at least {at_least} ({unit}), got {value!r}")
    return number


def as_float(loss: object) -> float:
    """Return ``loss`` as a float. Raise ``TypeError`` unless it is one real number.

    A tensor of one element counts as a number.
    """
    if isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex():
        return float(loss.item())
    if isinstance(loss, numbers.Real) and not isinstance(loss, bool):
        return float(loss)
    if isinstance(loss, Tensor):
        what = f"a tensor of shape {tuple(loss.shape)} and dtype {loss.dtype}"
    else:
        what = f"{loss!r} of type {type(loss).__name__}"
    raise TypeError(
        "val_fn must return the validation loss as one real number (a float or a tensor of one "
        f"element), got {what}. Reduce it to its mean, and check that val_fn has a return."
    )


def check_process_group(process_group: Any) -> Any:
    """Return ``process_group``. Raise ``TypeError`` unless it is a group, None or False."""
    if process_group is None or process_group is False:
        return process_group
    if dist.is_available() and isinstance(process_group, dist.ProcessGroup):
        return process_group
    raise TypeError(
        "process_group must be a torch.distributed.ProcessGroup (of a device mesh: "
        "mesh.get_group()), None for all ranks, or False for no group, got "
        f"{type(process_group).__name__}"
    )
