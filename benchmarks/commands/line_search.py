"""``line-search``: the library's line searches compared with an exact one."""

from __future__ import annotations

import sys
from typing import Annotated

import torch
import typer

from ..comparison.comparison import Comparison, Setting
from ..data.blocks import split_and_pack
from ..data.tasks import MEDICAL, TASKS
from ..measurements import line_search
from ..models.adapters import with_lora
from ..models.pretrained import smollm2
from ..support.environment import environment, pick_device
from ..support.tables import print_table
from .options import BatchSize, Block, Device, Rank, TaskName, Tf32, choose, parse, parse_rates


def line_search_command(
    task: TaskName = MEDICAL.name,
    searches: Annotated[
        str,
        typer.Option(
            help="repeat (hundreds of trials at low rates), bracket, or both with a comma."
        ),
    ] = "bracket",
    lrs: Annotated[str, typer.Option(help="Learning rates.")] = "2e-5,1e-4,3e-3",
    steps: Annotated[int, typer.Option(help="Real steps in a run.", min=1)] = 60,
    batch_size: BatchSize = 64,
    rank: Rank = 64,
    block: Block = 128,
    device: Device = "auto",
    tf32: Tf32 = False,
) -> None:
    """Measure which share of the possible decrease each line search finds, and in how many trials.

    At each stage, an exact line search follows on the same line and examples.
    """
    text = choose("--task", TASKS, task)
    names = searches.split(",")
    for name in names:
        choose("--searches", line_search.SEARCHES, name)
    rates = parse("--lrs", parse_rates, lrs)
    where = pick_device(device)
    if tf32:
        torch.set_float32_matmul_precision("high")
    base, tokenizer = smollm2()
    splits = split_and_pack(text, tokenizer, block=block, test=1)
    adapted = with_lora(base, rank=rank).to(where)
    comparison = Comparison(adapted, splits, Setting(batch_size, steps))
    rows = []
    for name in names:
        for lr in rates:
            stages, trials, share = line_search.summary(
                line_search.measure(comparison, name, lr, steps)
            )
            rows.append((name, f"{lr:g}", str(stages), f"{trials:.1f}", f"{100 * share:.1f} %"))
            print(*rows[-1], file=sys.stderr)
    columns = ("search", "lr", "stages", "trials a stage", "of the exact decrease")
    print_table(columns, rows, f"Line searches, {task}, {steps} steps", str(environment(where)))
