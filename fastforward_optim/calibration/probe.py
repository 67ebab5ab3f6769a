"""The probe: how far the loss falls along first steps at a small fraction of the rate.

Whatever rate a run starts with, a thousand times too low or far too high, these first steps go the
same way. The distance to the lowest loss along them shows how large steps can be. This is the
paper's own experiment, repeating the step while the loss falls, done once. The functions are pure
functions of ``evaluate(tau) -> loss``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..search.evidence import error_of
from ..search.line_search import FLAT, Evaluate

# Factor from one trial to the next, and the factor while the loss equals that of the start.
_FACTOR, _LEAP = 4.0, 16.0
# A rise or fall of the loss counts if it is this many standard errors; until then, go on.
_CLEAR = 1.5
# Two points count as equally good if they differ by less than this many standard errors.
_AS_GOOD = 1.0
# If no loss is lower, the distance is the furthest one without a clear rise, divided by this.
_BOUND = 12.0
# The loss rises in a straight line if the slopes from the start to this many points, each four
# times as far as the one before, differ by less than this factor, and the loss at the furthest
# point is higher by this many standard errors. More are required if the errors are known, because
# this test alone decides then.
_POINTS, _STRAIGHT, _CERTAIN, _SUSPICIOUS = 3, 1.5, 4.0, 2.0
# Limits of the search, as multiples of the first trial's distance.
_NEAREST, _FURTHEST = 1 / 256, 4.0**14


class Distance(NamedTuple):
    """The distance to the lowest loss ahead.

    Attributes:
        tau: distance in steps, from the last step.
        certainty: number of standard errors by which the loss fell; 0.0 if it did not. ``tau`` is
            then a bound on where the loss may be lowest.
    """

    tau: float
    certainty: float


@dataclass(frozen=True)
class ProbeSearch:
    """Find the lowest loss ahead, from 1/256 of the first trial's distance to as far as needed.

    The search goes outward by factors of four until the loss clearly rises, and inward while the
    nearest point is the best. Then it tries half and twice the best distance. While the loss does
    not change it takes larger leaps. It takes about eight passes over the validation set.

    Args:
        first: distance of the first trial, in steps.
    """

    first: float

    def __call__(self, evaluate: Evaluate, last_tau: float = 0.0, /) -> float:
        """Return the best tau among those evaluated; ``last_tau`` is ignored."""
        start = evaluate(0.0)
        tried = {0.0: start}

        def best() -> float:
            return min(tried, key=lambda tau: (_rank(tried[tau]), tau))

        tau = self.first
        tried[tau] = evaluate(tau)
        while tau < self.first * _FURTHEST and not _rises(tried[best()], tried[tau], start):
            falls = _rises(tried[tau], start, start)
            tau *= _FACTOR if falls else _LEAP
            tried[tau] = evaluate(tau)
            if not falls and _rises(tried[best()], tried[tau], start):  # leapt over it?
                tau /= _FACTOR
                tried[tau] = evaluate(tau)
                if not _rises(tried[best()], tried[tau], start):
                    break
        while (nearest := min(tried.keys() - {0.0})) > self.first * _NEAREST:
            # If nothing is lower, go nearer only if this loss or the next further one clearly
            # rises.
            next_tau = min(tried.keys() - {0.0, nearest}, default=nearest)
            rises = any(_rises(start, tried[tau], start) for tau in (nearest, next_tau))
            if not (best() == nearest or (best() == 0 and rises)):
                break
            tried[nearest / _FACTOR] = evaluate(nearest / _FACTOR)
        if middle := best():
            for tau in (middle / 2, middle * 2):
                tried[tau] = evaluate(tau)
        return best()


def lowest(trials: Sequence[tuple[float, float]]) -> Distance | None:
    """Return where the loss is lowest along a probe's line.

    Args:
        trials: pairs (tau, loss); the losses may carry their standard errors.

    Returns:
        The minimum of the parabola through the start, the best point and the next one, with these
        exceptions. If a nearer point may be as good, within one standard error, the distance is
        their geometric mean: a rate that is too low is soon seen and raised, one that is too high
        does damage. If no loss ahead is lower, it is a fraction of the furthest distance at which
        the loss does not clearly rise, or of the nearest one tried. It never exceeds the distance
        at which the losses of the rows visibly change and their mean does not fall, unless the mean
        clearly falls beyond it: a model may be equally bad at any distance. None without trials
        ahead, or if the loss at the start is not finite.
    """
    losses = dict(trials)
    start = losses.get(0.0, math.nan)
    ahead = sorted(tau for tau in losses if tau > 0)
    if not ahead or not math.isfinite(start):
        return None
    best = min(ahead, key=lambda tau: (_rank(losses[tau]), tau))
    changed = [
        tau
        for tau in ahead
        if _error(losses[tau], start) > FLAT * abs(start) and not losses[tau] < start
    ]
    if not _rank(losses[best]) < start:
        level = [tau for tau in ahead if not _rises(start, losses[tau], start)]
        return Distance(min([(max(level) if level else min(ahead)) / _BOUND, *changed]), 0.0)
    certainty = (start - losses[best]) / _error(losses[best], start)
    if certainty < _CLEAR and changed and changed[0] < best:
        return Distance(changed[0], certainty)
    as_good = [tau for tau in ahead if not _rises(losses[best], losses[tau], start, _AS_GOOD)]
    if losses[as_good[0]] < start and as_good[0] < best:
        return Distance(math.sqrt(as_good[0] * best), certainty)
    further = [tau for tau in ahead if tau > best and math.isfinite(losses[tau])]
    if not further:
        return Distance(best, certainty)
    # The parabola through the start, the best point and the next one.
    left, right = ((losses[tau] - start) / tau for tau in (best, further[0]))
    curvature = (right - left) / (further[0] - best)
    return Distance(-(left - curvature * best) / (2 * curvature), certainty)


def is_unchanged(trials: Sequence[tuple[float, float]]) -> bool:
    """Return True if the loss is exactly the same at all weights that a probe tried."""
    losses = {loss for _, loss in trials}
    return len(trials) > 2 and len(losses) == 1 and math.isfinite(trials[0][1])


def is_ascent(trials: Sequence[tuple[float, float]]) -> bool:
    """Return True if the loss rises from the very start, in proportion to the distance.

    The first steps lower the training loss but then raise this one, however short they are.

    Args:
        trials: pairs (tau, loss); the losses may carry their standard errors.
    """
    losses = dict(trials)
    start = losses[0.0]
    ahead = sorted(tau for tau in losses if tau > 0)
    if len(ahead) < _POINTS or not all(_rank(losses[tau]) > start for tau in ahead):
        return False
    slopes = [(losses[tau] - start) / tau for tau in ahead[:_POINTS]]
    last = losses[ahead[_POINTS - 1]]
    errors = _SUSPICIOUS if error_of(last) is None else _CERTAIN
    clear = last - start > errors * _error(last, start)
    return clear and max(slopes) < _STRAIGHT * min(slopes)


def _rank(loss: float) -> float:
    """Return the loss, or infinity for a NaN or an infinite one, so that both are worst.

    NaN compares false with everything, and -inf would win.
    """
    return loss if math.isfinite(loss) else math.inf


def _rises(lower: float, loss: float, start: float, errors: float = _CLEAR) -> bool:
    """Return True if ``loss`` exceeds ``lower`` by this many standard errors."""
    return not _rank(loss) <= lower + errors * _error(loss, start)


def _error(loss: float, start: float) -> float:
    """Return the standard error of a loss's difference from the start.

    If it is unknown, return the largest difference that may be rounding.
    """
    error = error_of(loss)
    known = error is not None and math.isfinite(error) and error > 0
    return error if known and error is not None else max(FLAT * abs(start), math.ulp(0.0))
