"""The law: from what a window of steps shows to the learning rate. Numbers only.

A rate is too low where the mean of the iterates goes on in one direction from window to window,
and too high where it turns back: then noise, or a valley's steep walls, throw the weights about
faster than they make way. Signs of this kind are old: the inner product of successive gradients
(Pflug 1983), hypergradients (Baydin et al. 2018), the distance from where a phase began (Pesme et
al. 2020). Here it is the cosine of two successive movements of the mean, compared with what a
random walk of such steps would show. It needs no forward, and looks over windows that are in
proportion to the run: what helps the next few steps is not what helps the run (short-horizon bias,
Wu et al. 2018).
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

# A loss that is higher by this part deserves a second look, whatever its error; where errors are
# not known it has risen.
_OBVIOUS = 0.1
# A rise that other examples did not show is looked at again once it is so many times higher.
_HIGHER = 1.25
# After so many checks in a row, from the first on, at which the loss has risen, it is none that
# training lowers.
_ASCENTS = 4


@dataclass(frozen=True)
class Calibration:
    """The constants of the law. The defaults are for every run; see the table in RESULTS.md.

    Args:
        probe: part of the rate at which the first ``interval`` steps are taken. Small, so that a
            rate that is far too high has done no damage by then.
        distance: the rate that the probe suggests covers this many times the distance to the
            lowest loss along the first steps, in as many steps again.
        caution: the first windows use a rate that is lower by so many standard deviations: a low
            rate is soon noticed and raised, a high one does damage.
        probe_doubt: standard deviation of the logarithm of that rate from the good one.
        probe_noise: added to it, over the number of standard errors by which the loss fell.
        phase: part of the run, after a warm-up, in which the rate is looked for; then the schedule
            has it.
        shortest_phase: or so many steps, if that is more.
        first_window: steps of the first window, or a two-hundredth of the run if that is more.
        growth: each window is so many times longer than the one before.
        longest_check: while the rate is held, windows are at most this part of the run; if its
            length is not known, at most this part of the steps so far.
        shortest_check: or so many steps, if that is more.
        excess: a good rate is so many times the one at which the mean's movement turns back as
            often as it goes on.
        slope: how much the cosine falls where the rate is e times higher.
        saturated: a cosine that is higher than a random walk's by more than this says that the rate
            is too low, and little of how much.
        rising: the rate is not raised where the loss rises by so many standard errors.
        noise: standard deviation of the logarithm of the rate that one cosine suggests.
        drift: by how much that logarithm wanders from window to window.
        movement_doubt: standard deviation of it from the good rate's, however many cosines agree.
        change_at_most: limit of one window's factor, or of its inverse.
        blown_up: standard errors, as they were in the windows before, by which the loss at a
            window's mean has to exceed that at the best one for the run to be taken back to it,
        risen: and part of that loss.
        scattered: or it is, where the rows' losses have come to change by so many times more than
            in the windows before, for the rate and the steps since the best mean, and the mean
            loss is not lower: what blows up does so on some rows first.
        confirmed: or it is, where the loss exceeds it by less, but by so many standard errors on
            other examples too: a run that overfits gets worse slowly.
        cut: factor of the rate when a run has been taken back; applied once more for each time
            that it was taken back to the same mean before.
        spike: a gradient whose norm exceeds the geometric mean of the recent ones by this factor is
            scaled down to that; 1e9 leaves gradients as they are.
        spike_deviations: not before it exceeds it by so many standard deviations of the norms'
            logarithms.
        horizon_of_mean: the mean that is kept aside is over about this part of the steps so far.
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
    """What a user passed as ``calibrate_lr``: the constants, or None if it is not to be."""
    if isinstance(value, Calibration):
        return value
    if isinstance(value, bool):
        return Calibration() if value else None
    raise TypeError(f"calibrate_lr must be True, False or a Calibration, got {value!r}")


class Phase(IntEnum):
    """How far the calibration has come."""

    PROBE = 0
    SEARCH = 1
    HOLD = 2
    OFF = 3  # the loss says nothing of the run: the learning rate stays as it was set


class Standing(NamedTuple):
    """How the run stands beside its best mean: those of a ``Rate``'s numbers that go with it."""

    since: int = 0
    returns: int = 0
    suspected: float = 0.0


