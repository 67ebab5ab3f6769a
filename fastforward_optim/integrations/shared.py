"""What the integrations have in common: how many examples, checks of options, what is reported.

Knows no framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..arguments import check_integer
from ..history import StageRecord
from ..optimizer import FastForward

# Stages of a calibrated run measure other examples in turn; so many sets of them are enough not to
# be overfitted.
SETS = 8


def wanted(num_examples: int, in_turn: bool) -> int:
    """How many examples to take for stages that measure so many, others in turn or always these."""
    return num_examples * (SETS if in_turn else 1)


def check_options(num_examples: int, options: Mapping[str, Any]) -> int:
    """``num_examples`` as an int; an error if it, or an option of ``FastForward``, cannot work."""
    number = check_integer("num_examples", num_examples, at_least=1, unit="a number of examples")
    # A dry run: what is wrong with the options is said here, not when training begins.
    FastForward(torch.optim.SGD([nn.Parameter(torch.zeros(1))]), lambda: 0.0, **options)
    return number


def figures(record: StageRecord) -> dict[str, float]:
    """What loggers are told of a stage."""
    return {
        "fast_forward/tau": record.tau,
        "fast_forward/trials": float(record.passes),
        "fast_forward/loss": record.loss_after,
        "fast_forward/lr_scale": record.lr_scale,
    }
