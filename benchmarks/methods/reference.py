"""The authors' rule as their published code behaves, faults included, written afresh.

It is what the benchmarks compare with, and nothing to train with: ``RepeatSearch`` is the rule as
the paper describes it. Left out is only what would not let a comparison end or be fair: eval mode
is undone after each stage, and a stage ends at the latest where the budget does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..comparison.comparison import Comparison
from .trainer import Result, Stage, Trainer


def repeat_last_step(
    tensors: Sequence[Tensor], before: Sequence[Tensor], loss: Callable[[], float], most: int
) -> list[tuple[float, float]]:
    """Repeat the last change of ``tensors`` until the loss is higher than one repeat earlier.

    The first repeat has nothing to be compared with, so that there are always two, and the one
    that made the loss higher is kept. A loss that stays exactly the same, or is NaN, is never
    higher: only ``most`` ends that.

    Args:
        tensors: what to move, in place.
        before: their values before the step.
        loss: measures the loss at their present values.
        most: repeats at which to give up.

    Returns:
        The repeats made: pairs (number of the repeat, loss).
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
    """AdamW with the authors' stages: every ``interval`` real steps, on fixed examples."""

    def __init__(self, comparison: Comparison, result: Result) -> None:
        fused = comparison.device.type == "cuda"
        super().__init__(torch.optim.AdamW(comparison.parameters, lr=result.lr, fused=fused))
        self.tensors = comparison.parameters
        self.interval = comparison.setting.interval
        self.loss = batch_mean_loss(comparison.model, comparison.validation.batches)
        self.steps = 0

    def step(self, room: int) -> list[Stage]:
        """Take a real step, and repeat it if it is one of those that are repeated."""
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
        """The optimizer's, and the number of steps."""
        return super().state_dict() | {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        super().load_state_dict(state)
        self.steps = state["steps"]


def batch_mean_loss(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> Callable[[], float]:
    """The mean of the batches' mean losses, however many labels each has."""

    def loss() -> float:
        model.eval()
        total = sum(model(**batch).loss for batch in batches)
        model.train()
        return float(total) / len(batches)

    return loss
