"""How sure a difference of two validation losses is: paired, example by example.

Knows numbers only: no model, no tensor, no other rank.
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
    """The losses of one measurement, by unit: an example, or a batch where these are not known.

    Attributes:
        sums: sum of the losses over the labels of each unit, in the model's unit of loss.
        weights: number of labels of each unit.
    """

    sums: tuple[float, ...]
    weights: tuple[float, ...]


class Measurement(NamedTuple):
    """What one call of a ``val_fn`` measured.

    Attributes:
        loss: mean loss per label, which the stage minimises.
        weight: of how many labels it is the mean.
        rows: the same by units, to be paired with those of other weights; None if not known.
    """

    loss: float
    weight: float
    rows: Rows | None = None


class Paired(NamedTuple):
    """Sums over units of what two measurements differ by; sums of several ranks can be added.

    ``d`` of a unit is the sum of its losses at the candidate minus that at the anchor, ``w`` its
    number of labels. Six numbers, whatever the number of units.

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

        Units without labels are passed over. Measurements of other units (other numbers of them, or
        other weights) cannot be paired: all of it is one unit then, whose error is infinite.
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
        """The sums over all units of the parts, as of the ranks of a run."""
        return cls(*(sum(column) for column in zip(cls(), *parts, strict=True)))

    @property
    def difference(self) -> float:
        """Mean loss per label at the candidate minus that at the anchor; NaN of no labels."""
        return self.d / self.w if self.w > 0 else math.nan

    @property
    def error(self) -> float:
        """Standard error of :attr:`difference`; infinite if it is not known.

        That of a ratio estimator (Cochran, Sampling Techniques, section 2.11), with units as the
        independent draws: labels of one unit are not independent of each other. It is enlarged by
        Student's t over the normal quantile (:func:`student_factor`), so that
        ``difference +- 1.96 * error`` covers about 95 %, of two units as of hundreds, where units
        are of about one size and their differences about normal.

        Infinite for fewer than two units, and where a loss is infinite or NaN.
        """
        ratio = self.difference
        if self.n < 2 or not math.isfinite(ratio):
            return math.inf
        # Rounding can leave a little less than nothing.
        squares = max(self.dd - 2 * ratio * self.dw + ratio * ratio * self.ww, 0.0)
        variance = self.n / (self.n - 1) * squares
        if not math.isfinite(variance):
            return math.inf
        return student_factor(self.n - 1) * math.sqrt(variance) / self.w


def student_factor(degrees: float) -> float:
    """The 0.975 quantile of Student's t distribution as a multiple of the normal one.

    Args:
        degrees: of freedom, 1 or more; a whole number.

    Returns:
        6.48 for 1, 1.42 for 4, 1.04 for 31; to within 2e-4 of itself.
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
    """Both as one unit of the anchor's weight, with the mean losses that they have."""
    before, after = sum(anchor.weights), sum(candidate.weights)
    if not (before > 0 and after > 0):
        return Rows((), ()), Rows((), ())
    scaled = sum(candidate.sums) / after * before
    return Rows((sum(anchor.sums),), (before,)), Rows((scaled,), (before,))


class Loss(float):
    """A validation loss with the standard error of its difference from another one.

    A float in every way. What ``evaluate`` returns to a line search is one.

    Attributes:
        error: standard error of its difference from the stage's first loss, the one at tau = 0
            (paired, row by row); None where the losses of the rows are not known.
        rows: the losses of this process's rows; None where they are not known.
    """

    error: float | None
    rows: Rows | None

    def __new__(cls, value: float, error: float | None = None, rows: Rows | None = None) -> Loss:
        """A loss with its error and its rows."""
        loss = super().__new__(cls, value)
        loss.error, loss.rows = error, rows
        return loss

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        """Copy and pickle it as a plain float."""
        return float, (float(self),)


def error_of(loss: float) -> float | None:
    """The standard error that comes with a loss; None if it is not known."""
    return loss.error if isinstance(loss, Loss) else None
