"""The numbers that Fast Forward keeps in the first param group.

Every way of saving an optimizer keeps them there, distributed checkpointing included, and other
optimizers ignore them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from .calibration import GAIN, HIGHEST, Rate
from .saved_numbers import LARGEST, is_finite, number_of, shortened

_STEP = "fast_forward_step"
_LAST_STAGE = "fast_forward_last_stage"
_LAST_TAU = "fast_forward_tau"
_COUNTERS: dict[str, int | float] = {_STEP: 0, _LAST_STAGE: 0, _LAST_TAU: 0.0}
# Where the interval adapts, and where the learning rate is calibrated.
_INTERVAL = "fast_forward_interval"
_RATE = ("fast_forward_lr_scale", "fast_forward_lr_gain", "fast_forward_lr_last")
_RATE_DEFAULTS = tuple(zip(_RATE, Rate(), strict=True))
# What calibration keeps them within: the gain is halved down to 1, and no stage changes the rate by
# more than HIGHEST, up or down (the logarithm may be rounded up). Of the scale there is no such
# limit, but a step cannot be taken at a rate that float32 does not hold.
_FASTEST = math.log(HIGHEST) + 1e-6
_RATE_LIMITS = {
    _RATE[0]: (math.ulp(0.0), torch.finfo(torch.float32).max),
    _RATE[1]: (1.0, GAIN),
    _RATE[2]: (-_FASTEST, _FASTEST),
}


class Counters:
    """The numbers in a param group, by name.

    Made anew where it is needed: ``load_state_dict`` replaces the group.

    Args:
        group: the optimizer's first param group.
    """

    def __init__(self, group: dict[str, Any]) -> None:
        self._group = group

    def add_missing(self, calibrated: bool, interval: int, max_interval: int) -> None:
        """Put in what is not there yet: distributed checkpointing loads what is there already.

        Args:
            calibrated: whether the learning rate is.
            interval: the first interval.
            max_interval: the longest; if it is longer, the interval adapts.
        """
        for name, value in _COUNTERS.items():
            self._group.setdefault(name, value)
        for name, number in _RATE_DEFAULTS if calibrated else ():
            self._group.setdefault(name, number)
        if max_interval > interval:
            self._group.setdefault(_INTERVAL, interval)

    def check(self) -> None:
        """Whether those that are there can be: a ``ValueError`` if a checkpoint is damaged."""
        for name, value in self._group.items():
            if not str(name).startswith("fast_forward_"):
                continue
            number = number_of(value)
            if not is_finite(number) or not _in_range(name, number):
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

    def interval(self, shortest: int, longest: int) -> int:
        """Steps from the last stage to the next, within the limits."""
        interval = self._group.get(_INTERVAL, shortest)
        return int(max(shortest, min(interval, longest)))

    def set_interval(self, value: int) -> None:
        """Set it."""
        self._group[_INTERVAL] = value

    @property
    def rate(self) -> Rate:
        """The multiplier of the learning rate, and how it has been changing."""
        return Rate(*(float(self._group.get(name, default)) for name, default in _RATE_DEFAULTS))

    @rate.setter
    def rate(self, value: Rate) -> None:
        self._group.update(zip(_RATE, value, strict=True))


def check_saved(state_dict: Mapping[str, Any]) -> None:
    """Whether the numbers in a state dict can be, before it is loaded: a ``ValueError`` if not."""
    groups = state_dict.get("param_groups")
    if isinstance(groups, list) and groups and isinstance(groups[0], Mapping):
        Counters(dict(groups[0])).check()


def _in_range(name: str, value: float) -> bool:
    if name in (_STEP, _LAST_STAGE, _INTERVAL):
        return value == int(value) and (name == _INTERVAL) <= value <= LARGEST
    limits = _RATE_LIMITS.get(name)
    return limits is None or limits[0] <= value <= limits[1]
