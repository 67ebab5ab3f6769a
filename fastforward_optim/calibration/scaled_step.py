"""A learning rate that is scaled for the length of a step, and put back.

Knows param groups as torch has them, and nothing else.
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
    """Take a step at learning rates that are multiplied by ``scale`` meanwhile.

    No context manager: Ctrl-C on the way into one, or out of it, would leave the rates scaled.

    Args:
        step: what takes it, given the closure.
        closure: runs at the rates that were set; those that it sets are scaled and kept.
        param_groups: each with a rate.
        scale: what the rates are multiplied by.
    """
    rates = ScaledRates(param_groups, scale)
    try:
        rates.scale()
        # What stands in a closure's place may be something else.
        return step(rates.unscaled(closure) if callable(closure) else closure)
    finally:
        try:
            rates.put_back()
        except KeyboardInterrupt:
            rates.put_back()
            raise


class ScaledRates:
    """The learning rates of param groups, multiplied by a number and put back, bit for bit.

    A rate that is a tensor stays the same tensor: captured and compiled optimizers hold on to it.

    Args:
        param_groups: as torch has them, each with a rate.
        scale: what the rates are multiplied by.
    """

    def __init__(self, param_groups: list[dict[str, Any]], scale: float) -> None:
        self._groups = param_groups
        self._scale = scale
        self._set: list[Any] = []
        self._values: list[tuple[Tensor, Tensor]] = []

    def scale(self) -> None:
        """Multiply the rates, as they are set now."""
        if self._scale == 1:
            return
        rates = [group["lr"] for group in self._groups]
        # Groups may share one tensor: scale it once.
        tensors = {id(rate): rate for rate in rates if isinstance(rate, Tensor)}.values()
        # What is to be put back is known before anything is changed.
        self._set, self._values = rates, [(tensor, tensor.clone()) for tensor in tensors]
        for tensor in tensors:
            tensor.mul_(self._scale)
        for group, rate in zip(self._groups, rates, strict=True):
            if not isinstance(rate, Tensor):
                group["lr"] = rate * self._scale

    def put_back(self) -> None:
        """Set the rates to what they were; a second time does nothing more."""
        for tensor, value in self._values:
            tensor.copy_(value)
        # A step that adds a group: not zip's strict.
        for group, rate in zip(self._groups, self._set, strict=False):
            group["lr"] = rate

    def unscaled(self, closure: Closure) -> Closure:
        """A closure that runs while the rates are scaled, at the rates that were set.

        Those that it sets are scaled for the rest of the step, and kept after it.
        """

        def run(*args: Any, **kwargs: Any) -> Any:
            self.put_back()
            try:
                return closure(*args, **kwargs)
            finally:
                self.scale()

        return run
