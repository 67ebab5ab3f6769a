"""The probe: how far the loss falls along the first steps, taken at a small part of the rate.

From whatever rate a run starts, a thousand times too low or far too high, the first steps then go
the same way, and the distance to the lowest loss along it tells of what size steps can be. It is
the paper's own experiment, repeat the step while the loss falls, done once. Pure functions of
``evaluate(tau) -> loss``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..search.evidence import error_of
from ..search.line_search import FLAT, Evaluate

# Factor from one trial to the next; and as long as the loss is that of the start.
_FACTOR, _LEAP = 4.0, 16.0
# A loss rises, or falls, where it does so by this many standard errors; until then, go on.
_CLEAR = 1.5
# Two points may be equally good as long as they differ by less.
_AS_GOOD = 1.0
# Where no loss is lower, the distance is taken to be this part of that at which it clearly rises.
_BOUND = 12.0
# The loss rises in a straight line if the slopes to so many points, each four times as far as the
# one before, differ by less than this factor, and the furthest is higher by so many errors: more of
# them where they are known, since that alone decides then.
_POINTS, _STRAIGHT, _CERTAIN, _SUSPICIOUS = 3, 1.5, 4.0, 2.0
# Limits of the search, in multiples of the first trial's distance.
_NEAREST, _FURTHEST = 1 / 256, 4.0**14


class Distance(NamedTuple):
    """How far ahead the loss is lowest.

    Attributes:
        tau: in steps, from the last of them.
        certainty: by how many standard errors it fell; 0.0 if it did not: then ``tau`` is a bound
            for where it may be lowest.
    """

    tau: float
    certainty: float


@dataclass(frozen=True)
class ProbeSearch:
    """Find the lowest loss ahead, from a 256th of the first trial's distance to whatever is needed.

    It goes outward by fours until the loss clearly rises, and inward as long as the nearest point
    is the best; then it tries half and twice the best distance. Where there is nothing to see yet
    it leaps. About eight passes over the validation set.

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
            # Nothing is lower: nearer, if all that lies further on clearly rises, or this does.
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
    """Where the loss is lowest along a probe's line.

    Args:
        trials: pairs (tau, loss), of which the losses may know their errors.

    Returns:
        The minimum of the parabola through the start, the best point and the next one. Where a
        nearer point may be as good, within one standard error, half-way to it: a rate that is too
        low is soon seen and raised, one that is too high does damage. Where no loss ahead is lower,
        a part of the furthest distance at which it does not clearly rise, or of the nearest one
        tried. Not further than where the rows' losses visibly change and their mean does not fall,
        unless it clearly falls beyond: a model may be as bad at any distance. None without trials
        ahead.
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
    """Whether the loss is exactly the same at all weights that a probe tried."""
    losses = {loss for _, loss in trials}
    return len(trials) > 2 and len(losses) == 1 and math.isfinite(trials[0][1])


def is_ascent(trials: Sequence[tuple[float, float]]) -> bool:
    """Whether the loss rises from the very start, in proportion to the distance.

    The first steps, which lower the training loss, then raise this one however short they are.

    Args:
        trials: pairs (tau, loss), of which the losses may know their errors.
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
    """NaN compares false with everything and -inf would win: both are worst."""
    return loss if math.isfinite(loss) else math.inf


def _rises(lower: float, loss: float, start: float, errors: float = _CLEAR) -> bool:
    """Whether a loss is higher than another one of the stage by so many standard errors."""
    return not _rank(loss) <= lower + errors * _error(loss, start)


def _error(loss: float, start: float) -> float:
    """Standard error of a loss's difference from the start; what may be rounding if not known."""
    error = error_of(loss)
    known = error is not None and math.isfinite(error) and error > 0
    return error if known and error is not None else max(FLAT * abs(start), math.ulp(0.0))
