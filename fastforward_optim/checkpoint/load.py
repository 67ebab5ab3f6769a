"""Load a state dict: all of it or nothing.

This module handles ``torch.optim.Optimizer``. ``Optimizer.load_state_dict`` itself only compares
the numbers of groups and parameters. The state of another model or optimizer would only be noticed
at the next step, or never.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..saved_numbers import is_finite, is_real, number_of, shortened
from ..validation.base import ValidationFunction

# Schedules that end at a rate of zero may end this far below zero, by rounding.
_ROUNDING = 1e-9
# Other options may be infinite, which means no limit.
_FINITE = ("betas", "eps", "weight_decay", "momentum", "dampening")
# State of torch's optimizers that has the shape of its parameter.
_LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg")
_KEYS = {"state", "param_groups"}


@contextmanager
def all_or_nothing(optimizer: Optimizer, val_fn: ValidationFunction) -> Iterator[None]:
    """Restore an optimizer, the optimizers that it wraps, and ``val_fn`` if anything is raised.

    It copies no tensors, because loading replaces them. Tensors that an optimizer of another
    library copies into are not restored.
    """
    put_back = _remember(optimizer)
    place = deepcopy(val_fn.state_dict())
    try:
        yield
    except BaseException:
        put_back()
        if place is not None:
            val_fn.load_state_dict(place)
        raise


def load_wrapped(optimizer: Optimizer, state_dict: Mapping[str, Any], saved_by: str | None) -> None:
    """Load a state dict of the wrapped optimizer.

    Call it inside :func:`all_or_nothing`: hooks of the optimizer may change the state dict on the
    way, so the checks run on the result.

    Args:
        optimizer: the optimizer to load into.
        state_dict: a state dict as ``optimizer.state_dict()`` returns it.
        saved_by: class name of the optimizer that saved it, if known.

    Raises:
        ValueError: the state dict is damaged, or of another optimizer.
    """
    name = type(optimizer).__name__
    _check_form(optimizer, state_dict)
    try:
        optimizer.load_state_dict(dict(state_dict))
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        _check_kind(optimizer, state_dict.get("param_groups"), saved_by)
        raise ValueError(f"{name} cannot load this state dict: {error!r}") from error
    # Torch's optimizers have now added the options that an older release did not save.
    _check_kind(optimizer, optimizer.param_groups, saved_by)
    for index, group in enumerate(optimizer.param_groups):
        _check_options(index, group)
    for p, state in optimizer.state.items():
        if isinstance(p, Tensor):
            _check_state(p, state, torchs=_is_torchs(optimizer))


def shapes_of(param_groups: list[dict[str, Any]]) -> list[list[list[int]]]:
    """Return the shapes of the parameters in each group; of sharded ones the global shapes."""
    return [[list(p.shape) for p in group["params"]] for group in param_groups]


def check_shapes(saved: list[list[list[int]]] | None, optimizer: Optimizer) -> None:
    """Raise ``ValueError`` if a state dict holds other parameters than the optimizer."""
    # Wrappers of other packages have no such hooks.
    hooks = getattr(optimizer, "_optimizer_load_state_dict_pre_hooks", None)
    if saved is None or hooks:
        return  # hooks may replace the parameters
    here = shapes_of(optimizer.param_groups)
    counts, expected = [len(group) for group in saved], [len(group) for group in here]
    if counts != expected:
        raise ValueError(
            f"the state dict is of another model: its param groups have {counts} parameters, "
            f"those of this optimizer {expected}"
        )
    for index, (theirs, ours) in enumerate(zip(saved, here, strict=True)):
        for place, (found, shape) in enumerate(zip(theirs, ours, strict=True)):
            if found != shape:
                raise ValueError(
                    f"the state dict is of another model: parameter {place} of group {index} has "
                    f"shape {found} there and {shape} here; load it into an optimizer of the same "
                    "model and adapter"
                )


def _remember(optimizer: Optimizer) -> Callable[[], None]:
    attributes = dict(optimizer.__dict__)
    # A wrapper shares its groups and state with the optimizer that it wraps.
    inner = [_remember(value) for value in attributes.values() if isinstance(value, Optimizer)]
    groups, state = optimizer.param_groups, optimizer.state
    contents = [(group, dict(group)) for group in groups]
    states = {key: dict(value) for key, value in state.items() if isinstance(value, dict)}
    entries = dict(state)

    def put_back() -> None:
        for restore in inner:
            restore()
        optimizer.__dict__.clear()
        optimizer.__dict__.update(attributes)
        groups[:] = [group for group, _ in contents]
        for group, content in contents:
            group.clear()
            group.update(content)
        state.clear()
        state.update(entries)
        for key, value in states.items():
            entries[key].clear()
            entries[key].update(value)

    return put_back


def _is_torchs(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.startswith("torch.optim.")


def _check_form(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if keys of the optimizer's own state dicts are missing."""
    if set(state_dict) >= _KEYS:
        return
    # State dicts of other packages' wrappers may have another form.
    own = _KEYS if _is_torchs(optimizer) else set(optimizer.state_dict())
    if missing := sorted(map(str, own - set(state_dict))):
        raise ValueError(
            f"this is not a state dict of {type(optimizer).__name__}: it has no "
            f"{', '.join(missing)}"
        )


def _check_kind(optimizer: Optimizer, groups: Any, saved_by: str | None) -> None:
    """Raise ``ValueError`` if the param groups are of an optimizer with other options."""
    kind, name = type(optimizer), type(optimizer).__name__
    if saved_by == name or not isinstance(groups, list):
        return
    refused = f"{name} cannot go on from this state dict"
    origin = f"it was saved from {saved_by or 'another optimizer'}"
    saved = [group for group in groups if isinstance(group, Mapping)]
    missing = sorted(key for key in optimizer.defaults if any(key not in group for group in saved))
    if missing:
        raise ValueError(f"{refused}: its param groups lack {', '.join(missing)}; {origin}")
    other = getattr(torch.optim, saved_by or "", None)
    related = isinstance(other, type) and (issubclass(kind, other) or issubclass(other, kind))
    if _is_torchs(optimizer) and other is not None and not related:
        raise ValueError(f"{refused}: {origin}")


def _check_options(index: int, group: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if the learning rate or another option is out of range."""
    lr = number_of(group.get("lr"))
    if lr is not None and not (is_finite(lr) and lr >= -_ROUNDING):
        raise ValueError(f"the learning rate of group {index} is {shortened(lr)}")
    for name in _FINITE:
        option = group.get(name)
        values = option if isinstance(option, list | tuple) else [option]
        numbers = [number for number in map(number_of, values) if is_real(number)]
        if not all(map(is_finite, numbers)):
            raise ValueError(f"{name} of group {index} is {shortened(option)}")


def _check_state(p: Tensor, state: Any, *, torchs: bool) -> None:
    """Raise ``ValueError`` if the state does not fit its parameter."""
    if not isinstance(state, Mapping):
        raise ValueError(f"the state of a parameter is a {type(state).__name__}, expected a dict")
    step = number_of(state.get("step", 0))
    if not is_finite(step) or step < 0:
        raise ValueError(f"a parameter has taken {shortened(step)} steps")
    for name in _LIKE_PARAMETER if torchs else ():
        value = state.get(name)
        if isinstance(value, Tensor) and value.shape != p.shape:
            raise ValueError(
                f"the state dict is of another model: {name} has shape {list(value.shape)}, its "
                f"parameter {list(p.shape)}"
            )
