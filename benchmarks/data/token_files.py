"""Files with the blocks of a task, for machines without its texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from .blocks import IGNORED, Blocks, Splits
from .tasks import Task


def save_tokens(folder: Path, task: Task, model: str, splits: Splits) -> Path:
    """Write the blocks of a task, tokenized for ``model``, and return the path of the file."""
    arrays = {"model": np.array(model), "source": np.array(task.source)}
    for name, blocks in splits._asdict().items():
        arrays[name] = blocks.input_ids.numpy().astype(np.int32)
        arrays[f"{name}_counts"] = (blocks.labels != IGNORED).numpy()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{task.name}.npz"
    np.savez_compressed(path, **arrays)
    return path


def load_tokens(
    folder: Path, task: str, model: str, *, block: int, validation: int, test: int, train: int
) -> tuple[Splits, str]:
    """Read the blocks of a task, with at most ``train`` to train on, and the credit of its source.

    Raises:
        SystemExit: the file is missing, or was written with other settings.
    """
    path = folder / f"{task}.npz"
    if not path.is_file():
        raise SystemExit(f"{path} is missing: write it with `python -m benchmarks tokens`")
    with np.load(path) as arrays:
        parts = {name: _blocks(arrays, name) for name in Splits._fields}
        made_for, source = str(arrays["model"]), str(arrays["source"])
    found = {
        "model": made_for,
        "block": parts["train"].input_ids.shape[1],
        "pool": parts["validation"].rows,
        "test": parts["test"].rows,
    }
    expected = {"model": model, "block": block, "pool": validation, "test": test}
    differences = [
        f"{name} {found[name]} instead of {value}"
        for name, value in expected.items()
        if found[name] != value
    ]
    if differences:
        raise SystemExit(f"{path} was written with other settings: {'; '.join(differences)}")
    splits = Splits(parts["train"].select(slice(train)), parts["validation"], parts["test"])
    return splits, source


def _blocks(arrays: Any, name: str) -> Blocks:
    ids = torch.from_numpy(arrays[name]).long()
    return Blocks(ids, ids.where(torch.from_numpy(arrays[f"{name}_counts"]), IGNORED))
