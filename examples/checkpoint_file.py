"""Checkpoint files that are whole or not there: copy this file beside your script.

``torch.save`` writes into the file that is there, so that a process that is killed meanwhile leaves
half a checkpoint, and the last good one is gone. ``save_checkpoint`` writes beside it, flushes the
bytes to the disk and renames. ``torch.load`` does not compare check sums, so that a bit that has
changed on the disk becomes a weight. ``load_checkpoint`` does, and runs no code from the file.

A killed process leaves a whole checkpoint on every system, and a power cut on Linux. On macOS and
Windows, a power cut can lose what has not reached the disk, the new name included.

``resume.py`` is a loop that uses them.
"""

from __future__ import annotations

import os
import random
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch


def save_checkpoint(path: str | os.PathLike[str], checkpoint: Mapping[str, Any]) -> None:
    """Save a checkpoint, so that ``path`` always holds a whole one: the new one, or the last.

    Where several processes train, call it on one of them.

    Args:
        path: of the file, in a folder that exists.
        checkpoint: tensors, numbers, strings, lists and dicts, such as state dicts and
            :func:`random_state`.
    """
    with replacing(path) as file:
        torch.save(dict(checkpoint), file)


def load_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """Load a checkpoint. Raise ``ValueError`` if its file is cut off or damaged.

    A file made to deceive is left to torch: an old one (2.7, but not 2.13) believes a file that
    calls a tensor larger than its data, and reads beyond them.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"the checkpoint {path} is cut off or damaged: {error}") from error
    if damaged is not None:
        raise ValueError(f"the checkpoint {path} is damaged: the check sum of {damaged} is wrong")
    checkpoint: dict[str, Any] = torch.load(
        path,
        map_location=map_location,
        weights_only=True,
        mmap=False,  # Windows cannot replace a file that is mapped
    )
    return checkpoint


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Yield a file that takes the place of ``path`` at the end, or not at all."""
    path = Path(os.path.realpath(path))  # of a link, the file that it leads to
    temporary = path.with_name(f".{path.name}.tmp")  # the next call replaces what a kill leaves
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # Windows does not delete what is open elsewhere
            temporary.unlink()
        raise
    with suppress(OSError):  # not all systems can open folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def random_state() -> dict[str, Any]:
    """Return the state of torch's, NumPy's and Python's random number generators.

    Of torch, those of the CPU and of each CUDA device, which dropout and the order of a
    ``DataLoader`` come from. Generators of your own (``torch.Generator``) are not included.
    """
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
    }
    if numpy := sys.modules.get("numpy"):
        name, keys, *rest = numpy.random.get_state()
        state["numpy"] = [name, keys.tolist(), *rest]
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put the generators back to where :func:`random_state` found them."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for device, value in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(value, device)
    random.setstate(state["python"])
    if "numpy" in state:
        import numpy

        numpy.random.set_state(tuple(state["numpy"]))
