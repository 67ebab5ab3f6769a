"""Batches of a validation set: what is in them, on which device, and grouped by length."""

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

# Lengths are rounded up to a multiple of it: matrix units like that, and there are fewer shapes.
_MULTIPLE = 8


def check_batches(batches: list[Any]) -> None:
    """Check that these are mappings, and that there are labels that count.

    Raises:
        TypeError: a batch is not a mapping.
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
    """Raise for what torch would refuse only in the first forward, in words of its own."""
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
    """Whether the first item, at any depth, is a number."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, int | float)


def describe(batch: Any) -> str:
    """A batch in one line: its names, dtypes and shapes."""
    items = batch.items() if isinstance(batch, Mapping) else [("batch", batch)]
    return ", ".join(
        f"{name}: {value.dtype} {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else f"{name}: {type(value).__name__}"
        for name, value in items
    )


def number_of_labels(batch: Mapping[str, Any], *, first: bool) -> int:
    """Labels that count, with or without the first of each row of token labels."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        sizes = [value.shape[0] for value in batch.values() if isinstance(value, Tensor)]
        return sizes[0] if sizes else 1
    if labels.is_floating_point():  # of a regression, where every number counts
        return labels.numel()
    if not first and labels.dim() == 2:
        labels = labels[:, 1:]
    return int((labels != IGNORED).sum())


def digest(batches: list[Any]) -> bytes:
    """The same on two ranks if they have the same batches."""
    data = io.BytesIO()
    try:
        torch.save(to_device(batches, torch.device("cpu")), data)
    except Exception:  # what cannot be saved cannot be compared: as if it was another
        return os.urandom(16)
    return hashlib.blake2b(data.getbuffer(), digest_size=16).digest()


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def to_device(value: Any, device: torch.device) -> Any:
    """``value`` with every tensor in it on ``device``; tensors that are there are not copied."""
    return map_tensors(lambda tensor: tensor.to(device), value)


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """``value`` with ``function`` of every tensor in its mappings, lists and tuples."""
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
    """The same rows in as many batches, those of one length together, without needless padding.

    Rows stay in the stage that they are in.

    Args:
        batches: of tensors, with an ``attention_mask`` (batch x length) that is zero where there
            is padding. What has the mask's first two dimensions in every batch is cut to the
            longest row of its new batch; other tensors have one entry for each row.
        per_stage: how many of the batches belong to one stage.

    Raises:
        ValueError: they are not such batches, or labels count where the mask is zero.
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
    if not padding:  # then no row is padded
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
    """The names of what has an entry for each token, in every batch."""
    return [
        name
        for name in batches[0]
        if all(batch[name].shape[:2] == batch["attention_mask"].shape for batch in batches)
    ]


def _padding(batches: Sequence[Mapping[str, Tensor]], by_token: Sequence[str]) -> dict[str, Tensor]:
    """What the values of a padded token are; empty if there is none."""
    for batch in batches:
        padded = (batch["attention_mask"] == 0).nonzero()
        if len(padded):
            row, column = padded[-1].tolist()
            return {name: batch[name][row, column] for name in by_token}
    return {}


def _rows(batch: Mapping[str, Tensor], by_token: Sequence[str]) -> list[dict[str, Tensor]]:
    """Each row by itself, without the padding at its end."""
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
    """One batch of rows, padded at their ends to the longest of them."""
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
