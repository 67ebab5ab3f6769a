"""AdamW, which all other methods are compared with, and the mean of its iterates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import AdamW

from ..comparison.comparison import Comparison
from .schedules import scheduler
from .trainer import Result, Stage, Trainer


def new_adamw(comparison: Comparison, result: Result) -> AdamW:
    """AdamW with torch's defaults, in one kernel where there is one."""
    fused = comparison.device.type == "cuda"
    return AdamW(comparison.parameters, lr=result.lr, fused=fused)


def scheduled(trainer: Trainer, comparison: Comparison, result: Result) -> Trainer:
    """The trainer, with the schedule that the run has."""
    trainer.scheduler = scheduler(
        result.schedule,
        trainer.optimizer,
        comparison.setting.budget_steps,
        lambda: result.flops / comparison.costs.step,
    )
    return trainer


def adamw(comparison: Comparison, result: Result) -> Trainer:
    """AdamW with torch's defaults."""
    return scheduled(Trainer(new_adamw(comparison, result)), comparison, result)


MEAN = 0.1
"""Part of the budget that the mean of the iterates looks back over."""


class MeanTrainer(Trainer):
    """AdamW; the weights to report on are an exponential mean of the iterates.

    The mean looks back over the last tenth of the budget; before that much has been spent, it is
    the mean of all iterates.
    """

    reports_mean = True

    def __init__(self, comparison: Comparison, result: Result) -> None:
        super().__init__(new_adamw(comparison, result))
        self.parameters = comparison.parameters
        self.mean = [p.detach().clone() for p in self.parameters]
        self.steps = 0
        self.span = max(1.0, MEAN * comparison.setting.budget_steps)

    def step(self, room: int) -> list[Stage]:
        """A step, which goes into the mean."""
        self.optimizer.step()
        self.steps += 1
        with torch.no_grad():
            torch._foreach_lerp_(self.mean, self.parameters, max(1 / self.steps, 1 / self.span))
        return []

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """With the mean in place of the weights."""
        with torch.no_grad():
            last = [p.clone() for p in self.parameters]
            torch._foreach_copy_(self.parameters, self.mean)
            yield
            torch._foreach_copy_(self.parameters, last)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's, the mean, and of how many steps it is."""
        return super().state_dict() | {"mean": self.mean, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        super().load_state_dict(state)
        self.steps = state["steps"]
        for tensor, saved in zip(self.mean, state["mean"], strict=True):
            tensor.copy_(saved)
