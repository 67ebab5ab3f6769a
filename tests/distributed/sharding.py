"""Checks, run on each rank: a stage's validation batches are split over the ranks."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastforward_optim import BracketSearch, FastForward, ValidationLoss
from tests.conftest import tiny_lora, token_batch
from tests.distributed.launch import DEVICE
from tests.distributed.training import EXCEPTIONS as OF_DEPENDENCIES

EXCEPTIONS = OF_DEPENDENCIES


class Counting(nn.Module):
    """A model whose loss is known, and that counts its forwards; each is a collective."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.forwards = 0

    def forward(self, labels):
        self.forwards += 1
        dist.all_reduce(torch.zeros(1, device=DEVICE))
        counted = labels[labels != -100]
        loss = (counted.double() + self.weight).mean()  # NaN of none, as a model's own

        class Output:
            pass

        output = Output()
        output.loss = loss
        return output


def rows(*numbers):
    return {"labels": torch.tensor(numbers).unsqueeze(0)}


def stay(evaluate, last_tau):
    evaluate(0.0)
    return 0.0


def first_loss(model, val_fn):
    """The loss at tau = 0 of one stage, and how many forwards each of its trials took."""
    inner = torch.optim.SGD(model.parameters(), lr=1e-9)
    optimizer = FastForward(inner, val_fn, interval=1, line_search=stay)
    model.weight.grad = torch.ones_like(model.weight)
    val_fn.check()  # which the first step would do
    model.forwards = 0
    optimizer.step()
    return optimizer.history[-1].loss_before, model.forwards


def check_batches_are_split_and_the_loss_is_that_of_one_process(rank, size):
    for batches in (
        [rows(*range(10 * n, 11 * n + 1)) for n in range(1, 9)],
        [rows(*range(1, n + 2)) for n in range(7)],
        [rows(1, 2, 3)],
    ):
        model = Counting().to(DEVICE)
        val_fn = ValidationLoss(model, batches)
        labels = torch.cat([batch["labels"].flatten() for batch in batches]).double()
        loss, forwards = first_loss(model, val_fn)
        assert loss == pytest.approx(labels.mean().item(), rel=1e-6)
        extra = 1  # the first call asks whether there are labels that do not count
        assert forwards == -(-len(batches) // size) + extra
        # Outside a stage it is of this rank alone, and measures all.
        assert val_fn() == pytest.approx(labels.mean().item(), rel=1e-6)


def check_the_next_stages_batches_are_split_too(rank, size):
    batches = [rows(n) for n in range(1, 13)]
    model = Counting().to(DEVICE)
    val_fn = ValidationLoss(model, batches, batches_per_stage=6)
    assert first_loss(model, val_fn)[0] == pytest.approx(3.5)
    assert first_loss(model, val_fn) == (pytest.approx(9.5), -(-6 // size))
    assert first_loss(model, val_fn)[0] == pytest.approx(3.5)


def check_ranks_with_batches_of_their_own_measure_all_of_them(rank, size):
    mine = [rows(*range(1, rank + 2)) for _ in range(rank + 1)]
    model = Counting().to(DEVICE)
    every = torch.cat([1 + torch.arange(r + 1.0) for r in range(size) for _ in range(r + 1)])
    loss, forwards = first_loss(model, ValidationLoss(model, mine))
    assert loss == pytest.approx(every.mean().item(), rel=1e-6)
    assert forwards == size + 1, "as many on each rank, since they may be collective"


def check_a_rank_whose_labels_all_count_nothing_counts_nothing(rank, size):
    batches = [rows(5, -100), rows(-100, -100), rows(6), rows(-100, 2)][:size]
    model = Counting().to(DEVICE)
    loss, _ = first_loss(model, ValidationLoss(model, batches))
    assert loss == pytest.approx(5 if size == 2 else (5 + 6 + 2) / 3)


def check_a_forward_of_ones_own_is_weighted_by_its_weights(rank, size):
    model = Counting().to(DEVICE)

    def forward(model, batch):
        return model(labels=torch.tensor([batch], device=DEVICE)).loss, batch

    batches = [1.0, 2.0, 3.0]
    loss, forwards = first_loss(model, ValidationLoss(model, batches, forward=forward))
    assert loss == pytest.approx((1 + 4 + 9) / 6)
    assert forwards == -(-3 // size)


def check_the_split_can_be_left_to_some_of_the_ranks(rank, size):
    """As with tensor parallelism, whose ranks compute each batch together."""
    pairs = [dist.new_group(list(range(first, size, size // 2))) for first in range(size // 2)]
    mine = pairs[rank % (size // 2)]
    batches = [rows(n) for n in range(1, 5)]
    model = Counting().to(DEVICE)
    loss, forwards = first_loss(model, ValidationLoss(model, batches, process_group=mine))
    assert (loss, forwards) == (pytest.approx(2.5), 3)
    model = Counting().to(DEVICE)
    loss, forwards = first_loss(model, ValidationLoss(model, batches, process_group=False))
    assert (loss, forwards) == (pytest.approx(2.5), 5)


def check_rows_that_several_ranks_measure_are_no_more_evidence_than_in_one_process(rank, size):
    """As with tensor parallelism: the error is that of one process, however batches are split."""
    batches = [token_batch(2, 3 + n, seed=n) for n in range(5)]
    pairs = [dist.new_group(list(range(first, size, size // 2))) for first in range(size // 2)]

    def error(together, split):
        model = tiny_lora().double().to(DEVICE)
        base = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
        val_fn = ValidationLoss(model, batches, process_group=split)
        search = BracketSearch(max_trials=2)
        optimizer = FastForward(base, val_fn, 1, line_search=search, process_group=together)
        model(**{name: value.to(DEVICE) for name, value in batches[0].items()}).loss.backward()
        optimizer.step()
        return optimizer.history[0].error

    expected = error(False, False)
    assert expected > 0
    for split in (None, False, pairs[rank % (size // 2)]):
        assert error(None, split) == pytest.approx(expected, rel=1e-6), split
