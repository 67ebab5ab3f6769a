"""Optimizers that a stage would break are refused when they are wrapped, ordinary ones are not."""

import pytest
import schedulefree
import torch
from accelerate import Accelerator
from prodigyopt import Prodigy

from fastforward_optim import FastForward

SCHEDULE_FREE = [
    "AdamWScheduleFree",
    "AdamWScheduleFreeClosure",
    "AdamWScheduleFreePaper",
    "AdamWScheduleFreeReference",
    "RAdamScheduleFree",
    "RAdamScheduleFreeClosure",
    "SGDScheduleFree",
    "SGDScheduleFreeClosure",
    "SGDScheduleFreeReference",
    "ScheduleFreeWrapper",
    "ScheduleFreeWrapperReference",
]


def schedule_free(name, params):
    make = getattr(schedulefree, name)
    if "Wrapper" in name:
        return make(torch.optim.SGD(params, lr=0.1))
    return make(params, lr=0.1)


def test_the_list_of_schedule_free_optimizers_is_complete():
    assert sorted(SCHEDULE_FREE) == sorted(n for n in dir(schedulefree) if "ScheduleFree" in n)


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_schedule_free_is_refused_by_name_before_and_after_its_first_step(problem, name):
    optimizer = schedule_free(name, problem.parameters)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"Schedule-Free \({name}\).*torch.optim.AdamW"):
            FastForward(optimizer, problem.val_loss)
        if hasattr(optimizer, "train"):
            optimizer.train()
        optimizer.step(lambda: problem.backward(0))


def test_schedule_free_is_refused_inside_accelerates_wrapper_and_other_optimizers_are_not(problem):
    """Accelerate's wrapper has ``train`` and ``eval`` whatever is in it."""
    accelerator = Accelerator(cpu=True)
    inner = schedulefree.AdamWScheduleFree(problem.parameters)
    with pytest.raises(ValueError, match=r"Schedule-Free \(AdamWScheduleFree\)"):
        FastForward(accelerator.prepare_optimizer(inner), problem.val_loss)
    ordinary = accelerator.prepare_optimizer(torch.optim.AdamW(problem.parameters))
    optimizer = FastForward(ordinary, problem.val_loss, interval=1)
    problem.train(optimizer, 2)
    assert len(optimizer.history) == 2


class WithModes(torch.optim.SGD):
    """Has modes and a state called z, but one sequence of weights."""

    def train(self):
        self.training = True

    def eval(self):
        self.training = False


def test_an_optimizer_with_modes_of_its_own_is_not_refused(problem):
    base = WithModes(problem.parameters, lr=0.1)
    base.state[problem.parameters[0]]["z"] = 1
    FastForward(base, problem.val_loss)


# Importing torch's own package of these optimizers warns.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_tensors_that_are_stepped_in_backward_are_refused(problem):
    """Their gradients are gone when ``step`` is called, so that no stage would ever run."""
    from torch.distributed.optim import _apply_optimizer_in_backward

    first, *rest = problem.parameters
    _apply_optimizer_in_backward(torch.optim.SGD, [first], {"lr": 0.1})
    with pytest.raises(ValueError, match=r"1 of 4 tensors .* in backward .*shape \(16, 6\)"):
        FastForward(torch.optim.SGD(problem.parameters, lr=0.1), problem.val_loss)
    optimizer = FastForward(torch.optim.SGD(rest, lr=0.1), problem.val_loss, interval=1)
    problem.train(optimizer, 2)
    assert len(optimizer.history) == 2


def test_calibration_is_refused_where_prodigys_estimate_depends_on_the_rate(problem):
    base = Prodigy(problem.parameters, safeguard_warmup=True)
    with pytest.raises(ValueError, match=r"safeguard_warmup=True, which group 0 of Prodigy has"):
        FastForward(base, problem.val_loss, calibrate_lr=True)
    FastForward(base, problem.val_loss)
    FastForward(Prodigy(problem.parameters), problem.val_loss, calibrate_lr=True)
