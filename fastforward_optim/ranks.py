"""Make all ranks take the same decision in a stage.

Knows ``torch.distributed`` and ``ValidationFunction``, but neither model tensors nor optimizers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist

from .search.evidence import Loss, Paired, Rows
from .search.line_search import Evaluate, LineSearch
from .validation.base import ValidationFunction, as_measurement

logger = logging.getLogger(__name__)

# Maximum length of an exception message that is sent to the other ranks, in bytes.
_MAX_MESSAGE_BYTES = 1000
# How many numbers a rank sends in an exchange, in addition to the point and the step.
_NUMBERS = 3 + len(Paired._fields)


class _Point(IntEnum):
    """The point of a stage that a rank has reached."""

    BEGIN = 0
    TRIAL = 1
    END = 2
    FAILED = 3
    READY = 4  # before the first step


class RankError(RuntimeError):
    """The ranks cannot finish a stage together; each has restored the weights."""


class Ranks:
    """The processes that run a stage together; one process alone is the simplest case.

    The ranks exchange numbers when a stage begins, at each trial and when it ends. An exchange is
    one all-gather of eleven float64 numbers per rank. Each rank computes the decision from the same
    numbers in the same order, so the ranks agree to the bit. All exchanges have the same shape.
    If a rank has failed or is at another point, the next exchange detects and names it, so no rank
    waits for it forever.

    Args:
        process_group: the ranks that run the stage; None for all ranks if ``torch.distributed`` is
            initialised, False for this process alone.
        step: number of real steps so far; it must be the same on all ranks.
    """

    def __init__(self, process_group: Any, step: int) -> None:
        self._group = None
        self._step = step
        self._tau = math.nan
        self._failed = False
        self._equal_batches = False
        self._copies = 1.0  # number of ranks that measure the same rows, this one included
        self._forwards = 0
        self._reference: Rows | None = None  # rows of the stage's first measurement
        self._measured = False
        self.rank, self.size = 0, 1
        if process_group is False or not (dist.is_available() and dist.is_initialized()):
            return
        rank = dist.get_rank(process_group)
        if rank >= 0:  # -1 if this process is not in the group
            self._group = process_group
            self.rank, self.size = rank, dist.get_world_size(process_group)

    def begin(
        self, moved: bool, val_fn: ValidationFunction, numbers: Sequence[float] = ()
    ) -> tuple[bool, list[float]]:
        """Decide whether to run a stage, and sum numbers over the ranks.

        Args:
            moved: whether the step moved any weight on this rank.
            val_fn: the validation function of the stage.
            numbers: at most six numbers of this rank, to be summed.

        Returns:
            Whether any rank moved a weight, and the sums of the numbers over all ranks.
        """
        plan = val_fn.plan() if self.size > 1 else None
        fingerprint, forwards = (0, 0) if plan is None else plan
        own = (float(moved), float(fingerprint), float(forwards), *numbers)
        records = self._exchange(_Point.BEGIN, *own)
        self._equal_batches = all(record[3] == records[0][3] for record in records)
        if plan is not None:
            self._copies = float(sum(record[3] == fingerprint for record in records))
        self._forwards = int(max(record[4] for record in records))
        columns = list(zip(*records, strict=True))[5 : 5 + len(numbers)]
        return any(record[2] for record in records), [math.fsum(column) for column in columns]

    def ready(self) -> None:
        """Wait until every rank has tried ``val_fn`` before the first step."""
        self._exchange(_Point.READY)

    @contextmanager
    def share(self, val_fn: ValidationFunction) -> Iterator[None]:
        """Make each rank's ``val_fn`` measure its share of the batches inside this context."""
        if self.size == 1:
            yield
            return
        split = self._equal_batches
        with val_fn.share(self.rank, self.size, self._forwards, split=split) as shares:
            # Ranks that measure the same rows, as with tensor parallelism, add no evidence.
            self._copies /= shares or 1
            yield

    def line_search(self, search: LineSearch) -> LineSearch:
        """Wrap ``search`` so that :meth:`measure` knows which tau is measured next."""

        def agreed(evaluate: Evaluate, last_tau: float, /) -> float:
            def evaluate_here(tau: float) -> float:
                self._tau = float(tau)
                return evaluate(tau)

            best = search(evaluate_here, last_tau)
            self._tau = math.nan
            return best

        return search if self.size == 1 else agreed

    def measure(self, val_fn: ValidationFunction, reference: Rows | None = None) -> Loss:
        """Return the weighted mean of the ranks' losses.

        Args:
            val_fn: measures the loss. The result has a standard error if ``val_fn`` returns the
                losses of the rows.
            reference: this rank's rows of the measurement to compare with. Default: the rows of
                the stage's first measurement.
        """
        loss, weight, rows = as_measurement(val_fn.measure())
        if not self._measured:
            self._measured, self._reference = True, rows
        reference = reference or self._reference
        paired = Paired(n=-1.0)  # unknown
        if rows is not None and reference is not None:
            paired = Paired(*(value / self._copies for value in Paired.of(reference, rows)))
        records = self._exchange(_Point.TRIAL, self._tau, loss, weight, *paired)
        if len({repr(record[2]) for record in records}) > 1:
            taus = ", ".join(f"rank {rank}: {record[2]:g}" for rank, record in enumerate(records))
            raise RankError(
                f"the ranks measure different candidates (tau at {taus}): line_search must return "
                "the same on every rank for the same losses, so it must not draw random numbers, "
                "look at the clock or be set differently"
            )
        parts = [Paired(*record[5:]) for record in records]
        whole = Paired.combine(parts)
        whole = whole._replace(n=float(round(whole.n)))
        # A single unit has no standard error.
        error = None if any(part.n < 0 for part in parts) or whole.n < 2 else whole.error
        if self.size == 1:
            return Loss(loss, error, rows)
        counted = [(record[3], record[4]) for record in records if record[4] > 0]
        total = sum(weight for _, weight in counted)
        if not total > 0:
            raise RankError("val_fn counted nothing on any rank: all weights are zero")
        return Loss(sum(loss * weight for loss, weight in counted) / total, error, rows)

    def end(self, tau: float) -> None:
        """Confirm that all ranks end the stage with the same tau. Raise ``RankError`` if not."""
        records = self._exchange(_Point.END, tau)
        if len({repr(record[2]) for record in records}) > 1:
            raise RankError(
                f"line_search returned different taus: {[record[2] for record in records]}"
            )

    @contextmanager
    def together(self) -> Iterator[None]:
        """If an exception leaves this context, end the stage on the other ranks too."""
        try:
            yield
        except RankError:
            raise
        except BaseException as error:
            if self.size > 1 and not self._failed:
                self._report_failure(error)
            raise

    def _exchange(self, point: _Point, *numbers: float) -> list[list[float]]:
        """Gather each rank's point, step and numbers.

        Raises:
            RankError: a rank has failed, or the ranks are at different points. All ranks raise it.
        """
        record = [float(point), float(self._step), *numbers, *(0.0,) * (_NUMBERS - len(numbers))]
        if self.size == 1:
            return [record]
        records = self._gather(torch.tensor(record, dtype=torch.float64)).tolist()
        if any(record[0] == _Point.FAILED for record in records):
            raise RankError(self._reasons(""))
        if any(record[:2] != records[0][:2] for record in records):
            places = ", ".join(
                f"rank {rank} at {_Point(int(record[0])).name} after step {record[1]:g}"
                for rank, record in enumerate(records)
            )
            raise RankError(
                f"the ranks are not at the same point of a stage: {places}; interval, warmup, "
                "max_interval and line_search must be the same on every rank, and each must take "
                "the same steps"
            )
        return records

    def _report_failure(self, error: BaseException) -> None:
        """Tell the other ranks, in the next exchange, that this rank has failed."""
        record = [float(_Point.FAILED), float(self._step), *(0.0,) * _NUMBERS]
        try:
            self._gather(torch.tensor(record, dtype=torch.float64))
            self._reasons(f"{type(error).__name__}: {error}")
        except RankError as lost:  # the caller must see the original error
            logger.warning("could not tell the other ranks of it: %s", lost)

    def _reasons(self, own: str) -> str:
        encoded = torch.zeros(_MAX_MESSAGE_BYTES, dtype=torch.uint8)
        data = own.encode(errors="replace")[:_MAX_MESSAGE_BYTES]
        encoded[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
        texts = [
            bytes(row).rstrip(b"\0").decode(errors="ignore")
            for row in self._gather(encoded).tolist()
        ]
        failed = [f"rank {rank} raised {text}" for rank, text in enumerate(texts) if text]
        return (
            f"Fast Forward stage after step {self._step}: {'; '.join(failed)}. The weights are "
            "back at the last real step on every rank"
        )

    def _gather(self, values: torch.Tensor) -> torch.Tensor:
        device = _device_of(self._group)
        values = values.to(device)
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        try:
            dist.all_gather(gathered, values, group=self._group)
            return torch.stack(gathered).cpu()
        except RuntimeError as error:
            self._failed = True
            raise RankError(
                f"a rank did not take part in a Fast Forward stage after step {self._step}: "
                "it has died, or it waits elsewhere for longer than the process group's timeout; "
                "the weights are back at the last real step here"
            ) from error


def _device_of(group: Any) -> torch.device:
    """Return the device to exchange numbers on.

    The CPU, if the group has a backend for it: that needs no kernel and no wait for the device.
    """
    if "cpu" in dist.get_backend_config(group) or not torch.accelerator.is_available():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
