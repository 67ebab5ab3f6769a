"""A new implementation of the authors' rule as their published code behaves, with its faults.

It is a baseline for the benchmarks, not for training: ``RepeatSearch`` is the rule as the paper
describes it. Two faults are not reproduced, because a comparison would not end or not be fair: the
model returns to train mode after each stage, and a stage ends when the budget is spent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..comparison.comparison import Comparison
from .adamw import new_adamw, scheduled
from .trainer import Result, Stage, Trainer


def repeat_last_step(
    tensors: Sequence[Tensor], before: Sequence[Tensor], loss: Callable[[], float], most: int
) -> list[tuple[float, float]]:
    """Repeat the last change of ``tensors`` until the loss is higher than one repeat earlier.

    The first repeat is not compared with anything, so there are always two, and the repeat that
    raised the loss is kept. A loss that is constant or NaN never rises: only ``most`` ends the
    stage.

    Args:
        tensors: the tensors to move, in place.
        before: their values before the step.
        loss: measures the loss at their present values.
        most: the largest number of repeats.

    Returns:
        A pair (number of the repeat, loss) for each repeat.
    """
    trials: list[tuple[float, float]] = []
    previous = float("inf")
    with torch.no_grad():
        change = torch._foreach_sub(list(tensors), list(before))
        while len(trials) < most:
            torch._foreach_add_(list(tensors), change)
            latest = loss()
            trials.append((float(len(trials) + 1), latest))
            if latest > previous:
                break
            previous = latest
    return trials


class ReferenceTrainer(Trainer):
    """AdamW with the authors' stages every ``interval`` real steps, on fixed examples."""

    def __init__(self, comparison: Comparison, result: Result) -> None:
        super().__init__(new_adamw(comparison, result))
        self.tensors = comparison.parameters
        self.interval = comparison.setting.interval
        self.loss = batch_mean_loss(comparison.model, comparison.validation.batches)
        self.steps = 0

    def step(self, room: int) -> list[Stage]:
        """Take a real step, and run a stage if one is due."""
        self.steps += 1
        if self.steps % self.interval or room < 1:
            return super().step(room)
        before = [tensor.detach().clone() for tensor in self.tensors]
        self.optimizer.step()
        started = time.perf_counter()
        trials = repeat_last_step(self.tensors, before, self.loss, room)
        stage = {
            "step": self.steps,
            "tau": trials[-1][0],
            "trials": [list(trial) for trial in trials],
            "passes": len(trials),
            "loss_before": None,  # never measured
            "loss_after": trials[-1][1],
            "seconds": time.perf_counter() - started,
        }
        return [stage]

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer, and the number of steps."""
        return super().state_dict() | {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of :meth:`state_dict`."""
        super().load_state_dict(state)
        self.steps = state["steps"]


def batch_mean_loss(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> Callable[[], float]:
    """Return a function for the unweighted mean of the batches' mean losses."""

    def loss() -> float:
        model.eval()
        total = sum(model(**batch).loss for batch in batches)
        model.train()
        return float(total) / len(batches)

    return loss


def reference(comparison: Comparison, result: Result) -> Trainer:
    """Train with AdamW and the authors' stages."""
    return scheduled(ReferenceTrainer(comparison, result), comparison, result)
