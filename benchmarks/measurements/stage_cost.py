"""``overhead`` on a GPU: what a stage costs beyond its forwards, compared with the minimum.

Writing a candidate must at least read the anchor and the direction and write the weights, once
each, at the speed of the GPU's memory. The authors' way is measured too: state dicts, a thread pool
over their entries, and ``load_state_dict``.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.optim import SGD

from fastforward_optim import FastForward, lora_parameters
from fastforward_optim.stage.line import MultiTensorLine
from fastforward_optim.stage.stage import Stage

from ..models.adapters import with_lora
from ..models.shapes import random_model
from ..support.environment import environment
from ..support.files import write_json
from ..support.tables import print_table
from ..support.timing import REPEATS, copy_speed, device_time, wall_time
from . import forward_cost
from .fixed_stages import TRIALS, expect_equal_losses, fixed_search

STAGES = 10_000
ADAPTER_COLUMNS = (
    "adapter",
    "tensors",
    "MB",
    "write µs",
    "of the floor",
    "host µs",
    "by foreach",
    "reference",
    "trial µs",
    "stage µs",
    "kernels",
    "waits",
    "copies",
    "left",
)


def adapter(name: str, rank: int, dtype: torch.dtype, device: torch.device) -> list[nn.Parameter]:
    """Make random tensors with the shapes of a model's LoRA adapter, without building the model."""
    return [
        nn.Parameter(torch.randn(shape, device=device).to(dtype))
        for shape in adapter_shapes(name, rank)
    ]


@functools.cache
def adapter_shapes(name: str, rank: int) -> list[torch.Size]:
    """Return the shapes of the trained tensors."""
    model = with_lora(random_model(name, torch.bfloat16, "meta"), rank=rank)
    return [p.shape for p in lora_parameters(model)]


def adapter_row(
    name: str, rank: int, dtype: torch.dtype, device: torch.device, speed: float
) -> dict[str, Any]:
    """Measure writes, trials and stages on an adapter: times, memory, kernels and waits."""
    parameters = adapter(name, rank, dtype, device)
    size = sum(p.numel() * p.element_size() for p in parameters)
    stage = Stage(parameters)
    move(parameters)
    stage.set_anchor()
    kernels, waits = counted(lambda: one_trial(stage, device))
    whole, held, left = stage_costs(parameters, device)
    return {
        "adapter": f"{name} r{rank} {str(dtype).removeprefix('torch.')}",
        "tensors": len(parameters),
        "bytes": size,
        "write": write_time(parameters, device),
        "host": host_time(stage, device),
        "floor": 3 * size / speed,
        "write_by_foreach": write_time(parameters, device, triton=False),
        "write_as_the_reference": reference_write(parameters, device),
        "trial": wall_time(lambda: one_trial(stage, device), device),
        "stage": whole,
        "kernels_a_trial": kernels,
        "waits_a_trial": waits,
        "held_in_a_stage": held / size,
        "left_after_it": left / size,
    }


def move(parameters: Iterable[nn.Parameter]) -> None:
    """Change the parameters as an optimizer's step does."""
    with torch.no_grad():
        for p in parameters:
            p.add_(1e-3 * torch.randn_like(p))


def write_time(
    parameters: Sequence[nn.Parameter], device: torch.device, triton: bool = True
) -> float:
    """Time the device writing a candidate, with Triton or with torch's multi-tensor kernels."""
    plain = mock.patch("fastforward_optim.stage.stage.line_of", MultiTensorLine)
    with nullcontext() if triton else plain:
        stage = Stage(parameters)
    move(parameters)
    stage.set_anchor()
    taus = itertools.count(1.0)  # a new candidate each time
    return device_time(lambda: stage.write(next(taus)), device)


def host_time(stage: Stage, device: torch.device) -> float:
    """Return the median time of the host to queue the write of a candidate."""
    times = []
    for repeat in range(REPEATS):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        stage.write(float(repeat + 2))
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def one_trial(stage: Stage, device: torch.device) -> None:
    """Run one trial whose forward is a single kernel, and return to the anchor."""
    expect_equal_losses()
    loss = torch.zeros((), device=device)

    def once(evaluate: Callable[[float], float], last_tau: float, /) -> float:
        evaluate(1.0)
        return 1.0

    stage._tau = 0.0  # so that tau = 1 is written
    stage.search(lambda: loss.mul(1), once, 0.0)


def counted(function: Callable[[], object]) -> tuple[int, int]:
    """Count the kernels that a call launches, without its forward's, and its waits for the device.

    The counts of one call are subtracted from those of eleven, because the profiler adds its own.
    """
    kernels, waits = zip(*(_profiled(function, calls) for calls in (1, 11)), strict=True)
    return round((kernels[1] - kernels[0]) / 10) - 1, round((waits[1] - waits[0]) / 10)


