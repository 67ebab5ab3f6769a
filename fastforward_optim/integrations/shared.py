"""What the integrations have in common: how many examples, checks of options, what is reported.

Knows no framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..arguments import check_integer
from ..calibration.calibrator import highest_rate
from ..history import StageRecord
from ..optimizer import FastForward

# Stages of a calibrated run measure other examples in turn; so many sets of them are enough not to
# be overfitted.
SETS = 8


# How many examples a trial measures, if nobody says: as many as a step trains on, within these. A
# trial then costs half a step, and few good measurements are better than many poor ones.
FEWEST, MOST = 8, 32


def examples_for(rows: int) -> int:
    """How many examples a trial is to measure, where a step trains on so many rows."""
    return max(FEWEST, min(MOST, rows))


def wanted(num_examples: int, in_turn: bool) -> int:
    """How many examples to take for stages that measure so many, others in turn or always these."""
    return num_examples * (SETS if in_turn else 1)


def check_options(num_examples: int | None, options: Mapping[str, Any]) -> int | None:
    """``num_examples`` as an int; an error if it, or an option of ``FastForward``, cannot work."""
    if num_examples is not None:
        unit = "a number of examples"
        num_examples = check_integer("num_examples", num_examples, at_least=1, unit=unit)
    # A dry run: what is wrong with the options is said here, not when training begins.
    known = {
        name: value for name, value in options.items() if name != "warmup" or value is not None
    }
    FastForward(torch.optim.SGD([nn.Parameter(torch.zeros(1))]), lambda: 0.0, **known)
    return num_examples


def figures(record: StageRecord, optimizer: FastForward) -> dict[str, float]:
    """What loggers are told of a stage: ``learning_rate`` is the one that is really used.

    At the present rate of the schedule, which may have gone on since the record was made.
    """
    return {
        "fast_forward/tau": record.tau,
        "fast_forward/trials": float(record.passes),
        "fast_forward/loss": record.loss_after,
        "fast_forward/lr_scale": record.lr_scale,
        "fast_forward/learning_rate": optimizer.lr_scale * highest_rate(optimizer.param_groups),
    }
