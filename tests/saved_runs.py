"""Runs with stages, the state dicts that they save, and what must be so where one is refused."""

import copy

import pytest
import torch
from torch import nn

from fastforward_optim import FastForward, ValidationLoss

from .conftest import Regression, flat, same, through_a_file

REMOVED = object()
KINDS = {"plain": {}, "calibrated": {"calibrate_lr": True}}


class Run(Regression):
    """In training, with stages that take other validation examples in turn."""

    def __init__(self, optimizer=torch.optim.AdamW, options=KINDS["plain"], model=None):
        super().__init__()
        if model is not None:
            self.model = model
        rows = [(self.inputs[i : i + 8], self.targets[i : i + 8]) for i in range(64, 96, 8)]
        self.val_fn = ValidationLoss(self.model, rows, batches_per_stage=1, forward=self.forward)
        more = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
        self.inner = optimizer(self.parameters, lr=1e-3, **more)
        self.optimizer = FastForward(self.inner, self.val_fn, interval=3, **options)
        self.taken = 0

    @staticmethod
    def forward(model, rows):
        return nn.functional.mse_loss(model(rows[0]), rows[1]), len(rows[0])

    def loss(self, rows):
        outputs = self.model(self.inputs[rows])
        return nn.functional.mse_loss(outputs, self.targets[rows, : outputs.shape[1]])

    def take(self, steps):
        self.train(self.optimizer, steps, first=self.taken)
        self.taken += steps
        return self

    def everything(self):
        """All that a step depends on, bit for bit, and what stages have found."""
        state = {
            "weights": self.weights(),
            "optimizer": self.optimizer.state_dict(),
            "val_fn": self.val_fn.state_dict(),
            "lr_scale": self.optimizer.lr_scale,
            "random": torch.get_rng_state(),
            "attributes": sorted(self.inner.__dict__),
            "objects": [id(group) for group in self.inner.param_groups] + [id(self.inner.state)],
        }
        return flat(state)


def saved(run):
    """Its state dict, through a file."""
    return through_a_file(run.optimizer.state_dict())


def assert_refused(run, state_dict, words=""):
    """It is, and the run goes on as one that has never seen it."""
    twin = copy.deepcopy(run)
    before = run.everything()
    with pytest.raises(ValueError, match=words or "."):
        run.optimizer.load_state_dict(state_dict)
    assert run.everything() == before
    run.take(6)
    twin.take(6)
    assert flat(run.optimizer.state_dict()) == flat(twin.optimizer.state_dict())
    assert same(run.weights(), twin.weights())


def edited(state_dict, path, value):
    """A copy with another value, or what a function returns, at the end of the path; or without."""
    result = copy.deepcopy(state_dict)
    value = value() if callable(value) else value
    at = result
    for name in path[:-1]:
        at = at[name]
    if value is REMOVED:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return result
