"""AdamW wrapped in Fast Forward, without and with ``calibrate_lr``."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from fastforward_optim import FastForward, ValidationLoss
from fastforward_optim.search.evidence import Measurement

from ..comparison.comparison import Comparison
from .adamw import new_adamw, scheduled
from .schedules import CONSTANT, warmup_steps
from .trainer import Result, Stage, Trainer

FINAL_TRIALS = 4
"""Trials that the last check and ``finish`` of a calibrated run may cost."""


Build = Callable[[Comparison, Result], Trainer]


class Metered:
    """A ``val_fn`` that counts its passes and stops measuring when its room is used up.

    From then on it returns infinity. No stage moves to such a point, so the stage ends with the
    best point found so far.

    Args:
        val_fn: the function to meter.
        watch: a loss to measure before each stage, without charge; optional.
    """

    def __init__(self, val_fn: ValidationLoss, watch: ValidationLoss | None = None) -> None:
        self.val_fn = val_fn
        self.watch = watch
        self.watched = math.nan
        self.room = 0
        self.passes = 0

    def __call__(self) -> float:
        """Return the loss, or infinity if there is no room."""
        return self.measure().loss

    def measure(self) -> Measurement:
        """Like a call, with the losses of the rows."""
        if self.passes >= self.room:
            return Measurement(math.inf, 1.0)
        self.passes += 1
        return self.val_fn.measure()

    def new_stage(self) -> None:
        """Advance to the next examples, unless they are fixed."""
        self.val_fn.new_stage()

    def check(self) -> None:
        """Let ``val_fn`` check its forward; measure the watched loss."""
        self.val_fn.check()
        if self.watch is not None:
            self.watched = self.watch()

    def measuring(self) -> AbstractContextManager[None]:
        """The context in which the library runs a stage."""
        return self.val_fn.measuring()

    def state_dict(self) -> dict[str, int]:
        """The position in the examples."""
        return self.val_fn.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the position of :meth:`state_dict`."""
        self.val_fn.load_state_dict(state)


class FastForwardTrainer(Trainer):
    """AdamW wrapped in ``FastForward``."""

    def __init__(
        self, comparison: Comparison, result: Result, val_fn: ValidationLoss, options: Any
    ) -> None:
        watch = comparison.test if comparison.setting.test_stages else None
        self.meter = Metered(val_fn, watch)
        interval = comparison.setting.interval
        adamw = new_adamw(comparison, result)
        super().__init__(FastForward(adamw, self.meter, interval, **options))

    def step(self, room: int) -> list[Stage]:
        """Take a step, and run a stage if one is due and there is room for it."""
        if room < 2:
            self.optimizer.optimizer.step()
            return []
        return self.staged(self.optimizer.step, room)

    def staged(self, act: Callable[[], Any], room: int) -> list[Stage]:
        """Call ``act``, which may run a stage; return the records of stages."""
        self.meter.room, self.meter.passes = room, 0
        seen = len(self.optimizer.history)
        act()
        records = self.optimizer.history[seen:]
        more: Stage = {"passes": self.meter.passes}
        if records and self.meter.watch is not None:
            more |= {"test_before": self.meter.watched, "test_after": self.meter.watch()}
        return [record.to_dict() | more for record in records]


class CalibratedTrainer(FastForwardTrainer):
    """AdamW wrapped in ``FastForward`` with ``calibrate_lr``, set up as the documentation says.

    Without a decay, evaluations before the end use the mean of the iterates.
    """

    reserve = FINAL_TRIALS

    def __init__(self, comparison: Comparison, result: Result) -> None:
        total = comparison.setting.budget_steps
        options: dict[str, Any] = {
            "calibrate_lr": True,
            "warmup": warmup_steps(result.schedule, total),
        }
        if result.schedule != CONSTANT:
            options["total_steps"] = int(total)
        self.evaluates_mean = result.schedule == CONSTANT
        super().__init__(comparison, result, comparison.pooled_validation(), options)

    def finish(self, room: int) -> list[Stage]:
        """Keep the better weights: those of the last iterate or a mean."""
        self.evaluates_mean = False
        return self.staged(self.optimizer.finish, room)

    def evaluating(self) -> AbstractContextManager[Any]:
        """At a constant rate, use the mean in place of the weights until :meth:`finish`."""
        mean: AbstractContextManager[Any] = (
            self.optimizer.averaged() if self.evaluates_mean else nullcontext()
        )
        return mean


def calibrated(comparison: Comparison, result: Result) -> Trainer:
    """Train with ``calibrate_lr``, measuring other examples at each stage."""
    return scheduled(CalibratedTrainer(comparison, result), comparison, result)


def fast_forward(*, fixed_interval: bool = False, **options: Any) -> Build:
    """Return a builder of trainers that measure the same validation examples at every stage."""

    def build(comparison: Comparison, result: Result) -> Trainer:
        more = {"warmup": warmup_steps(result.schedule, comparison.setting.budget_steps)}
        if fixed_interval:
            more["max_interval"] = comparison.setting.interval
        trainer = FastForwardTrainer(comparison, result, comparison.validation, options | more)
        return scheduled(trainer, comparison, result)

    return build
