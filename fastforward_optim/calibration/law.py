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


@dataclass(frozen=True)
class Calibration:
    """The constants of the law. The defaults are for every run; see the table in RESULTS.md.

    Args:
        probe: part of the rate at which the first ``interval`` steps are taken. Small, so that a
            rate that is far too high has done no damage by then.
        distance: the rate that the probe suggests covers this many times the distance to the
            lowest loss along the first steps, in as many steps again.
        phase: part of the run in which the rate is looked for; after it the schedule has it.
        shortest_phase: at least so many steps, after a warm-up.
        first_window: steps of the first window, or a hundredth of the run if that is more.
        growth: each window is so many times longer than the one before.
        longest_check: while the rate is held, windows are at most this part of the run.
        excess: a good rate is so many times the one at which the mean's movement turns back as
            often as it goes on.
        slope: how much the cosine falls where the rate is e times higher.
        doubt: standard deviation of the logarithm of the rate that one cosine suggests.
        horizon: added to it for each time that the window is e times shorter than ``judged``.
        judged: part of the run that a window has to be for its cosine to be taken at its word.
        prior: standard deviation of the logarithm of the rate that the probe suggests.
        drift: by how much the logarithm of the good rate wanders from window to window.
        raise_at_most: limit of one window's factor.
        cut_at_most: the same downwards, as the inverse of a factor.
        blown_up: standard errors by which the loss at the mean has to rise from one window to the
            next for the run to be taken back.
        cut: factor of the rate when a run has been taken back.
        horizon_of_mean: the mean that is kept aside is over about this part of the steps so far.
    """

    probe: float = 1 / 64
    distance: float = 2.0
    phase: float = 0.15
    shortest_phase: int = 36
    first_window: int = 10
    growth: float = 1.3
    longest_check: float = 0.05
    excess: float = 1.75
    slope: float = 0.2
    doubt: float = 0.3
    horizon: float = 0.4
    judged: float = 0.04
    prior: float = 0.6
    drift: float = 0.25
    raise_at_most: float = 6.0
    cut_at_most: float = 3.0
    blown_up: float = 3.0
    cut: float = 0.4
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
        variance: of the logarithm of ``rate``.
        ceiling: what it is not to exceed, since a run at more has blown up; infinite at first.
        travelled: sum of the rates that the window's steps were taken at.
        window: number of steps of the present window.
    """

    phase: int = Phase.PROBE
    scale: float = 1.0
    rate: float = 0.0
    peak: float = 0.0
    variance: float = 0.0
    ceiling: float = math.inf
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
    if rate.phase == Phase.PROBE or not lr > 0:
        return rate.scale
    if step > warmup:
        return rate.rate / max(rate.peak, lr)
    # How high the schedule's peak will be is not known yet, but that it is reached then.
    return rate.rate * step / warmup / lr


def seen(rate: Rate, lr: float, applied: float) -> Rate:
    """After a step at ``lr``, which was multiplied by ``applied``."""
    return rate._replace(
        peak=max(rate.peak, lr) if lr > 0 else rate.peak,
        travelled=rate.travelled + max(lr, 0.0) * applied,
    )


def begin(law: Calibration, interval: int) -> Rate:
    """Before the first step."""
    return Rate(scale=law.probe, window=interval)


def after_probe(
    rate: Rate, law: Calibration, steps: int, distance: float, total: int | None, clear: bool
) -> Rate:
    """After the line search along the first steps.

    Args:
        rate: what was known before it.
        law: the constants.
        steps: number of steps taken.
        distance: from their beginning to the lowest loss, in such steps.
        total: number of steps of the run; None if it is not known.
        clear: whether there was a lowest loss; if not, the distance is no more than a bound.
    """
    found = law.distance * distance / steps * rate.travelled / steps
    return rate._replace(
        phase=Phase.SEARCH,
        scale=1.0,
        rate=found,
        variance=(law.prior if clear else 2 * law.prior) ** 2,
        travelled=0.0,
        window=max(law.first_window, (total or 0) // 100),
    )


def after_window(
    rate: Rate,
    law: Calibration,
    cosine: float | None,
    lengths: Sequence[int],
    momentum: float,
    total: int | None,
) -> Rate:
    """After a window at whose end the run was sound.

    A Kalman filter of one number, the logarithm of the good rate: each cosine says where it is,
    and how sure that is depends on how long the window was.

    Args:
        rate: what was known before it.
        law: the constants.
        cosine: of the last two movements of the mean; None where there are no two yet.
        lengths: steps of the three windows that they are from.
        momentum: of the optimizer, which makes any walk go on for a while.
        total: number of steps of the run; None if it is not known.
    """
    rate = next_window(rate, law, total)
    if cosine is None or not math.isfinite(cosine) or not rate.rate > 0:
        return rate
    excess = cosine - random_walk_cosine(*lengths, momentum)
    suggested = math.log(rate.rate) + excess / law.slope + math.log(law.excess)
    doubt = law.doubt
    if total is not None:
        doubt += law.horizon * max(0.0, math.log(law.judged * total / lengths[-1]))
    variance = rate.variance + law.drift**2
    gain = variance / (variance + doubt**2)
    change = gain * (suggested - math.log(rate.rate))
    change = max(-math.log(law.cut_at_most), min(math.log(law.raise_at_most), change))
    return rate._replace(
        rate=min(rate.rate * math.exp(change), rate.ceiling), variance=variance * (1 - gain)
    )


def after_blow_up(rate: Rate, law: Calibration, total: int | None) -> Rate:
    """After a window at whose end the run was taken back to the beginning of it."""
    cut = rate.rate * law.cut
    window = max(law.first_window, round(rate.window / law.growth))
    return next_window(rate, law, total)._replace(
        rate=cut, ceiling=cut, variance=law.doubt**2, window=window
    )


def next_window(rate: Rate, law: Calibration, total: int | None) -> Rate:
    """With the next window's length."""
    window = max(rate.window + 1, int(rate.window * law.growth))
    if rate.phase == Phase.HOLD and total is not None:
        window = max(law.first_window, min(window, int(law.longest_check * total)))
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
    return rate._replace(phase=Phase.HOLD)


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
