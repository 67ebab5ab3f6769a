"""``demo``: fine-tune SmolLM2-135M on medical text, with and without Fast Forward."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fastforward_optim import RepeatSearch

from ..comparison.comparison import Comparison, Setting
from ..data.blocks import split_and_pack
from ..data.tasks import MEDICAL
from ..methods.adamw import adamw
from ..methods.fast_forward import calibrated, fast_forward
from ..methods.trainer import Method
from ..models.adapters import with_lora
from ..models.pretrained import smollm2
from ..reports import demo as report
from ..runs.training import train_with_bar
from ..support.environment import environment, pick_device
from ..support.tables import print_table
from .options import BatchSize, Block, BudgetSteps, Device, Dtype, FrozenDtype, Interval, Rank, Test


def demo_command(
    low_lr: Annotated[float, typer.Option(help="The paper's learning rate.")] = 2e-5,
    good_lr: Annotated[float, typer.Option(help="A learning rate from a sweep.")] = 3e-3,
    budget_steps: BudgetSteps = 48,
    interval: Interval = 6,
    batch_size: BatchSize = 8,
    block: Block = 24,
    validation: Annotated[int, typer.Option(help="Blocks that a trial measures.", min=1)] = 8,
    test: Test = 64,
    rank: Rank = 8,
    dtype: FrozenDtype = Dtype.float32,
    seed: Annotated[int, typer.Option(help="Seed of data, adapter and batches.")] = 0,
    device: Device = "auto",
    output: Annotated[Path, typer.Option(help="Folder for the table, JSON and plot.")] = Path(
        "results/demo"
    ),
) -> None:
    """Fine-tune SmolLM2-135M on medical text, with and without Fast Forward.

    It compares plain AdamW, the paper's rule (RepeatSearch), Fast Forward's default (BracketSearch)
    and calibrate_lr, at the paper's learning rate and at a good one, under a linear decay. All runs
    cost the same: steps and all passes over the validation set are charged. The test blocks are
    used only for the report.
    """
    where = pick_device(device)
    started = time.perf_counter()
    print("Loading SmolLM2-135M and the medical task ...", file=sys.stderr)
    model, tokenizer = smollm2(getattr(torch, dtype))
    splits = split_and_pack(
        MEDICAL, tokenizer, block=block, validation=8 * validation, test=test, seed=seed
    )
    model = with_lora(model, rank=rank, seed=seed).to(where)
    setting = Setting(batch_size, budget_steps, interval, validation)
    comparison = Comparison(model, splits, setting, seed)
    # Here AdamW does not train on the validation blocks, so all methods see the same batches.
    methods = (
        Method("AdamW", "", adamw),
        Method("paper's rule", "", fast_forward(fixed_interval=True, line_search=RepeatSearch())),
        Method("Fast Forward", "", fast_forward()),
        Method("calibrated", "", calibrated),
    )
    jobs = [(method, lr) for lr in (low_lr, good_lr) for method in methods]
    results = [
        train_with_bar(
            *(comparison, method, lr, f"{number}/{len(jobs)} {method.name}, lr {lr:g}"), "linear"
        )
        for number, (method, lr) in enumerate(jobs, 1)
    ]

    note = (
        f"Test loss before training: {comparison.initial_test_loss:.3f}. A trial is one pass over "
        f"the validation set and costs {comparison.costs.trial / comparison.costs.step:.2f} steps."
    )
    title = f"SmolLM2-135M, LoRA, medical text, linear decay, equal cost, seed {seed}"
    print_table(report.COLUMNS, report.rows(results), title, note)
    about: dict[str, Any] = environment(where) | {
        "task": MEDICAL.source,
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "flops_step": comparison.costs.step,
        "flops_trial": comparison.costs.trial,
    }
    report.save(output, results, about)
    print(f"{about['minutes']} minutes. Wrote {output}/loss.png, table.md and results.json.")
