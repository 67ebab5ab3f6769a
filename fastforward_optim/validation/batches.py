"""Batches of a validation set: check them, move them to a device, and group rows by length."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# torch.nn.functional.cross_entropy and transformers skip labels of this value.
IGNORED = -100

# Round lengths up to a multiple of this: it suits matrix units, and gives fewer distinct shapes.
_MULTIPLE = 8


def check_batches(batches: list[Any]) -> None:
    """Check that all batches are mappings, and that some label counts.

    Raises:
        TypeError: a batch is not a mapping, or a value in it has the wrong type.
        ValueError: no label counts.
    """
    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise TypeError(
                "a batch must be a mapping from argument names to tensors, got "
                f"{type(batch).__name__}; for other batches pass forward=function of "
                "(model, batch) that returns (loss, weight)"
            )
        for name, value in batch.items():
            _check_value(f"batches[{index}][{name!r}]", name, value)
    if sum(number_of_labels(batch, first=True) for batch in batches) == 0:
        raise ValueError(
            f"all labels in batches are {IGNORED}, so no loss is defined; check the collator or "
            "the truncation that made them"
        )


def _check_value(where: str, name: str, value: Any) -> None:
    """Raise ``TypeError`` early, and more clearly, for values that would fail in the forward."""
    if isinstance(value, list | tuple) and value and _is_numbers(value):
        raise TypeError(
            f"{where} is a {type(value).__name__} of numbers, expected a tensor: make batches with "
            "a collator, or torch.tensor(...)"
        )
    if not isinstance(value, Tensor):
        return
    if name == "labels" and value.dtype in (torch.int8, torch.int16, torch.int32, torch.uint8):
        raise TypeError(f"{where} has dtype {value.dtype}, a cross-entropy needs int64: .long()")
    if name.endswith("_ids") and value.is_floating_point():
        raise TypeError(f"{where} has dtype {value.dtype}, indices must be integers: .long()")


def _is_numbers(value: Any) -> bool:
    """Return True if the first item, at any depth, is a number."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, int | float)


def describe(batch: Any) -> str:
    """Describe a batch in one line: its names, dtypes and shapes."""
    items = batch.items() if isinstance(batch, Mapping) else [("batch", batch)]
    return ", ".join(
        f"{name}: {value.dtype} {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else f"{name}: {type(value).__name__}"
        for name, value in items
    )


