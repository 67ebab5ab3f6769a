"""``shapes``: what a step, a trial and a stage cost on a model of a published size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from ..measurements import shapes
from ..models.shapes import SHAPES
from ..support.environment import environment, pick_device
from ..support.files import write_json
from .options import BatchSize, Block, Device, Dtype, choose


def shapes_command(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "pythia-1.4b",
    rank: Annotated[int, typer.Option(help="Rank of the adapter.", min=1)] = 64,
    batch_size: BatchSize = 4,
    block: Block = 1024,
    validation: Annotated[int, typer.Option(help="Blocks that a trial measures.", min=1)] = 32,
    dtype: Annotated[Dtype, typer.Option(help="Data type of the frozen weights.")] = Dtype.bfloat16,
    dora: Annotated[bool, typer.Option("--dora", help="Use DoRA instead of LoRA.")] = False,
    compile_layers: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile the decoder's layers.")
    ] = False,
    repeats: Annotated[
        int, typer.Option(help="Repeats of each timing, of which the median is taken.", min=1)
    ] = 10,
    device: Device = "auto",
    output: Annotated[Path, typer.Option(help="Folder for the JSON.")] = Path("results/shapes"),
) -> None:
    """Measure a step, a trial and a stage on a model of a published size with random weights."""
    choose("--model", SHAPES, model)
    where = pick_device(device)
    rows = shapes.report(
        model,
        device=where,
        rank=rank,
        batch_size=batch_size,
        block=block,
        validation=validation,
        dtype=getattr(torch, dtype),
        repeats=repeats,
        compile_layers=compile_layers,
        dora=dora,
    )
    name = f"{model}-{'dora' if dora else 'lora'}-r{rank}-b{batch_size}-t{block}.json"
    write_json(output / name, {"about": environment(where), "rows": rows})
