"""``tokens``: write the tasks' blocks of tokens to files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from ..data.blocks import split_and_pack
from ..data.tasks import ALL_TASKS
from ..data.token_files import save_tokens
from ..models.pretrained import MODELS
from .options import POOL, Block, Model, Tasks, Test, TrainBlocks, choose, parse, parse_tasks

EVERY_TASK = ",".join(ALL_TASKS)


def tokens_command(
    task: Tasks = EVERY_TASK,
    model: Model = "smollm2",
    block: Block = 128,
    pool: Annotated[int, typer.Option(help="Blocks in the validation split.", min=1)] = POOL,
    test: Test = 512,
    train_blocks: TrainBlocks = 8000,
    output: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("results/tokens"),
) -> None:
    """Write the tasks' blocks of tokens for `compare --tokens` on a machine without the texts."""
    _, tokenizer = choose("--model", MODELS, model)(torch.float32)
    for name in parse("--task", parse_tasks, task):
        splits = split_and_pack(
            ALL_TASKS[name], tokenizer, block=block, validation=pool, test=test, train=train_blocks
        )
        path = save_tokens(output, ALL_TASKS[name], model, splits)
        print(f"{path}: {splits.train.rows} blocks to train on.")
