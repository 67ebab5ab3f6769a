"""Stages of a fixed number of trials on random tokens, to be timed."""

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
"""Of the stages that are timed; about what a bracket takes."""


def fixed_search(evaluate: Evaluate, last_tau: float, /) -> float:
    """Always as many trials, none of which has to be good; the stage goes back to one of them."""
    for tau in range(TRIALS):
        evaluate(float(tau))
    return 1.0


def expect_equal_losses() -> None:
    """Steps are so small that all trials have one loss, which is what a stage would warn of."""
    warnings.filterwarnings("ignore", "val_fn returns .* at all weights")


def stage_timer(
    adamw: AdamW, val_fn: Callable[[], float], device: torch.device
) -> Callable[[], float]:
    """A function that takes a step with a stage and returns the seconds that the stage adds.

    Its forwards are not counted, its copies of the weights are. The real step is taken off, as it
    takes without a stage.
    """
    spent = [0.0]

    def timed_val_fn() -> float:
        losses: list[float] = []
        # What the stage itself has asked of the device is done before the clock starts.
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
    """So many blocks of so many random tokens."""
    tokens = torch.randint(vocabulary, (count, block))
    labels = tokens.clone()
    labels[:, 0] = IGNORED  # else ValidationLoss takes a forward to find out that it is skipped
    return Blocks(tokens, labels)
