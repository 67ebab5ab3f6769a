"""The records of all Fast Forward stages, as a table, JSON lines or a plot."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, overload

from .record import StageRecord

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)


class History(Sequence[StageRecord]):
    """One ``StageRecord`` for each stage, in order: a read-only sequence.

    ``print(optimizer.history)`` gives a summary of a few lines.
    """

    def __init__(self, records: Iterable[StageRecord] = ()) -> None:
        self._records = list(records)
        # Why there are no records yet; the optimizer keeps it up to date.
        self._reason = ""

    def _append(self, record: StageRecord) -> None:
        self._records.append(record)
        _log(record)

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> StageRecord: ...
    @overload
    def __getitem__(self, index: slice) -> History: ...
    def __getitem__(self, index: int | slice) -> StageRecord | History:
        if isinstance(index, slice):
            return History(self._records[index])
        return self._records[index]

    def __iter__(self) -> Iterator[StageRecord]:
        return iter(self._records)

    def __eq__(self, other: object) -> bool:
        return self._records == other._records if isinstance(other, History) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"History({_stages(len(self)) if self or not self._reason else self._no_stage()})"

    def __str__(self) -> str:
        if not self:
            return f"Fast Forward: {self._no_stage()}"
        useful = [record for record in self if record.useful]
        trials = sum(record.passes for record in self)
        times = [record.seconds for record in self if not math.isnan(record.seconds)]
        lines = [
            f"Fast Forward: {_stages(len(self))} up to step {self[-1].step}, "
            f"{len(useful)} of them useful",
            f"  trials: {trials} ({trials / len(self):.1f} a stage), "
            f"{sum(times):.1f} s in {'all' if len(times) == len(self) else 'this process'}",
            f"  validation loss: {self[0].loss_before:.4f} before the first stage, "
            f"{self[-1].loss_after:.4f} after the last",
        ]
        taus = sorted(record.tau for record in useful if not record.averaged)
        if taus:
            lines.append(
                f"  tau of the useful ones: {taus[0]:.3g} to {taus[-1]:.3g}, "
                f"median {taus[len(taus) // 2]:.3g}"
            )
        averaged = sum(record.averaged for record in useful)
        if averaged:
            lines.append(f"  left at the mean of the iterates: {_stages(averaged)}")
        if any(record.lr_scale != 1 for record in self):
            lines.append(f"  learning rate: now {self[-1].lr_scale:.3g} times the one set")
        return "\n".join(lines)

    def _no_stage(self) -> str:
        return "no stage yet" + (f": {self._reason}" if self._reason else "")

    def to_dataframe(self) -> pd.DataFrame:
        """Return a data frame with one row per stage and the fields of ``StageRecord``.

        Needs pandas.
        """
        import pandas as pd

        return pd.DataFrame(
            [record.to_dict() for record in self],
            columns=[field.name for field in fields(StageRecord)],
        )

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Write one line of JSON for each stage. Numbers that are NaN or infinite become null."""
        with open(path, "w", encoding="utf-8") as file:
            for record in self:
                file.write(json.dumps(_finite(record.to_dict()), allow_nan=False) + "\n")

    def plot(self) -> Figure:
        """Plot tau, and the validation loss before and after each stage, over the steps.

        Stages that did not move the weights, or left them at the mean of the iterates, have marks
        of their own. If the learning rate was calibrated, a third panel shows its multiplier.
        Needs matplotlib.

        Returns:
            A figure that pyplot does not manage: save it with ``figure.savefig(path)``. A notebook
            shows it if it is the last value of a cell.
        """
        from .plotting import plot

        return plot(self)

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the records as plain numbers, lists and dicts, without their times."""
        records = [record.to_dict() for record in self]
        for record in records:
            del record["seconds"]
        return records


def _log(record: StageRecord) -> None:
    if not math.isfinite(record.loss_before):
        logger.warning("the validation loss after step %d is %s", record.step, record.loss_before)
    logger.debug(
        "stage after step %d: tau %.4g, loss %.6g to %.6g, %d passes, %.2f s",
        record.step,
        record.tau,
        record.loss_before,
        record.loss_after,
        record.passes,
        record.seconds,
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value


def _stages(count: int) -> str:
    return "1 stage" if count == 1 else f"{count} stages"
