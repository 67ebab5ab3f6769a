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
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import NamedTuple

from ..line_search import FLAT


@dataclass(frozen=True)
class Calibration:
    """The constants of the law. The defaults are for every run; see the table in RESULTS.md.

    Args:
        probe: part of the rate at which the first ``interval`` steps are taken. Small, so that a
            rate that is far too high has done no damage by then.
        distance: the rate that the probe suggests covers this many times the distance to the
            lowest loss along the first steps, in as many steps again.
        caution: the part of it that the first windows are taken at: the movements of the mean tell
            less of a rate that is too high than of one that is too low.
        probe_doubt: standard deviation of the logarithm of that rate from the good one.
        probe_noise: added to it, over the number of standard errors by which the loss fell.
        phase: part of the run, after a warm-up, in which the rate is looked for; then the schedule
            has it.
        shortest_phase: or so many steps, if that is more.
        first_window: steps of the first window, or a two-hundredth of the run if that is more.
        growth: each window is so many times longer than the one before.
        longest_check: while the rate is held, windows are at most this part of the run.
        shortest_check: or so many steps, if that is more.
        excess: a good rate is so many times the one at which the mean's movement turns back as
            often as it goes on.
        slope: how much the cosine falls where the rate is e times higher.
        saturated: a cosine that is higher than a random walk's by more than this says that the rate
            is too low, and little of how much.
        reverting: the same for one that is lower, and a rate that is too high.
        falling: that is believed at once where the loss falls by so many standard errors.
        rising: the rate is not raised where the loss seems to rise, by so many.
        noise: standard deviation of the logarithm of the rate that one cosine suggests.
        horizon: added to it for each time that the window is e times shorter than ``judged``.
        judged: part of the run that a window has to be for its cosine to be taken at its word.
        drift: by how much that logarithm wanders from window to window.
        movement_doubt: standard deviation of it from the good rate's, however many cosines agree.
        raise_at_most: limit of one window's factor.
        cut_at_most: the same downwards, as the inverse of a factor.
        blown_up: standard errors by which the loss at the mean has to rise from one window to the
            next for the run to be taken back,
        risen: and part of that loss.
        scattered: or it is, where the rows' losses have come to change by so many times more than
            in the window before, for its rate and its length, and the mean loss has not fallen:
            what blows up does so on some rows first.
        cut: factor of the rate when a run has been taken back.
        horizon_of_mean: the mean that is kept aside is over about this part of the steps so far.
    """

    probe: float = 1 / 64
    distance: float = 2.0
    caution: float = 0.5
    probe_doubt: float = 0.5
    probe_noise: float = 2.0
    phase: float = 0.15
    shortest_phase: int = 60
    first_window: int = 6
    growth: float = 1.3
    longest_check: float = 0.05
    shortest_check: int = 48
    excess: float = 1.75
    slope: float = 0.2
    saturated: float = 0.15
    reverting: float = 0.3
    falling: float = 1.0
    rising: float = 0.5
    noise: float = 0.5
    horizon: float = 0.4
    judged: float = 0.04
    drift: float = 0.15
    movement_doubt: float = 0.5
    raise_at_most: float = 6.0
    cut_at_most: float = 3.0
    blown_up: float = 3.0
    risen: float = 0.01
    scattered: float = 4.0
    cut: float = 0.5
    horizon_of_mean: float = 0.1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise ValueError(f"{field.name} must be a positive number, got {value!r}")
        for name in ("probe", "phase", "longest_check", "judged", "cut", "horizon_of_mean"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} must be at most 1, got {getattr(self, name)!r}")
        if self.growth < 1:
            raise ValueError(f"growth must be at least 1, got {self.growth!r}")


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
        error: standard error of the last check's difference, over how far the window's steps led
            (:func:`reach`); 0.0 if it is not known.
        travelled: sum of the rates that the window's steps were taken at.
        window: number of steps of the present window.
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
    error: float = 0.0
    travelled: float = 0.0
    window: int = 1


def factor(rate: Rate, lr: float, step: int, warmup: int) -> float:
    """What the learning rate is multiplied by in this step.

    Args:
        rate: what is known of it.
        lr: what the schedule has set, of the group with the highest rate.
        step: number of this step, from 1.
        warmup: number of steps over which the rate rises to its peak.
    """
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