def number_of_labels(batch: Mapping[str, Any], *, first: bool) -> int:
    """Return the number of labels that count, with or without the first label of each row.

    Only token labels, of shape (rows, length), have such a first label. Without labels, return the
    number of rows.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        sizes = [value.shape[0] for value in batch.values() if isinstance(value, Tensor)]
        return sizes[0] if sizes else 1
    if labels.is_floating_point():  # in a regression every number counts
        return labels.numel()
    if not first and labels.dim() == 2:
        labels = labels[:, 1:]
    return int((labels != IGNORED).sum())


def digest(batches: list[Any]) -> bytes:
    """Return a digest that is equal on ranks with equal batches."""
    data = io.BytesIO()
    try:
        torch.save(to_device(batches, torch.device("cpu")), data)
    except Exception:  # batches that cannot be saved cannot be compared: treat them as different
        return os.urandom(16)
    return hashlib.blake2b(data.getbuffer(), digest_size=16).digest()


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter; the CPU if it has none."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def to_device(value: Any, device: torch.device) -> Any:
    """Move every tensor in ``value`` to ``device``. Tensors already there are not copied."""
    return map_tensors(lambda tensor: tensor.to(device), value)


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply ``function`` to every tensor in nested mappings, lists and tuples."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, item) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(function, item) for item in value)
    return value


def group_by_length(
    batches: Sequence[Mapping[str, Any]], per_stage: int
) -> list[dict[str, Tensor]]:
    """Regroup the rows of each stage by length, to reduce padding.

    The number and sizes of the batches do not change, and rows stay in their stage.

    Args:
        batches: batches of tensors, each with an ``attention_mask`` of shape (batch, length) that
            is zero at padding. Tensors with the mask's first two dimensions in every batch are cut
            to the longest row of the new batch; the others must have one entry per row.
        per_stage: number of batches in a stage.

    Raises:
        ValueError: the batches are not of this form, or labels count where the mask is zero.
    """
    if len(batches) % per_stage:
        raise ValueError(
            f"group_by_length keeps the rows of a stage together, and {len(batches)} batches are "
            f"not a multiple of batches_per_stage ({per_stage}); pass a multiple"
        )
    for batch in batches:
        _check_mask(batch)
        if batch.keys() != batches[0].keys():
            raise ValueError(
                f"group_by_length cannot put rows together that have other values: "
                f"{sorted(batches[0])} and {sorted(batch)}; give each batch the same names"
            )
    by_token = _by_token(batches)
    padding = _padding(batches, by_token)
    if not padding:  # no row is padded
        return [dict(batch) for batch in batches]
    grouped = []
    for first in range(0, len(batches), per_stage):
        stage = batches[first : first + per_stage]
        rows = sorted((row for batch in stage for row in _rows(batch, by_token)), key=_length)
        for size in [len(batch["attention_mask"]) for batch in stage]:
            grouped.append(_join(rows[:size], padding))
            rows = rows[size:]
    return grouped


def _check_mask(batch: Mapping[str, Any]) -> None:
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise ValueError(
            "group_by_length needs an attention_mask of shape (batch, length) in each batch, "
            "which tells where there is padding; leave it out for batches without padding"
        )
    rows = mask.shape[0]
    if rows == 0:
        raise ValueError("group_by_length got a batch without rows; leave it out")
    for name, value in batch.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != rows:
            raise ValueError(
                f"group_by_length cannot regroup {name!r}: each value of a batch must be a tensor "
                f"with one entry for each row ({rows} in this one)"
            )
    labels = batch.get("labels")
    if (
        isinstance(labels, Tensor)
        and labels.shape == mask.shape
        and bool(((labels != IGNORED) & (mask == 0)).any())
    ):
        raise ValueError(
            f"labels count where attention_mask is zero: set them to {IGNORED} there, or the "
            "loss is that of the padding too"
        )


def _by_token(batches: Sequence[Mapping[str, Tensor]]) -> list[str]:
    """Return the names of the values that have one entry per token in every batch."""
    return [
        name
        for name in batches[0]
        if all(batch[name].shape[:2] == batch["attention_mask"].shape for batch in batches)
    ]


def _padding(batches: Sequence[Mapping[str, Tensor]], by_token: Sequence[str]) -> dict[str, Tensor]:
    """Return the values of a padded token by name; empty if no token is padded."""
    for batch in batches:
        padded = (batch["attention_mask"] == 0).nonzero()
        if len(padded):
            row, column = padded[-1].tolist()
            return {name: batch[name][row, column] for name in by_token}
    return {}


def _rows(batch: Mapping[str, Tensor], by_token: Sequence[str]) -> list[dict[str, Tensor]]:
    """Split a batch into rows, without the padding at their ends."""
    last = [int(row.nonzero().max()) + 1 if row.any() else 1 for row in batch["attention_mask"]]
    return [
        {
            name: value[row, :length] if name in by_token else value[row]
            for name, value in batch.items()
        }
        for row, length in enumerate(last)
    ]


def _length(row: Mapping[str, Tensor]) -> int:
    return len(row["attention_mask"])


def _join(rows: list[dict[str, Tensor]], padding: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join rows into one batch, padded at their ends to the length of the longest."""
    longest = -(-max(map(_length, rows)) // _MULTIPLE) * _MULTIPLE

    def column(name: str) -> Tensor:
        values = [row[name] for row in rows]
        if name not in padding:
            return torch.stack(values)
        missing = [longest - len(value) for value in values]
        ends = [
            padding[name].expand(count, *value.shape[1:])
            for value, count in zip(values, missing, strict=True)
        ]
        return torch.stack([torch.cat(pair) for pair in zip(values, ends, strict=True)])

    return {name: column(name) for name in rows[0]}