def _profiled(function: Callable[[], object], calls: int) -> tuple[int, int]:
    from torch.profiler import ProfilerActivity, profile

    function()
    torch.cuda.synchronize()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    # Some versions warn that events of earlier cycles are lost, although there is only one cycle.
    with profile(activities=activities, acc_events=True) as profiled:
        for _ in range(calls):
            function()
    events = profiled.events()
    on_device = [e.name for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [name for name in on_device if not name.startswith(("Memcpy", "Memset"))]
    return len(kernels), sum(event.name.endswith("Synchronize") for event in events)


def stage_costs(parameters: list[nn.Parameter], device: torch.device) -> tuple[float, int, int]:
    """Measure a stage with one-kernel forwards: seconds, bytes held during it and left after it."""
    expect_equal_losses()
    loss = torch.zeros((), device=device)
    for p in parameters:
        p.grad = torch.ones_like(p)
    plain = wall_time(SGD(parameters, lr=1e-9).step, device)
    sgd = SGD(parameters, lr=1e-9)
    optimizer = FastForward(sgd, lambda: loss.mul(1), interval=1, line_search=fixed_search)
    whole = wall_time(optimizer.step, device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    optimizer.step()
    held = torch.cuda.max_memory_allocated(device) - before
    return whole - plain, held, torch.cuda.memory_allocated(device) - before


def reference_write(parameters: Sequence[nn.Parameter], device: torch.device) -> float:
    """Time writing a candidate in the authors' way, on a module with the adapter alone."""
    module = nn.Module()
    for index, parameter in enumerate(parameters):
        module.register_parameter(f"p{index}", parameter)
    change = {name: 1e-3 * value for name, value in module.state_dict().items()}

    def repeat() -> None:
        state = module.state_dict()
        with ThreadPoolExecutor() as pool:
            moved = pool.map(lambda name: (name, state[name] + change[name]), state)
            module.load_state_dict(dict(moved))

    return wall_time(repeat, device)


def growth(device: torch.device, stages: int = STAGES) -> dict[str, Any]:
    """Measure memory and times over many stages, on SmolLM2's adapter of rank 8."""
    parameters = adapter("smollm2-135m", 8, torch.float32, device)
    expect_equal_losses()
    loss = torch.zeros((), device=device)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer = FastForward(
        SGD(parameters, lr=1e-9), lambda: loss.mul(1), interval=1, line_search=fixed_search
    )
    for _ in range(10):
        optimizer.step()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before, times = torch.cuda.memory_allocated(device), []
    peak = 0
    for done in range(stages):
        if done == stages // 10:
            peak = torch.cuda.max_memory_allocated(device)
        started = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - started)
    tenth = stages // 10
    return {
        "stages": stages,
        "grown_bytes": torch.cuda.memory_allocated(device) - before,
        "peak_grown_bytes": torch.cuda.max_memory_allocated(device) - peak,
        "first_tenth": statistics.median(times[:tenth]),
        "last_tenth": statistics.median(times[-tenth:]),
    }


def report(
    names: Sequence[str],
    device: torch.device,
    output: Path,
    forwards: dict[str, tuple[int, int]],
    ranks: Sequence[int] = (8, 64),
) -> None:
    """Measure, print tables, and write JSON after each measurement.

    Args:
        names: names in ``SHAPES``, for the adapters.
        device: a GPU.
        output: the folder for the JSON.
        forwards: (rows, tokens per row) of a trial, by the model whose forward is timed.
        ranks: of the adapters.
    """
    document: dict[str, Any] = {"about": environment(device)}
    path = output / "stage-cost.json"
    speed = copy_speed(device)
    document["copy_bytes_per_second"] = speed
    document["adapters"] = adapters = []
    for name in names:
        for rank in ranks:
            for dtype in (torch.float32, torch.bfloat16):
                adapters.append(adapter_row(name, rank, dtype, device, speed))
                print(*adapter_cells(adapters[-1]), file=sys.stderr)
                write_json(path, document)
    note = "\n".join(f"{key}: {value}" for key, value in document["about"].items())
    title = f"A candidate, a trial and a stage of {TRIALS} trials beyond their forwards; memory "
    print_table(
        ADAPTER_COLUMNS,
        [adapter_cells(row) for row in adapters],
        title + f"copies at {speed / 1e12:.2f} TB/s",
        note,
    )
    document["growth"] = growth(device)
    write_json(path, document)
    print(document["growth"])
    document["forwards"] = forward_cost.measure(forwards, device)
    write_json(path, document)


def adapter_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Format a row of the table."""
    return (
        row["adapter"],
        str(row["tensors"]),
        f"{row['bytes'] / 1e6:.1f}",
        f"{1e6 * row['write']:.0f}",
        f"{100 * row['floor'] / row['write']:.0f} %",
        f"{1e6 * row['host']:.0f}",
        f"{1e6 * row['write_by_foreach']:.0f}",
        f"{1e6 * row['write_as_the_reference']:.0f}",
        f"{1e6 * row['trial']:.0f}",
        f"{1e6 * row['stage']:.0f}",
        str(row["kernels_a_trial"]),
        str(row["waits_a_trial"]),
        f"{row['held_in_a_stage']:.2f}",
        f"{row['left_after_it']:.2f}",
    )
