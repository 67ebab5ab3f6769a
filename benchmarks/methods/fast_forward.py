"""Fast Forward around AdamW: at a rate that is given, or with ``calibrate_lr``."""

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
"""What a check after the last step of a calibrated run and its end may cost, in trials."""


Build = Callable[[Comparison, Result], Trainer]


class Metered:
    """A ``val_fn`` that counts its passes, and makes no more than there is room for.

    After that it is infinite, which no stage goes to: the stage ends with what it has found.

    Args:
        val_fn: what it meters.
        watch: taken before each stage, uncharged, if it is given.
    """

    def __init__(self, val_fn: ValidationLoss, watch: ValidationLoss | None = None) -> None:
        self.val_fn = val_fn
        self.watch = watch
        self.watched = math.nan
        self.room = 0
        self.passes = 0

    def __call__(self) -> float:
        """The loss, if there is room to measure it."""
        return self.measure().loss

    def measure(self) -> Measurement:
        """The same with the losses of the rows."""
        if self.passes >= self.room:
            return Measurement(math.inf, 1.0)
        self.passes += 1
        return self.val_fn.measure()

    def new_stage(self) -> None:
        """Take the next examples, if they are not fixed."""
        self.val_fn.new_stage()

    def check(self) -> None:
        """Let it try its forward, if it has not yet."""
        self.val_fn.check()
        if self.watch is not None:
            self.watched = self.watch()

    def measuring(self) -> AbstractContextManager[None]:
        """What the library is in for the length of a stage."""
        return self.val_fn.measuring()

    def state_dict(self) -> dict[str, int]:
        """Which examples are next."""
        return self.val_fn.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.val_fn.load_state_dict(state)


class FastForwardTrainer(Trainer):
    """AdamW in a ``FastForward``."""

    def __init__(
        self, comparison: Comparison, result: Result, val_fn: ValidationLoss, options: Any
    ) -> None:
        watch = comparison.test if comparison.setting.test_stages else None
        self.meter = Metered(val_fn, watch)
        interval = comparison.setting.interval
        adamw = new_adamw(comparison, result)
        super().__init__(FastForward(adamw, self.meter, interval, **options))

    def step(self, room: int) -> list[Stage]:
        """A step, with its stage if one is due and there is room for it."""
        if room < 2:
            self.optimizer.optimizer.step()
            return []
        return self.staged(self.optimizer.step, room)

    def staged(self, act: Callable[[], Any], room: int) -> list[Stage]:
        """Do what may run a stage; return its record."""
        self.meter.room, self.meter.passes = room, 0
        seen = len(self.optimizer.history)
        act()
        records = self.optimizer.history[seen:]
        more: Stage = {"passes": self.meter.passes}
        if records and self.meter.watch is not None:
            more |= {"test_before": self.meter.watched, "test_after": self.meter.watch()}
        return [record.to_dict() | more for record in records]


class CalibratedTrainer(FastForwardTrainer):
    """The same with ``calibrate_lr``: as its users are told to, to ``finish`` at the end.

    Without a decay, evaluations before the end are of the mean of the iterates.
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
        """Leave the weights at the better end, the last iterate or the mean."""
        self.evaluates_mean = False
        return self.staged(self.optimizer.finish, room)

    def evaluating(self) -> AbstractContextManager[Any]:
        """At a constant rate with the mean in place of the weights, until the end."""
        mean: AbstractContextManager[Any] = (
            self.optimizer.averaged() if self.evaluates_mean else nullcontext()
        )
        return mean


def calibrated(comparison: Comparison, result: Result) -> Trainer:
    """AdamW in a ``FastForward`` that calibrates the rate, on fresh examples at each stage."""
    return scheduled(CalibratedTrainer(comparison, result), comparison, result)


def fast_forward(*, fixed_interval: bool = False, **options: Any) -> Build:
    """AdamW in a ``FastForward`` on the fixed validation examples."""

    def build(comparison: Comparison, result: Result) -> Trainer:
        more = {"warmup": warmup_steps(result.schedule, comparison.setting.budget_steps)}
        if fixed_interval:
            more["max_interval"] = comparison.setting.interval
        trainer = FastForwardTrainer(comparison, result, comparison.validation, options | more)
        return scheduled(trainer, comparison, result)

    return build
