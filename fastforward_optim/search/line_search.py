"""Line searches: how many times to repeat the last step.

A line search here is a pure function of ``evaluate(tau) -> loss``: it knows nothing of tensors,
optimizers or devices. ``tau`` is the multiple of the last step that is added to the weights
(tau = 0: stay; tau = 1: repeat the step once), as in the paper (section "Fast Forward").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from .evidence import Loss

Evaluate = Callable[[float], float]

# A relative change of the loss below this one may be rounding. Measured: in bfloat16, the loss of
# SmolLM2-135M on 1,024 tokens scatters by 3e-4 of itself (standard deviation) between weights that
# differ by one step of AdamW at 2e-5, which improves it by as much.
FLAT = 1e-3
# Factors by which a search goes on: over a plateau, where there is nothing to step over; down a
# straight slope; and down a slope that flattens out, where the minimum is near.
LEAP = 8.0
STRIDE = 4.0
DOUBLE = 2.0
# A slope is straight if it is at least this part of the one before it. On a parabola the minimum
# is then more than ten times as far away as the first of the two points.
STRAIGHT = 0.9
# Going to the vertex of a parabola is worth a trial if it promises this part of the decrease
# so far.
WORTHWHILE = 0.01


def _flat(loss: float, reference: float) -> bool:
    """Whether the two are the same within rounding."""
    return math.isfinite(loss) and math.isclose(loss, reference, rel_tol=FLAT)


class LineSearch(Protocol):
    """What ``FastForward`` accepts as ``line_search``."""

    def __call__(self, evaluate: Evaluate, last_tau: float, /) -> float:
        """Search for the best multiple of the last step.

        Args:
            evaluate: gives the validation loss at ``tau``; each call costs one pass over the
                validation set. The loss is a float that has an ``error`` too: the standard error
                of its difference from the loss at tau = 0, or None (see ``Loss``). A ``tau`` below
                zero goes back along the step, at most to where it began.
            last_tau: what the previous stage returned; 0.0 before the first one.

        Returns:
            One of the values that were passed to ``evaluate``; 0.0 for "stay".
        """
        ...


class _Point(NamedTuple):
    tau: float
    loss: float
    error: float = 0.0  # of the difference from the start


class _Trials:
    """Calls ``evaluate`` within a budget and keeps the best point."""

    def __init__(self, evaluate: Evaluate, max_trials: int) -> None:
        self._evaluate = evaluate
        self.left = max_trials
        self.start = self.best = _Point(0.0, math.inf)
        self.points = [self.start]
        self.start = self.best = self.measure(0.0)

    def measure(self, tau: float) -> _Point:
        self.left -= 1
        loss = self._evaluate(tau)
        # NaN compares false with everything and -inf would win: both are treated as worst.
        known = loss.error if isinstance(loss, Loss) else None
        # Where it is not known, what may be rounding is no evidence.
        error = FLAT * abs(self.start.loss) / 2 if known is None else known
        point = _Point(tau, loss if math.isfinite(loss) else math.inf, error)
        self.points.append(point)
        if point.loss < self.best.loss:
            self.best = point
        return point

    def surest(self, standard_errors: float) -> _Point:
        """The point that is lower by most, after what may be chance has been deducted.

        The further a point, the more has to be deducted: a search that looks far finds something
        by chance more often, and goes further wrong by it. Where the loss at the start is no
        number, any number is better.
        """
        if math.isinf(self.start.loss) or standard_errors == 0:
            return self.best

        def sure_decrease(point: _Point) -> float:
            if point.tau == 0 or point.loss == math.inf:
                return 0.0
            far = 1 + math.log10(1 + abs(point.tau)) / 4
            decrease = self.start.loss - point.loss - far * standard_errors * point.error
            return decrease if decrease > 0 else 0.0  # NaN too

        return max(self.points, key=lambda point: (sure_decrease(point), -abs(point.tau)))

    def is_flat(self, point: _Point) -> bool:
        """Whether the loss at ``point`` is that of the start within rounding."""
        return _flat(point.loss, self.start.loss)

    def is_lower(self, point: _Point) -> bool:
        """Whether the loss at ``point`` is lower than at the start by more than rounding."""
        return point.loss < self.start.loss and not self.is_flat(point)


def _check_limits(max_tau: float, max_trials: int) -> None:
    if not (isinstance(max_tau, int | float) and math.isfinite(max_tau) and max_tau >= 1):
        raise ValueError(
            "max_tau must be a finite number of at least 1 (one repeat of the step), "
            f"got {max_tau!r}"
        )
    if not isinstance(max_trials, int) or isinstance(max_trials, bool) or max_trials < 2:
        raise ValueError(
            "max_trials must be an integer of at least 2 (the start and one trial), "
            f"got {max_trials!r}"
        )


@dataclass(frozen=True)
class RepeatSearch:
    """The paper's search: tau = 1, 2, 3, ... until the loss stops decreasing.

    It is described in the section "Fast Forward". Unlike the authors' code, this class measures
    tau = 0 first, returns the best point instead of the first one past it, and stops at a cap.
    Where the loss is still flat within rounding when it stops decreasing, the stride grows
    eightfold (tau = 8, 16, ..., then 64, 128, ...).

    It takes about tau + 2 passes over the validation set to return tau.

    Args:
        max_tau: largest multiple of the step to try.
        max_trials: most passes over the validation set, the one at tau = 0 included.
    """

    max_tau: float = 1000.0
    max_trials: int = 1000

    def __post_init__(self) -> None:
        _check_limits(self.max_tau, self.max_trials)

    def __call__(self, evaluate: Evaluate, last_tau: float = 0.0, /) -> float:
        """Return the best tau among those evaluated; ``last_tau`` is ignored."""
        trials = _Trials(evaluate, self.max_trials)
        tau = stride = 1.0
        while tau <= self.max_tau and trials.left > 0:
            previous_best = trials.best
            point = trials.measure(tau)
            if point.loss >= previous_best.loss:
                if not (trials.is_flat(point) and trials.is_flat(previous_best)):
                    break
                stride *= LEAP
            tau = stride * (tau // stride + 1)
        return trials.best.tau


@dataclass(frozen=True)
class BracketSearch:
    """Bracket the minimum by doubling, then interpolate a parabola inside the bracket.

    It starts at half of the last stage's tau, or at 1 if that was small. It goes down by quarters
    while that is too far, and up by doubling while the loss decreases: fourfold where it falls as
    steeply as before, eightfold where it is flat within rounding. Then it takes at most two steps
    to the vertex of the parabola through the bracket's three points, if that promises at least 1 %
    more decrease.

    A candidate is taken on evidence: its loss has to be lower by two standard errors of the paired
    difference (row by row, where ``val_fn`` gives the rows' losses, as ``ValidationLoss`` does),
    and by more the further it is: three at a hundred steps. Where the error is not known, by 0.1 %.

    It takes about five passes over the validation set where the last stage's tau is a good guess,
    seven to ten without one (the first stage), and two or three where neither this step nor the
    last stage's could be repeated.

    Args:
        max_tau: largest multiple of the step to try.
        max_trials: most passes over the validation set, the one at tau = 0 included.
        standard_errors: how sure a decrease has to be; 0 takes whatever measures lowest.
    """

    max_tau: float = 10000.0
    max_trials: int = 20
    standard_errors: float = 2.0

    def __post_init__(self) -> None:
        _check_limits(self.max_tau, self.max_trials)
        errors = self.standard_errors
        if not (isinstance(errors, int | float) and math.isfinite(errors) and errors >= 0):
            raise ValueError(f"standard_errors must be a finite number >= 0, got {errors!r}")

    def __call__(self, evaluate: Evaluate, last_tau: float = 0.0, /) -> float:
        """Return the best tau among those evaluated, starting near ``last_tau``."""
        trials = _Trials(evaluate, self.max_trials)
        bracket = self._bracket(trials, min(last_tau / 2 if last_tau > 4 else 1.0, self.max_tau))
        for _ in range(2):
            if bracket is None or trials.left == 0 or not trials.surest(self.standard_errors).tau:
                break
            tau, gain = _vertex(bracket)
            decrease = trials.start.loss - trials.best.loss
            visible = decrease + gain > FLAT * abs(trials.start.loss)
            if not visible or gain <= WORTHWHILE * decrease:
                break
            bracket = _shrink(bracket, trials.measure(tau))
        return trials.surest(self.standard_errors).tau

    def _bracket(self, trials: _Trials, tau: float) -> _Bracket | None:
        """Three points with a minimum between them, or None if there is no such triple."""
        points = [trials.start, trials.measure(tau)]
        if not _go_ahead(trials, points, self.max_tau):
            return None
        if len(points) > 2:
            return _Bracket(*points[-3:])
        while points[1].tau >= 2 and trials.left > 0:
            points.insert(1, trials.measure(max(1.0, points[1].tau / 4)))
            if points[1].loss < points[0].loss:
                return _Bracket(*points[:3])
        return None


def _go_ahead(trials: _Trials, points: list[_Point], max_tau: float) -> bool:
    """Go on from the last of the points until the loss rises; whether it did, within the limits."""
    while (factor := _expansion(trials, points)) > 1:
        if points[-1].tau >= max_tau or trials.left == 0:
            return False
        points.append(trials.measure(min(factor * points[-1].tau, max_tau)))
    return True


def _expansion(trials: _Trials, points: list[_Point]) -> float:
    """The factor by which to go on after ``points``; 1.0 if the loss does not fall any more."""
    before, last = points[-2:]
    if trials.is_flat(last) and trials.is_flat(trials.best):
        return LEAP
    if last.loss >= before.loss:
        return 1.0
    if len(points) > 2 and _slope(before, last) <= STRAIGHT * _slope(points[-3], before):
        return STRIDE
    return DOUBLE


def _slope(left: _Point, right: _Point) -> float:
    return (right.loss - left.loss) / (right.tau - left.tau)


def _parabola(first: _Point, second: _Point, third: _Point) -> tuple[float, float] | None:
    """Where the parabola through three points is lowest, and its curvature; None if it is not."""
    left = _slope(first, second)
    curvature = (_slope(second, third) - left) / (third.tau - first.tau)
    if not (math.isfinite(curvature) and curvature > 0):
        return None
    return (first.tau + second.tau - left / curvature) / 2, curvature


class _Bracket(NamedTuple):
    low: _Point
    middle: _Point
    high: _Point


def _vertex(bracket: _Bracket) -> tuple[float, float]:
    """Where the parabola through the three points is lowest, and how far below the middle one.

    Next to an infinite loss there is no parabola, but if the loss falls towards it, all to gain
    from halving that side of the bracket.
    """
    low, middle, high = bracket
    if math.isinf(high.loss):
        falls = middle.loss < low.loss
        return (middle.tau + high.tau) / 2, math.inf if falls else 0.0
    parabola = _parabola(low, middle, high)
    if parabola is None:
        return middle.tau, 0.0
    tau, curvature = parabola
    if not low.tau < tau < high.tau:
        return middle.tau, 0.0
    return tau, curvature * (middle.tau - tau) * (middle.tau - tau)


def _shrink(bracket: _Bracket, point: _Point) -> _Bracket:
    """The narrowest bracket that the three points and a new one inside it make."""
    low, middle, high = bracket
    left, right = (point, middle) if point.tau < middle.tau else (middle, point)
    return _Bracket(low, left, right) if left.loss < right.loss else _Bracket(left, right, high)
