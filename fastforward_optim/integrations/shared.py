"""What the integrations share: how many examples to measure, checks of options, metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..arguments import check_integer
from ..calibration.calibrator import highest_rate
from ..optimizer import FastForward, Options
from ..record import StageRecord

# In a calibrated run the probe has its own examples, since it chooses by them, so have the checks,
# and a loss that seems to have risen is measured on others.
_SETS = 6

NO_DEEPSPEED = (
    "DeepSpeed is not supported: its engine trains flat copies of the weights, a part of them on "
    "each rank, and overwrites the model's weights with them after each step, so that the next "
    "step would undo every stage; use DDP or FSDP2 (fully_shard)"
)

# Default number of examples of a trial: enough for so many labels, within limits, and no more than
# a step trains on.
LABELS, FEWEST, MOST = 1000, 8, 32


def examples_for(rows: int, labels: float) -> int:
    """Number of examples that a trial is to measure.

    Args:
        rows: that a step trains on.
        labels: of a row, on average.
    """
    enough = math.ceil(LABELS / max(labels, 1.0))
    return max(FEWEST, min(MOST, rows, enough))


def examples_to_read(num_examples: int, calibrated: bool) -> int:
    """Number of examples to read, if each trial measures ``num_examples``."""
    return num_examples * (_SETS if calibrated else 1)


def check_options(num_examples: int | None, options: Mapping[str, Any]) -> int | None:
    """Return ``num_examples`` as an int.

    Raises:
        TypeError: an option is none of :class:`Options`, or has the wrong type.
        ValueError: ``num_examples`` or an option has a value that cannot work.
    """
    allowed = ("interval", *Options.__annotations__)
    if unknown := sorted(options.keys() - set(allowed)):
        raise TypeError(
            f"FastForwardCallback got the unexpected option {unknown[0]!r}; those of FastForward "
            f"that it takes are {', '.join(allowed)}"
        )
    if num_examples is not None:
        unit = "a number of examples"
        num_examples = check_integer("num_examples", num_examples, at_least=1, unit=unit)
    # Construct one now, so that a wrong option raises here and not when training begins.
    known = {
        name: value for name, value in options.items() if name != "warmup" or value is not None
    }
    FastForward(torch.optim.SGD([nn.Parameter(torch.zeros(1))]), lambda: 0.0, **known)
    return num_examples


def metrics(record: StageRecord, optimizer: FastForward) -> dict[str, float]:
    """Return the metrics of a stage for loggers.

    ``learning_rate`` is the rate that is really used, at the present point of the schedule.
    """
    return {
        "fast_forward/tau": record.tau,
        "fast_forward/trials": float(record.passes),
        "fast_forward/loss": record.loss_after,
        "fast_forward/lr_scale": record.lr_scale,
        "fast_forward/learning_rate": optimizer.lr_scale * highest_rate(optimizer.param_groups),
    }
