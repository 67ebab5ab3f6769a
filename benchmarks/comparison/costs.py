"""The cost of training in FLOPs: of a step, of a trial, and of a run so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .flops import forward_flops, step_flops

UPDATE, WRITE = 15, 3
"""Operations per trained number of an AdamW update, and of writing a candidate."""

PAPERS_STEP = 3
"""Forwards that the paper charges for a step.

A backward is then two forwards, which is true if every weight is trained; with frozen weights it
is about one.
"""

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Costs:
    """The FLOPs that a run is charged.

    Attributes:
        step: the forwards and backwards of a training step (with LoRA about two forwards).
        trial: the forwards over the validation examples.
        forward: only the forwards of a training step.
    """

    step: int
    trial: int
    forward: int


def count(model: nn.Module, batch: Batch, accumulation: int, validation: Sequence[Batch]) -> Costs:
    """Count forwards with fvcore and training steps with torch's ``FlopCounterMode``.

    Args:
        model: the model as it is trained.
        batch: a training batch.
        accumulation: batches in a step.
        validation: the batches of a trial.
    """
    return Costs(
        step=accumulation * step_flops(model, batch),
        trial=sum(forward_flops(model, part) for part in validation),
        forward=accumulation * forward_flops(model, batch),
    )


def estimate(
    model: nn.Module, batch: Batch, accumulation: int, validation: Sequence[Batch]
) -> Costs:
    """Estimate the same costs as two operations per weight and token, without attention."""
    parameters = list(model.parameters())
    a_token = 2 * sum(p.numel() for p in parameters)
    frozen = any(not p.requires_grad for p in parameters)
    forward = accumulation * a_token * batch["input_ids"].numel()
    return Costs(
        step=(2 if frozen else 3) * forward,
        trial=a_token * sum(part["input_ids"].numel() for part in validation),
        forward=forward,
    )


@dataclass(frozen=True)
class Spent:
    """The cost of a run so far, including parameter updates and candidates.

    Attributes:
        flops: with steps as counted.
        flops_paper: with steps as three forwards each.
        seconds: wall-clock time without evaluations on the test set.
        seconds_with_tests: wall-clock time with them.
    """

    flops: int
    flops_paper: int
    seconds: float
    seconds_with_tests: float

    @classmethod
    def of(
        cls, costs: Costs, *, steps: int, trials: int, trained: int, seconds: float, testing: float
    ) -> Spent:
        """Add up the cost of ``steps`` and ``trials`` with ``trained`` trainable numbers."""
        more = trained * (UPDATE * steps + WRITE * trials) + costs.trial * trials
        return cls(
            flops=costs.step * steps + more,
            flops_paper=PAPERS_STEP * costs.forward * steps + more,
            seconds=seconds,
            seconds_with_tests=seconds + testing,
        )
