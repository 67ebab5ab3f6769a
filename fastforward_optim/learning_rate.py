"""A learning rate that is scaled for the length of a step, and put back.

Knows param groups as torch has them, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

Closure = Callable[..., Any]


@contextmanager
def scaled_lr(
    param_groups: list[dict[str, Any]], scale: float
) -> Iterator[Callable[[Closure], Closure]]:
    """Multiply the learning rates by ``scale`` and put them back on leaving, bit for bit.

    A rate that is a tensor stays the same tensor: captured and compiled optimizers hold on to it.

    Yields:
        A function that wraps a closure which is to run inside: it runs at the rates that were set,
        and those that it sets are scaled for the rest of the step and kept after it.
    """
    if scale == 1:
        yield lambda closure: closure
        return
    put_back = _scale(param_groups, scale)

    def at_the_set_rate(closure: Closure) -> Closure:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal put_back
            put_back()
            try:
                return closure(*args, **kwargs)
            finally:
                put_back = _scale(param_groups, scale)

        return run

    try:
        yield at_the_set_rate
    finally:
        put_back()


def _scale(param_groups: list[dict[str, Any]], scale: float) -> Callable[[], None]:
    """Scale the rates; what is returned puts them back."""
    rates = [group["lr"] for group in param_groups]
    # Groups may share one tensor: scale it once.
    tensors = {id(rate): (rate, rate.clone()) for rate in rates if isinstance(rate, Tensor)}

    def put_back() -> None:
        for tensor, value in tensors.values():
            tensor.copy_(value)
        # A step that adds a group: not zip's strict.
        for group, rate in zip(param_groups, rates, strict=False):
            group["lr"] = rate

    for tensor, _ in tensors.values():
        tensor.mul_(scale)
    for group, rate in zip(param_groups, rates, strict=True):
        if not isinstance(rate, Tensor):
            group["lr"] = rate * scale
    return put_back
