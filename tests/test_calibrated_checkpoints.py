"""Checkpoints of calibrated runs: resumed bit for bit, or refused."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR

from .conftest import Regression, same
from .test_calibrated_optimizer import make


def resumable(problem):
    optimizer = make(problem, torch.optim.AdamW(problem.parameters, lr=3e-4))
    return optimizer, LambdaLR(optimizer, lambda step: 1 - step / 60)


def train(problem, optimizer, scheduler, first, last):
    for step in range(first, last):
        problem.train(optimizer, 1, first=step)
        scheduler.step()


@pytest.mark.parametrize("stop", range(0, 30, 4))
def test_a_resumed_run_is_bit_identical(stop, tmp_path):
    expected = Regression()
    expected_optimizer, scheduler = resumable(expected)
    train(expected, expected_optimizer, scheduler, 0, 30)
    expected_optimizer.finish()
    assert len(expected_optimizer.history) > 4

    first = Regression()
    optimizer, scheduler = resumable(first)
    train(first, optimizer, scheduler, 0, stop)
    parts = first.model.state_dict(), optimizer.state_dict(), scheduler.state_dict()
    torch.save(parts, tmp_path / "checkpoint.pt")

    second = Regression()
    model, state, schedule = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    second.model.load_state_dict(model)
    resumed, scheduler = resumable(second)
    resumed.load_state_dict(state)
    scheduler.load_state_dict(schedule)
    train(second, resumed, scheduler, stop, 30)
    resumed.finish()
    assert same(second.weights(), expected.weights())
    assert [(r.tau, r.trials, r.lr_scale) for r in resumed.history] == [
        (r.tau, r.trials, r.lr_scale) for r in expected_optimizer.history
    ]


def test_a_checkpoint_of_another_adapter_is_refused_and_changes_nothing(problem):
    optimizer = make(problem)
    problem.train(optimizer, 5)
    state_dict = optimizer.state_dict()
    other = Regression()
    other.model[0] = nn.Linear(6, 16, bias=False)
    fresh = make(other)
    other.train(fresh, 4)
    before = repr(fresh.state_dict())
    with pytest.raises(
        ValueError, match=r"of another model: its param groups have \[4\] parameters"
    ):
        fresh.load_state_dict(state_dict)
    del state_dict["fast_forward"]["shapes"]
    words = "of 4 tensors, this .* load it into an optimizer of the same model and adapter$"
    with pytest.raises(ValueError, match=words):
        fresh.load_state_dict(state_dict)
    del state_dict["fast_forward"]["window"]["mean"]
    with pytest.raises(ValueError, match="calibration in the state dict is damaged"):
        fresh.load_state_dict(state_dict)
    assert repr(fresh.state_dict()) == before


def test_checkpoints_load_with_and_without_calibration(problem):
    optimizer = make(problem)
    problem.train(optimizer, 8)
    state_dict = optimizer.state_dict()
    other = Regression()
    plain = make(other, calibrate_lr=False, max_interval=3)
    plain.load_state_dict(state_dict)
    assert plain.lr_scale == 1.0
    other.train(plain, 4)

    third = Regression()
    calibrated = make(third)
    calibrated.load_state_dict(plain.state_dict())
    assert calibrated.lr_scale == optimizer.lr_scale  # it rides along in the param group
    third.train(calibrated, 10)
    torch.optim.AdamW(Regression().parameters).load_state_dict(state_dict)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_distributed_checkpoints_keep_the_rate_and_the_interval(problem, tmp_path):
    optimizer = make(problem, max_interval=50)
    problem.train(optimizer, 30)
    assert optimizer.lr_scale != 1
    assert optimizer._interval_now() > 3
    problem.model.zero_grad()
    saved = get_optimizer_state_dict(problem.model, optimizer)
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path, no_dist=True)

    second = Regression()
    resumed = make(second, max_interval=50)
    loaded = {"optimizer": get_optimizer_state_dict(second.model, resumed)}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(second.model, resumed, loaded["optimizer"])
    assert resumed._counters.rate == optimizer._counters.rate
    assert resumed._interval_now() == optimizer._interval_now()
    second.train(resumed, resumed._interval_now())
    assert len(resumed.history) == 1
