"""``overhead``: the cost of the wrapper in time and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..data.blocks import split_and_pack
from ..data.tasks import MEDICAL
from ..measurements import overhead, stage_cost
from ..models.adapters import with_lora
from ..models.pretrained import smollm2
from ..models.shapes import SHAPES
from ..support.environment import environment, pick_device
from .options import Block, Device, Rank, choose


def overhead_command(
    block: Block = 24,
    validation: Annotated[int, typer.Option(help="Blocks that a trial measures.", min=1)] = 32,
    rank: Rank = 8,
    device: Device = "auto",
    shapes: Annotated[
        str, typer.Option(help="On a GPU: also measure the adapters of these models.")
    ] = "smollm2-135m,pythia-1.4b,llama-3-8b",
    output: Annotated[Path, typer.Option(help="On a GPU: folder for the JSON.")] = Path(
        "results/overhead"
    ),
) -> None:
    """Measure the time and memory that the wrapper costs, on SmolLM2-135M with LoRA.

    On a GPU, also compare a candidate, a trial and a stage with the speed of its memory, and
    forwards with and without CUDA graphs.
    """
    where = pick_device(device)
    names = [name.strip() for name in shapes.split(",")]
    for name in names:
        choose("--shapes", SHAPES, name)
    model, tokenizer = smollm2()
    splits = split_and_pack(MEDICAL, tokenizer, block=block, validation=validation, test=1)
    model = with_lora(model, rank=rank).to(where)
    title = f"Overhead, SmolLM2-135M, LoRA rank {rank}, {validation} x {block} tokens"
    overhead.report(model, [splits.validation.batch(where)], Console(), title)
    for name, value in environment(where).items():
        print(f"{name}: {value}")
    if where.type == "cuda":
        trials = {name: (16, 512) if name == "llama-3-8b" else (32, 128) for name in names}
        stage_cost.report(names, where, output, trials)
