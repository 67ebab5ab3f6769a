"""What a run is made of: the setting, the method, the trainer that it makes, and the result."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from ..comparison.comparison import Comparison
from .schedules import CONSTANT, SCHEDULES

Stage = dict[str, Any]
"""A ``StageRecord`` as a dict, with ``passes``: how many trials were made."""


@dataclass
class Result:
    """What one run reached.

    Attributes:
        trials: passes over validation examples, all charged.
        seconds: wall-clock time of the training, test evaluations left out.
        stages: record of each stage.
        curve: (FLOPs spent, seconds, test loss), from before the first step to the end.
        lr_scale: what the method multiplied the learning rate by in the end.
        schedule: of the learning rate, one of ``SCHEDULES``.
        last_loss: test loss of the last iterate, where ``test_loss`` is that of a mean; else NaN.
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
        """The final one, in nats a token."""
        return self.curve[-1][2]

    @property
    def diverged(self) -> bool:
        """Whether the run ended early because its loss was no number any more."""
        return not math.isfinite(self.test_loss)


class Trainer:
    """A method at work: an optimizer and perhaps a learning rate schedule.

    Subclasses say what else belongs to a step, and what it costs.

    Attributes:
        reserve: trials that are to be left in the budget at the end, for :meth:`finish`.
        reports_mean: whether :meth:`evaluating` puts a mean of iterates in place of the last one.
    """

    reserve = 0
    reports_mean = False

    def __init__(self, optimizer: Any, scheduler: Any = None) -> None:
        self.optimizer = optimizer
        self.scheduler = scheduler

    def step(self, room: int) -> list[Stage]:
        """Update the weights; return the stages that came with it, of at most ``room`` trials."""
        self.optimizer.step()
        return []

    def finish(self, room: int) -> list[Stage]:
        """What is to be done after the last step; as :meth:`step`."""
        return []

    def evaluating(self) -> AbstractContextManager[Any]:
        """Where the weights are those to report on."""
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs besides the weights."""
        state: dict[str, Any] = {"optimizer": self.optimizer.state_dict()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.optimizer.load_state_dict(state["optimizer"])


@dataclass(frozen=True)
class Method:
    """A way of training.

    Attributes:
        name: as it is asked for and shown.
        about: one sentence.
        build: makes the trainer of a run, of which the ``Result`` holds the learning rate and
            its schedule and, while it goes on, what has been spent.
        trains_on_pool: whether the validation split is trained on, since nothing is measured on it.
        has_rate: whether the learning rate matters.
        package: from PyPI, which it needs.
        schedules: those that it can be run under.
    """

    name: str
    about: str
    build: Callable[[Comparison, Result], Trainer]
    trains_on_pool: bool = False
    has_rate: bool = True
    package: str | None = None
    schedules: tuple[str, ...] = SCHEDULES
