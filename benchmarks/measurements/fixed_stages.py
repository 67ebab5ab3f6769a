"""Stages with a fixed number of trials, and random tokens, for timing."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch.optim import AdamW

from fastforward_optim import FastForward
from fastforward_optim.search.line_search import Evaluate

from ..data.blocks import IGNORED, Blocks
from ..support.timing import elapsed

TRIALS = 4
"""The number of trials in a timed stage: about as many as a bracket search takes."""


def fixed_search(evaluate: Evaluate, last_tau: float, /) -> float:
    """A line search with a fixed number of trials, which ignores their losses and returns 1."""
    for tau in range(TRIALS):
        evaluate(float(tau))
    return 1.0


def expect_equal_losses() -> None:
    """Ignore the warning about equal losses: the steps are too small to change the loss."""
    warnings.filterwarnings("ignore", "val_fn returns .* at all weights")


def stage_timer(
    adamw: AdamW, val_fn: Callable[[], float], device: torch.device
) -> Callable[[], float]:
    """Return a function that takes a step with a stage and returns the seconds the stage adds.

    They include the stage's copies of the weights, but not its forwards. The time of the real step
    is measured without a stage and subtracted.
    """
    spent = [0.0]

    def timed_val_fn() -> float:
        losses: list[float] = []
        # ``elapsed`` waits for the stage's own work on the device before the clock starts.
        spent[0] += elapsed(lambda: losses.append(val_fn()), device)
        return losses[0]

    expect_equal_losses()
    optimizer = FastForward(adamw, timed_val_fn, interval=1, line_search=fixed_search)

    def seconds() -> float:
        plain = elapsed(adamw.step, device)
        spent[0] = 0.0
        return elapsed(optimizer.step, device) - plain - spent[0]

    return seconds


def random_blocks(vocabulary: int, count: int, block: int) -> Blocks:
    """Draw ``count`` blocks of ``block`` random tokens."""
    tokens = torch.randint(vocabulary, (count, block))
    labels = tokens.clone()
    labels[:, 0] = IGNORED  # saves ValidationLoss a forward to find out that it is ignored
    return Blocks(tokens, labels)
