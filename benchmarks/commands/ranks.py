"""``ranks``: what a stage costs on several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from ..measurements import ranks
from ..models.shapes import SHAPES
from .options import BatchSize, Block, Device, Dtype, choose


def ranks_command(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "smollm2-135m",
    way: Annotated[str, typer.Option(help="ddp or fsdp.")] = "ddp",
    rank: Annotated[int, typer.Option(help="Rank of the adapter.", min=1)] = 8,
    batch_size: BatchSize = 4,
    block: Block = 128,
    validation: Annotated[int, typer.Option(help="Blocks that a trial measures.", min=1)] = 32,
    trial_size: Annotated[int, typer.Option(help="Blocks in a batch of a trial.", min=1)] = 4,
    dtype: Annotated[Dtype, typer.Option(help="Data type of all weights.")] = Dtype.bfloat16,
    device: Device = "auto",
    output: Annotated[Path, typer.Option(help="Folder for the JSON.")] = Path("results/ranks"),
) -> None:
    """Measure a stage on several ranks: torchrun --nproc-per-node 2 -m benchmarks ranks."""
    choose("--model", SHAPES, model)
    choose("--way", {"ddp": None, "fsdp": None}, way)
    ranks.report(
        model,
        way,
        device=device,
        rank=rank,
        batch_size=batch_size,
        block=block,
        validation=validation,
        trial_size=trial_size,
        dtype=getattr(torch, dtype),
        output=output,
    )
