"""The wrapper's own part of a state dict, under a key that other optimizers ignore."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

from ..history import History, StageRecord
from ..saved_numbers import shortened
from ..validation.base import ValidationFunction

KEY = "fast_forward"
# Version 2 added what calibration keeps, version 3 whose state it is; older ones are read as if
# there was none. Version 4 keeps the iterates of another calibration, version 5 no times.
_VERSION = 5
_READABLE = (1, 2, 3, 4, 5)


class Part(NamedTuple):
    """What a checkpoint holds besides the wrapped optimizer's part and the counters in it.

    Attributes:
        history: the stages so far.
        iterates: their means, if the learning rate was calibrated.
        val_fn: the state of a ``val_fn`` that takes other examples at each stage.
        optimizer: the class of the wrapped optimizer.
        shapes: of the parameters in each group; of a sharded one the whole's.
    """

    history: History
    iterates: Mapping[str, Any] | None = None
    val_fn: Mapping[str, Any] | None = None
    optimizer: str | None = None
    shapes: list[list[list[int]]] | None = None


def write_part(part: Part) -> dict[str, Any]:
    """The part in tensors, plain numbers, lists and dicts."""
    written = part._asdict() | {"version": _VERSION, "history": part.history.state_dict()}
    return {name: value for name, value in written.items() if value is not None}


def read_part(part: Any) -> Part:
    """The inverse of :func:`write_part`; of None, an empty one.

    Raises:
        ValueError: it is damaged or of a newer version.
    """
    if part is None:
        return Part(History())
    damaged = f"the {KEY!r} part of the state dict is damaged"
    remedy = "remove it to load the wrapped optimizer's part alone"
    if not isinstance(part, Mapping):
        raise ValueError(f"{damaged}: expected a dict, got {shortened(part)}; {remedy}")
    for name in _KINDS:
        value = part.get(name)
        if not _is_what(name, value):
            raise ValueError(f"{damaged}: its {name} is {shortened(value)}; {remedy}")
    version = part.get("version")
    if type(version) is not int or version not in _READABLE:
        raise ValueError(
            f"the {KEY!r} part of the state dict has version {shortened(version)}, this "
            f"release reads versions {_READABLE[0]} to {_READABLE[-1]}; update fastforward-optim, "
            "or remove that part to load the wrapped optimizer's part alone"
        )
    history = History(StageRecord.from_dict(record) for record in part["history"])
    return Part(history, *(part.get(name) for name in Part._fields[1:]))


_KINDS: dict[str, type] = {
    "history": list,
    "iterates": Mapping,
    "val_fn": Mapping,
    "optimizer": str,
    "shapes": list,
}


def _is_what(name: str, value: Any) -> bool:
    """Whether a field is there as it should be; all but the history may be missing."""
    if value is None:
        return name != "history"
    if name == "shapes":
        return _are_shapes(value)
    return isinstance(value, _KINDS[name])


def _are_shapes(value: Any, depth: int = 3) -> bool:
    """Whether it is a list (of groups) of lists (of parameters) of lists of numbers."""
    if depth == 0:
        return type(value) is int
    return isinstance(value, list) and all(_are_shapes(item, depth - 1) for item in value)


@contextmanager
def kept_on_error(val_fn: ValidationFunction) -> Iterator[None]:
    """If anything is raised, a ``val_fn`` that has a state is put back to where it was."""
    before = deepcopy(val_fn.state_dict())
    try:
        yield
    except BaseException:
        if before is not None:
            val_fn.load_state_dict(before)
        raise
