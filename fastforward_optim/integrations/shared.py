"""Code that both integrations use: the number of examples, checks of options, and metrics."""

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

# How many sets of examples a calibrated run reads: one for the probe, which chooses by it, one for
# the checks, and others to measure a loss again that seems to have risen.
_SETS = 6

NO_DEEPSPEED = (
    "DeepSpeed is not supported: its engine trains flat copies of the weights, a part of them on "
    "each rank, and overwrites the model's weights with them after each step, so that the next "
    "step would undo every stage; use DDP or FSDP2 (fully_shard)"
)

# By default a trial measures enough examples for LABELS labels: at least FEWEST, at most MOST, and
# otherwise no more than a step trains on.
LABELS, FEWEST, MOST = 1000, 8, 32


def examples_for(rows: int, labels: float) -> int:
    """Return how many examples a trial measures by default.

    Args:
        rows: number of rows that a step trains on.
        labels: mean number of labels per row.
    """
    enough = math.ceil(LABELS / max(labels, 1.0))
    return max(FEWEST, min(MOST, rows, enough))


def examples_to_read(num_examples: int, calibrated: bool) -> int:
    """Return how many examples to read if each trial measures ``num_examples``."""
    return num_examples * (_SETS if calibrated else 1)


def check_options(num_examples: int | None, options: Mapping[str, Any]) -> int | None:
    """Check the options of a callback. Return ``num_examples`` as an int, or None.

    Raises:
        TypeError: an option is unknown (see :class:`Options`) or has the wrong type.
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
    # Construct a FastForward so that a wrong option raises now, not when training begins.
    known = {
        name: value for name, value in options.items() if name != "warmup" or value is not None
    }
    FastForward(torch.optim.SGD([nn.Parameter(torch.zeros(1))]), lambda: 0.0, **known)
    return num_examples


def metrics(record: StageRecord, optimizer: FastForward) -> dict[str, float]:
    """Return the metrics of a stage for loggers.

    ``learning_rate`` is the highest rate in effect, at the current point of the schedule.
    """
    return {
        "fast_forward/tau": record.tau,
        "fast_forward/trials": float(record.passes),
        "fast_forward/loss": record.loss_after,
        "fast_forward/lr_scale": record.lr_scale,
        "fast_forward/learning_rate": optimizer.lr_scale * highest_rate(optimizer.param_groups),
    }
