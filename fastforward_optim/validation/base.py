"""The interface of a validation function, and the adapter for other callables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ..arguments import as_float
from ..search.evidence import Measurement


class ValidationFunction:
    """Base class of a ``val_fn`` that does more than return a number.

    Implement :meth:`__call__`, and optionally :meth:`measure`. The other methods do nothing by
    default; override the ones you need. ``ValidationLoss`` is an example. A plain function needs
    none of this, and a class with some of these methods works without deriving from this one.

    Examples:
        >>> class Rotating(ValidationFunction):
        ...     stage = -1
        ...     def new_stage(self):
        ...         self.stage += 1
        ...     def __call__(self):
        ...         return loss_of(model, batches[self.stage % len(batches)])
        >>> optimizer = FastForward(AdamW(params), Rotating())
    """

    def __call__(self) -> Any:
        """Return the loss at the current weights, without changing them.

        Returns:
            A number or a tensor of one element, or a pair ``(loss, weight)``, where ``weight`` is
            the number of labels that the loss averages over. The mean over the ranks uses these
            weights.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement __call__")

    def measure(self) -> Measurement:
        """Return the loss with its weight and, if known, the losses of the rows.

        With rows, ``FastForward`` compares losses example by example and knows the standard error
        of a difference. Default: the result of :meth:`__call__`, without rows.
        """
        return as_measurement(self())

    def check(self) -> bool:
        """Try a small part of the measurement before the first step. Raise an error if it fails.

        Returns:
            True if it was tried. If False, which is the default, ``FastForward`` measures twice and
            warns if the two losses differ.
        """
        return False

    def new_stage(self) -> None:
        """Choose the examples of the next stage. Called once before each stage.

        With ``calibrate_lr`` and :meth:`measure` it is called only before and after the probe,
        since all checks then compare the same rows.
        """

    def measuring(self) -> AbstractContextManager[object]:
        """Return a context that surrounds all measurements of one stage, such as eval mode."""
        return nullcontext()

    def plan(self) -> tuple[int, int] | None:
        """Describe this stage's batches, so that the ranks can split them.

        Returns:
            A fingerprint (a whole number below 2**48 that is equal on ranks with equal batches)
            and the number of batches; None if the batches cannot be split.
        """
        return None

    def share(
        self, rank: int, size: int, forwards: int, *, split: bool
    ) -> AbstractContextManager[int]:
        """Return a context in which each rank measures its share of the batches.

        Args:
            rank: rank of this process among those that run the stage.
            size: number of these processes.
            forwards: the largest number of batches on any of these ranks.
            split: whether all ranks have the same batches, so that they can be split.

        Returns:
            A context manager that yields the number of ranks among which the batches are split.
        """
        return nullcontext(1)

    def state_dict(self) -> Mapping[str, Any] | None:
        """Return the state that a resumed run needs to continue with the same examples, or None.

        It is saved in ``FastForward``'s state dict, so it may hold only tensors, numbers, strings,
        lists and dicts.
        """
        return None

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Continue from a saved state. Raise ``ValueError`` if it is damaged."""

    @property
    def gives_rows(self) -> bool:
        """True if :meth:`measure` returns the losses of rows. Default: if it is overridden."""
        return type(self).measure is not ValidationFunction.measure

    @property
    def same_examples(self) -> bool:
        """True if all stages use the same examples. Default: if ``new_stage`` is not overridden."""
        return type(self).new_stage is ValidationFunction.new_stage


class _Adapted(ValidationFunction):
    """Adapts a callable that does not derive from ``ValidationFunction``; uses its methods."""

    def __init__(self, function: Any) -> None:
        self.function = function
        methods = ["new_stage", "measuring", "plan", "share"]
        stateful = ["new_stage", "state_dict", "load_state_dict"]
        if all(map(self._has, stateful)):
            methods += stateful
        for name in filter(self._has, methods):
            setattr(self, name, getattr(function, name))

    def _has(self, name: str) -> bool:
        return callable(getattr(self.function, name, None))

    def __call__(self) -> Any:
        return self.function()

    def measure(self) -> Measurement:
        name = next(filter(self._has, ("measure", "weighted", "__call__")))
        return as_measurement(getattr(self.function, name)())

    def check(self) -> bool:
        if not self._has("check"):
            return False
        self.function.check()
        return True

    @property
    def gives_rows(self) -> bool:
        return self._has("measure")

    @property
    def same_examples(self) -> bool:
        return not self._has("new_stage")


def adapted(val_fn: Any) -> ValidationFunction:
    """Return ``val_fn`` as a ``ValidationFunction``: itself if it is one, or else wrapped."""
    return val_fn if isinstance(val_fn, ValidationFunction) else _Adapted(val_fn)


def original(val_fn: ValidationFunction) -> Any:
    """Return the ``val_fn`` that the user passed: the inverse of :func:`adapted`."""
    return val_fn.function if isinstance(val_fn, _Adapted) else val_fn


def as_measurement(result: Any) -> Measurement:
    """Return the result of a validation function as a ``Measurement``; the default weight is 1.

    Raises:
        TypeError: the result is neither a number nor a tuple of a loss, a weight and perhaps rows.
        ValueError: the weight is negative or not finite.
    """
    if not isinstance(result, tuple):
        return Measurement(as_float(result), 1.0)
    if len(result) not in (2, 3):
        raise TypeError(
            f"val_fn must return the loss, or (loss, weight), got a tuple of {len(result)}"
        )
    loss, weight = (as_float(value) for value in result[:2])
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"the weight that val_fn returned must be finite and >= 0, got {weight}")
    return Measurement(loss, weight, *result[2:])