class Rate(NamedTuple):
    """What is known of the learning rate.

    The rates are those of the param group with the highest one; the others keep their ratio to it.

    Attributes:
        phase: one of ``Phase``.
        scale: in the probe, what the learning rate is multiplied by.
        rate: after it, the rate that the schedule's peak is brought to.
        peak: the highest rate that the schedule has set so far.
        probed: the rate that the probe suggests.
        probed_variance: of its logarithm.
        moving: the rate that the mean's movements suggest.
        moving_variance: of its logarithm; infinite until there has been a cosine.
        ceiling: what the rate is not to exceed, since a run at more has blown up; infinite at
            first.
        scatter: standard error of a check's difference, over how far the steps since the best mean
            led (:func:`reach`); of the recent windows. 0.0 if it is not known.
        travelled: sum of the rates that the window's steps were taken at.
        window: number of steps of the present window.
        ascents: how many stages in a row, from the probe on, the loss has risen at; 0 once it has
            not.
        since: steps since the best mean so far.
        returns: how many times the run has been taken back, less the better means found since.
        suspected: by how much the loss exceeded the best one where other examples did not confirm
            it.
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
    """What the learning rate is multiplied by in this step.

    Args:
        rate: what is known of it.
        lr: what the schedule has set, of the group with the highest rate.
        step: number of this step, from 1.
        warmup: number of steps over which the rate rises to its peak.
    """
    if rate.phase == Phase.OFF:
        return 1.0
    if not lr > 0:  # as at the end of a decay
        known = rate.phase != Phase.PROBE and rate.peak > 0
        return rate.rate / rate.peak if known else rate.scale
    # How high the schedule's peak will be is not known in a warm-up, but that it is reached then.
    risen = min(step / warmup, 1.0) if warmup else 1.0
    if rate.phase == Phase.PROBE:  # steps of one length: tiny ones would be lost in rounding
        return rate.scale / risen
    return rate.rate * risen / (lr if risen < 1 else max(rate.peak, lr))


def seen(rate: Rate, lr: float, applied: float) -> Rate:
    """After a step at ``lr``, which was multiplied by ``applied``."""
    return rate._replace(
        peak=max(rate.peak, lr) if lr > 0 else rate.peak,
        travelled=rate.travelled + max(lr, 0.0) * applied,
    )


def begin(law: Calibration, interval: int) -> Rate:
    """Before the first step."""
    return Rate(scale=law.probe, window=interval)


class Verdict(IntEnum):
    """What a check says of a window."""

    SOUND = 0
    DOUBTFUL = 1  # the loss may have risen: a reason not to raise the rate
    SUSPECT = 2  # a reason to measure other examples
    WORSE = 3


def judge(
    rate: Rate, law: Calibration, before: float, after: float, error: float | None
) -> Verdict:
    """What the loss at the mean of a window says, beside the one at the best mean so far.

    Args:
        rate: what is known so far.
        law: the constants.
        before: loss at the best mean.
        after: loss at the mean of this window.
        error: standard error of their difference; None if it is not known: then the differences
            of the windows before stand in for it.
    """
    if not math.isfinite(before):  # nowhere to go back to
        return Verdict.DOUBTFUL
    if not math.isfinite(after):
        return Verdict.WORSE
    rise, usual = after - before, rate.scatter * reach(rate)
    visible, obvious = law.risen * abs(before), _OBVIOUS * abs(before)
    if error is None or not math.isfinite(error):
        doubtful, clear = visible, min(law.blown_up * usual, obvious)
    else:
        # What blows up scatters more: the windows before know better what is usual.
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
    """What other sets of examples say of a window whose loss is suspect.

    Args:
        law: the constants.
        before: losses at the best mean, one for each set.
        after: losses at this window's mean.
        errors: standard errors of their differences; infinite where they are not known: then the
            differences' own scatter stands in for them.
        last: whether there are no more sets.

    Returns:
        ``WORSE`` or ``DOUBTFUL``; ``SUSPECT`` if more sets are needed to tell, and may come.
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
    """With what a sound window's losses scattered by, averaged with those before it (as squares).

    Args:
        rate: what was known before it.
        before: loss at the best mean.
        after: loss at the mean of this window.
        error: standard error of their difference; where it is not known the difference itself
            stands in for it.
    """
    if error is None or not math.isfinite(error):
        error = abs(after - before)
    if not (0 < error < math.inf and reach(rate) > 0):
        return rate
    scatter = error / reach(rate)
    recent = rate.scatter or scatter
    return rate._replace(scatter=math.hypot(scatter, recent) / math.sqrt(2))


