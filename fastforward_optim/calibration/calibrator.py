"""The calibration of one run: ``FastForward`` calls it around its steps and in its stages.

It handles tensors through ``Iterates`` and ``Stage``, and takes a function that measures the loss.
It does not depend on ``torch.optim`` or on other ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

from ..search.evidence import Loss, Rows, Trial, error_of
from ..search.line_search import FLAT
from ..stage.stage import Stage
from .gradient_spikes import Closure, GradientSpikes
from .iterates import Groups, Iterates
from .law import (
    Calibration,
    Phase,
    Rate,
    Standing,
    Verdict,
    after_probe,
    after_return,
    after_window,
    begin,
    factor,
    held,
    judge,
    judge_elsewhere,
    off,
    seen,
    with_ascent,
    with_best,
    with_scatter,
)
from .probe import ProbeSearch, is_ascent, is_unchanged, lowest

# A run ends at the mean of the recent iterates if that is better by this many standard errors. It
# is not measured if the rate has decayed below this fraction of its peak.
_BETTER, _DECAYED = 1.0, 0.2
# The decision of a check that takes the run back,
RETURNED = "worse: back to the best mean, at a lower rate"
# and those that leave the learning rate alone.
UNCHANGED = "the loss is the same at all weights: the learning rate is left alone"
ASCENT = "the loss rises from the first steps on: the learning rate is left alone"
# Maximum number of other sets of examples on which a suspect loss is measured, at two points each.
_SETS = 8

# Returns a context for measurements on other examples; it yields a function that moves on to the
# next set.
Others = Callable[[], AbstractContextManager[Callable[[], None]]]


class Outcome(NamedTuple):
    """The result of a stage of a calibrated run.

    Attributes:
        kind: ``"probe"``, ``"check"`` or ``"finish"``.
        decision: the decision, in words.
        tau: final position of the weights, in steps from where they were; also 0.0 if they were
            left at the mean of the recent iterates.
        trials: pairs (tau, loss) on the line; empty for a check if the loss before it is known.
        before: loss at the start of the stage; for a check, at the best mean so far.
        after: loss at the final weights; for a check, at this window's mean.
        mean_loss: loss at a mean; None if none was measured.
        error: standard error of the difference that decided; None if unknown.
        averaged: whether the weights were left at the mean of the recent iterates.
        elsewhere: number of passes over examples other than the stage's.
    """

    kind: str
    decision: str
    tau: float
    trials: tuple[Trial, ...]
    before: float
    after: float
    mean_loss: float | None = None
    error: float | None = None
    averaged: bool = False
    elsewhere: int = 0


class Calibrator:
    """Scales the learning rate of a run by what the run itself shows.

    Args:
        law: the constants.
        interval: number of steps of the probe.
        warmup: number of steps over which the user's schedule rises.
        total_steps: number of steps of the run; None if unknown.
        max_interval: maximum number of steps in a window; None for the law's limit alone.
    """

    def __init__(
        self,
        law: Calibration,
        interval: int,
        warmup: int,
        total_steps: int | None,
        max_interval: int | None,
    ) -> None:
        self.law = law
        self.interval = interval
        self.warmup = warmup
        self.total_steps = total_steps
        self.max_interval = max_interval
        self.iterates = Iterates(law.horizon_of_mean)
        self.spikes = GradientSpikes(law)

    def begin(self) -> Rate:
        """Return the state before the first step."""
        return begin(self.law, self.interval)

    def factor(self, rate: Rate, groups: list[dict[str, Any]], step: int) -> float:
        """Return the multiplier of the learning rates in this step, counted from 1."""
        return factor(rate, highest_rate(groups), step, self.warmup)

    def without_spikes(
        self, rate: Rate, groups: list[dict[str, Any]], closure: Closure | None
    ) -> Closure | None:
        """Scale down this step's gradients if they are a spike; see :class:`GradientSpikes`."""
        return closure if rate.phase == Phase.OFF else self.spikes.clipping(closure, groups)

    def after_step(
        self, rate: Rate, groups: list[dict[str, Any]], step: int, applied: float
    ) -> Rate:
        """Return the state after a step whose rates were multiplied by ``applied``."""
        if rate.phase == Phase.PROBE:
            self.iterates.steps += 1
        elif step <= self.warmup:  # the mean moves because the rate rises
            self.iterates.restart(forget=True)
        elif rate.phase != Phase.OFF:
            self.iterates.add()
        return seen(rate, highest_rate(groups), applied)

    def is_due(self, rate: Rate) -> bool:
        """Return True if a stage is due."""
        window = rate.window
        if rate.phase != Phase.PROBE and self.max_interval is not None:
            window = min(window, self.max_interval)
        return rate.phase != Phase.OFF and self.iterates.steps >= window

    def not_moved(self, rate: Rate) -> Rate:
        """Return the state after steps that changed nothing.

        In the probe the rate is raised: 16-bit weights lose small steps in rounding.
        """
        if rate.phase == Phase.PROBE and rate.travelled > 0:
            self.iterates.steps = 0
            return rate._replace(scale=min(1.0, 8 * rate.scale), travelled=0.0)
        return rate

    def run(
        self,
        rate: Rate,
        stage: Stage,
        val_fn: Callable[..., Any],
        step: int,
        products: Sequence[float],
        momentum: float,
        others: Others | None,
    ) -> tuple[Outcome, Rate]:
        """Run a stage: the probe's line search, or the check at the end of a window.

        Args:
            rate: state of the calibration.
            stage: the stage from :meth:`Iterates.stage`, with its anchor set.
            val_fn: measures the loss; takes the rows to compare it with, or None.
            step: number of steps so far.
            products: result of :meth:`Iterates.products`, summed over all ranks.
            momentum: momentum of the wrapped optimizer.
            others: context for measurements on other examples; None if there are none.
        """
        if rate.phase == Phase.PROBE:
            window, rate = self._probe(rate, stage, val_fn)
        else:
            rate = self._with_standing(rate)
            window, rate = self._check(rate, stage, val_fn, step, products, momentum, others)
            self.iterates.standing = Standing(*(getattr(rate, name) for name in Standing._fields))
            rate = with_ascent(
                rate, window.mean_loss is not None and window.mean_loss > window.before
            )
            if rate.phase == Phase.OFF:
                window = window._replace(decision=ASCENT)
        return window, held(rate, self.law, step, self.warmup, self.total_steps)

    def _probe(self, rate: Rate, stage: Stage, val_fn: Callable[[], Any]) -> tuple[Outcome, Rate]:
        steps = self.iterates.steps
        # The first trial is as far as the steps would have led at the rate that was set.
        tau, trials = stage.search(val_fn, ProbeSearch(steps / rate.scale), 0.0)
        losses = dict(trials)
        loss = losses[tau]
        distance = lowest(trials)
        if distance is None:  # the loss at the current weights is not finite
            distance = lowest([(0.0, 0.0), (steps / rate.scale, math.inf)])
            assert distance is not None
        self.iterates.restart(forget=True)
        found = steps + distance.tau
        rate = after_probe(rate, self.law, steps, found, self.total_steps, distance.certainty)
        decision = "found the distance" if distance.certainty else "nothing is lower: a bound"
        ascends = is_ascent(trials)
        if is_unchanged(trials):
            rate, decision = off(rate), UNCHANGED
        elif ascends and error_of(loss) is not None:
            rate, decision = off(rate), ASCENT
        rate = rate._replace(ascents=int(ascends))
        window = Outcome(*("probe", decision, tau, trials, losses[0.0], loss), error=error_of(loss))
        return window, rate

    def _check(
        self,
        rate: Rate,
        stage: Stage,
        val_fn: Callable[..., Any],
        step: int,
        products: Sequence[float],
        momentum: float,
        others: Others | None,
    ) -> tuple[Outcome, Rate]:
        """Check that the run is sound; if not, go back to the best mean so far."""
        iterates = self.iterates
        before = self._at_best(stage, val_fn)
        loss = stage.measure(partial(val_fn, _rows(before)), iterates.mean)
        error = error_of(loss)
        verdict = judge(rate, self.law, before, loss, error)
        elsewhere = 0
        if verdict == Verdict.SUSPECT:
            verdict, elsewhere = self._look_elsewhere(
                *(verdict, stage, val_fn, iterates.mean, before, loss, others)
            )
            if verdict == Verdict.DOUBTFUL:
                rate = rate._replace(suspected=float(loss - before))
        back = verdict == Verdict.WORSE
        tau = -float(rate.since) if back else 0.0
        window = Outcome(
            kind="check",
            decision=RETURNED if back else "sound",
            tau=tau,
            # Left out if the loss is known, so that a resumed run, which measures it again, has the
            # same history as an uninterrupted one.
            trials=(Trial(-float(rate.since), before),) if _comparable(loss) is None else (),
            before=before,
            after=before if back else loss,
            mean_loss=loss,
            error=error,
            elsewhere=elsewhere,
        )
        if back:
            stage.put(iterates.best)
            iterates.restart(forget=True, known=_comparable(before))
            return window, after_return(rate, self.law, step, self.total_steps)
        stage.write(0.0)
        cosine = _cosine(products) if rate.phase == Phase.SEARCH else None
        lengths = (*iterates.lengths, iterates.steps)
        # Errors of the first windows are not used, since everything grows then: an adapter starts
        # at zero.
        if error is None or (
            verdict == Verdict.SOUND and (cosine is not None or rate.phase == Phase.HOLD)
        ):
            rate = with_scatter(rate, before, loss, error)
        rate = after_window(
            *(rate, self.law, verdict, cosine, lengths, momentum, step, self.total_steps)
        )
        is_best = loss < before or not math.isfinite(before)
        iterates.next_window(is_best=is_best, known=_comparable(loss if is_best else before))
        return window, with_best(rate) if is_best else rate

    def _with_standing(self, rate: Rate) -> Rate:
        """Return the state with this window's position relative to the best mean."""
        rate = rate._replace(**self.iterates.standing._asdict())
        return rate._replace(since=rate.since + self.iterates.steps)

    def _at_best(self, stage: Stage, val_fn: Callable[..., Any]) -> float:
        """Return the loss at the best mean so far."""
        known = self.iterates.known
        return stage.measure(val_fn, self.iterates.best) if known is None else known

    def _look_elsewhere(
        self,
        verdict: Verdict,
        stage: Stage,
        val_fn: Callable[..., Any],
        values: Groups,
        before: float,
        loss: float,
        others: Others | None,
    ) -> tuple[Verdict, int]:
        """Measure whether the loss exceeds the loss at the best mean on other examples too.

        The best mean was chosen on the examples of the checks, so it looks better there than it is.
        Each set of examples takes two passes. Sets are measured until the result is clear, at most
        16 passes in all.

        Returns:
            The verdict and the number of passes.
        """
        sets: list[tuple[float, float, float]] = []
        seen, found, passes = {before}, Verdict.SUSPECT, 0
        with nullcontext() if others is None else others() as take_next:
            while take_next is not None and found == Verdict.SUSPECT and len(sets) < _SETS:
                take_next()
                at_best = stage.measure(val_fn, self.iterates.best)
                passes += 1
                if at_best in seen:  # all examples have been used
                    break
                seen.add(at_best)
                here = stage.measure(partial(val_fn, _rows(at_best)), values)
                passes += 1
                error = error_of(here)
                sets.append((at_best, here, math.inf if error is None else error))
                found = judge_elsewhere(self.law, *zip(*sets, strict=True))
        if not sets:  # then the stage's own examples decide
            error = error_of(loss)
            clear = error is not None and loss - before > self.law.blown_up * error
            found = Verdict.WORSE if clear or verdict == Verdict.WORSE else Verdict.DOUBTFUL
        elif found == Verdict.SUSPECT:
            found = judge_elsewhere(self.law, *zip(*sets, strict=True), last=True)
        return found, passes

    def finish(
        self,
        rate: Rate,
        stage: Stage,
        val_fn: Callable[..., Any],
        groups: list[dict[str, Any]],
        others: Others | None,
    ) -> Outcome:
        """Leave the weights at the best end point.

        This is the last iterate, or the mean of the recent iterates if it is clearly better, or the
        best mean of a window if both are worse. The mean of the recent iterates is not measured if
        a schedule has brought the rate down.
        """
        iterates, rate = self.iterates, self._with_standing(rate)
        before = self._at_best(stage, val_fn)
        loss = last = stage.measure(partial(val_fn, _rows(before)), stage.anchor())
        error = error_of(last)
        trials = ((-float(rate.since), before),) if _comparable(last) is None else ()
        values, decision, mean_loss = stage.anchor(), "left at the last iterate", None
        if rate.phase == Phase.PROBE or highest_rate(groups) > _DECAYED * rate.peak:
            mean_loss = stage.measure(partial(val_fn, _rows(last)), iterates.average)
            decision = "the mean is not better"
        averaged = mean_loss is not None and _is_lower(mean_loss, last, _BETTER)
        if averaged and mean_loss is not None:
            loss, values, decision = mean_loss, iterates.average, "left at the mean"
        verdict = judge(rate, self.law, before, loss, error)
        elsewhere = 0
        if verdict >= Verdict.SUSPECT and math.isfinite(loss):
            verdict, elsewhere = self._look_elsewhere(
                *(verdict, stage, val_fn, values, before, loss, others)
            )
        back = verdict == Verdict.WORSE
        if back:
            values, loss, averaged = iterates.best, before, False
            decision = "worse: back to the best mean"
        stage.put(values)
        iterates.unfinished = False
        return Outcome(
            kind="finish",
            decision=decision,
            # Directly after a check whose mean is the best one, report the distance of the last
            # step.
            tau=-float(max(rate.since, 1)) if back else 0.0,
            trials=(*trials, Trial(0.0, last)),
            before=last,
            after=loss,
            mean_loss=mean_loss,
            error=error if mean_loss is None else error_of(mean_loss),
            averaged=averaged,
            elsewhere=elsewhere,
        )


def highest_rate(groups: list[dict[str, Any]]) -> float:
    """Return the highest learning rate of the param groups."""
    return max((float(group.get("lr") or 0.0) for group in groups), default=0.0)


def _rows(loss: float) -> Rows | None:
    return loss.rows if isinstance(loss, Loss) else None


def _comparable(loss: float) -> float | None:
    """Return the loss if later ones can be compared with it row by row, else None."""
    return None if error_of(loss) is None or not math.isfinite(loss) else loss


def _is_lower(loss: float, than: float, errors: float) -> bool:
    """Return True if a loss is lower by this many standard errors.

    If the error is unknown, the loss must be lower by more than rounding.
    """
    if not math.isfinite(loss):
        return False
    if not math.isfinite(than):
        return True
    error = error_of(loss)
    margin = FLAT * abs(than) if error is None or not math.isfinite(error) else errors * error
    return loss < than - margin


def _cosine(products: Sequence[float]) -> float | None:
    both, last, now = products
    return both / math.sqrt(last * now) if last > 0 and now > 0 else None
