"""AdamW, with which all others are compared, and the mean of its iterates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from ..comparison.comparison import Comparison
from .schedules import scheduler
from .trainer import Result, Stage, Trainer


def new_adamw(comparison: Comparison, result: Result) -> AdamW:
    """Make AdamW with torch's defaults, fused on CUDA."""
    fused = comparison.device.type == "cuda"
    return AdamW(comparison.parameters, lr=result.lr, fused=fused)


def scheduled(trainer: Trainer, comparison: Comparison, result: Result) -> Trainer:
    """Give the trainer the schedule of the run."""
    trainer.scheduler = scheduler(
        result.schedule,
        trainer.optimizer,
        comparison.setting.budget_steps,
        lambda: result.flops / comparison.costs.step,
    )
    return trainer


def adamw(comparison: Comparison, result: Result) -> Trainer:
    """Train with AdamW."""
    return scheduled(Trainer(new_adamw(comparison, result)), comparison, result)


class ClippedTrainer(Trainer):
    """AdamW; gradients whose norm exceeds 1 are scaled down to it, as transformers does."""

    def __init__(self, comparison: Comparison, result: Result) -> None:
        super().__init__(new_adamw(comparison, result))
        self.parameters = comparison.parameters

    def step(self, room: int) -> list[Stage]:
        """Clip the gradients and take a step."""
        clip_grad_norm_(self.parameters, 1.0)
        return super().step(room)


def clipped_adamw(comparison: Comparison, result: Result) -> Trainer:
    """Train with AdamW and clipped gradients."""
    return scheduled(ClippedTrainer(comparison, result), comparison, result)


MEAN = 0.1
"""The fraction of the budget over which the mean of the iterates looks back."""


class MeanTrainer(Trainer):
    """AdamW; the weights that are evaluated are an exponential mean of the iterates.

    The mean looks back over a tenth of the budget. Before that much has been spent, it is the mean
    of all iterates.
    """

    reports_mean = True

    def __init__(self, comparison: Comparison, result: Result) -> None:
        super().__init__(new_adamw(comparison, result))
        self.parameters = comparison.parameters
        self.mean = [p.detach().clone() for p in self.parameters]
        self.steps = 0
        self.span = max(1.0, MEAN * comparison.setting.budget_steps)

    def step(self, room: int) -> list[Stage]:
        """Take a step and update the mean."""
        self.optimizer.step()
        self.steps += 1
        with torch.no_grad():
            torch._foreach_lerp_(self.mean, self.parameters, max(1 / self.steps, 1 / self.span))
        return []

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Use the mean in place of the weights."""
        with torch.no_grad():
            last = [p.clone() for p in self.parameters]
            torch._foreach_copy_(self.parameters, self.mean)
            yield
            torch._foreach_copy_(self.parameters, last)

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer, the mean, and the number of steps."""
        return super().state_dict() | {"mean": self.mean, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of :meth:`state_dict`."""
        super().load_state_dict(state)
        self.steps = state["steps"]
        for tensor, saved in zip(self.mean, state["mean"], strict=True):
            tensor.copy_(saved)
