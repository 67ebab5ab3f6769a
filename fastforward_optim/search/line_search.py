"""Line searches: how many times to repeat the last step.

A line search is a pure function of ``evaluate(tau) -> loss``: it does not depend on tensors,
optimizers or devices. ``tau`` is the multiple of the last step that is added to the weights
(tau = 0: stay; tau = 1: repeat the step once), as in the paper (section "Fast Forward").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from .evidence import Loss, Trial, error_of
from .parabola import Bracket, shrink, slope, vertex

Evaluate = Callable[[float], float]

# A relative change of the loss below this may be rounding. Measured: in bfloat16, the loss of
# SmolLM2-135M on 1,024 tokens has a relative standard deviation of 3e-4 between weights that differ
# by one step of AdamW at 2e-5, and one such step improves it by as much.
FLAT = 1e-3
# Expansion factors of a search: on a plateau, where there is nothing to step over; down a straight
# slope; and down a slope that flattens out, where the minimum is near.
LEAP = 8.0
STRIDE = 4.0
DOUBLE = 2.0
# A slope counts as straight if it is at least this fraction of the one before it. On a parabola the
# minimum is then more than ten times as far away as the first of the two points.
STRAIGHT = 0.9
# The vertex of a parabola is worth a trial if it promises this fraction of the decrease so far.
WORTHWHILE = 0.01


def _flat(loss: float, reference: float) -> bool:
    """Return True if two losses are equal within rounding."""
    return math.isfinite(loss) and math.isclose(loss, reference, rel_tol=FLAT)


class LineSearch(Protocol):
    """The interface of the ``line_search`` argument of ``FastForward``."""

    def __call__(self, evaluate: Evaluate, last_tau: float, /) -> float:
        """Search for the best multiple of the last step.

        Args:
            evaluate: returns the validation loss at ``tau``; each call costs one pass over the
                validation set. The loss is a float with an ``error`` attribute: the standard error
                of its difference from the loss at tau = 0, or None (see ``Loss``). A ``tau`` below
                zero goes back along the step, at most to where it began.
            last_tau: the tau that the previous stage returned; 0.0 before the first one.

        Returns:
            One of the values passed to ``evaluate``; 0.0 to stay.
        """
        ...


class _Trials:
    """Calls ``evaluate`` within a budget and keeps the trials."""

    def __init__(self, evaluate: Evaluate, max_trials: int) -> None:
        self._evaluate = evaluate
        self.left = max_trials
        self.start = self.best = Trial(0.0, Loss(math.inf, 0.0))
        self.points = [self.start]
        self.start = self.best = self.measure(0.0)

    def measure(self, tau: float) -> Trial:
        self.left -= 1
        loss = self._evaluate(tau)
        error = error_of(loss)
        if error is None:  # a change that may be rounding is no evidence
            error = FLAT * abs(self.start.loss) / 2
        # NaN compares false with everything and -inf would win: both are treated as worst.
        point = Trial(tau, Loss(loss if math.isfinite(loss) else math.inf, error))
        self.points.append(point)
        if point.loss < self.best.loss:
            self.best = point
        return point

    def surest(self, standard_errors: float) -> Trial:
        """Return the trial with the largest decrease after a deduction for chance.

        The deduction grows with the distance: a search that looks far finds a decrease by chance
        more often, and the mistake is larger. If the loss at the start is not finite, any finite
        loss is better.
        """
        if math.isinf(self.start.loss) or standard_errors == 0:
            return self.best

        def sure_decrease(point: Trial) -> float:
            if point.tau == 0 or point.loss == math.inf:
                return 0.0
            far = 1 + math.log10(1 + abs(point.tau)) / 4
            decrease = self.start.loss - point.loss - far * standard_errors * (point.error or 0.0)
            return decrease if decrease > 0 else 0.0  # NaN too

        return max(self.points, key=lambda point: (sure_decrease(point), -abs(point.tau)))

    def is_flat(self, point: Trial) -> bool:
        """Return True if the loss at ``point`` equals that of the start within rounding."""
        return _flat(point.loss, self.start.loss)

    def is_lower(self, point: Trial) -> bool:
        """Return True if the loss at ``point`` is lower than at the start by more than rounding."""
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
    tau = 0 first, returns the best point instead of the first one past it, and stops at a cap. If
    the loss is still flat within rounding when it stops decreasing, the stride grows eightfold
    (tau = 8, 16, ..., then 64, 128, ...).

    It takes about tau + 2 passes over the validation set to return tau.

    Args:
        max_tau: largest multiple of the step to try.
        max_trials: maximum number of passes over the validation set, including the one at tau = 0.
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

    The search starts at half of the last stage's tau, or at 1 if that was small. While this is too
    far, it goes down by factors of four. While the loss decreases, it goes up: by doubling,
    fourfold where the loss falls as steeply as before, and eightfold where it is flat within
    rounding. Then it takes at most two steps to the vertex of the parabola through the bracket's
    three points, if that promises at least 1 % more decrease.

    A candidate is accepted on evidence: its loss must be lower by two standard errors of the paired
    difference (row by row, if ``val_fn`` returns the losses of the rows, as ``ValidationLoss``
    does). The requirement grows with the distance, to three standard errors at a hundred steps. If
    the error is unknown, the loss must be lower by 0.1 %.

    It takes about five passes over the validation set if the last stage's tau is a good guess,
    seven to ten without one (the first stage), and two or three if neither this step nor the last
    stage's could be repeated.

    Args:
        max_tau: largest multiple of the step to try.
        max_trials: maximum number of passes over the validation set, including the one at tau = 0.
        standard_errors: required decrease, in standard errors; 0 accepts the lowest loss measured.
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
            tau, gain = vertex(bracket)
            decrease = trials.start.loss - trials.best.loss
            visible = decrease + gain > FLAT * abs(trials.start.loss)
            if not visible or gain <= WORTHWHILE * decrease:
                break
            bracket = shrink(bracket, trials.measure(tau))
        return trials.surest(self.standard_errors).tau

    def _bracket(self, trials: _Trials, tau: float) -> Bracket | None:
        """Return three points with a minimum between them, or None if there is no such triple."""
        points = [trials.start, trials.measure(tau)]
        if not _go_ahead(trials, points, self.max_tau):
            return None
        if len(points) > 2:
            return Bracket(*points[-3:])
        while points[1].tau >= 2 and trials.left > 0:
            points.insert(1, trials.measure(max(1.0, points[1].tau / 4)))
            if points[1].loss < points[0].loss:
                return Bracket(*points[:3])
        return None


def _go_ahead(trials: _Trials, points: list[Trial], max_tau: float) -> bool:
    """Extend the points until the loss rises; return True if it did within the limits."""
    while (factor := _expansion(trials, points)) > 1:
        if points[-1].tau >= max_tau or trials.left == 0:
            return False
        points.append(trials.measure(min(factor * points[-1].tau, max_tau)))
    return True


def _expansion(trials: _Trials, points: list[Trial]) -> float:
    """Return the factor from the last tau to the next; 1.0 if the loss no longer falls."""
    before, last = points[-2:]
    if trials.is_flat(last) and trials.is_flat(trials.best):
        return LEAP
    if last.loss >= before.loss:
        return 1.0
    if len(points) > 2 and slope(before, last) <= STRAIGHT * slope(points[-3], before):
        return STRIDE
    return DOUBLE
