"""Scale the learning rate for one step, and restore it.

This module handles torch's param groups and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Closure = Callable[..., Any]


def step_scaled(
    step: Callable[[Closure | None], Any],
    closure: Closure | None,
    param_groups: list[dict[str, Any]],
    scale: float,
) -> Any:
    """Take a step at learning rates multiplied by ``scale``, then restore the rates.

    This is not a context manager: Ctrl-C while entering or leaving one would leave the rates
    scaled.

    Args:
        step: takes the step; called with the closure.
        closure: runs at the unscaled rates. Rates that it sets are scaled for the step and kept.
        param_groups: torch's param groups, each with a rate.
        scale: multiplier of the rates.
    """
    rates = ScaledRates(param_groups, scale)
    try:
        rates.scale()
        # The argument may be something other than a closure.
        return step(rates.unscaled(closure) if callable(closure) else closure)
    finally:
        try:
            rates.put_back()
        except KeyboardInterrupt:
            rates.put_back()
            raise


class ScaledRates:
    """The learning rates of param groups, multiplied by a number and restored bit for bit.

    A rate that is a tensor stays the same tensor, because captured and compiled optimizers keep a
    reference to it.

    Args:
        param_groups: torch's param groups, each with a rate.
        scale: multiplier of the rates.
    """

    def __init__(self, param_groups: list[dict[str, Any]], scale: float) -> None:
        self._groups = param_groups
        self._scale = scale
        self._set: list[Any] = []
        self._values: list[tuple[Tensor, Tensor]] = []

    def scale(self) -> None:
        """Multiply the current rates."""
        if self._scale == 1:
            return
        rates = [group["lr"] for group in self._groups]
        # Groups may share one tensor: scale it once.
        tensors = {id(rate): rate for rate in rates if isinstance(rate, Tensor)}.values()
        # Save the rates before changing any, so that an interrupt can be undone.
        self._set, self._values = rates, [(tensor, tensor.clone()) for tensor in tensors]
        for tensor in tensors:
            tensor.mul_(self._scale)
        for group, rate in zip(self._groups, rates, strict=True):
            if not isinstance(rate, Tensor):
                group["lr"] = rate * self._scale

    def put_back(self) -> None:
        """Restore the rates; calling it again has no effect."""
        for tensor, value in self._values:
            tensor.copy_(value)
        # Not strict, because a step may add a group.
        for group, rate in zip(self._groups, self._set, strict=False):
            group["lr"] = rate

    def unscaled(self, closure: Closure) -> Closure:
        """Return a closure that runs at the unscaled rates while the rates are scaled.

        Rates that it sets are scaled for the rest of the step, and kept after it.
        """

        def run(*args: Any, **kwargs: Any) -> Any:
            self.put_back()
            try:
                return closure(*args, **kwargs)
            finally:
                self.scale()

        return run
