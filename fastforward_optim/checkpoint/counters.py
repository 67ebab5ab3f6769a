"""The numbers that Fast Forward keeps in the first param group.

Every way of saving an optimizer keeps them there, distributed checkpointing included, and other
optimizers ignore them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..calibration import Phase, Rate
from ..saved_numbers import LARGEST, is_finite, is_real, number_of, shortened

_STEP = "fast_forward_step"
_LAST_STAGE = "fast_forward_last_stage"
_LAST_TAU = "fast_forward_tau"
_COUNTERS: dict[str, int | float] = {_STEP: 0, _LAST_STAGE: 0, _LAST_TAU: 0.0}
# Where the interval adapts, and where the learning rate is calibrated.
_INTERVAL = "fast_forward_interval"
_RATE = {name: f"fast_forward_lr_{name}" for name in Rate._fields}
# Of earlier calibrations, whose numbers mean something else.
_OLD_RATE = ("fast_forward_lr_gain", "fast_forward_lr_last", "fast_forward_lr_error")
# The rest are rates, variances and sums of rates: not below zero, and for the scale above it.
_COUNTS = {
    _STEP: (0, LARGEST),
    _LAST_STAGE: (0, LARGEST),
    _INTERVAL: (1, LARGEST),
    _RATE["window"]: (1, LARGEST),
    _RATE["ascents"]: (0, LARGEST),
    _RATE["phase"]: (min(Phase), max(Phase)),
}
_MAY_BE_INFINITE = (_RATE["ceiling"], _RATE["moving_variance"])


class Counters:
    """The numbers in a param group, by name.

    Made anew where it is needed: ``load_state_dict`` replaces the group.

    Args:
        group: the optimizer's first param group.
    """

    def __init__(self, group: dict[str, Any]) -> None:
        self._group = group

    def add_missing(self, rate: Rate | None, interval: int) -> None:
        """Put in what is not there yet: distributed checkpointing loads what is there already.

        Args:
            rate: what a calibration begins with; None if the learning rate is not calibrated.
            interval: the first interval.
        """
        for name, value in _COUNTERS.items():
            self._group.setdefault(name, value)
        if rate is None:
            self._group.setdefault(_INTERVAL, interval)
        elif not self.has_rate():
            self.rate = rate

    def has_rate(self) -> bool:
        """Whether a calibration has been here."""
        return all(name in self._group for name in _RATE.values())

    def drop_old_rate(self) -> bool:
        """Take out what a calibration of an older release has left; whether there was any."""
        found = [name for name in _OLD_RATE if self._group.pop(name, None) is not None]
        if found:
            self._group.pop(_RATE["scale"], None)
        return bool(found)

    def check(self) -> None:
        """Whether those that are there can be: a ``ValueError`` if a checkpoint is damaged."""
        for name, value in self._group.items():
            if not str(name).startswith("fast_forward_"):
                continue
            number = number_of(value)
            if not _in_range(name, number):
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
        """Real steps so far."""
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
        """What the last stage returned; 0.0 before the first."""
        return float(self._group.get(_LAST_TAU, 0.0))

    @last_tau.setter
    def last_tau(self, value: float) -> None:
        self._group[_LAST_TAU] = value

    def interval(self, shortest: int, longest: int | None) -> int:
        """Steps from the last stage to the next, within the limits."""
        interval = max(shortest, int(self._group.get(_INTERVAL, shortest)))
        return interval if longest is None else min(interval, longest)

    def set_interval(self, value: int) -> None:
        """Set it."""
        self._group[_INTERVAL] = value

    @property
    def rate(self) -> Rate:
        """What a calibration knows of the learning rate."""
        return Rate(**{field: _plain(field, self._group[name]) for field, name in _RATE.items()})

    @rate.setter
    def rate(self, value: Rate) -> None:
        # A Phase would keep torch.load(weights_only=True) from reading a checkpoint.
        self._group.update({_RATE[name]: _plain(name, it) for name, it in value._asdict().items()})


def _plain(field: str, value: Any) -> Any:
    """One of a ``Rate``'s numbers as an int or a float."""
    return int(value) if field in ("phase", "window", "ascents") else float(value)


def check_saved(state_dict: Mapping[str, Any]) -> None:
    """Whether the numbers in a state dict can be, before it is loaded: a ``ValueError`` if not."""
    groups = state_dict.get("param_groups")
    if isinstance(groups, list) and groups and isinstance(groups[0], Mapping):
        Counters(dict(groups[0])).check()


def _in_range(name: str, value: Any) -> bool:
    if name in _MAY_BE_INFINITE and is_real(value) and value == math.inf:
        return True
    if not is_finite(value):
        return False
    if name in _COUNTS:
        least, most = _COUNTS[name]
        return bool(value == int(value) and least <= value <= most)
    if name == _RATE["scale"]:
        return bool(0 < value <= torch.finfo(torch.float32).max)
    return name not in _RATE.values() or bool(value >= 0)
