"""Contexts that restore the state of random number generators."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def random_state_kept(devices: Iterable[torch.device], seed: int | None = None) -> Iterator[None]:
    """Restore torch's generators of the CPU and ``devices`` on exit; seed them if given a seed."""
    indices: dict[str, set[int]] = {}
    for device in devices:
        if device.index is not None and device.type != "cpu":
            indices.setdefault(device.type, set()).add(device.index)
    with ExitStack() as stack:
        for device_type, found in indices.items():  # usually one type
            stack.enter_context(torch.random.fork_rng(devices=found, device_type=device_type))
        if not indices:  # otherwise fork_rng above includes the CPU
            stack.enter_context(torch.random.fork_rng(devices=[]))
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            for device_type, found in indices.items():
                module = torch.get_device_module(device_type)
                for index in found:
                    with torch.accelerator.device_index(index):
                        module.manual_seed(seed)
        yield


@contextmanager
def randomness_kept(device: torch.device | None = None) -> Iterator[None]:
    """Restore the generators of Python, NumPy and torch (CPU and CUDA ``device``) on exit."""
    numpy = sys.modules.get("numpy")
    python, of_numpy = random.getstate(), numpy and numpy.random.get_state()
    try:
        with torch.random.fork_rng([device] if device and device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(of_numpy)
