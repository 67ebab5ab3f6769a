"""``overhead`` on a GPU: what a trial's forward costs with each option of ``ValidationLoss``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from fastforward_optim import FastForward, ValidationLoss, lora_parameters

from ..data.blocks import IGNORED
from ..models.adapters import with_lora
from ..models.shapes import random_model
from ..models.speed import compile_layers
from ..support.environment import environment
from ..support.tables import print_table
from ..support.timing import wall_time
from .fixed_stages import TRIALS, fixed_search, random_blocks

RANK = 64
REPEATS = 15  # fewer than usual: the forward of a large model takes a third of a second
FORWARDS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "cuda_graphs": {"cuda_graphs": True},
    "padded rows": {"padded": True},
    "padded rows, group_by_length": {"padded": True, "group_by_length": True},
    "padded rows, both": {"padded": True, "group_by_length": True, "cuda_graphs": True},
    "layers compiled": {"compiled": True},
}
"""Ways to measure the validation loss, with their options."""


def forward_rows(
    name: str, rows: int, block: int, rank: int, device: torch.device
) -> list[dict[str, Any]]:
    """Time a trial in each way, on a bfloat16 model with random weights."""
    found = []
    model = with_lora(random_model(name, torch.bfloat16, device), rank=rank)
    for way, chosen in FORWARDS.items():
        options = dict(chosen)
        batches = random_batches(
            model.config.vocab_size, rows, block, options.pop("padded", False), device
        )
        if options.pop("compiled", False):  # the last one: it cannot be undone
            compile_layers(model)
        before = reserved(device)
        val_fn = ValidationLoss(model, batches, **options)
        losses = [val_fn() for _ in range(4)]
        held = reserved(device) - before
        alone = wall_time(val_fn, device, REPEATS)
        in_stage, beyond = stage_of(model, val_fn, device)
        found.append(
            {
                "model": f"{name}, {rows} x {block}",
                "way": way,
                "tokens": sum(batch["input_ids"].numel() for batch in val_fn.batches),
                "trial_alone": alone,
                "trial_in_a_stage": in_stage,
                "beyond": beyond,
                "held_bytes": held,
                "loss": losses[-1],
                "first_loss": losses[0],
            }
        )
        del val_fn
    return found


def reserved(device: torch.device) -> int:
    """Return the bytes that CUDA has reserved: the memory of a graph belongs to no tensor."""
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def random_batches(
    vocabulary: int, rows: int, block: int, padded: bool, device: torch.device
) -> list[dict[str, Tensor]]:
    """Make the same batches each time: one, or four with padded rows.

    The lengths of padded rows range from an eighth of a block to a whole one.
    """
    torch.manual_seed(0)
    blocks = random_blocks(vocabulary, rows, block)
    if not padded:
        return [blocks.batch(device)]
    lengths = torch.linspace(block / 8, block, rows).round()[torch.randperm(rows)]
    mask = (torch.arange(block) < lengths[:, None]).long()
    labels = torch.where(mask == 1, blocks.labels, IGNORED)
    columns = {"input_ids": blocks.input_ids, "attention_mask": mask, "labels": labels}
    parts = zip(*(column.to(device).chunk(4) for column in columns.values()), strict=True)
    return [dict(zip(columns, part, strict=True)) for part in parts]


def stage_of(model: Any, val_fn: ValidationLoss, device: torch.device) -> tuple[float, float]:
    """Time a trial in a stage in seconds, and the rest of the stage as a fraction of its forwards.

    The rest is measured with a ``val_fn`` that returns a number without a forward.
    """
    parameters = lora_parameters(model)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    parameters[0].grad = torch.ones_like(parameters[0])
    sgd = SGD(parameters, lr=1e-12)
    loss = torch.zeros((), device=device)
    options = {"interval": 1, "line_search": fixed_search}
    empty = FastForward(sgd, lambda: loss.mul(1), **options)
    full = FastForward(sgd, val_fn, **options)
    plain = wall_time(sgd.step, device)
    beyond = wall_time(empty.step, device) - plain
    whole = wall_time(full.step, device, REPEATS) - plain
    return (whole - beyond) / TRIALS, beyond / (whole - beyond)


def measure(forwards: Mapping[str, tuple[int, int]], device: torch.device) -> list[dict[str, Any]]:
    """Measure and print a table.

    Args:
        forwards: (rows, tokens per row) of a trial, by the name in ``SHAPES``.
        device: a GPU.
    """
    rows = []
    for name, (count, block) in forwards.items():
        rows += forward_rows(name, count, block, RANK, device)
    print_table(
        ("forward", "way", "tokens", "trial ms", "in a stage", "beyond", "MB held", "loss"),
        [forward_cells(row) for row in rows],
        f"A trial's forward, bfloat16, LoRA rank {RANK}",
        "\n".join(f"{key}: {value}" for key, value in environment(device).items()),
    )
    return rows


def forward_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Format a row of the table."""
    return (
        row["model"],
        row["way"],
        str(row["tokens"]),
        f"{1e3 * row['trial_alone']:.2f}",
        f"{1e3 * row['trial_in_a_stage']:.2f}",
        f"{100 * row['beyond']:.2f} %",
        f"{row['held_bytes'] / 1e6:.0f}",
        f"{row['loss']:.6f}",
    )