def with_ascent(rate: Rate, rises: bool) -> Rate:
    """Count the stages at which the loss has risen, from the probe on; switch off after enough.

    Where the error is not known, a probe whose loss rises in a straight line proves nothing: a few
    examples can do that by chance. If the checks go on rising, training does not lower this loss.
    Of 96 runs of the fast problem with a ``val_fn`` of 16 labels, the probe of 3
    rose so, and at most two checks in a row did after it.
    """
    if not rate.ascents:
        return rate
    ascents = rate.ascents + 1 if rises else 0
    return off(rate) if ascents > _ASCENTS else rate._replace(ascents=ascents)


def off(rate: Rate) -> Rate:
    """The learning rate is left as it was set, from now on."""
    return rate._replace(phase=Phase.OFF, scale=1.0)


def reach(rate: Rate) -> float:
    """How far the steps since the best mean lead, up to a factor: as a walk at random."""
    return rate.rate * math.sqrt(rate.since)


def after_probe(
    rate: Rate, law: Calibration, steps: int, distance: float, total: int | None, certainty: float
) -> Rate:
    """After the line search along the first steps.

    Args:
        rate: what was known before it.
        law: the constants.
        steps: number of steps taken.
        distance: from their beginning to the lowest loss, in such steps.
        total: number of steps of the run; None if it is not known.
        certainty: by how many standard errors the loss fell there.
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
    """After a window at whose end the run was sound.

    Each cosine says where the good rate is: a Kalman filter of one number keeps what they say
    together. What that is worth beside the probe's word has a limit: on some problems either is off
    by a factor of two.

    Args:
        rate: what was known before it.
        law: the constants.
        verdict: on the window. Where the loss seems to rise the rate is not raised: a run that
            begins to blow up moves persistently too.
        cosine: of the last two movements of the mean; None where there are no two yet.
        lengths: steps of the three windows that they are from.
        momentum: of the optimizer, which makes any walk go on for a while.
        step: number of steps so far.
        total: number of steps of the run; None if it is not known.
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
    # A rate that is far too low is a bound, not to be averaged away.
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
    """The mean of the window that has just ended is the best one so far."""
    return rate._replace(since=0, suspected=0.0, returns=max(0, rate.returns - 1))


def after_return(rate: Rate, law: Calibration, step: int, total: int | None) -> Rate:
    """After a window at whose end the run was taken back to the best mean so far.

    What is usual stays what it was, though steps are shorter now: otherwise a model that overfits
    would be taken back again and again.
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
    """With the next window's length.

    Args:
        rate: what is known of it.
        law: the constants.
        step: number of steps so far.
        total: number of steps of the run; None if it is not known: then the steps so far.
    """
    window = max(rate.window + 1, int(rate.window * law.growth))
    if rate.phase == Phase.HOLD or total is None:
        window = min(window, max(law.shortest_check, int(law.longest_check * (total or step))))
    return rate._replace(window=window, travelled=0.0)


def held(rate: Rate, law: Calibration, step: int, warmup: int, total: int | None) -> Rate:
    """With the rate held, if the next window would reach far beyond the phase in which it is not.

    Args:
        rate: what is known of it.
        law: the constants.
        step: number of steps so far.
        warmup: of which so many were a warm-up.
        total: number of steps of the run; None if it is not known: then it is never held.
    """
    if total is None or rate.phase != Phase.SEARCH:
        return rate
    last = warmup + max(law.phase * total, law.shortest_phase)
    if step + 0.7 * rate.window <= last:
        return rate
    # Without a single cosine the probe's word is all there is.
    known = math.isfinite(rate.moving_variance)
    return rate._replace(
        phase=Phase.HOLD, rate=rate.rate if known else min(rate.probed, rate.ceiling)
    )


@functools.cache
def random_walk_cosine(first: int, second: int, third: int, momentum: float) -> float:
    """Cosine of two successive movements of the mean, in a random walk whose steps have momentum.

    The movements are those from the mean over ``first`` steps to that over the ``second`` ones,
    and from there to that over the ``third`` ones. Without momentum it is 1/4 for windows of one
    length: half of what the second window adds is in both. Steps that are an exponential mean of
    independent ones make it higher in short windows: 0.57 in those of 12 steps at 0.9.

    Args:
        first: number of steps of the first window.
        second: of the second one.
        third: of the third one.
        momentum: weight of the past in the exponential mean.
    """
    # What the walk knew before the first window; later it is forgotten.
    memory = math.ceil(6 / max(1 - momentum, 1e-2)) if momentum else 0
    ends = [memory, memory + first, memory + first + second, memory + first + second + third]
    # Weight in x(t) of the independent step i <= t: 1 - momentum^(t - i + 1). Its sum over a
    # window's t, for each i.
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
