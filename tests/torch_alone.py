"""Run a stage in an environment that has torch and this package, and nothing else.

A script, not a test module: ``make wheel`` runs it in such an environment, and
``test_packaging.py`` with every other package hidden.
"""

import contextlib
import io

import torch

import fastforward_optim
from fastforward_optim.__main__ import main

torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
inputs, targets = torch.randn(64, 4), torch.randn(64, 1)


def loss(model, batch):
    return torch.nn.functional.mse_loss(model(inputs[batch]), targets[batch]), len(inputs[batch])


val_fn = fastforward_optim.ValidationLoss(model, [slice(48, 56), slice(56, 64)], forward=loss)
base = torch.optim.AdamW(model.parameters(), lr=1e-4)
optimizer = fastforward_optim.FastForward(base, val_fn, max_interval=6)
for step in range(12):
    optimizer.zero_grad()
    loss(model, slice(step, step + 16))[0].backward()
    optimizer.step()
assert [record.step for record in optimizer.history] == [6, 12]
with contextlib.redirect_stdout(io.StringIO()) as report:
    status = main(["doctor"])
assert status == 0, report.getvalue()
assert "pip install 'fastforward-optim[peft]'" in report.getvalue()
print(f"fastforward_optim {fastforward_optim.__version__}, torch {torch.__version__}: ok")
