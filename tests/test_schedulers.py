"""Every learning rate scheduler of torch drives the wrapper as it drives the wrapped optimizer."""

import warnings

import pytest
import torch
from torch.optim import lr_scheduler

from fastforward_optim import FastForward

from .conftest import Regression, fixed

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 9),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.01, 20),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [4]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.001),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_takes_it_and_sees_only_its_own_rates(name):
    rates = []
    for wrap in (False, True):
        problem = Regression()
        optimizer = torch.optim.AdamW(problem.parameters, lr=0.01)
        if wrap:
            optimizer = FastForward(optimizer, problem.val_loss, **fixed(2))
        scheduler = SCHEDULERS[name](optimizer)
        rates.append([])
        for step in range(8):
            problem.train(optimizer, 1, first=step)
            with warnings.catch_warnings():
                # SequentialLR calls its parts with a deprecated argument.
                warnings.filterwarnings("ignore", "The epoch parameter")
                scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            rates[-1].append(float(optimizer.param_groups[0]["lr"]))
        if wrap:
            assert len(optimizer.history) == 4
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1


def test_a_scheduler_made_before_wrapping_works_too(problem):
    base = torch.optim.AdamW(problem.parameters, lr=0.01)
    scheduler = lr_scheduler.StepLR(base, 1)
    optimizer = FastForward(base, problem.val_loss, interval=2)
    problem.train(optimizer, 1)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
