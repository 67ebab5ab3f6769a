"""What a method is: it builds the trainer of a run, which takes the steps; and a run's result."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from ..comparison.comparison import Comparison
from .schedules import CONSTANT, SCHEDULES

Stage = dict[str, Any]
"""A ``StageRecord`` as a dict, with the number of trials as ``passes``."""


@dataclass
class Result:
    """The result of one run.

    Attributes:
        trials: passes over validation examples, all charged.
        seconds: wall-clock time of training, without test evaluations.
        stages: the record of each stage.
        curve: (FLOPs spent, seconds, test loss), from before the first step to the end.
        lr_scale: the final multiplier of the learning rate.
        schedule: of the learning rate, one of ``SCHEDULES``.
        last_loss: test loss of the last iterate if ``test_loss`` is that of a mean, else NaN.
    """

    method: str
    lr: float
    seed: int = 0
    steps: int = 0
    trials: int = 0
    flops: int = 0
    seconds: float = 0.0
    stages: list[Stage] = field(default_factory=list)
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    lr_scale: float = 1.0
    schedule: str = CONSTANT
    last_loss: float = math.nan

    @property
    def test_loss(self) -> float:
        """The final test loss in nats per token."""
        return self.curve[-1][2]

    @property
    def diverged(self) -> bool:
        """Whether the run ended early because its loss was not finite."""
        return not math.isfinite(self.test_loss)


class Trainer:
    """Takes the steps of one run, with an optimizer and optionally a learning rate schedule.

    Subclasses add what else their method does in a step.

    Attributes:
        reserve: trials to leave in the budget for :meth:`finish`.
        reports_mean: whether :meth:`evaluating` replaces the last iterate by a mean of iterates.
    """

    reserve = 0
    reports_mean = False

    def __init__(self, optimizer: Any, scheduler: Any = None) -> None:
        self.optimizer = optimizer
        self.scheduler = scheduler

    def step(self, room: int) -> list[Stage]:
        """Update the weights; return the stages that ran, with at most ``room`` trials in all."""
        self.optimizer.step()
        return []

    def finish(self, room: int) -> list[Stage]:
        """End the run after the last step; like :meth:`step`, return the stages that ran."""
        return []

    def evaluating(self) -> AbstractContextManager[Any]:
        """A context in which the weights are those to evaluate."""
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, without the weights."""
        state: dict[str, Any] = {"optimizer": self.optimizer.state_dict()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of :meth:`state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])


@dataclass(frozen=True)
class Method:
    """A way of training.

    Attributes:
        name: the name on the command line and in tables.
        about: a description in one sentence.
        build: makes the trainer of a run. The ``Result`` holds the run's learning rate and
            schedule and, as it goes on, its cost so far.
        trains_on_pool: whether it trains on the validation split too, since it measures nothing.
        has_rate: whether it uses the learning rate.
        package: a package on PyPI that it needs.
        schedules: the schedules it supports.
    """

    name: str
    about: str
    build: Callable[[Comparison, Result], Trainer]
    trains_on_pool: bool = False
    has_rate: bool = True
    package: str | None = None
    schedules: tuple[str, ...] = SCHEDULES
