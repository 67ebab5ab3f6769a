"""Train one method for a given cost and record what it reached."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastforward_optim import (
    BracketSearch,
    FastForward,
    RepeatSearch,
    ValidationLoss,
    lora_parameters,
)
from fastforward_optim.flops import forward_flops, step_flops

from .tasks import Splits


@dataclass(frozen=True)
class Method:
    """A way of training: AdamW with a constant rate, and perhaps a line search after some steps."""

    name: str
    lr: float
    line_search: RepeatSearch | BracketSearch | None = None


@dataclass(frozen=True)
class Setting:
    """What all methods of a comparison share.

    Attributes:
        batch_size: blocks in a training step.
        budget_steps: the cost that each method may spend, in plain training steps.
        interval: real steps from one stage to the next.
        evaluations: how often the test loss is taken, spread evenly over the cost, the end
            included. It is not charged.
        seed: of the adapter's initial weights and the order of the batches.
    """

    batch_size: int
    budget_steps: float
    interval: int = 6
    evaluations: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Costs:
    """FLOPs of what a run pays for."""

    step: int
    trial: int


@dataclass
class Result:
    """What one run reached.

    Attributes:
        curve: (FLOPs spent, test loss), from before the first step to the end.
        taus: tau of each stage.
        trials: passes over the validation set, all charged.
        seconds: wall-clock time of the training, test evaluations left out.
    """

    method: str
    lr: float
    steps: int = 0
    trials: int = 0
    flops: int = 0
    seconds: float = 0.0
    taus: list[float] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)

    @property
    def test_loss(self) -> float:
        """The final one, in nats a token."""
        return self.curve[-1][1]


class Comparison:
    """Runs methods from the same adapter, on the same batches, for the same cost.

    Args:
        model: a PEFT model; it is put back to its present adapter before each run.
        splits: blocks of tokens; the test blocks are only evaluated on.
        setting: what all methods share.
    """

    def __init__(self, model: Any, splits: Splits, setting: Setting) -> None:
        self.model = model
        self.setting = setting
        self.splits = splits
        self.parameters = lora_parameters(model)
        self.initial = [p.detach().clone() for p in self.parameters]
        self.device = self.parameters[0].device
        batch = as_batch(splits.train[: setting.batch_size], self.device)
        self.validation = ValidationLoss(model, self._batches(splits.validation))
        self.test = ValidationLoss(model, self._batches(splits.test))
        self.costs = Costs(
            step=step_flops(model, batch),
            trial=sum(forward_flops(model, b) for b in self.validation.batches),
        )
        self.initial_test_loss = self.test()

    def _batches(self, blocks: Tensor) -> list[dict[str, Tensor]]:
        return [as_batch(part, self.device) for part in blocks.split(self.setting.batch_size)]

    def training_batches(self) -> Iterator[dict[str, Tensor]]:
        """Endless, shuffled anew each epoch, the same for every method."""
        generator = torch.Generator().manual_seed(self.setting.seed)
        size = self.setting.batch_size
        while True:
            order = torch.randperm(len(self.splits.train), generator=generator)
            for rows in order[: len(order) // size * size].split(size):
                yield as_batch(self.splits.train[rows], self.device)

    def run(self, method: Method, progress: Callable[[float, float], None]) -> Result:
        """Train ``method`` until its cost reaches the budget.

        Args:
            method: what to run.
            progress: called after each step with the part of the budget spent since the last
                call and the latest test loss.
        """
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.initial)
        self.model.train()
        torch.manual_seed(self.setting.seed)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.parameters, lr=method.lr)
        if method.line_search is not None:
            optimizer = FastForward(
                optimizer,
                self.validation,
                self.setting.interval,
                line_search=method.line_search,
            )
        budget = int(self.setting.budget_steps * self.costs.step)
        result = Result(method.name, method.lr, curve=[(0, self.initial_test_loss)])
        for batch in self.training_batches():
            spent = result.flops
            started = time.perf_counter()
            self._step(optimizer, batch, result, budget - spent)
            result.seconds += time.perf_counter() - started
            done = result.flops + self.costs.step > budget
            between = budget / self.setting.evaluations
            if done or result.flops // between > spent // between:
                result.curve.append((result.flops, self.test()))
            progress((result.flops - spent) / budget, result.test_loss)
            if done:
                return result
        raise AssertionError("the batches are endless")

    def _step(
        self, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], result: Result, left: int
    ) -> None:
        """One step, with its stage if one is due and the budget has room for it."""
        self.model(**batch).loss.backward()
        result.steps += 1
        result.flops += self.costs.step
        room = (left - self.costs.step) // self.costs.trial
        if isinstance(optimizer, FastForward) and room < 2:
            optimizer.optimizer.step()
        elif isinstance(optimizer, FastForward):
            stages = len(optimizer.history)
            search = optimizer.line_search
            if isinstance(search, RepeatSearch | BracketSearch):
                optimizer.line_search = replace(search, max_trials=min(search.max_trials, room))
            optimizer.step()
            optimizer.line_search = search
            for stage in optimizer.history[stages:]:
                result.taus.append(stage.tau)
                result.trials += len(stage.trials)
                result.flops += len(stage.trials) * self.costs.trial
        else:
            optimizer.step()
        optimizer.zero_grad()


def as_batch(blocks: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Blocks of tokens (batch, length) as arguments of a causal language model."""
    blocks = blocks.to(device)
    return {"input_ids": blocks, "labels": blocks}
