"""The record of each Fast Forward stage, as a table, JSON lines or a plot."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, overload

from .saved_numbers import as_count, is_real, shortened

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

# Of Okabe and Ito's palette, which colour-blind readers can tell apart.
_ORANGE, _BLUE, _GREEN = "#D55E00", "#0072B2", "#009E73"


@dataclass(frozen=True)
class StageRecord:
    """What one Fast Forward stage did.

    Attributes:
        step: number of real optimizer steps taken when the stage ran, counted from 1.
        tau: multiple of the last step (where the learning rate is calibrated: of the mean step
            since the last stage) that was added to the weights; 0.0 if none was; negative where
            the stage went back.
        trials: pairs (tau, validation loss) in the order in which they were tried, tau = 0 first.
            Each is one pass over the validation set.
        loss_before: validation loss at tau = 0; of a check, at the best mean so far.
        loss_after: validation loss at the weights that the stage left; of a check, at the window's
            mean. Both are of the same examples, which may be other ones at the next stage.
        seconds: wall-clock time of the stage, the real step not included. Two runs that do the same
            differ in it alone, so state dicts leave it out, and it does not count where records
            are compared; NaN in a record that was loaded from one.
        steps: number of real steps that the direction is the mean of; 1 for the last step.
        mean_loss: validation loss at a mean of the iterates, one pass more; None if it was not
            tried.
        averaged: whether the stage left the weights at that mean (and ``tau`` is 0.0).
        lr_scale: what the learning rate is multiplied by from this stage on.
        kind: ``"stage"``; where the learning rate is calibrated, ``"probe"``, ``"check"`` or
            ``"finish"``.
        decision: what was made of it, in words.
        error: standard error of the decrease, of the best trial that there was (paired, row by
            row); None if it is not known.
        elsewhere: number of passes over other examples, by which a loss that seemed to have risen
            was confirmed or not.
    """

    step: int
    tau: float
    trials: tuple[tuple[float, float], ...]
    loss_before: float
    loss_after: float
    seconds: float = field(compare=False)
    steps: int = 1
    mean_loss: float | None = None
    averaged: bool = False
    lr_scale: float = 1.0
    kind: str = "stage"
    decision: str = ""
    error: float | None = None
    elsewhere: int = 0

    @property
    def passes(self) -> int:
        """Passes over the validation set that the stage took."""
        return len(self.trials) + (self.mean_loss is not None) + self.elsewhere

    @property
    def useful(self) -> bool:
        """Whether the stage moved the weights."""
        return self.tau != 0 or self.averaged

    def to_dict(self) -> dict[str, Any]:
        """The record in plain numbers, lists and one dict."""
        return asdict(self) | {"trials": [list(trial) for trial in self.trials]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StageRecord:
        """The inverse of ``to_dict``; raises ``ValueError`` if it is not one.

        ``seconds`` may be missing, and is NaN then.
        """
        names = {field.name for field in fields(cls)}
        # Records written before the learning rate could be calibrated have no more than these.
        required = {field.name for field in fields(cls) if field.default is MISSING} - {"seconds"}
        if not isinstance(values, Mapping) or not required <= set(values) <= names:
            raise ValueError(
                f"a stage record needs exactly {sorted(names)}, got {shortened(values)}"
            )
        read: dict[str, Any] = {"seconds": math.nan}
        for name, value in values.items():
            try:
                read[name] = _READERS[name](value)
            except (TypeError, ValueError, OverflowError, RuntimeError) as error:
                raise ValueError(
                    f"a stage record cannot be read: its {name} is {shortened(value)}"
                ) from error
        record = cls(**read)
        taus = [record.tau, *(tau for tau, _ in record.trials)]
        if not (all(map(math.isfinite, taus)) and 0 < record.lr_scale < math.inf):
            raise ValueError(
                "tau and lr_scale of a stage record must be finite, but tau is "
                f"{record.tau}, lr_scale {record.lr_scale}, and trials {shortened(record.trials)}"
            )
        return record


class History(Sequence[StageRecord]):
    """One ``StageRecord`` for each stage, in order: a read-only sequence.

    ``print(optimizer.history)`` gives a summary of a few lines.
    """

    def __init__(self, records: Iterable[StageRecord] = ()) -> None:
        self._records = list(records)
        # Why there are none; the optimizer whose history it is keeps it up to date.
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
        """One row for each stage, with the columns of ``StageRecord`` (needs pandas)."""
        import pandas as pd

        return pd.DataFrame(
            [record.to_dict() for record in self],
            columns=[field.name for field in fields(StageRecord)],
        )

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON object a line for each stage; a loss that is NaN or infinite is null."""
        with open(path, "w", encoding="utf-8") as file:
            for record in self:
                file.write(json.dumps(_finite(record.to_dict()), allow_nan=False) + "\n")

    def plot(self) -> Figure:
        """Tau and validation loss before and after, over steps (needs matplotlib).

        A stage that left the weights where they were, or at the mean of the iterates, has a mark
        of its own. Where the learning rate was calibrated, its multiplier is drawn below them.

        Returns a figure that pyplot does not keep: save it with ``figure.savefig(path)``; a
        notebook shows it when it is the last value of a cell.
        """
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        calibrated = any(record.lr_scale != 1 for record in self)
        # Set while the figure is made and drawn upon, so that it is readable at half its size.
        with rc_context({"font.size": 12, "axes.axisbelow": True, "legend.frameon": False}):
            figure = Figure(figsize=(8, 7.5 if calibrated else 5.5), layout="constrained")
            panels = figure.subplots(3 if calibrated else 2, 1, sharex=True)
            self._plot_tau(panels[0])
            self._plot_loss(panels[1])
            if calibrated:
                self._plot_rate(panels[2])
            panels[-1].set_xlabel("optimizer steps")
            for axes in panels:
                axes.grid(alpha=0.3)
                axes.spines[["top", "right"]].set_visible(False)
        return figure

    def _plot_tau(self, axes: Axes) -> None:
        steps = [record.step for record in self]
        taus = [record.tau for record in self]
        axes.bar(steps, taus, width=_bar_width(steps), color=_BLUE)
        unmoved = [record for record in self if not record.useful]
        for label, marker, color, at in (
            ("nothing found", "x", _ORANGE, [r.step for r in unmoved if r.kind != "check"]),
            ("checked: sound", "|", "k", [r.step for r in unmoved if r.kind == "check"]),
            ("left at the mean of the iterates", "D", _GREEN, [r.step for r in self if r.averaged]),
        ):
            if at:
                marks: dict[str, Any] = {"marker": marker, "color": color, "label": label}
                axes.plot(at, [0] * len(at), linestyle="none", clip_on=False, zorder=3, **marks)
                axes.legend()
        if any(abs(tau) > 10 for tau in taus):
            axes.set_yscale("symlog", linthresh=1)
            axes.yaxis.set_major_formatter("{x:,.0f}")
        of = "last" if all(record.steps == 1 for record in self) else "mean"
        axes.set_ylabel(f"tau (repeats of\nthe {of} step)")
        useful = sum(record.useful for record in self)
        axes.set_title(f"Fast Forward: {_stages(len(self))}, {useful} useful", loc="left")

    def _plot_loss(self, axes: Axes) -> None:
        steps = [record.step for record in self]
        before = [record.loss_before for record in self]
        after = [record.loss_after for record in self]
        for step, start, end in zip(steps, before, after, strict=True):
            axes.plot([step, step], [start, end], color="#999999", linewidth=1, zorder=1)
        # Hollow and filled, larger and smaller: also to be told apart where one covers the other.
        hollow: Any = {"markersize": 9, "markerfacecolor": "none", "markeredgewidth": 1.8}
        axes.plot(steps, before, "o", color=_ORANGE, label="before the stage", **hollow)
        axes.plot(steps, after, "s", color=_BLUE, markersize=5, label="after the stage")
        axes.set_ylabel("validation loss")
        axes.legend()

    def _plot_rate(self, axes: Axes) -> None:
        from matplotlib.ticker import NullFormatter

        steps = [0, *(record.step for record in self)]
        scales = [1.0, *(record.lr_scale for record in self)]
        axes.step(steps, scales, where="post", color="k", marker=".")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,g}")
        low, high = axes.get_ylim()
        if high / low > 10:  # else no decade would be labelled
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.yaxis.set_minor_formatter("{x:,g}")
        axes.set_ylabel("learning rate\nmultiplied by")

    def state_dict(self) -> list[dict[str, Any]]:
        """The records in plain numbers, lists and dicts, but for their times."""
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


def _real(value: Any) -> float:
    if not is_real(value):
        raise TypeError(f"{shortened(value)} is no number")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{shortened(value)} is not a text")
    return value


def _trials(value: Any) -> tuple[tuple[float, float], ...]:
    return tuple((_real(tau), _real(loss)) for tau, loss in value)


# What reads each number of a record, or refuses it.
_READERS: dict[str, Callable[[Any], Any]] = {
    "step": partial(as_count, at_least=1),
    "tau": _real,
    "trials": _trials,
    "loss_before": _real,
    "loss_after": _real,
    "seconds": _real,
    "steps": partial(as_count, at_least=1),
    "mean_loss": lambda value: None if value is None else _real(value),
    "averaged": bool,
    "lr_scale": _real,
    "kind": _text,
    "decision": _text,
    "error": lambda value: None if value is None else _real(value),
    "elsewhere": partial(as_count, at_least=0),
}


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


def _bar_width(steps: list[int]) -> float:
    gaps = [later - earlier for earlier, later in pairwise(steps)]
    # Intervals that have doubled a few times: bars as narrow as the shortest would not be seen.
    return max(0.6 * min(gaps, default=1), 0.015 * sum(gaps))
