"""``overhead``: what the wrapper adds to a step, and the time and memory of a stage."""

from __future__ import annotations

import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fastforward_optim import FastForward, ValidationLoss, lora_parameters

from ..support.memory import live_tensor_bytes
from ..support.timing import elapsed


def plain_step_overhead(
    device: torch.device, steps: int = 2000, rounds: int = 15
) -> tuple[float, float]:
    """Time an SGD step on one scalar, and what FastForward adds to it without a stage.

    Rounds alternate between the two, because other load comes and goes.

    Returns:
        Medians in microseconds.
    """
    parameter = nn.Parameter(torch.zeros(1, device=device))
    parameter.grad = torch.ones(1, device=device)
    plain = torch.optim.SGD([parameter], lr=1e-9)
    wrapped = FastForward(torch.optim.SGD([parameter], lr=1e-9), lambda: 0.0, 10**9)

    def microseconds(optimizer: torch.optim.Optimizer) -> float:
        return elapsed(lambda: [optimizer.step() for _ in range(steps)], device) / steps * 1e6

    times = [(microseconds(plain), microseconds(wrapped)) for _ in range(rounds)]
    bare = statistics.median(first for first, _ in times)
    return bare, statistics.median(second - first for first, second in times)


def calibrated_step_overhead(
    model: nn.Module, batch: dict[str, Tensor], steps: int = 20, rounds: int = 15
) -> tuple[float, float]:
    """Time an AdamW step on the adapter, and what calibration adds without a stage, in ms."""
    parameters = lora_parameters(model)
    device = parameters[0].device
    model(**batch).loss.backward()
    plain = torch.optim.AdamW(parameters, lr=1e-9)
    adamw = torch.optim.AdamW(parameters, lr=1e-9)
    wrapped = FastForward(adamw, lambda: 0.0, 10**9, calibrate_lr=True)

    def milliseconds(optimizer: torch.optim.Optimizer) -> float:
        return elapsed(lambda: [optimizer.step() for _ in range(steps)], device) / steps * 1e3

    times = [(milliseconds(plain), milliseconds(wrapped)) for _ in range(rounds)]
    model.zero_grad()
    bare = statistics.median(first for first, _ in times)
    return bare, statistics.median(second - first for first, second in times)


def stage_time_overhead(
    model: nn.Module, batches: list[dict[str, Tensor]], stages: int = 10
) -> tuple[float, float]:
    """Time ``val_fn`` in a stage, in seconds, and the rest of the stage, in percent of that.

    The rest includes the stage's copies of the weights. The real step is timed without a stage
    and subtracted. Both are medians over ``stages``, after two stages to warm up.
    """
    device = next(model.parameters()).device
    val_fn = ValidationLoss(model, batches)
    spent = [0.0]

    def timed_val_fn() -> float:
        started = time.perf_counter()
        loss = val_fn()
        spent[0] += time.perf_counter() - started
        return loss

    optimizer = FastForward(
        torch.optim.AdamW(lora_parameters(model), lr=1e-4), timed_val_fn, interval=1
    )
    forwards, percents = [], []
    for _ in range(stages + 2):
        model(**batches[0]).loss.backward()
        plain = elapsed(optimizer.optimizer.step, device)
        spent[0] = 0.0
        with_stage = elapsed(optimizer.step, device)
        forwards.append(spent[0])
        percents.append(100 * (with_stage - plain - spent[0]) / spent[0])
        optimizer.zero_grad()
    return statistics.median(forwards[2:]), statistics.median(percents[2:])


def stage_memory(
    model: nn.Module, batches: list[dict[str, Tensor]], **options: bool
) -> tuple[float, float]:
    """Measure the memory during and after a stage, in copies of the tracked tensors."""
    parameters = lora_parameters(model)
    during: list[int] = []

    def val_fn() -> float:
        during.append(live_tensor_bytes())
        return 1.0

    adamw = torch.optim.AdamW(parameters, lr=1e-4)
    optimizer = FastForward(adamw, val_fn, interval=1, **options)
    model(**batches[0]).loss.backward()
    optimizer.optimizer.step()  # creates the moments
    before = live_tensor_bytes()
    optimizer.step()
    after = live_tensor_bytes()
    size = sum(p.numel() * p.element_size() for p in parameters)
    return (max(during) - before) / size, (after - before) / size


def report(
    model: nn.Module, batches: list[dict[str, Tensor]], console: Console, title: str
) -> None:
    """Measure ``model`` with ``batches`` as the validation set, and print a table."""
    device = next(model.parameters()).device
    bare, added = plain_step_overhead(device)
    forwards, percent = stage_time_overhead(model, batches)
    held, left = stage_memory(model, batches)
    held_calibrated, left_calibrated = stage_memory(model, batches, calibrate_lr=True)
    step, more = calibrated_step_overhead(model, batches[0])
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    table.add_column("measured", justify="right")
    table.add_column("promised", justify="right")
    table.add_row(f"added to a step without a stage ({bare:.1f} µs)", f"{added:.1f} µs", "< 20 µs")
    table.add_row(f"stage, beyond its val_fn ({forwards:.2f} s)", f"{percent:.2f} %", "<= 2 %")
    table.add_row("memory during a stage, in adapter copies", f"{held:.2f}", "<= 2")
    table.add_row("memory between stages, in adapter copies", f"{left:.2f}", "0")
    table.add_row(
        f"calibrate_lr: added to a step without a stage ({step:.2f} ms)",
        f"{more:.2f} ms",
        "one kernel",
    )
    table.add_row("calibrate_lr: memory during a stage", f"{held_calibrated:.2f}", "<= 3")
    table.add_row("calibrate_lr: memory between stages", f"{left_calibrated:.2f}", "<= 2")
    console.print(table)
