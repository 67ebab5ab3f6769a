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

from fastforward_optim.calibration import Phase

from .conftest import Regression, same, through_a_file
from .test_calibrated_optimizer import make


def resumable(problem, warmup):
    base = torch.optim.AdamW(problem.parameters, lr=3e-4)
    optimizer = make(problem, base, total_steps=100, warmup=warmup)
    return optimizer, LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20, 1.2 - step / 100))


def train(problem, optimizer, scheduler, first, last):
    for step in range(first, last):
        problem.train(optimizer, 1, first=step)
        scheduler.step()


def numbers(optimizer):
    return [
        (r.step, r.kind, r.tau, r.trials, r.mean_loss, r.averaged, r.lr_scale)
        for r in optimizer.history
    ]


@pytest.fixture(scope="module")
def uninterrupted():
    """Runs that were never stopped, by the length of their warm-up."""
    runs = {}
    for warmup in (0, 20):
        problem = Regression()
        optimizer, scheduler = resumable(problem, warmup)
        train(problem, optimizer, scheduler, 0, 93)
        optimizer.finish()
        phases = {record.kind for record in optimizer.history}
        assert phases == {"probe", "check", "finish"}
        assert optimizer._progress.rate.phase == Phase.HOLD
        runs[warmup] = problem, optimizer
    return runs


# In the probe, at its end, in the search, at the end of a window, and while the rate is held.
@pytest.mark.parametrize("warmup", [0, 20])
@pytest.mark.parametrize("stop", [2, 3, 9, 20, 26, 85])
def test_a_resumed_run_is_bit_identical(stop, warmup, uninterrupted):
    expected, expected_optimizer = uninterrupted[warmup]
    first = Regression()
    optimizer, scheduler = resumable(first, warmup)
    train(first, optimizer, scheduler, 0, stop)
    parts = first.model.state_dict(), optimizer.state_dict(), scheduler.state_dict()
    model, state, schedule = through_a_file(parts)

    second = Regression()
    second.model.load_state_dict(model)
    resumed, scheduler = resumable(second, warmup)
    resumed.load_state_dict(state)
    scheduler.load_state_dict(schedule)
    with resumed.averaged():
        averaged = second.weights()
    with optimizer.averaged():
        assert same(averaged, first.weights())
    train(second, resumed, scheduler, stop, 93)
    resumed.finish()
    assert same(second.weights(), expected.weights())
    assert numbers(resumed) == numbers(expected_optimizer)
    assert resumed._progress.rate == expected_optimizer._progress.rate


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
    del state_dict["fast_forward"]["iterates"]["mean"]
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
def test_distributed_checkpoints_keep_the_rate(problem, tmp_path):
    """The wrapped optimizer's part alone: the windows begin anew."""
    optimizer = make(problem)
    problem.train(optimizer, 30)
    problem.model.zero_grad()
    saved = get_optimizer_state_dict(problem.model, optimizer)
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path, no_dist=True)

    second = Regression()
    resumed = make(second)
    loaded = {"optimizer": get_optimizer_state_dict(second.model, resumed)}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(second.model, resumed, loaded["optimizer"])
    assert resumed._progress.rate == optimizer._progress.rate
    assert resumed.lr_scale == optimizer.lr_scale != 1
    window = resumed._progress.rate.window
    second.train(resumed, window)
    assert [record.steps for record in resumed.history] == [window]
