"""``shapes``: what training and Fast Forward cost on a model of a published size.

FLOPs, times and memory depend on shapes alone, so the weights are random and nothing is downloaded.
The losses mean nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from fastforward_optim import ValidationLoss, lora_parameters

from ..comparison.flops import forward_flops, step_flops
from ..models import speed
from ..models.adapters import with_lora
from ..models.shapes import random_model, untrained
from ..support.environment import environment
from ..support.timing import elapsed, median_of
from .fixed_stages import TRIALS, random_blocks, stage_timer
from .rows import MeasuredRow, print_rows

Batch = dict[str, Tensor]


def report(
    name: str,
    *,
    device: torch.device,
    rank: int,
    batch_size: int,
    block: int,
    validation: int,
    dtype: torch.dtype,
    repeats: int,
    compile_layers: bool,
    dora: bool = False,
    model: Any = None,
) -> list[MeasuredRow]:
    """Measure AdamW on the adapter of a model, and print a table.

    Args:
        name: one of ``SHAPES``, or the name of ``model`` for the title.
        device: the device to use.
        rank: of the adapter, which is float32.
        batch_size: blocks in a training step, and in each batch of a trial.
        block: tokens in a block.
        validation: blocks that a trial measures.
        dtype: of the frozen weights.
        repeats: repeats of each timing, of which the median is taken.
        compile_layers: compile the decoder's layers before timing.
        dora: use DoRA instead of LoRA.
        model: a model to measure, in place; default: one with the shapes of ``name``.
    """
    model = random_model(name, dtype, device) if model is None else model.to(device, dtype)
    blocks = random_blocks(model.config.vocab_size, batch_size + validation, block)
    batch = blocks.select(slice(batch_size)).batch(device)
    batches = [
        part.batch(device) for part in blocks.select(slice(batch_size, None)).split(batch_size)
    ]

    forward, step = count_flops(model.config, batch, dtype=dtype, rank=rank, dora=dora)
    rows: list[MeasuredRow] = [
        {"what": "forward, counted", "value": forward / 1e12, "unit": "TFLOPs"},
        {"what": "training step, counted", "value": step / 1e12, "unit": "TFLOPs"},
        {"what": "training step / forward, counted", "value": step / forward, "unit": ""},
    ]
    model = with_lora(model, rank=rank, dora=dora)
    if compile_layers:
        speed.compile_layers(model)
    rows += measure(model, batch, batches, repeats)

    kind = "DoRA" if dora else "LoRA"
    print_rows(
        rows,
        f"{name}, random weights, {kind} rank {rank}, {batch_size} x {block} tokens a step, "
        f"{validation} x {block} a trial, {str(dtype).removeprefix('torch.')}"
        + (", compiled" if compile_layers else ""),
        environment(device),
    )
    return rows


def count_flops(
    config: Any, batch: Batch, *, dtype: torch.dtype, rank: int, dora: bool
) -> tuple[int, int]:
    """Count the FLOPs of a forward and of a training step on ``batch``.

    They are counted on the meta device: the counters need plain attention, which would take more
    memory than the attention used in training.
    """
    model = untrained(config, dtype, "meta")
    # Without a cache, transformers looks for packed rows in the values, which meta tensors lack.
    model.config.use_cache = True
    model = with_lora(model, rank=rank, dora=dora)
    batch = {name: tensor.to("meta") for name, tensor in batch.items()}
    return forward_flops(model, batch), step_flops(model, batch)


def measure(model: Any, batch: Batch, batches: list[Batch], repeats: int) -> list[MeasuredRow]:
    """Measure training steps on ``batch``, and trials and stages on ``batches``."""
    parameters = lora_parameters(model)
    device = parameters[0].device
    adamw = AdamW(parameters, lr=1e-9)
    val_fn = ValidationLoss(model, batches)
    model.train()

    def step() -> None:
        model(**batch).loss.backward()
        adamw.step()
        adamw.zero_grad()

    step_time, step_peak = median_of(lambda: elapsed(step, device), device, repeats)
    trial_time, _ = median_of(lambda: elapsed(val_fn, device), device, repeats)
    model(**batch).loss.backward()  # the gradients of the steps before all stages
    stage_time, stage_peak = median_of(stage_timer(adamw, val_fn, device), device, repeats)
    model.zero_grad()

    size = sum(p.numel() * p.element_size() for p in parameters)
    rows: list[MeasuredRow] = [
        {"what": "training step", "value": 1e3 * step_time, "unit": "ms"},
        {"what": "trial", "value": 1e3 * trial_time, "unit": "ms"},
        {
            "what": f"stage of {TRIALS} trials, beyond its forwards",
            "value": 1e3 * stage_time,
            "unit": "ms",
        },
        {"what": "adapter", "value": size / 1e6, "unit": "MB"},
    ]
    for what, peak in (("training steps", step_peak), ("stages", stage_peak)):
        if peak is not None:
            rows.append({"what": f"peak memory of {what}", "value": peak / 1e9, "unit": "GB"})
    return rows
