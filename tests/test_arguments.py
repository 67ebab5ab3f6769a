"""Bad input: the message names the argument, its value and the remedy, before any change."""

import pytest
import torch
from torch import nn

from fastforward_optim import BracketSearch, FastForward

from .conftest import Regression


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"optimizer": None}, TypeError, "optimizer must be .* NoneType"),
        ({"optimizer": nn.Linear(2, 2)}, TypeError, "optimizer must be .* Linear"),
        ({"optimizer": torch.optim.AdamW}, TypeError, "class AdamW; construct it first"),
        ({"val_fn": 0.5}, TypeError, "val_fn must be a function .* 0.5"),
        ({"val_fn": Regression}, TypeError, "val_fn must be a function .* class Regression"),
        ({"interval": 0}, ValueError, "interval must be at least 1 .* got 0"),
        ({"interval": 2.0}, TypeError, "interval must be an integer .* got 2.0"),
        ({"interval": True}, TypeError, "interval must be an integer .* got True"),
        ({"warmup": -1}, ValueError, "warmup must be at least 0 .* got -1"),
        ({"calibrate_lr": 1}, TypeError, "calibrate_lr must be True, False or a Calib.*, got 1"),
        (
            {"calibrate_lr": True, "line_search": BracketSearch()},
            ValueError,
            "line_search has no part in a calibration.* leave out line_search or calibrate_lr",
        ),
        ({"total_steps": 0}, ValueError, "total_steps must be at least 1.* got 0"),
        ({"max_interval": 3}, ValueError, "max_interval must be at least 6 .* got 3"),
        (
            {"line_search": BracketSearch},
            TypeError,
            "line_search must be BracketSearch.., RepeatSearch.. or a function, got the class Bra",
        ),
        ({"line_search": "bracket"}, TypeError, "line_search must be .* 'bracket'"),
        (
            {"on_stage": 3},
            TypeError,
            "on_stage must be a function of one StageRecord, or None, got 3",
        ),
        ({"process_group": 5}, TypeError, "process_group must be a torch.distributed.ProcessGroup"),
        ({"params": torch.zeros(2)}, TypeError, "params must be an iterable .* pass .tensor."),
        ({"params": [("weight", 1)]}, TypeError, "params must be .* not named_parameters"),
        ({"params": [torch.zeros(2)]}, ValueError, "params holds 1 of 1 .* does not update"),
        ({"params": 5}, TypeError, "params must be an iterable of tensors, got 5"),
        ({"params": []}, ValueError, "params is empty, so there is nothing to fast-forward; leave"),
    ],
    ids=str,
)
def test_bad_arguments_are_named_before_anything_is_changed(problem, change, error, words):
    base = torch.optim.SGD(problem.parameters, lr=0.1)
    before = repr(base), len(base._optimizer_step_post_hooks)
    arguments = {"optimizer": base, "val_fn": problem.val_loss, **change}
    with pytest.raises(error, match=words):
        FastForward(**arguments)
    assert (repr(base), len(base._optimizer_step_post_hooks)) == before


def test_wrapping_twice_is_refused(problem):
    optimizer = FastForward(torch.optim.AdamW(problem.parameters), problem.val_loss)
    with pytest.raises(ValueError, match="wrapped in FastForward already"):
        FastForward(optimizer, problem.val_loss)
    FastForward(optimizer.optimizer, problem.val_loss)

    class Outer(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

    with pytest.raises(ValueError, match="wrapped in FastForward already"):
        FastForward(Outer(optimizer), problem.val_loss)


def test_a_misspelt_option_is_refused(problem):
    with pytest.raises(TypeError, match="intervall"):
        FastForward(torch.optim.SGD(problem.parameters, lr=0.1), problem.val_loss, intervall=3)


def test_calibration_needs_a_learning_rate(problem):
    optimizer = torch.optim.SGD(problem.parameters, lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match="needs a learning rate in every param group, group 0 of"):
        FastForward(optimizer, problem.val_loss, calibrate_lr=True)
