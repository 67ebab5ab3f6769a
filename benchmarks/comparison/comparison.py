"""What all methods of a comparison share: model, data, batches, budget and costs."""

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
        interval: real steps from one stage to the next.
        validation: blocks that a trial measures. Where the validation split has more, it is a pool
            for those methods that measure other ones at each stage.
        evaluations: how often the test loss is taken, spread evenly over the cost, the end
            included. It is not charged.
        test_stages: whether it is taken before and after each stage too.
        accumulation: batches whose gradients make up one step, each token with the same weight.
        evaluation_batch_size: blocks in a batch of the test and validation sets; as many as in a
            training batch if it is None.
        count_flops: whether to count what a step and a trial cost; if not, it is estimated.
        cuda_graphs: whether trials and test evaluations replay their forwards
            (``ValidationLoss``); training steps do after :meth:`Comparison.capture`.
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
    """Runs methods from the same adapter, on the same batches, for the same cost.

    Args:
        model: what requires gradients is trained, and put back to what it is now before each run.
        splits: blocks of tokens; the test blocks are only evaluated on.
        setting: what all methods share.
        seed: of the order of the batches.
        costs: of a step and a trial, if they have been counted before.

    Attributes:
        graph: what computes the gradients of a batch, once a step has been captured. A comparison
            of the same model and batch shape can take another one's.
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
        # Each step picks its rows on the device: that much less to wait for.
        self.train = Blocks(*(part.to(self.device) for part in splits.train))
        self.pool = Blocks(*(part.to(self.device) for part in splits.validation))
        self._measure_anew()
        batch = self.train.select(slice(setting.batch_size)).batch(self.device)
        find = count if setting.count_flops else estimate
        self.costs = costs or find(model, batch, setting.accumulation, self.validation.batches)
        self.budget = int(setting.budget_steps * self.costs.step)
        self.initial_test_loss = self.test()

    def _measure_anew(self) -> None:
        self.validation = self.fixed_validation()
        self._pooled: ValidationLoss | None = None
        self.pooled_validation()  # tries a forward here, outside the budget of any run
        self.test = self._validation_loss(self.evaluation_batches(self.splits.test))

    def with_budget(self, steps: float) -> Comparison:
        """The same comparison for another budget; model, data and graphs are shared."""
        other = copy.copy(self)
        other.setting = replace(self.setting, budget_steps=steps)
        other.budget = int(steps * self.costs.step)
        return other

    def epochs(self, steps: int, with_pool: bool) -> float:
        """How many epochs a number of steps makes; ``with_pool`` as in :meth:`training_batches`."""
        rows = self.train.rows + (self.pool.rows if with_pool else 0)
        return steps * self.setting.batch_size * self.setting.accumulation / rows

    def reseed(self, seed: int) -> None:
        """Go on with another adapter, drawn afresh, and another order of the batches."""
        self.seed = seed
        reset_lora(self.model, seed)
        self.initial = [p.detach().clone() for p in self.parameters]

    def restart(self) -> None:
        """Put the adapter and the random numbers back to where each run begins."""
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.initial)
        self.model.train()
        self.model.zero_grad()
        if self.graph is not None:
            self.graph.attach()
        torch.manual_seed(self.seed)

    def warm_up(self) -> None:
        """A pass over a batch of each shape, so that no run has to wait for a compiler."""
        self._measure_anew()  # what has been recorded before is not compiled
        self.model.train()
        self._loss(next(self.training_batches())).backward()
        self.model.zero_grad()
        self.validation()
        if self.pool.rows > self.setting.validation:
            self.pooled_validation()()
        self.initial_test_loss = self.test()

    def capture(self) -> None:
        """Record forward and backward of a step as one CUDA graph, which all runs then replay."""
        if self.setting.accumulation > 1:
            raise ValueError("a graph of several batches is not supported: accumulation must be 1")
        self.model.train()
        self.graph = GraphedBackward(self._loss, self.parameters, next(self.training_batches()))

    def fixed_validation(self) -> ValidationLoss:
        """Loss on the first blocks of the validation split, always the same."""
        blocks = self.pool.select(slice(self.setting.validation))
        return self._validation_loss(self.evaluation_batches(blocks))

    def pooled_validation(self) -> ValidationLoss:
        """Loss on the validation split, at each stage on the blocks that come next in it.

        It is the same object for all runs, put back to its beginning: what it has recorded is kept.
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
        """Endless, shuffled anew each epoch, the same for every method.

        ``with_pool`` strews the blocks of the validation split in, and leaves the order of the
        others as it is.
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
                strewn = own + torch.randperm(extra, generator=places)
                order = torch.cat((order, strewn))[place.argsort(stable=True)]
            order = order.to(self.device)
            # Whole steps, so that an epoch begins with one.
            step = size * self.setting.accumulation
            for rows in order[: len(order) // step * step].split(size):
                yield blocks.select(rows).batch(self.device)

    def backward(self, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Gradients of the mean loss over all labels of the batches."""
        if self.graph is not None:
            return self.graph(batches[0])
        if len(batches) == 1:
            loss = self._loss(batches[0])
            loss.backward()
            return loss.detach()
        # The first label of a row is not predicted.
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
        """Batches to measure the loss on."""
        return _batches(blocks, self.setting.evaluation_batch_size or self.setting.batch_size)

    def now(self) -> float:
        """Seconds, once the device has done what it has been given."""
        return now(self.device)


def _batches(blocks: Blocks, size: int) -> list[dict[str, torch.Tensor]]:
    """Batches to measure the loss on.

    Their first labels, to which no prediction belongs, are marked as such: else ``ValidationLoss``
    would take one forward more, uncharged, to find out whether the model skips them.
    """
    labels = blocks.labels.clone()
    labels[:, 0] = IGNORED
    return [part.batch(labels.device) for part in Blocks(blocks.input_ids, labels).split(size)]
