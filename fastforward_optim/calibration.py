"""Calibration: what a stage measures, fed back into the learning rate.

The law is a pure function of numbers (:func:`calibrate`). The tensors that are needed between
stages are in ``window.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .history import StageRecord
from .line_search import FLAT, TwoSidedSearch, estimate_minimum
from .stage import Trial

# The rate is multiplied by a power of how much further than the steps went the loss is lowest. The
# first power would keep the rate near the one that is best for the next few steps alone: high
# curvature ends a line search long before it ends the progress of many steps.
GAIN = 4.0
# Where the loss is lowest, in windows from the last iterate, at a rate that is too low and at one
# that is too high. A good one is a little too high for the next few steps: it makes more progress
# over many, and the mean takes its noise out. Much more than that, and it becomes unstable.
TOO_LOW = -0.05
TOO_HIGH = -0.12
# Limits of one stage's factor: a raise of this many times the distance found, of this much in
# all (of STEEPEST after a raise of more than that, until it has proved itself), and a cut to this
# part.
STEEPEST = 4.0
HIGHEST = 1000.0
LOWEST = 0.4
# A raise of more than CAUTIOUS needs a decrease of the loss by more than this part.
CLEAR = 0.01
CAUTIOUS = 2.0
# A loss that is lowest behind the last iterate says that the rate is too high after about this
# many steps. After fewer, noise outweighs progress at any good rate. After many more it does so
# again, where there is not much to learn any more, and there a lower rate makes it no better: a
# run that believed it would come to a halt.
TRUSTED = 24
# The rate is cut by this much at least where the mean of the iterates is better than the last one.
AVERAGED = 0.9
# After many steps the rate is cut by this much where they have made no visible progress.
NO_PROGRESS = 0.5
# Distance of the first trials, in windows.
REACH = 0.25
# Furthest trial, in windows.
FURTHEST = 4096.0
# Where the mean is better by this part of the loss, the run has blown up on the way: the weights
# from before it are tried too.
BLOWN_UP = 0.1


class Outcome(NamedTuple):
    """What a calibrated stage found.

    Attributes:
        tau: multiple of the mean step that was committed; 0.0 if the mean was.
        trials: pairs (tau, loss).
        loss: at the weights that it left.
        mean_loss: loss at the mean of the iterates; None if it was not tried.
        averaged: whether the weights were left at that mean.
    """

    tau: float
    trials: tuple[Trial, ...]
    loss: float
    mean_loss: float | None = None
    averaged: bool = False

    def record(self, *, step: int, seconds: float, steps: int, lr_scale: float) -> StageRecord:
        """What goes into the history."""
        return StageRecord(
            step=step,
            tau=self.tau,
            trials=self.trials,
            loss_before=loss_at(self.trials, 0.0),
            loss_after=self.loss,
            seconds=seconds,
            steps=steps,
            mean_loss=self.mean_loss,
            averaged=self.averaged,
            lr_scale=lr_scale,
        )


class Rate(NamedTuple):
    """The multiplier of the learning rate, and how it has been changing.

    Attributes:
        scale: what the learning rate is multiplied by.
        gain: power with which the next stage's finding is applied.
        last: logarithm of the last stage's factor.
    """

    scale: float = 1.0
    gain: float = GAIN
    last: float = 0.0

    @property
    def is_steep(self) -> bool:
        """Whether the last stage raised the rate by more than ``STEEPEST``."""
        return self.last > math.log(STEEPEST)


def verdict(trials: Sequence[Trial], steps: int) -> float | None:
    """How much further than the last steps went the loss is lowest, as a part of their distance.

    Args:
        trials: pairs (tau, loss) of a stage, with tau in mean steps.
        steps: number of steps since the last stage.

    Returns:
        0.0 for "just right", 1.0 for "twice as far", -0.5 for "half as far"; None if the trials
        do not tell.
    """
    # A line search of the user's may have tried a point twice, or not tau = 0.
    losses = dict(trials)
    if 0.0 not in losses:
        return None
    ahead = estimate_minimum(losses.items())
    if ahead is None:
        return None
    start = losses[0.0]
    if ahead > 0 and any(tau < 0 and loss < start for tau, loss in trials):
        return None  # lower on both sides: noise
    if ahead > steps and not _gain(trials) > FLAT:  # so is the lowest point of a plateau
        return None
    return max(ahead / steps, -1.0)


def loss_at(trials: Sequence[Trial], tau: float) -> float:
    """The loss that was measured there last; NaN if none was."""
    return dict(trials).get(tau, math.nan)


def _gain(trials: Sequence[Trial]) -> float:
    """How much lower the lowest loss is than the one at the start, as a part of that."""
    start = loss_at(trials, 0.0)
    lowest = min(loss for _, loss in trials if math.isfinite(loss))
    return (start - lowest) / abs(start) if start else 0.0


def calibrate(rate: Rate, outcome: Outcome, steps: int) -> Rate:
    """The rate after a stage.

    Args:
        rate: the one before it.
        outcome: what the stage found.
        steps: number of steps since the stage before it.
    """
    gain, averaged = rate.gain, outcome.averaged
    ahead = verdict(outcome.trials, steps)
    trust = min(steps / TRUSTED, (TRUSTED / steps) ** 2)
    if ahead is None:
        factor = 0.5 if averaged else 1.0
    else:
        factor = 1.0
        if ahead > TOO_LOW:
            ratio = (1 + ahead) / (1 + TOO_LOW)
            limit = STEEPEST if rate.is_steep else HIGHEST
            if not _gain(outcome.trials) > CLEAR:
                limit = CAUTIOUS
            factor = min(ratio**gain, STEEPEST * ratio, limit)
        elif ahead < TOO_HIGH:
            factor = max(((1 + ahead) / (1 + TOO_HIGH)) ** (gain * trust), LOWEST)
        if averaged:
            factor = min(factor, AVERAGED**trust)
    start, last = dict(outcome.trials).get(-steps), loss_at(outcome.trials, 0.0)
    if start is not None:
        if not last <= start + BLOWN_UP * abs(start):
            factor = min(factor, LOWEST)
        if not outcome.loss < start - FLAT * abs(start):
            factor = min(factor, math.exp(-rate.last) if rate.is_steep else NO_PROGRESS)
    # Kesten's rule: as long as the sign stays the same the rate is far off; when it changes, the
    # rate has been passed, and the changes get smaller.
    change = math.log(factor)
    if change * rate.last < 0:
        gain = max(1.0, gain / 2)
    return Rate(rate.scale * factor, gain, change or rate.last)


def is_far_off(before: Rate, after: Rate) -> bool:
    """Whether the rate should be looked at again soon.

    That is where it has changed much, but not any more once the changes are small because their
    sign has changed twice: what is left then is noise, and it would cost a stage each time.
    """
    return after.gain > 1 and not 0.5 <= after.scale / before.scale <= 2


def two_sided(steps: int) -> TwoSidedSearch:
    """The search after so many steps, of which the mean is the direction."""
    return TwoSidedSearch(REACH * steps, steps, FURTHEST * steps)
