"""What training and Fast Forward cost on a model of true shapes whose weights are random.

FLOPs, times and memory depend on shapes, so that no download is needed. Losses mean nothing here.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.optim import AdamW

from fastforward_optim import FastForward, ValidationLoss, lora_parameters
from fastforward_optim.search.line_search import Evaluate

from ..comparison.flops import forward_flops, step_flops
from ..data.tasks import IGNORED, Blocks
from ..models import pretrained as models
from ..support.environment import elapsed, environment
from ..support.tables import print_table

Batch = dict[str, Tensor]

TRIALS = 4
"""Of the stages that are timed; about what a bracket takes."""

WARM_UP = 2
"""Repeats that are not counted: the first compiles, allocates and makes AdamW's moments."""


class Row(TypedDict):
    """A measured figure, in its unit."""

    what: str
    value: float
    unit: str


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
) -> list[Row]:
    """Measure a model with an adapter that is trained by AdamW, and print a table.

    Args:
        name: one of ``models.SHAPES``; or of ``model``, for the title.
        device: where to build and run it.
        rank: of the adapter, which is float32.
        batch_size: blocks in a training step, and in each batch of a trial.
        block: tokens in a block.
        validation: blocks that a trial measures.
        dtype: of the frozen weights.
        repeats: times are medians of so many.
        compile_layers: compile the decoder's layers before taking times.
        dora: DoRA in place of LoRA.
        model: to be measured in place of one of true shapes; it is changed in place.
    """
    model = models.random_model(name, dtype, device) if model is None else model.to(device, dtype)
    blocks = random_blocks(model.config.vocab_size, batch_size + validation, block)
    batch = blocks.select(slice(batch_size)).batch(device)
    batches = [
        part.batch(device) for part in blocks.select(slice(batch_size, None)).split(batch_size)
    ]

    forward, step = count_flops(model.config, batch, dtype=dtype, rank=rank, dora=dora)
    rows: list[Row] = [
        {"what": "forward, counted", "value": forward / 1e12, "unit": "TFLOPs"},
        {"what": "training step, counted", "value": step / 1e12, "unit": "TFLOPs"},
        {"what": "training step / forward, counted", "value": step / forward, "unit": ""},
    ]
    model = models.with_lora(model, rank=rank, dora=dora)
    if compile_layers:
        models.compile_layers(model)
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


def random_blocks(vocabulary: int, count: int, block: int) -> Blocks:
    """So many blocks of so many random tokens."""
    tokens = torch.randint(vocabulary, (count, block))
    labels = tokens.clone()
    labels[:, 0] = IGNORED  # else ValidationLoss takes a forward to find out that it is skipped
    return Blocks(tokens, labels)


def print_rows(rows: list[Row], title: str, about: dict[str, str]) -> None:
    """Print measured figures, and what they have to be read with."""
    print_table(
        ("what", "measured", "unit"),
        [(row["what"], f"{row['value']:.4g}", row["unit"]) for row in rows],
        title,
        "\n".join(f"{key}: {value}" for key, value in about.items()),
    )


def count_flops(
    config: Any, batch: Batch, *, dtype: torch.dtype, rank: int, dora: bool
) -> tuple[int, int]:
    """FLOPs of a forward and of a training step on ``batch``.

    They are counted on the meta device, by the shapes alone: the plain attention that the counters
    can read would need more memory than the one that is used in training.
    """
    model = models.untrained(config, dtype, "meta")
    # Without a cache, transformers looks for packed rows in the values, and there are none here.
    model.config.use_cache = True
    model = models.with_lora(model, rank=rank, dora=dora)
    batch = {name: tensor.to("meta") for name, tensor in batch.items()}
    return forward_flops(model, batch), step_flops(model, batch)


def measure(model: Any, batch: Batch, batches: list[Batch], repeats: int) -> list[Row]:
    """Times and memory of training steps on ``batch``, and of trials and stages on ``batches``."""
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
    model(**batch).loss.backward()  # all stages repeat the step along these gradients
    stage_time, stage_peak = median_of(stage_timer(adamw, val_fn, device), device, repeats)
    model.zero_grad()

    size = sum(p.numel() * p.element_size() for p in parameters)
    rows: list[Row] = [
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


def stage_timer(
    adamw: AdamW, val_fn: Callable[[], float], device: torch.device
) -> Callable[[], float]:
    """A function that takes a step with a stage and returns the seconds that the stage adds.

    Its forwards are not counted, its copies of the weights are. The real step is taken off, as it
    takes without a stage.
    """
    spent = [0.0]

    def timed_val_fn() -> float:
        losses: list[float] = []
        # What the stage itself has asked of the device is done before the clock starts.
        spent[0] += elapsed(lambda: losses.append(val_fn()), device)
        return losses[0]

    expect_equal_losses()
    optimizer = FastForward(adamw, timed_val_fn, interval=1, line_search=fixed_search)

    def seconds() -> float:
        plain = elapsed(adamw.step, device)
        spent[0] = 0.0
        return elapsed(optimizer.step, device) - plain - spent[0]

    return seconds


def expect_equal_losses() -> None:
    """Steps are so small that all trials have one loss, which is what a stage would warn of."""
    warnings.filterwarnings("ignore", "val_fn returns .* at all weights")


def fixed_search(evaluate: Evaluate, last_tau: float, /) -> float:
    """Always as many trials, none of which has to be good; the stage goes back to one of them."""
    for tau in range(TRIALS):
        evaluate(float(tau))
    return 1.0


def median_of(
    sample: Callable[[], float], device: torch.device, repeats: int
) -> tuple[float, int | None]:
    """Median of what ``sample`` returns, and on CUDA the most bytes in use meanwhile."""
    for _ in range(WARM_UP):
        sample()
    if device.type != "cuda":
        return statistics.median(sample() for _ in range(repeats)), None
    torch.cuda.reset_peak_memory_stats(device)
    median = statistics.median(sample() for _ in range(repeats))
    return median, torch.cuda.max_memory_allocated(device)
