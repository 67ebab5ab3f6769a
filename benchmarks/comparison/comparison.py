"""The conditions that all methods of a comparison share: model, data, batches, budget, costs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastforward_optim import ValidationLoss

from ..data.blocks import IGNORED, Blocks, Splits
from ..models.adapters import reset_lora
from ..support.timing import now
from .costs import Costs, count, estimate
from .cuda_graphs import GraphedBackward


@dataclass(frozen=True)
class Setting:
    """What all methods of a comparison share.

    Attributes:
        batch_size: blocks in a training step.
        budget_steps: the cost that each method may spend, in plain training steps.
        interval: real steps between stages.
        validation: blocks that a trial measures. If the validation split has more, it is a pool,
            from which some methods measure other blocks at each stage.
        evaluations: evaluations on the test set in a run, evenly spread over the cost, including
            one at the end. They are not charged.
        test_stages: also evaluate on the test set before and after each stage.
        accumulation: batches in a training step; all tokens have the same weight.
        evaluation_batch_size: blocks in a batch of the test and validation sets; None for
            ``batch_size``.
        count_flops: count the cost of steps and trials; otherwise it is estimated.
        cuda_graphs: trials and test evaluations replay their forwards (``ValidationLoss``).
            Training steps do so after :meth:`Comparison.capture`.
    """

    batch_size: int
    budget_steps: float
    interval: int = 6
    validation: int = 32
    evaluations: int = 4
    test_stages: bool = False
    accumulation: int = 1
    evaluation_batch_size: int | None = None
    count_flops: bool = True
    cuda_graphs: bool = False


class Comparison:
    """Lets each method start from the same adapter and train on the same batches at equal cost.

    Args:
        model: the model. Its trainable parameters are restored to their present values before each
            run.
        splits: blocks of tokens. The test blocks are used for evaluation only.
        setting: the other conditions.
        seed: of the order of the batches.
        costs: of a step and a trial, if they have been counted already.

    Attributes:
        graph: computes gradients once a step has been captured. Comparisons with the same model
            and batch shape can share it.
    """

    graph: GraphedBackward | None = None

    def __init__(
        self,
        model: Any,
        splits: Splits,
        setting: Setting,
        seed: int = 0,
        *,
        costs: Costs | None = None,
    ) -> None:
        self.model = model
        self.splits = splits
        self.setting = setting
        self.seed = seed
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.initial = [p.detach().clone() for p in self.parameters]
        # Steps select their rows on the device, without waiting for a copy.
        self.train = Blocks(*(part.to(self.device) for part in splits.train))
        self.pool = Blocks(*(part.to(self.device) for part in splits.validation))
        self._new_losses()
        batch = self.train.select(slice(setting.batch_size)).batch(self.device)
        find = count if setting.count_flops else estimate
        self.costs = costs or find(model, batch, setting.accumulation, self.validation.batches)
        self.budget = int(setting.budget_steps * self.costs.step)
        self.initial_test_loss = self.test()

    def _new_losses(self) -> None:
        self.validation = self.fixed_validation()
        self._pooled: ValidationLoss | None = None
        self.pooled_validation()  # checks its forward now, outside the budget of any run
        self.test = self._validation_loss(self.evaluation_batches(self.splits.test))

    def with_budget(self, steps: float) -> Comparison:
        """Return the same comparison for another budget, sharing model, data and graphs."""
        other = copy.copy(self)
        other.setting = replace(self.setting, budget_steps=steps)
        other.budget = int(steps * self.costs.step)
        return other

    def epochs(self, steps: int, with_pool: bool) -> float:
        """Convert steps to epochs; ``with_pool`` is that of :meth:`training_batches`."""
        rows = self.train.rows + (self.pool.rows if with_pool else 0)
        return steps * self.setting.batch_size * self.setting.accumulation / rows

    def reseed(self, seed: int) -> None:
        """Draw a new adapter and a new order of the batches."""
        self.seed = seed
        reset_lora(self.model, seed)
        self.initial = [p.detach().clone() for p in self.parameters]

    def restart(self) -> None:
        """Restore the adapter and the random state with which each run starts."""
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.initial)
        self.model.train()
        self.model.zero_grad()
        if self.graph is not None:
            self.graph.attach()
        torch.manual_seed(self.seed)

    def warm_up(self) -> None:
        """Process a batch of each shape, so that no run waits for the compiler."""
        self._new_losses()  # recorded graphs are of uncompiled layers
        self.model.train()
        self._loss(next(self.training_batches())).backward()
        self.model.zero_grad()
        self.validation()
        if self.pool.rows > self.setting.validation:
            self.pooled_validation()()
        self.initial_test_loss = self.test()

    def capture(self) -> None:
        """Record the forward and backward of a step as a CUDA graph, which all runs then replay."""
        if self.setting.accumulation > 1:
            raise ValueError(f"CUDA graphs need accumulation=1, got {self.setting.accumulation}")
        self.model.train()
        self.graph = GraphedBackward(self._loss, self.parameters, next(self.training_batches()))

    def fixed_validation(self) -> ValidationLoss:
        """The loss on the first blocks of the validation split, the same at every stage."""
        blocks = self.pool.select(slice(self.setting.validation))
        return self._validation_loss(self.evaluation_batches(blocks))

    def pooled_validation(self) -> ValidationLoss:
        """The loss on the validation split, on the next blocks at each stage.

        All runs share one object, so that its CUDA graphs are kept; it starts with the first
        blocks again.
        """
        if self._pooled is None:
            sets = self.pool.split(self.setting.validation)
            batches = [batch for part in sets for batch in self.evaluation_batches(part)]
            self._pooled = self._validation_loss(
                batches, batches_per_stage=len(batches) // len(sets)
            )
            self._start = self._pooled.state_dict()
        self._pooled.load_state_dict(self._start)
        return self._pooled

    def _validation_loss(
        self, batches: list[dict[str, torch.Tensor]], **options: int
    ) -> ValidationLoss:
        return ValidationLoss(self.model, batches, cuda_graphs=self.setting.cuda_graphs, **options)

    def training_batches(self, with_pool: bool = False) -> Iterator[dict[str, torch.Tensor]]:
        """Yield batches without end, shuffled in each epoch, in the same order for every method.

        ``with_pool`` mixes in the blocks of the validation split and leaves the order of the
        others unchanged.
        """
        generator = torch.Generator().manual_seed(self.seed)
        places = torch.Generator().manual_seed(self.seed)
        size = self.setting.batch_size
        blocks = Blocks.cat(self.train, self.pool) if with_pool else self.train
        own, extra = self.train.rows, blocks.rows - self.train.rows
        while True:
            order = torch.randperm(own, generator=generator)
            if extra:
                place = torch.cat((torch.arange(own) / own, torch.rand(extra, generator=places)))
                inserted = own + torch.randperm(extra, generator=places)
                order = torch.cat((order, inserted))[place.argsort(stable=True)]
            order = order.to(self.device)
            # Whole steps only, so that each epoch starts with a new step.
            step = size * self.setting.accumulation
            for rows in order[: len(order) // step * step].split(size):
                yield blocks.select(rows).batch(self.device)

    def backward(self, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Compute gradients of the mean loss over all labels of the batches; return that loss."""
        if self.graph is not None:
            return self.graph(batches[0])
        if len(batches) == 1:
            loss = self._loss(batches[0])
            loss.backward()
            return loss.detach()
        # The first label of a row has no prediction.
        counts = torch.stack([(batch["labels"][:, 1:] != IGNORED).sum() for batch in batches])
        weights = counts / counts.sum()
        total = torch.zeros((), device=self.device)
        for batch, weight in zip(batches, weights, strict=True):
            loss = self._loss(batch) * weight
            loss.backward()
            total += loss.detach()
        return total

    def _loss(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        return loss

    def evaluation_batches(self, blocks: Blocks) -> list[dict[str, torch.Tensor]]:
        """Split blocks into batches for measuring a loss.

        The first label of each row, which has no prediction, is marked as ignored. Otherwise
        ``ValidationLoss`` would take an uncharged forward to find out whether the model ignores it.
        """
        labels = blocks.labels.clone()
        labels[:, 0] = IGNORED
        size = self.setting.evaluation_batch_size or self.setting.batch_size
        return [part.batch(labels.device) for part in Blocks(blocks.input_ids, labels).split(size)]

    def now(self) -> float:
        """The time in seconds, after waiting for the device."""
        return now(self.device)
