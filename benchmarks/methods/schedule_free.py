"""Schedule-Free AdamW, from the package schedulefree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..comparison.comparison import Comparison
from .schedules import WARMUP
from .trainer import Result, Trainer


class ScheduleFreeTrainer(Trainer):
    """Schedule-Free AdamW; its average is evaluated, not the point at which it takes gradients."""

    def __init__(self, comparison: Comparison, result: Result) -> None:
        from schedulefree import AdamWScheduleFree

        warmup = int(WARMUP * comparison.setting.budget_steps)
        super().__init__(
            AdamWScheduleFree(comparison.parameters, lr=result.lr, warmup_steps=warmup)
        )
        self.optimizer.train()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Use the average in place of the weights."""
        self.optimizer.eval()
        yield
        self.optimizer.train()
