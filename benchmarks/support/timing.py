"""Clocks: wall-clock time that waits for the device, and the time of a GPU alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

REPEATS = 50
"""Calls that a median is taken over."""


def copy_speed(device: torch.device, size: int = 2**31) -> float:
    """Return the bytes per second that a copy within the device's memory reads and writes."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / device_time(lambda: target.copy_(source), device)


HEAD_START = 4_000_000
"""Cycles for which the device is kept busy before the clock starts.

The timed work is queued in the meantime, so that the host's share of it is not measured.
"""


def device_time(function: Callable[[], object], device: torch.device) -> float:
    """Return the median time in seconds of a call on the device alone, without the host's share.

    The call must not wait for the device.
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
    """Return the median time in seconds of a call, until the device has finished."""
    return statistics.median([elapsed(function, device) for _ in range(repeats + 3)][3:])


WARM_UP = 2
"""Repeats that are discarded: the first compiles, allocates, and creates AdamW's moments."""


def median_of(
    sample: Callable[[], float], device: torch.device, repeats: int
) -> tuple[float, int | None]:
    """Return the median of ``sample()``, and on CUDA the peak memory in bytes (elsewhere None)."""
    for _ in range(WARM_UP):
        sample()
    if device.type != "cuda":
        return statistics.median(sample() for _ in range(repeats)), None
    torch.cuda.reset_peak_memory_stats(device)
    median = statistics.median(sample() for _ in range(repeats))
    return median, torch.cuda.max_memory_allocated(device)


def now(device: torch.device) -> float:
    """Return the time in seconds, after waiting for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def elapsed(function: Callable[[], object], device: torch.device) -> float:
    """Return the wall-clock time in seconds of a call, until the device has finished."""
    started = now(device)
    function()
    return now(device) - started
