"""Our part of a state dict: numbers in the first param group, and one additional key.

Every way of saving an optimizer keeps the param groups, distributed checkpointing included, and
other optimizers ignore names that they do not know. History, iterates and the position of
``val_fn`` are stored under the key ``"fast_forward"``, also as plain data and tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..calibration import Phase, Rate, Standing
from ..history import History
from ..record import StageRecord
from ..saved_numbers import is_finite, number_of, shortened

KEY = "fast_forward"
_VERSION = 5

_STEP = "fast_forward_step"
_LAST_STAGE = "fast_forward_last_stage"
_LAST_TAU = "fast_forward_tau"
_COUNTERS: dict[str, int | float] = {_STEP: 0, _LAST_STAGE: 0, _LAST_TAU: 0.0}
# Without calibration the interval is saved, with it the numbers of the rate.
_INTERVAL = "fast_forward_interval"
# The fields of ``Standing`` are saved with the best mean instead: each number here that changes
# makes a compiled optimizer step compile once more.
_RATE = {name: f"fast_forward_lr_{name}" for name in Rate._fields if name not in Standing._fields}
_INTEGERS = ("phase", "window", "ascents")
# Lower bounds. The other numbers of a ``Rate`` are rates, variances and sums: not negative.
_LEAST = {_STEP: 0, _LAST_STAGE: 0, _INTERVAL: 1, _LAST_TAU: -math.inf}
_LEAST |= dict.fromkeys(_RATE.values(), 0) | {_RATE["window"]: 1}
_WHOLE = {_STEP, _LAST_STAGE, _INTERVAL, *(_RATE[name] for name in _INTEGERS)}
_MAY_BE_INFINITE = {_RATE["ceiling"], _RATE["moving_variance"]}


class Progress:
    """The progress of a run: the numbers that ``FastForward`` keeps in the first param group.

    Create one where it is needed, because ``load_state_dict`` replaces the group.

    Args:
        group: the optimizer's first param group.
    """

    def __init__(self, group: dict[str, Any]) -> None:
        self._group = group

    def add_missing(self, rate: Rate | None, interval: int) -> None:
        """Add missing numbers, because distributed checkpointing loads only existing ones.

        Args:
            rate: initial state of a calibration; None if the learning rate is not calibrated.
            interval: the first interval.
        """
        for name, value in _COUNTERS.items():
            self._group.setdefault(name, value)
        if rate is None:
            self._group.setdefault(_INTERVAL, interval)
        elif not all(name in self._group for name in _RATE.values()):
            self.rate = rate

    def check(self) -> None:
        """Raise ``ValueError`` if a number is out of range, as in a damaged checkpoint."""
        for name, value in self._group.items():
            number = number_of(value)
            if str(name).startswith("fast_forward_") and not _in_range(name, number):
                raise ValueError(
                    f"the state dict is damaged: {name} in its first group is {shortened(number)}"
                )
        if self.last_stage > self.step:
            raise ValueError(
                f"the state dict is damaged: its last stage was after step {self.last_stage}, but "
                f"it has taken {self.step} steps"
            )

    @property
    def step(self) -> int:
        """Number of real steps so far."""
        return int(self._group.get(_STEP, 0))

    @step.setter
    def step(self, value: int) -> None:
        self._group[_STEP] = value

    @property
    def last_stage(self) -> int:
        """The step that the last stage followed; 0 before the first."""
        return int(self._group.get(_LAST_STAGE, 0))

    @last_stage.setter
    def last_stage(self, value: int) -> None:
        self._group[_LAST_STAGE] = value

    @property
    def last_tau(self) -> float:
        """The tau that the last stage returned; 0.0 before the first."""
        return float(self._group.get(_LAST_TAU, 0.0))

    @last_tau.setter
    def last_tau(self, value: float) -> None:
        self._group[_LAST_TAU] = value

    def interval(self, shortest: int, longest: int | None) -> int:
        """Return the number of steps from the last stage to the next, within the limits."""
        interval = max(shortest, int(self._group.get(_INTERVAL, shortest)))
        return interval if longest is None else min(interval, longest)

    def set_interval(self, value: int) -> None:
        """Set the interval."""
        self._group[_INTERVAL] = value

    @property
    def rate(self) -> Rate:
        """The state of the calibration."""
        return Rate(**{field: _plain(field, self._group[name]) for field, name in _RATE.items()})

    @rate.setter
    def rate(self, value: Rate) -> None:
        # A Phase would keep torch.load(weights_only=True) from reading a checkpoint.
        self._group.update(
            {name: _plain(field, getattr(value, field)) for field, name in _RATE.items()}
        )


def _plain(field: str, value: Any) -> Any:
    """Return a field of a ``Rate`` as an int or a float."""
    return int(value) if field in _INTEGERS else float(value)


def _in_range(name: str, value: Any) -> bool:
    if name in _MAY_BE_INFINITE and value == math.inf:
        return True
    if not is_finite(value) or value < _LEAST.get(name, -math.inf):
        return False
    if name in _WHOLE and value != int(value):
        return False
    if name == _RATE["scale"]:
        return bool(0 < value <= torch.finfo(torch.float32).max)
    return name != _RATE["phase"] or value <= max(Phase)


class SavedState(NamedTuple):
    """The content of a checkpoint under :data:`KEY`.

    Attributes:
        history: the stages so far.
        iterates: state of the ``Iterates``, if the learning rate was calibrated.
        val_fn: state of a ``val_fn`` that takes other examples at each stage.
        optimizer: class name of the wrapped optimizer.
        shapes: shapes of the parameters in each group; for a sharded parameter the global shape.
        gradient_norms: state of the ``GradientSpikes`` of a calibrated run.
    """

    history: History
    iterates: Mapping[str, Any] | None = None
    val_fn: Mapping[str, Any] | None = None
    optimizer: str | None = None
    shapes: list[list[list[int]]] | None = None
    gradient_norms: list[float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as tensors, plain numbers, lists and dicts."""
        written = self._asdict() | {"version": _VERSION, "history": self.history.state_dict()}
        return {name: value for name, value in written.items() if value is not None}

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> SavedState:
        """Parse our part of a state dict; return an empty state if there is none.

        Raises:
            ValueError: our part is damaged or of another version, or one of our numbers in the
                first param group is out of range.
        """
        groups = state_dict.get("param_groups")
        if isinstance(groups, list) and groups and isinstance(groups[0], Mapping):
            Progress(dict(groups[0])).check()
        written = state_dict.get(KEY)
        if written is None:
            return cls(History())
        damaged = f"the {KEY!r} part of the state dict is damaged"
        remedy = "remove it to load the wrapped optimizer's part alone"
        if not isinstance(written, Mapping):
            raise ValueError(f"{damaged}: expected a dict, got {shortened(written)}; {remedy}")
        version = written.get("version")
        if version != _VERSION:
            raise ValueError(
                f"the {KEY!r} part of the state dict has version {shortened(version)}, this "
                f"release reads version {_VERSION}; update fastforward-optim, or remove that part "
                "to load the wrapped optimizer's part alone"
            )
        for name, kind in _KINDS.items():
            value = written.get(name)
            if not isinstance(value, kind):
                raise ValueError(f"{damaged}: its {name} is {shortened(value)}; {remedy}")
        shapes = written.get("shapes")
        if shapes is not None and not _are_shapes(shapes):
            raise ValueError(f"{damaged}: its shapes are {shortened(shapes)}; {remedy}")
        history = History(StageRecord.from_dict(record) for record in written["history"])
        return cls(history, *(written.get(name) for name in cls._fields[1:]))


def _are_shapes(value: Any, depth: int = 3) -> bool:
    """Return True for a list (of groups) of lists (of parameters) of lists of sizes."""
    if depth == 0:
        return type(value) is int
    return isinstance(value, list) and all(_are_shapes(item, depth - 1) for item in value)


_OPTIONAL = type(None)
_KINDS: dict[str, tuple[type, ...]] = {
    "history": (list,),
    "iterates": (Mapping, _OPTIONAL),
    "val_fn": (Mapping, _OPTIONAL),
    "optimizer": (str, _OPTIONAL),
    "shapes": (list, _OPTIONAL),
    "gradient_norms": (list, _OPTIONAL),
}
