"""Times of a GPU: medians, by its own clock or by the host's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

REPEATS = 50


def copy_speed(device: torch.device, size: int = 2**31) -> float:
    """Bytes a second that a copy from memory to memory reads and writes."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / device_time(lambda: target.copy_(source), device)


# Cycles of the device: what is timed waits in its queue meanwhile, so that the host's part of it
# is over when it begins.
HEAD_START = 4_000_000


def device_time(function: Callable[[], object], device: torch.device) -> float:
    """Seconds that the device takes for what a call asks of it, without the host's part: a median.

    A call that waits for the device cannot be timed like this.
    """
    times = []
    for repeat in range(REPEATS + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        torch.cuda._sleep(HEAD_START)
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize(device)
        if repeat >= 3:
            times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def wall_time(
    function: Callable[[], object], device: torch.device, repeats: int = REPEATS
) -> float:
    """Seconds of a call until the device has done all of it: a median."""
    return statistics.median([elapsed(function, device) for _ in range(repeats + 3)][3:])


WARM_UP = 2
"""Repeats that are not counted: the first compiles, allocates and makes AdamW's moments."""


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


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it has been given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def elapsed(function: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of a call, until the device has done it all."""
    started = now(device)
    function()
    return now(device) - started
