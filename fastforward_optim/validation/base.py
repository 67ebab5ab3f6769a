"""The interface of a validation function, and the one place that adapts other callables to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ..arguments import as_float
from ..search.evidence import Measurement


class ValidationFunction:
    """Base class of a ``val_fn`` that does more than return a number.

    Implement :meth:`__call__`, or :meth:`measure` as well, and override any of the other methods;
    by default they do nothing. ``ValidationLoss`` is one. A plain function needs none of this, and
    a class that has some of these methods works without deriving from this one.

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
        """Return the loss at the present weights, and leave the weights alone.

        Returns:
            A number or a tensor of one element, or a pair ``(loss, weight)``, where the weight is
            the number of labels that the loss is the mean of. Ranks average by these weights.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement __call__")

    def measure(self) -> Measurement:
        """Return the loss with its weight and, if known, the losses of the rows.

        With rows, ``FastForward`` compares losses example by example and knows how certain a
        difference is. Default: what :meth:`__call__` returns, without rows.
        """
        return as_measurement(self())

    def check(self) -> bool:
        """Try a small part of the measurement before the first step, and raise if it fails.

        Returns:
            Whether it was tried. Default: False; then ``FastForward`` measures twice, and warns if
            the two losses differ.
        """
        return False

    def new_stage(self) -> None:
        """Choose the examples of the next stage; called once before each stage.

        With ``calibrate_lr`` and :meth:`measure`, called before and after the probe only, since all
        checks then compare the same rows.
        """

    def measuring(self) -> AbstractContextManager[object]:
        """Return a context that surrounds all measurements of one stage, such as eval mode."""
        return nullcontext()

    def plan(self) -> tuple[int, int] | None:
        """Describe this stage's batches, so that ranks can split them; None if they cannot.

        Returns:
            A whole number below 2**48 that is equal on ranks with equal batches, and the number of
            batches.
        """
        return None

    def share(
        self, rank: int, size: int, forwards: int, *, split: bool
    ) -> AbstractContextManager[int]:
        """Return a context in which each rank measures its share of the batches.

        Args:
            rank: of this process among those that run the stage.
            size: number of these processes.
            forwards: the largest number of batches that any of them has.
            split: whether all have the same batches.

        Returns:
            A context manager that yields over how many ranks the batches are split.
        """
        return nullcontext(1)

    def state_dict(self) -> Mapping[str, Any] | None:
        """Return what a resumed run needs to go on with the same examples; None for nothing.

        It becomes a part of ``FastForward``'s state dict: tensors, numbers, strings, lists, dicts.
        """
        return None

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Go on where ``state_dict`` was taken. Raise ``ValueError`` if it is damaged."""

    @property
    def gives_rows(self) -> bool:
        """Whether :meth:`measure` gives the losses of the rows. Default: if it is overridden."""
        return type(self).measure is not ValidationFunction.measure

    @property
    def same_examples(self) -> bool:
        """Whether all stages measure the same ones. Default: if :meth:`new_stage` is inherited."""
        return type(self).new_stage is ValidationFunction.new_stage


class _Adapted(ValidationFunction):
    """A callable that does not derive from ``ValidationFunction``, with the methods that it has."""

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
    """Return ``val_fn`` as a ``ValidationFunction``: itself, or wrapped in one."""
    return val_fn if isinstance(val_fn, ValidationFunction) else _Adapted(val_fn)


def original(val_fn: ValidationFunction) -> Any:
    """Return what the user passed: the inverse of :func:`adapted`."""
    return val_fn.function if isinstance(val_fn, _Adapted) else val_fn


def as_measurement(result: Any) -> Measurement:
    """Return the result of a validation function as a ``Measurement``; the default weight is 1.

    Raises:
        TypeError: it is neither a number nor a tuple of a loss, a weight and perhaps rows.
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
