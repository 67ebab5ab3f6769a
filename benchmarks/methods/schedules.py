"""Learning rate schedules as functions of the cost spent."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

WARMUP = 0.05
"""The fraction of the budget over which the learning rate rises before it decays."""

CONSTANT = "constant"

_DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda part: 1 - part,
    "cosine": lambda part: (1 + math.cos(math.pi * part)) / 2,
}

SCHEDULES = (CONSTANT, *_DECAYS)
"""A constant rate, or a warm-up followed by a decay to zero at the end of the budget."""


def warmup_steps(schedule: str, total: float) -> int:
    """Return the length of the warm-up in steps; 0 at a constant rate."""
    return 0 if schedule == CONSTANT else int(WARMUP * total)


def scheduler(
    schedule: str, optimizer: Optimizer, total: float, spent: Callable[[], float]
) -> LambdaLR | None:
    """Make the scheduler of a run; None at a constant rate.

    If stages use part of the budget, the run has fewer steps, and the rate still ends at zero.

    Args:
        schedule: one of ``SCHEDULES``.
        optimizer: the optimizer whose rates are multiplied.
        total: the budget in plain steps.
        spent: returns the cost so far in plain steps.
    """
    if schedule == CONSTANT:
        return None
    decay, rising = _DECAYS[schedule], warmup_steps(schedule, total)

    def factor(_: int) -> float:
        done = spent()
        if done < rising:
            return (done + 1) / rising
        return decay(min(1.0, (done - rising) / (total - rising)))

    return LambdaLR(optimizer, factor)
