"""The calibration law: compute the learning rate from what a window of steps shows.

The functions here work on numbers only.

The rate is too low if the mean of the iterates keeps moving in one direction from window to window.
It is too high if the mean turns back: noise, or the steep walls of a valley, then throw the weights
about faster than they make progress. Signals of this kind are well known: the inner product of
successive gradients (Pflug 1983), hypergradients (Baydin et al. 2018), the distance from the start
of a phase (Pesme et al. 2020). This law takes the cosine of two successive movements of the mean
and compares it with the cosine that a random walk of such steps would show. It needs no forward
pass. Its windows are proportional to the run, because what helps the next few steps is not what
helps the run (short-horizon bias, Wu et al. 2018).
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import NamedTuple

from ..search.evidence import student_factor

# A loss that is higher by this fraction is measured again on other examples, whatever its standard
# error. If the error is unknown, the loss counts as risen.
_OBVIOUS = 0.1
# If other examples did not confirm a rise, it is measured again once it is this many times as
# large.
_HIGHER = 1.25
# If the loss has risen at this many checks in a row, counted from the first one, training does not
# lower this loss.
_ASCENTS = 4


@dataclass(frozen=True)
class Calibration:
    """The constants of the law.

    The defaults are meant for every run; see the table in RESULTS.md.

    Args:
        probe: fraction of the rate at which the first ``interval`` steps are taken. It is small, so
            that a rate that is far too high does no damage in these steps.
        distance: the rate that the probe suggests covers this multiple of the distance to the
            lowest loss along the first steps, in the same number of steps.
        caution: the first windows use a rate that is lower by this many standard deviations. A rate
            that is too low is soon noticed and raised; a rate that is too high does damage.
        probe_doubt: standard deviation of the logarithm of the probe's rate around the good rate.
        probe_noise: added to ``probe_doubt`` in quadrature, after division by the number of
            standard errors by which the loss fell.
        phase: fraction of the run, after the warm-up, in which the law searches for the rate. After
            it the rate follows the schedule alone.
        shortest_phase: minimum length of this phase, in steps.
        first_window: steps of the first window, or 1/200 of the run if that is more.
        growth: length of each window, as a multiple of the length of the one before.
        longest_check: maximum length of a window while the rate is held, as a fraction of the run.
            If the length of the run is unknown, the maximum is this fraction of the steps so far.
        shortest_check: lower bound of this maximum, in steps.
        excess: the good rate, as a multiple of the rate at which the mean's movement turns back as
            often as it goes on.
        slope: decrease of the cosine when the rate is e times higher.
        saturated: a cosine that exceeds that of a random walk by more than this shows that the rate
            is too low, but not by how much.
        rising: the rate is not raised if the loss rises by this many standard errors.
        noise: standard deviation of the logarithm of the rate that one cosine suggests.
        drift: standard deviation of the change of that logarithm from window to window.
        movement_doubt: standard deviation of that logarithm around the good rate's, however many
            cosines agree.
        change_at_most: largest factor by which one window may raise or lower the rate.
        blown_up: the run is taken back to its best mean if the loss at a window's mean exceeds the
            loss at the best mean by this many standard errors, as they were in the windows before.
        risen: this rise must also exceed this fraction of that loss.
        scattered: the run is also taken back if the changes of the rows' losses have grown by this
            factor over the windows before, allowing for the rate and the steps since the best mean,
            and the mean loss is not lower. A run that diverges does so on some rows first.
        confirmed: the run is also taken back if the loss rises by less, but by this many standard
            errors on other examples too. A run that overfits gets worse slowly.
        cut: factor applied to the rate when the run is taken back. It is applied once more for each
            earlier return to the same mean.
        spike: a gradient whose norm exceeds the geometric mean of the recent norms by this factor
            is scaled down to that limit; 1e9 leaves all gradients unchanged.
        spike_deviations: the norm must also exceed that mean by this many standard deviations of
            the logarithms of the norms.
        horizon_of_mean: the mean of the recent iterates covers about this fraction of the steps so
            far.
    """

    probe: float = 1 / 64
    distance: float = 2.0
    caution: float = 0.25
    probe_doubt: float = 0.5
    probe_noise: float = 1.0
    phase: float = 0.15
    shortest_phase: int = 60
    first_window: int = 6
    growth: float = 1.3
    longest_check: float = 0.05
    shortest_check: int = 24
    excess: float = 2.0
    slope: float = 0.2
    saturated: float = 0.1
    rising: float = 1.0
    noise: float = 0.5
    drift: float = 0.15
    movement_doubt: float = 0.5
    change_at_most: float = 6.0
    blown_up: float = 4.0
    risen: float = 0.01
    scattered: float = 2.5
    confirmed: float = 2.5
    cut: float = 0.7
    spike: float = 1.3
    spike_deviations: float = 3.0
    horizon_of_mean: float = 0.1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise ValueError(f"{field.name} must be a positive number, got {value!r}")
        for name in ("probe", "phase", "longest_check", "cut", "horizon_of_mean"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} must be at most 1, got {getattr(self, name)!r}")
        for name in ("growth", "spike"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")


def as_law(value: object) -> Calibration | None:
    """Return the constants for a ``calibrate_lr`` argument; None if it is False."""
    if isinstance(value, Calibration):
        return value
    if isinstance(value, bool):
        return Calibration() if value else None
    raise TypeError(f"calibrate_lr must be True, False or a Calibration, got {value!r}")


class Phase(IntEnum):
    """The phases of a calibration."""

    PROBE = 0
    SEARCH = 1
    HOLD = 2
    OFF = 3  # the loss is of no use for calibration: the learning rate stays as set


class Standing(NamedTuple):
    """The fields of a ``Rate`` that describe the run relative to its best mean."""

    since: int = 0
    returns: int = 0
    suspected: float = 0.0


class Rate(NamedTuple):
    """The state of a calibration.

    All rates are those of the param group with the highest one. The other groups keep their ratio
    to it.

    Attributes:
        phase: a value of ``Phase``.
        scale: multiplier of the learning rate during the probe.
        rate: after the probe, the rate used at the peak of the schedule.
        peak: highest rate that the schedule has set so far.
        probed: rate that the probe suggests.
        probed_variance: variance of its logarithm.
        moving: rate that the movements of the mean suggest.
        moving_variance: variance of its logarithm; infinite until the first cosine.
        ceiling: upper limit of the rate, set when the run has blown up at a higher one; infinite at
            first.
        scatter: standard error of the difference that a check measures, divided by the distance
            covered since the best mean (:func:`reach`), over the recent windows. 0.0 if unknown.
        travelled: sum of the rates at which the window's steps were taken.
        window: number of steps in the current window.
        ascents: number of consecutive stages, from the probe on, at which the loss has risen; 0
            once it has not.
        since: number of steps since the best mean so far.
        returns: number of times that the run has been taken back, minus the number of better means
            found since.
        suspected: rise of the loss above the best one that other examples did not confirm.
    """

    phase: int = Phase.PROBE
    scale: float = 1.0
    rate: float = 0.0
    peak: float = 0.0
    probed: float = 0.0
    probed_variance: float = 0.0
    moving: float = 0.0
    moving_variance: float = math.inf
    ceiling: float = math.inf
    scatter: float = 0.0
    travelled: float = 0.0
    window: int = 1
    ascents: int = 0
    since: int = 0
    returns: int = 0
    suspected: float = 0.0


def factor(rate: Rate, lr: float, step: int, warmup: int) -> float:
    """Return the multiplier of this step's learning rate.

    Args:
        rate: state of the calibration.
        lr: rate that the schedule has set, of the group with the highest one.
        step: number of this step, counted from 1.
        warmup: number of steps over which the rate rises to its peak.
    """
    if rate.phase == Phase.OFF:
        return 1.0
    if not lr > 0:  # for example at the end of a decay
        known = rate.phase != Phase.PROBE and rate.peak > 0
        return rate.rate / rate.peak if known else rate.scale
    # During a warm-up the height of the schedule's peak is unknown, but not when it is reached.
    risen = min(step / warmup, 1.0) if warmup else 1.0
    if rate.phase == Phase.PROBE:  # equal steps: rounding would lose tiny ones
        return rate.scale / risen
    return rate.rate * risen / (lr if risen < 1 else max(rate.peak, lr))


def seen(rate: Rate, lr: float, applied: float) -> Rate:
    """Return the state after a step at ``lr`` that was multiplied by ``applied``."""
    return rate._replace(
        peak=max(rate.peak, lr) if lr > 0 else rate.peak,
        travelled=rate.travelled + max(lr, 0.0) * applied,
    )


def begin(law: Calibration, interval: int) -> Rate:
    """Return the state before the first step."""
    return Rate(scale=law.probe, window=interval)


class Verdict(IntEnum):
    """The result of a check of a window."""

    SOUND = 0
    DOUBTFUL = 1  # the loss may have risen: do not raise the rate
    SUSPECT = 2  # measure other examples
    WORSE = 3


def judge(
    rate: Rate, law: Calibration, before: float, after: float, error: float | None
) -> Verdict:
    """Compare the loss at a window's mean with the loss at the best mean so far.

    Args:
        rate: state of the calibration.
        law: the constants.
        before: loss at the best mean.
        after: loss at the mean of this window.
        error: standard error of their difference; None if unknown. The differences of the windows
            before are then used instead.
    """
    if not math.isfinite(before):  # there is no good mean to return to
        return Verdict.DOUBTFUL
    if not math.isfinite(after):
        return Verdict.WORSE
    rise, usual = after - before, rate.scatter * reach(rate)
    visible, obvious = law.risen * abs(before), _OBVIOUS * abs(before)
    if error is None or not math.isfinite(error):
        doubtful, clear = visible, min(law.blown_up * usual, obvious)
    else:
        # The errors of a run that blows up grow too, so the windows before set the usual error.
        doubtful, clear = law.rising * error, law.blown_up * (usual or error)
        if rise > 0 and 0 < law.scattered * usual < error:
            return Verdict.WORSE if rise > max(clear, visible) else Verdict.SUSPECT
    if rise > max(clear, visible):
        return Verdict.WORSE
    if rise > max(min(doubtful, obvious), visible, _HIGHER * rate.suspected):
        return Verdict.SUSPECT
    return Verdict.DOUBTFUL if rise > doubtful else Verdict.SOUND


def judge_elsewhere(
    law: Calibration,
    before: Sequence[float],
    after: Sequence[float],
    errors: Sequence[float],
    *,
    last: bool = False,
) -> Verdict:
    """Judge a window with a suspect loss by its losses on other sets of examples.

    Args:
        law: the constants.
        before: losses at the best mean, one for each set.
        after: losses at this window's mean, one for each set.
        errors: standard errors of their differences; infinite if unknown. The scatter of the
            differences is then used instead.
        last: whether there are no more sets.

    Returns:
        ``WORSE`` or ``DOUBTFUL``; ``SUSPECT`` if another set is needed and may be available.
    """
    needed, unclear = (1, Verdict.DOUBTFUL) if last else (2, Verdict.SUSPECT)
    if not all(map(math.isfinite, before)):
        return Verdict.DOUBTFUL
    if not all(map(math.isfinite, after)):
        return Verdict.WORSE
    n, known = len(before), all(map(math.isfinite, errors))
    if n < (needed if known else 2):
        return unclear
    differences = [b - a for a, b in zip(before, after, strict=True)]
    rise = sum(differences) / n
    if known:
        error = math.hypot(*errors) / n
    else:
        error = student_factor(n - 1) * statistics.stdev(differences) / math.sqrt(n)
    if rise > max(law.confirmed * error, law.risen / 2 * abs(sum(before) / n)):
        return Verdict.WORSE
    return unclear if rise > error else Verdict.DOUBTFUL


def with_scatter(rate: Rate, before: float, after: float, error: float | None) -> Rate:
    """Return the state updated with the scatter of a sound window's losses.

    The new value and the old one are averaged as squares.

    Args:
        rate: state before this window.
        before: loss at the best mean.
        after: loss at the mean of this window.
        error: standard error of their difference; if it is unknown, the difference itself is used.
    """
    if error is None or not math.isfinite(error):
        error = abs(after - before)
    if not (0 < error < math.inf and reach(rate) > 0):
        return rate
    scatter = error / reach(rate)
    recent = rate.scatter or scatter
    return rate._replace(scatter=math.hypot(scatter, recent) / math.sqrt(2))


def with_ascent(rate: Rate, rises: bool) -> Rate:
    """Count consecutive stages at which the loss rose; switch calibration off after too many.

    The count begins with the probe. If the standard error is unknown, a probe whose loss rises in a
    straight line proves nothing: a few examples can cause that by chance. If the loss goes on
    rising at the checks, training does not lower this loss. In 96 runs of the fast problem with a
    ``val_fn`` of 16 labels, the loss rose like this in the probe of 3 runs, and after it at two
    checks in a row at most.
    """
    if not rate.ascents:
        return rate
    ascents = rate.ascents + 1 if rises else 0
    return off(rate) if ascents > _ASCENTS else rate._replace(ascents=ascents)


def off(rate: Rate) -> Rate:
    """Return the state with calibration switched off: the learning rate stays as set."""
    return rate._replace(phase=Phase.OFF, scale=1.0)


def reach(rate: Rate) -> float:
    """Return the distance since the best mean, up to a factor, as of a random walk."""
    return rate.rate * math.sqrt(rate.since)


def after_probe(
    rate: Rate, law: Calibration, steps: int, distance: float, total: int | None, certainty: float
) -> Rate:
    """Return the state after the line search along the first steps.

    Args:
        rate: state before the search.
        law: the constants.
        steps: number of steps taken.
        distance: distance from their start to the lowest loss, in units of these steps.
        total: number of steps of the run; None if unknown.
        certainty: number of standard errors by which the loss fell there.
    """
    found = law.distance * distance / steps * rate.travelled / steps
    variance = law.probe_doubt**2 + (law.probe_noise / max(certainty, 1.0)) ** 2
    return rate._replace(
        phase=Phase.SEARCH,
        scale=1.0,
        rate=found * math.exp(-law.caution * math.sqrt(variance)),
        probed=found,
        probed_variance=variance,
        travelled=0.0,
        window=max(law.first_window, (total or 0) // 200),
    )


def after_window(
    rate: Rate,
    law: Calibration,
    verdict: Verdict,
    cosine: float | None,
    lengths: Sequence[int],
    momentum: float,
    step: int,
    total: int | None,
) -> Rate:
    """Return the state after a window at whose end the run was sound.

    Each cosine is an estimate of the good rate. A scalar Kalman filter combines them. The result is
    averaged with the probe's rate, and its weight is limited: on some problems either estimate is
    wrong by a factor of two.

    Args:
        rate: state before this window.
        law: the constants.
        verdict: result of the window's check. The rate is not raised if the loss seems to rise: a
            run that begins to blow up also moves persistently.
        cosine: cosine of the last two movements of the mean; None before there are two.
        lengths: number of steps in each of the three windows that the movements come from.
        momentum: momentum of the optimizer, which makes any walk persist for a while.
        step: number of steps so far.
        total: number of steps of the run; None if unknown.
    """
    following = next_window(rate, law, step, total)
    if cosine is None or not math.isfinite(cosine) or not (rate.rate > 0 and rate.probed > 0):
        return following
    persistence = cosine - random_walk_cosine(*lengths, momentum)
    suggested = math.log(rate.rate) + persistence / law.slope + math.log(law.excess)
    known = math.isfinite(rate.moving_variance) and rate.moving > 0
    before = math.log(rate.moving) if known else suggested
    variance = rate.moving_variance + law.drift**2
    gain = variance / (variance + law.noise**2) if known else 1.0
    # If the rate is far too low, the cosine gives only a lower bound. Averaging would pull it down.
    if persistence > law.saturated and suggested > before and verdict == Verdict.SOUND:
        gain = 1.0
    moving = before + gain * (suggested - before)
    variance = (1 - gain) * variance if known else law.noise**2

    weights = 1 / rate.probed_variance, 1 / (variance + law.movement_doubt**2)
    wanted = (weights[0] * math.log(rate.probed) + weights[1] * moving) / sum(weights)
    change = wanted - math.log(rate.rate)
    if verdict > Verdict.SOUND:
        change = min(change, 0.0)
    limit = math.log(law.change_at_most)
    change = max(-limit, min(limit, change))
    return following._replace(
        rate=min(rate.rate * math.exp(change), rate.ceiling),
        moving=math.exp(moving),
        moving_variance=variance,
    )


def with_best(rate: Rate) -> Rate:
    """Return the state after the window that has just ended gave the best mean so far."""
    return rate._replace(since=0, suspected=0.0, returns=max(0, rate.returns - 1))


def after_return(rate: Rate, law: Calibration, step: int, total: int | None) -> Rate:
    """Return the state after the run was taken back to the best mean so far.

    ``scatter`` is rescaled so that the usual error stays the same, although the steps are shorter
    now. Otherwise a model that overfits would be taken back again and again.
    """
    returns = rate.returns + 1
    factor = law.cut**returns
    cut = rate.rate * factor
    window = max(law.first_window, round(rate.window / law.growth))
    return next_window(rate, law, step, total)._replace(
        rate=cut,
        ceiling=cut,
        probed=cut,
        probed_variance=law.probe_doubt**2,
        moving_variance=math.inf,
        scatter=rate.scatter / factor,
        window=window,
        since=0,
        returns=returns,
        suspected=0.0,
    )


def next_window(rate: Rate, law: Calibration, step: int, total: int | None) -> Rate:
    """Return the state with the length of the next window.

    Args:
        rate: state of the calibration.
        law: the constants.
        step: number of steps so far.
        total: number of steps of the run; None if unknown. The number of steps so far is then used.
    """
    window = max(rate.window + 1, int(rate.window * law.growth))
    if rate.phase == Phase.HOLD or total is None:
        window = min(window, max(law.shortest_check, int(law.longest_check * (total or step))))
    return rate._replace(window=window, travelled=0.0)


def held(rate: Rate, law: Calibration, step: int, warmup: int, total: int | None) -> Rate:
    """Return the state with the rate held if the next window would end well after the search phase.

    Args:
        rate: state of the calibration.
        law: the constants.
        step: number of steps so far.
        warmup: number of warm-up steps among them.
        total: number of steps of the run; None if unknown. The rate is then never held.
    """
    if total is None or rate.phase != Phase.SEARCH:
        return rate
    last = warmup + max(law.phase * total, law.shortest_phase)
    if step + 0.7 * rate.window <= last:
        return rate
    # Before the first cosine the probe's rate is the only estimate.
    known = math.isfinite(rate.moving_variance)
    return rate._replace(
        phase=Phase.HOLD, rate=rate.rate if known else min(rate.probed, rate.ceiling)
    )


@functools.cache
def random_walk_cosine(first: int, second: int, third: int, momentum: float) -> float:
    """Return the cosine of two successive movements of the mean of a random walk.

    The steps of the walk have momentum. The first movement leads from the mean over the first
    window to the mean over the second, the next one from there to the mean over the third. Without
    momentum the cosine is 1/4 for windows of equal length: half of what the second window adds is
    in both movements. If the steps are an exponential mean of independent ones, it is higher in
    short windows: 0.57 in windows of 12 steps at momentum 0.9.

    Args:
        first: number of steps in the first window.
        second: number of steps in the second window.
        third: number of steps in the third window.
        momentum: weight of the past in the exponential mean.
    """
    # Steps before the first window that momentum still remembers; earlier ones are forgotten.
    memory = math.ceil(6 / max(1 - momentum, 1e-2)) if momentum else 0
    ends = [memory, memory + first, memory + first + second, memory + first + second + third]
    # Weight of the independent step i <= t in x(t): 1 - momentum^(t - i + 1). For each i, it is
    # summed over the t of a window.
    powers = [0.0]  # sum over 0 < k <= n of 1 - momentum^k
    power = 1.0
    for _ in range(ends[-1]):
        power *= momentum
        powers.append(powers[-1] + 1 - power)

    def mean_weight(i: int, begin: int, end: int) -> float:
        return (powers[max(end - i, 0)] - powers[max(begin - i, 0)]) / (end - begin)

    product = before = after = 0.0
    for i in range(ends[-1]):
        means = [mean_weight(i, *ends[k : k + 2]) for k in range(3)]
        one, two = means[1] - means[0], means[2] - means[1]
        product, before, after = product + one * two, before + one * one, after + two * two
    return product / math.sqrt(before * after)
