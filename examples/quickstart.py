"""Fast Forward in a plain loop: SmolLM2-135M with LoRA, with it and without it for the same cost.

The learning rate is too low, as the paper's is: there Fast Forward helps. Nothing is downloaded, as
model and texts come with packages. It takes the functions that load them from ``benchmarks``, so
run it in a clone, with what ``make setup`` installs:

    .venv/bin/python examples/quickstart.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script finds what is beside it, not above

from benchmarks.data.blocks import split_and_pack
from benchmarks.data.tasks import MEDICAL
from benchmarks.models.adapters import with_lora
from benchmarks.models.pretrained import smollm2
from fastforward_optim import FastForward, ValidationLoss, lora_parameters

LR, BATCH, BLOCK, VALIDATION, TEST = 2e-5, 16, 24, 16, 32
# What a pass over the validation set costs, in steps: LoRA's backward costs about a forward.
TRIAL = VALIDATION / (2 * BATCH)

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=18, help="the cost of so many steps")
parser.add_argument("--plot", type=Path, default=Path("quickstart.png"), help="where to save it")
options = parser.parse_args()

print("Loading SmolLM2-135M ...", file=sys.stderr)
base, tokenizer = smollm2()
splits = split_and_pack(
    MEDICAL, tokenizer, block=BLOCK, validation=VALIDATION, test=TEST, train=512
)
model = with_lora(base, rank=8).train()
start = [p.detach().clone() for p in lora_parameters(model)]
# Held out: the stages choose by the validation blocks, the table reports on the test blocks.
val_fn = ValidationLoss(model, [splits.validation.batch("cpu")])
test_loss = ValidationLoss(model, [part.batch("cpu") for part in splits.test.split(32)])


def train(optimizer: torch.optim.Optimizer, budget: float) -> int:
    """Train until steps and trials have cost as much as ``budget`` steps."""
    with torch.no_grad():
        for p, value in zip(lora_parameters(model), start, strict=True):
            p.copy_(value)
    steps = 0
    while steps + TRIAL * trials(optimizer) < budget:
        rows = torch.arange(steps * BATCH, (steps + 1) * BATCH) % splits.train.rows
        model(**splits.train.select(rows).batch("cpu")).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return steps


def trials(optimizer: torch.optim.Optimizer) -> int:
    """Passes over the validation set."""
    return sum(stage.passes for stage in getattr(optimizer, "history", ()))


adamw = torch.optim.AdamW(lora_parameters(model), lr=LR)
fast_forward = FastForward(torch.optim.AdamW(lora_parameters(model), lr=LR), val_fn, interval=6)
print(f"{'':13} {'test loss':>9} {'steps':>6} {'trials':>6} {'cost':>6}")
print(f"{'not trained':13} {float(test_loss()):9.3f}")
budget = options.steps
# AdamW comes second, for what Fast Forward has cost: a last stage may go beyond the budget.
for name, optimizer in (("Fast Forward", fast_forward), ("AdamW", adamw)):
    steps = train(optimizer, budget)
    budget = steps + TRIAL * trials(optimizer)
    print(f"{name:13} {float(test_loss()):9.3f} {steps:6} {trials(optimizer):6} {budget:6.1f}")

print(fast_forward.history)
fast_forward.history.plot().savefig(options.plot)
print(f"Wrote {options.plot}.")
