"""The parabola through three trials: its lowest point, and the bracket around it."""

from __future__ import annotations

import math
from typing import NamedTuple

from .evidence import Trial


class Bracket(NamedTuple):
    """Three trials of which the middle one has the lowest loss.

    Attributes:
        low: the trial with the smallest tau.
        middle: the trial between the two others.
        high: the trial with the largest tau.
    """

    low: Trial
    middle: Trial
    high: Trial


def slope(left: Trial, right: Trial) -> float:
    """Return the mean change of the loss per unit of tau between two trials."""
    return (right.loss - left.loss) / (right.tau - left.tau)


def vertex(bracket: Bracket) -> tuple[float, float]:
    """Return the tau of the parabola's vertex and its decrease below the middle trial.

    If there is no vertex inside the bracket, return the middle trial's tau and 0.0. Next to an
    infinite loss, return the centre of that side, with an infinite decrease if the loss falls
    towards it.
    """
    low, middle, high = bracket
    if math.isinf(high.loss):
        falls = middle.loss < low.loss
        return (middle.tau + high.tau) / 2, math.inf if falls else 0.0
    left = slope(low, middle)
    curvature = (slope(middle, high) - left) / (high.tau - low.tau)
    if not (math.isfinite(curvature) and curvature > 0):
        return middle.tau, 0.0
    tau = (low.tau + middle.tau - left / curvature) / 2
    if not low.tau < tau < high.tau:
        return middle.tau, 0.0
    return tau, curvature * (middle.tau - tau) * (middle.tau - tau)


def shrink(bracket: Bracket, trial: Trial) -> Bracket:
    """Return the narrowest bracket from the three trials and a new one inside it."""
    low, middle, high = bracket
    left, right = (trial, middle) if trial.tau < middle.tau else (middle, trial)
    return Bracket(low, left, right) if left.loss < right.loss else Bracket(left, right, high)
