"""The record of one Fast Forward stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import partial
from typing import Any

from .saved_numbers import as_count, is_real, shortened
from .search.evidence import Trial


@dataclass(frozen=True)
class StageRecord:
    """What one Fast Forward stage did.

    Attributes:
        step: number of real optimizer steps taken when the stage ran, counted from 1.
        tau: multiple of the last step that the stage added to the weights (of the mean step since
            the last stage if the learning rate is calibrated). 0.0 if it added nothing; negative if
            it went back.
        trials: the pairs ``(tau, loss)`` that were tried, in order, starting with tau = 0. Each is
            one pass over the validation set.
        loss_before: validation loss at tau = 0; for a check, at the best mean so far.
        loss_after: validation loss at the weights after the stage; for a check, at the window's
            mean. It is measured on the same examples as ``loss_before``; the next stage may use
            others.
        seconds: wall-clock time of the stage without the real step. It differs between equal runs,
            so it is neither saved in state dicts nor compared; NaN in a loaded record.
        steps: number of real steps that the direction averages over; 1 for the last step alone.
        mean_loss: validation loss at a mean of the iterates, which takes one more pass; None if
            the stage did not try it.
        averaged: True if the stage left the weights at that mean (``tau`` is 0.0 then).
        lr_scale: multiplier of the learning rate from this stage on.
        kind: ``"stage"``; with a calibrated learning rate ``"probe"``, ``"check"`` or
            ``"finish"``.
        decision: the decision in words.
        error: standard error of the decrease at the best trial (paired, row by row); None if
            unknown.
        elsewhere: number of passes over other examples, which confirmed or refuted that a loss had
            risen.
    """

    step: int
    tau: float
    trials: tuple[Trial, ...]
    loss_before: float
    loss_after: float
    seconds: float = field(compare=False)
    steps: int = 1
    mean_loss: float | None = None
    averaged: bool = False
    lr_scale: float = 1.0
    kind: str = "stage"
    decision: str = ""
    error: float | None = None
    elsewhere: int = 0

    @property
    def passes(self) -> int:
        """Number of passes over the validation set that the stage took."""
        return len(self.trials) + (self.mean_loss is not None) + self.elsewhere

    @property
    def useful(self) -> bool:
        """True if the stage moved the weights."""
        return self.tau != 0 or self.averaged

    def to_dict(self) -> dict[str, Any]:
        """Return the record as a dict of plain numbers, strings and lists."""
        return asdict(self) | {"trials": [list(trial) for trial in self.trials]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StageRecord:
        """Make a record from the dict that ``to_dict`` returned.

        ``seconds`` may be missing; it is NaN then.

        Raises:
            ValueError: a value is missing or wrong.
        """
        names = {field.name for field in fields(cls)}
        # Records from versions without calibration have only these.
        required = {field.name for field in fields(cls) if field.default is MISSING} - {"seconds"}
        if not isinstance(values, Mapping) or not required <= set(values) <= names:
            raise ValueError(
                f"a stage record needs exactly {sorted(names)}, got {shortened(values)}"
            )
        read: dict[str, Any] = {"seconds": math.nan}
        for name, value in values.items():
            try:
                read[name] = _READERS[name](value)
            except (TypeError, ValueError, OverflowError, RuntimeError) as error:
                raise ValueError(
                    f"a stage record cannot be read: its {name} is {shortened(value)}"
                ) from error
        record = cls(**read)
        taus = [record.tau, *(tau for tau, _ in record.trials)]
        if not (all(map(math.isfinite, taus)) and 0 < record.lr_scale < math.inf):
            raise ValueError(
                "tau and lr_scale of a stage record must be finite, but tau is "
                f"{record.tau}, lr_scale {record.lr_scale}, and trials {shortened(record.trials)}"
            )
        return record


def _real(value: Any) -> float:
    if not is_real(value):
        raise TypeError(f"{shortened(value)} is not a number")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{shortened(value)} is not a string")
    return value


def _trials(value: Any) -> tuple[Trial, ...]:
    return tuple(Trial(_real(tau), _real(loss)) for tau, loss in value)


# One function per field: it converts a saved value, or raises an error if it is invalid.
_READERS: dict[str, Callable[[Any], Any]] = {
    "step": partial(as_count, at_least=1),
    "tau": _real,
    "trials": _trials,
    "loss_before": _real,
    "loss_after": _real,
    "seconds": _real,
    "steps": partial(as_count, at_least=1),
    "mean_loss": lambda value: None if value is None else _real(value),
    "averaged": bool,
    "lr_scale": _real,
    "kind": _text,
    "decision": _text,
    "error": lambda value: None if value is None else _real(value),
    "elsewhere": partial(as_count, at_least=0),
}
