"""The random number generators that a training loop draws from, as a checkpoint holds them.

Knows torch's, NumPy's and Python's generators, and nothing else.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


def random_state() -> dict[str, Any]:
    """Where the random number generators of this process are: torch's, NumPy's and Python's.

    Of torch, those of the CPU and of each CUDA device, which dropout and the order of a
    ``DataLoader`` come from; generators of your own (``torch.Generator``) are not in it.

    Returns:
        Tensors, numbers, lists and tuples, as :func:`save_checkpoint` takes them.
    """
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
    }
    if numpy := sys.modules.get("numpy"):  # no dependency of ours
        name, keys, *rest = numpy.random.get_state()
        state["numpy"] = [name, keys.tolist(), *rest]
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put the generators back to where :func:`random_state` found them.

    CUDA devices that are not there any more are left out.

    Raises:
        ValueError: ``state`` is not what :func:`random_state` returned.
    """
    try:
        before = random_state()
        try:
            _set(state)
        except BaseException:
            _set(before)
            raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"this is not what random_state() returned: {error!r}") from error


def _set(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available():
        for device, value in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(value.cpu(), device)
    random.setstate(_tuples(state["python"]))
    if "numpy" in state:
        import numpy

        numpy.random.set_state(tuple(state["numpy"]))


def _tuples(value: Any) -> Any:
    """A checkpoint that has been JSON in between has lists for tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


@contextmanager
def randomness_kept(device: torch.device | None = None) -> Iterator[None]:
    """Put back where the generators of Python, NumPy and torch are (torch's: CPU and device)."""
    numpy = sys.modules.get("numpy")
    python, of_numpy = random.getstate(), numpy and numpy.random.get_state()
    try:
        with torch.random.fork_rng([device] if device and device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(of_numpy)
