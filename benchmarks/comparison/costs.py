"""What training costs, in floating-point operations: counted or estimated, summed in two ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .flops import forward_flops, step_flops

# Operations of an AdamW update, and of writing a candidate, for each trained number.
UPDATE, WRITE = 15, 3

# The paper counts a backward as two forwards, which it is where every weight is trained; frozen
# weights need no gradients.
PAPERS_STEP = 3

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Costs:
    """FLOPs of what a run pays for.

    Attributes:
        step: forwards and backwards of a training step, as they are (with LoRA two forwards).
        trial: forwards over the validation examples.
        forward: the forwards of a training step alone.
    """

    step: int
    trial: int
    forward: int


def count(model: nn.Module, batch: Batch, accumulation: int, validation: Sequence[Batch]) -> Costs:
    """Count forwards with fvcore, and what a training batch takes with ``FlopCounterMode``.

    Args:
        model: as it is trained.
        batch: a training batch.
        accumulation: how many of them make up a step.
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
    """The same without a count: two operations a weight and token, attention left out."""
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
    """What a run has cost so far, parameter updates and candidates included.

    Attributes:
        flops: steps as measured.
        flops_paper: steps as three forwards each.
        seconds: wall-clock, evaluations on the test set left out.
        seconds_with_tests: the same with them.
    """

    flops: int
    flops_paper: int
    seconds: float
    seconds_with_tests: float

    @classmethod
    def of(
        cls, costs: Costs, *, steps: int, trials: int, trained: int, seconds: float, testing: float
    ) -> Spent:
        """Of so many steps and trials on so many trained numbers."""
        more = trained * (UPDATE * steps + WRITE * trials) + costs.trial * trials
        return cls(
            flops=costs.step * steps + more,
            flops_paper=PAPERS_STEP * costs.forward * steps + more,
            seconds=seconds,
            seconds_with_tests=seconds + testing,
        )
