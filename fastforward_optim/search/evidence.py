"""How certain a difference of two validation losses is, paired example by example.

This module works on numbers only: no model, no tensor, no other rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

# The 0.975 quantile of the normal distribution, and of Student's t for 1 to 4 degrees of freedom
# (Abramowitz and Stegun, Handbook of Mathematical Functions, table 26.10).
_NORMAL = 1.959964
_STUDENT = (12.706205, 4.302653, 3.182446, 2.776445)


class Rows(NamedTuple):
    """The losses of one measurement by unit: an example, or a batch if example losses are unknown.

    Attributes:
        sums: sum of the losses over the labels of each unit, in the model's unit of loss.
        weights: number of labels of each unit.
    """

    sums: tuple[float, ...]
    weights: tuple[float, ...]


class Measurement(NamedTuple):
    """The result of one call of a ``val_fn``.

    Attributes:
        loss: mean loss per label, which the stage minimises.
        weight: number of labels in this mean.
        rows: losses by unit, to be paired with those at other weights; None if unknown.
    """

    loss: float
    weight: float
    rows: Rows | None = None


class Paired(NamedTuple):
    """Sums over units of the differences of two measurements; sums of several ranks can be added.

    For each unit, ``d`` is the sum of its losses at the candidate minus that at the anchor, and
    ``w`` is its number of labels. There are six numbers, whatever the number of units.

    Attributes:
        n: number of units with a label.
        w: sum of w.
        d: sum of d.
        dd: sum of d * d.
        dw: sum of d * w.
        ww: sum of w * w.
    """

    n: float = 0.0
    w: float = 0.0
    d: float = 0.0
    dd: float = 0.0
    dw: float = 0.0
    ww: float = 0.0

    @classmethod
    def of(cls, anchor: Rows, candidate: Rows) -> Paired:
        """Pair two measurements of the same examples, unit by unit.

        Units without labels are skipped. Measurements with other units (another number of them, or
        other weights) cannot be paired: they are treated as one unit, whose error is infinite.
        """
        if anchor.weights != candidate.weights:
            anchor, candidate = _as_one_unit(anchor, candidate)
        units = [
            (after - before, weight)
            for before, after, weight in zip(
                anchor.sums, candidate.sums, anchor.weights, strict=True
            )
            if weight > 0
        ]
        return cls(
            n=float(len(units)),
            w=sum(w for _, w in units),
            d=sum(d for d, _ in units),
            dd=sum(d * d for d, _ in units),
            dw=sum(d * w for d, w in units),
            ww=sum(w * w for _, w in units),
        )

    @classmethod
    def combine(cls, parts: Iterable[Paired]) -> Paired:
        """Return the sums over all units of the parts, for example of the ranks of a run."""
        return cls(*(sum(column) for column in zip(cls(), *parts, strict=True)))

    @property
    def difference(self) -> float:
        """Mean loss per label at the candidate minus that at the anchor; NaN without labels."""
        return self.d / self.w if self.w > 0 else math.nan

    @property
    def error(self) -> float:
        """Standard error of :attr:`difference`; infinite if unknown.

        This is the standard error of a ratio estimator (Cochran, Sampling Techniques, section
        2.11), with units as the independent draws: labels of one unit are not independent of each
        other. It is multiplied by Student's t over the normal quantile (:func:`student_factor`).
        ``difference +- 1.96 * error`` then covers about 95 %, for two units as for hundreds, if
        units are of about equal size and their differences are approximately normal.

        It is infinite for fewer than two units, and if a loss is infinite or NaN.
        """
        ratio = self.difference
        if self.n < 2 or not math.isfinite(ratio):
            return math.inf
        # Rounding can make this slightly negative.
        squares = max(self.dd - 2 * ratio * self.dw + ratio * ratio * self.ww, 0.0)
        variance = self.n / (self.n - 1) * squares
        if not math.isfinite(variance):
            return math.inf
        return student_factor(self.n - 1) * math.sqrt(variance) / self.w


def student_factor(degrees: float) -> float:
    """Return the 0.975 quantile of Student's t distribution as a multiple of the normal one.

    Args:
        degrees: degrees of freedom; a whole number, 1 or more.

    Returns:
        6.48 for 1, 1.42 for 4, 1.04 for 31; the relative error is at most 2e-4.
    """
    if degrees <= len(_STUDENT):
        return _STUDENT[int(degrees) - 1] / _NORMAL
    # The asymptotic expansion, Abramowitz and Stegun 26.7.5.
    z = _NORMAL
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    terms = (z, first, second, third, fourth)
    return sum(term / degrees**power for power, term in enumerate(terms)) / z


def _as_one_unit(anchor: Rows, candidate: Rows) -> tuple[Rows, Rows]:
    """Return both as one unit of the anchor's weight, with their mean losses unchanged."""
    before, after = sum(anchor.weights), sum(candidate.weights)
    if not (before > 0 and after > 0):
        return Rows((), ()), Rows((), ())
    scaled = sum(candidate.sums) / after * before
    return Rows((sum(anchor.sums),), (before,)), Rows((scaled,), (before,))


class Loss(float):
    """A validation loss with the standard error of its difference from another loss.

    It behaves as a float. ``evaluate`` returns one to a line search.

    Attributes:
        error: standard error of its difference from the stage's first loss, the one at tau = 0
            (paired, row by row); None if the losses of the rows are unknown.
        rows: losses of this process's rows; None if unknown.
    """

    error: float | None
    rows: Rows | None

    def __new__(cls, value: float, error: float | None = None, rows: Rows | None = None) -> Loss:
        """Create a loss with its error and its rows."""
        loss = super().__new__(cls, value)
        loss.error, loss.rows = error, rows
        return loss

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        """Copy and pickle as a plain float."""
        return float, (float(self),)


class Trial(NamedTuple):
    """One evaluation of the loss along a step.

    Attributes:
        tau: multiple of the step.
        loss: the loss there, with its standard error if known.
    """

    tau: float
    loss: float

    @property
    def error(self) -> float | None:
        """Standard error of the loss's difference from the one at tau = 0; None if unknown."""
        return error_of(self.loss)


def error_of(loss: float) -> float | None:
    """Return the standard error that a loss carries; None if unknown."""
    return loss.error if isinstance(loss, Loss) else None
