"""The wrapper's own part of a state dict, under a key that other optimizers ignore."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .history import History, StageRecord

KEY = "fast_forward"
# Version 2 added what calibration keeps; version 1 is read as if there was none.
_VERSION = 2
_READABLE = (1, 2)


class Part(NamedTuple):
    """What a checkpoint holds besides the wrapped optimizer's part and the counters in it.

    Attributes:
        history: the stages so far.
        window: the iterates since the last stage, if the learning rate was calibrated.
        val_fn: the state of a ``val_fn`` that takes other examples at each stage.
    """

    history: History
    window: Mapping[str, Any] | None = None
    val_fn: Mapping[str, Any] | None = None


def write_part(part: Part) -> dict[str, Any]:
    """The part in tensors, plain numbers, lists and dicts."""
    written = {"version": _VERSION, "history": part.history.state_dict()}
    optional = {"window": part.window, "val_fn": part.val_fn}
    return written | {name: value for name, value in optional.items() if value is not None}


def read_part(part: Any) -> Part:
    """The inverse of :func:`write_part`; of None, an empty one.

    Raises:
        ValueError: it is damaged or of a newer version.
    """
    if part is None:
        return Part(History())
    if (
        not isinstance(part, Mapping)
        or not isinstance(part.get("history"), list)
        or not isinstance(part.get("window", {}), Mapping)
        or not isinstance(part.get("val_fn", {}), Mapping)
    ):
        raise ValueError(
            f"the {KEY!r} part of the state dict is damaged: expected a version and a history, "
            f"got {part!r}; remove it to load the wrapped optimizer's part alone"
        )
    if part.get("version") not in _READABLE:
        raise ValueError(
            f"the {KEY!r} part of the state dict has version {part.get('version')!r}, this "
            f"release reads versions {_READABLE[0]} to {_READABLE[-1]}; update fastforward-optim, "
            "or remove that part to load the wrapped optimizer's part alone"
        )
    history = History(StageRecord.from_dict(record) for record in part["history"])
    return Part(history, part.get("window"), part.get("val_fn"))


def has_state(val_fn: object) -> bool:
    """Whether ``val_fn`` goes on from stage to stage, and can be saved."""
    return all(hasattr(val_fn, name) for name in ("new_stage", "state_dict", "load_state_dict"))