def has_blown_up(
    rate: Rate, law: Calibration, before: float, after: float, error: float | None
) -> bool:
    """Whether a run has, by the loss at the mean of a window and of the one before it.

    Args:
        rate: what is known so far.
        law: the constants.
        before: loss at the mean of the window before.
        after: loss at the mean of this window.
        error: standard error of their difference; None if it is not known.
    """
    if not math.isfinite(after):
        return True
    rise = after - before
    if error is None:
        return rise > FLAT * abs(before) + law.risen * abs(before)
    if rise > law.blown_up * error and rise > law.risen * abs(before):
        return True
    return rise > 0 and 0 < law.scattered * rate.error * reach(rate) < error


def reach(rate: Rate) -> float:
    """How far a window's steps lead, up to a factor: as a walk at random."""
    return rate.rate * math.sqrt(rate.window)


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
    return rate._replace(
        phase=Phase.SEARCH,
        scale=1.0,
        rate=law.caution * found,
        probed=found,
        probed_variance=law.probe_doubt**2 + (law.probe_noise / max(certainty, 1.0)) ** 2,
        travelled=0.0,
        window=max(law.first_window, (total or 0) // 200),
    )


def after_window(
    rate: Rate,
    law: Calibration,
    cosine: float | None,
    lengths: Sequence[int],
    momentum: float,
    total: int | None,
    rise: float,
) -> Rate:
    """After a window at whose end the run was sound.

    Each cosine says where the good rate is, and how sure that is depends on how long the window
    was: a Kalman filter of one number keeps what they say together. What that is worth beside the
    probe's word has a limit: on some problems either is off by a factor of two.

    Args:
        rate: what was known before it.
        law: the constants.
        cosine: of the last two movements of the mean; None where there are no two yet.
        lengths: steps of the three windows that they are from.
        momentum: of the optimizer, which makes any walk go on for a while.
        total: number of steps of the run; None if it is not known.
        rise: by how many standard errors the loss at the mean is higher than a window before. Where
            it seems to rise the rate is not raised: a run that begins to blow up moves
            persistently too.
    """
    following = next_window(rate, law, total)
    if cosine is None or not math.isfinite(cosine) or not (rate.rate > 0 and rate.probed > 0):
        return following
    persistence = cosine - random_walk_cosine(*lengths, momentum)
    suggested = math.log(rate.rate) + persistence / law.slope + math.log(law.excess)
    noise = law.noise
    if total is not None:
        noise += law.horizon * max(0.0, math.log(law.judged * total / lengths[-1]))
    known = math.isfinite(rate.moving_variance) and rate.moving > 0
    before = math.log(rate.moving) if known else suggested
    variance = rate.moving_variance + law.drift**2
    gain = variance / (variance + noise**2) if known else 1.0
    # What is far off says no more than in which direction: it is a bound, not to be averaged away.
    too_low = persistence > law.saturated and suggested > before and rise < -law.falling
    if too_low or (persistence < -law.reverting and suggested < before):
        gain = 1.0
    moving = before + gain * (suggested - before)
    variance = (1 - gain) * variance if known else noise**2

    weights = 1 / rate.probed_variance, 1 / (variance + law.movement_doubt**2)
    wanted = (weights[0] * math.log(rate.probed) + weights[1] * moving) / sum(weights)
    change = wanted - math.log(rate.rate)
    if rise > law.rising:
        change = min(change, 0.0)
    change = max(-math.log(law.cut_at_most), min(math.log(law.raise_at_most), change))
    return following._replace(
        rate=min(rate.rate * math.exp(change), rate.ceiling),
        moving=math.exp(moving),
        moving_variance=variance,
    )


def after_blow_up(rate: Rate, law: Calibration, total: int | None) -> Rate:
    """After a window at whose end the run was taken back to the beginning of it."""
    cut = rate.rate * law.cut
    window = max(law.first_window, round(rate.window / law.growth))
    return next_window(rate, law, total)._replace(
        rate=cut,
        ceiling=cut,
        probed=cut,
        probed_variance=law.probe_doubt**2,
        moving_variance=math.inf,
        error=0.0,
        window=window,
    )


def next_window(rate: Rate, law: Calibration, total: int | None) -> Rate:
    """With the next window's length."""
    window = max(rate.window + 1, int(rate.window * law.growth))
    if rate.phase == Phase.HOLD and total is not None:
        window = max(window, law.shortest_check)
        window = min(window, max(law.shortest_check, int(law.longest_check * total)))
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
