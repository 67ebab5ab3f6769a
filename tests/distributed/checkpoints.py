"""Checks, run on each rank: a checkpoint of these ranks goes on elsewhere, and one goes on here.

The folder comes from the environment: the ranks of several launches share it.
"""

import os
from itertools import count
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastforward_optim import FastForward, OptimizerState, ValidationLoss, lora_parameters
from tests.conftest import LOWEST, Untried, fixed
from tests.distributed.launch import DEVICE
from tests.distributed.training import EXCEPTIONS as OF_TRAINING
from tests.distributed.training import count_up, sharded, tiny_lora, whole

EXCEPTIONS = [
    *OF_TRAINING,
    "torch.distributed is disabled, unavailable or uninitialized",
    "TypedStorage is deprecated",  # torch 2.7 uses its own
]
OPTIONS = [{"line_search": LOWEST}, {"calibrate_lr": True, "total_steps": 90}]
FIRST, ALL = 9, 24


def make(net, model, options):
    val_fn = ValidationLoss(net, [count_up(3, 7, seed) for seed in range(8)], batches_per_stage=4)
    # Adam makes much of rounding where a gradient is about zero, and the more the higher the rate.
    inner = torch.optim.AdamW(lora_parameters(model), lr=3e-4, eps=1e-3)
    return FastForward(inner, val_fn, **fixed(4) | options)


def train(net, optimizer, first, last, rank, size):
    for number in range(first, last):
        batch = count_up(8, 9, 100 + number)
        net(**{name: rows[rank::size] for name, rows in batch.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def states(net, optimizer):
    return {"model": get_model_state_dict(net), "optimizer": OptimizerState(net, optimizer)}


def folder_of(size, index):
    return Path(os.environ["CHECKPOINTS"]) / f"{size}-ranks-{index}"


def resume(net, model, options, folder):
    optimizer = make(net, model, options)
    loading = states(net, optimizer)
    dcp.load(loading, checkpoint_id=folder)
    set_model_state_dict(net, loading["model"])
    return optimizer


def outcome(optimizer, model):
    history = [(r.step, r.tau, r.loss_after, r.lr_scale) for r in optimizer.history]
    return history, [whole(p) for p in lora_parameters(model)]


def assert_same_outcome(found, expected, exact):
    tolerance = 0 if exact else 1e-5
    assert len(found[0]) == len(expected[0]) > 2
    for a, b in zip(found[0], expected[0], strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=0)
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def check_a_sharded_run_saves_loads_and_goes_on(rank, size):
    for index, options in enumerate(OPTIONS):
        net = sharded()
        optimizer = make(net, net, options)
        train(net, optimizer, 0, FIRST, rank, size)
        dcp.save(states(net, optimizer), checkpoint_id=folder_of(size, index))
        train(net, optimizer, FIRST, ALL, rank, size)

        again = sharded()
        resumed = resume(again, again, options, folder_of(size, index))
        assert len(resumed.history) >= 1
        kept = [(record.step, record.trials) for record in resumed.history]
        assert kept == [(record.step, record.trials) for record in optimizer.history][: len(kept)]
        train(again, resumed, FIRST, ALL, rank, size)
        expected = outcome(optimizer, net)
        assert_same_outcome(outcome(resumed, again), expected, exact=True)
        if rank == 0:
            torch.save(expected, folder_of(size, index) / "outcome.pt")
        dist.barrier()


def check_a_checkpoint_of_more_ranks_goes_on_here(rank, size):
    for index, options in enumerate(OPTIONS):
        for more in (2, 4):
            folder = folder_of(more, index)
            if more <= size or (DEVICE == "cuda" and not folder.exists()):
                continue  # on fewer GPUs there have been no more ranks before
            expected = torch.load(folder / "outcome.pt", weights_only=True)
            for kind in (sharded, tiny_lora):
                model = kind()
                net = model if kind is sharded or size == 1 else DistributedDataParallel(model)
                optimizer = resume(net, model, options, folder)
                train(net, optimizer, FIRST, ALL, rank, size)
                assert_same_outcome(outcome(optimizer, model), expected, exact=False)


def check_a_whole_run_can_be_sharded(rank, size):
    """A state dict of one process, as ``torch.save`` keeps it, in a sharded run."""
    model, losses = tiny_lora(), count(0, -1)
    lower_each_time = Untried(lambda: next(losses))
    alone = FastForward(
        torch.optim.AdamW(lora_parameters(model), lr=3e-4), lower_each_time, process_group=False,
        calibrate_lr=True, interval=1,
    )  # fmt: skip
    for number in range(3):
        model(**count_up(8, 9, number)).loss.backward()
        alone.step()
    means = alone.state_dict()["fast_forward"]["iterates"]
    net = fully_shard(tiny_lora())
    optimizer = FastForward(
        torch.optim.AdamW(lora_parameters(net), lr=3e-4), lambda: 0.0, calibrate_lr=True
    )
    with optimizer._loading({"fast_forward": alone.state_dict()["fast_forward"]}):
        pass
    found = optimizer.state_dict()["fast_forward"]["iterates"]
    assert found["steps"] == means["steps"] == 2
    for name in ("mean", "previous", "movement", "average"):
        for a, b in zip(found[name], means[name], strict=True):
            assert torch.equal(whole(a), b)
