"""Loading a state dict into an optimizer: all of it or nothing, and none that cannot work.

Knows ``torch.optim.Optimizer``. Knows nothing of Fast Forward. ``Optimizer.load_state_dict`` itself
compares the numbers of groups and parameters only: the state of another model, or of another
optimizer, would be found out at the next step, or never.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..saved_numbers import is_finite, is_real, number_of, shortened

# What is raised by code that finds something else than it expects.
_SURPRISES = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)
_LONGEST_REASON = 500
# Schedules that end at a rate of zero may end this far below it, by rounding.
_ROUNDING = 1e-9
# Others may be infinite, which is no limit, or are written by the steps of a run that blew up.
_FINITE = {"betas", "eps", "weight_decay", "momentum", "dampening"}
# Torch's state dicts have these.
_KEYS = {"state", "param_groups"}


def as_dict(state_dict: Any) -> dict[str, Any]:
    """A copy of a state dict, which must be a mapping."""
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"state_dict must be a dict, got {type(state_dict).__name__}")
    return dict(state_dict)


def load_whole(optimizer: Optimizer, state_dict: Mapping[str, Any], saved_by: str | None) -> None:
    """Load a state dict; what is raised is a ``ValueError`` that says what is wrong.

    To be called inside :func:`unchanged_on_error`: whether it can work is seen once it is loaded,
    since hooks of the optimizer may change it on the way.

    Args:
        optimizer: where to.
        state_dict: as ``optimizer.state_dict()`` returns it.
        saved_by: the class of the optimizer that it was saved from, if that is known.
    """
    name = type(optimizer).__name__
    missing = _missing(optimizer, state_dict)
    try:
        optimizer.load_state_dict(dict(state_dict))
        _check_numbers(optimizer)
        if _is_torchs(optimizer):
            _check_options(optimizer)
            _check_tensors(optimizer)
        tried = _try_steps(optimizer)
    except _SURPRISES as error:
        origin = f", which was saved from {saved_by}" if saved_by not in (None, name) else ""
        lacks = f"; its param groups lack {', '.join(missing)}" if missing else ""
        reason = str(error) if type(error) is ValueError else repr(error)
        if len(reason) > _LONGEST_REASON:  # torch's may list all that it can run
            reason = reason[:_LONGEST_REASON] + "..."
        raise ValueError(
            f"{name} cannot go on from this state dict{origin}: {reason}{lacks}"
        ) from error
    if missing and not tried and saved_by != name:
        raise ValueError(
            f"{name} cannot go on from this state dict: its param groups lack "
            f"{', '.join(missing)}; it was saved from {saved_by or 'another optimizer'}"
        )


def shapes_of(param_groups: list[dict[str, Any]]) -> list[list[list[int]]]:
    """The shapes of the parameters in each group; of a sharded one the whole's."""
    return [[list(p.shape) for p in group["params"]] for group in param_groups]


def check_shapes(saved: list[list[list[int]]] | None, optimizer: Optimizer) -> None:
    """Whether a state dict is of parameters like these: a ``ValueError`` if not."""
    # Wrappers of other packages have no such hooks.
    hooks = getattr(optimizer, "_optimizer_load_state_dict_pre_hooks", None)
    if saved is None or hooks:
        return  # hooks may put other parameters in their place
    here = shapes_of(optimizer.param_groups)
    counts, expected = list(map(len, saved)), list(map(len, here))
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
                    f"shape {shortened(found)} there and {shape} here; load it into an optimizer "
                    "of the same model and adapter"
                )


@contextmanager
def unchanged_on_error(optimizer: Optimizer) -> Iterator[None]:
    """If anything is raised, an optimizer and those that it wraps are put back to what they were.

    Costs no copies of tensors: to load is to replace them. Those that an optimizer copies into are
    not put back.
    """
    put_back = _remember(optimizer)
    try:
        yield
    except BaseException:
        put_back()
        raise


def _remember(optimizer: Optimizer) -> Callable[[], None]:
    attributes = dict(optimizer.__dict__)
    # A wrapper's groups and state are those of the optimizer in it.
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


def _missing(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> list[str]:
    """The options that the optimizer has and a group of the state dict has not."""
    if not set(state_dict) >= _KEYS and not _is_torchs(optimizer):
        own = set(optimizer.state_dict())
        if not own >= _KEYS:  # a wrapper of another package, whose state dicts have another form
            if lacking := sorted(map(str, own - set(state_dict))):
                raise ValueError(
                    f"this is no state dict of {type(optimizer).__name__}: it has no "
                    f"{', '.join(lacking)}"
                )
            return []
    groups = state_dict.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        raise ValueError(
            "this is no optimizer's state dict: it has no list of dicts under 'param_groups'"
        )
    if not isinstance(state_dict.get("state"), Mapping):
        raise ValueError("this is no optimizer's state dict: it has no dict under 'state'")
    return sorted(key for key in optimizer.defaults if any(key not in group for group in groups))


def _check_numbers(optimizer: Optimizer) -> None:
    """The numbers that each optimizer has: learning rates, and steps taken."""
    for index, group in enumerate(optimizer.param_groups):
        lr = group.get("lr")
        if lr is not None and not (is_finite(number_of(lr)) and number_of(lr) >= -_ROUNDING):
            raise ValueError(f"the learning rate of group {index} is {shortened(lr)}")
        for name in _FINITE & set(group):
            if not all(map(is_finite, _numbers(group[name]))):
                raise ValueError(f"{name} of group {index} is {shortened(group[name])}")
    for key, state in optimizer.state.items():
        if not isinstance(key, Tensor):
            continue
        if not isinstance(state, Mapping):
            raise ValueError(f"the state of a parameter is {type(state).__name__} and no dict")
        step = number_of(state.get("step", 0))
        if not is_finite(step) or step < 0:
            raise ValueError(f"a parameter has taken {shortened(step)} steps")


def _numbers(value: Any) -> list[Any]:
    """The numbers that an option is, or that it is a sequence of."""
    values = value if isinstance(value, list | tuple) else [value]
    return [number for number in map(number_of, values) if is_real(number)]


def _is_torchs(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.startswith("torch.optim.")


def _check_options(optimizer: Optimizer) -> None:
    """Whether the constructor, which has limits of its own, takes the numbers among the options."""
    kind: Any = type(optimizer)
    known = inspect.signature(kind).parameters.keys() - {"params", "lr"}
    for index, group in enumerate(optimizer.param_groups):
        options = {name: group[name] for name in known & set(group) if _numbers(group[name])}
        kind([torch.zeros(1, 1)], **options)
        nan = [name for name, value in options.items() if any(x != x for x in _numbers(value))]
        if nan:
            raise ValueError(f"{nan[0]} of group {index} is {shortened(group[nan[0]])}")
        captured = group.get("capturable") and not optimizer.defaults.get("capturable", True)
        if captured and any(p.device.type == "cpu" for p in group["params"]):
            raise ValueError(
                f"capturable of group {index} is {shortened(group['capturable'])}, but its "
                "parameters are on a CPU"
            )


def _check_tensors(optimizer: Optimizer) -> None:
    """Whether the state of parameters that are dense is: steps write into it."""
    dense = [p for p in optimizer.state if isinstance(p, Tensor) and p.layout == torch.strided]
    for p in dense:
        for name, value in optimizer.state[p].items():
            if isinstance(value, Tensor) and (value.layout != torch.strided or _is_expanded(value)):
                raise ValueError(f"{name} of a parameter is sparse or expanded")


def _is_expanded(tensor: Tensor) -> bool:
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return any(stride == 0 and size > 1 for size, stride in sizes)


def _try_steps(optimizer: Optimizer) -> bool:
    """Try what the next steps do with the state, on tensors without data ("meta").

    That tells for certain what no list of names and shapes would: whether anything is missing or
    does not fit. For torch's own optimizers only: others may do more in a step than they say.

    Returns:
        Whether it could be tried. If it cannot work, the optimizer's own error is raised.
    """
    if not _is_torchs(optimizer):
        return False
    try:
        _twin(optimizer, {}, optimizer.defaults)()
    except Exception:  # it needs data, a closure or sparse gradients: nothing is known then
        return False
    _twin(optimizer, optimizer.state)()
    return True


def _twin(
    optimizer: Optimizer, state: Mapping[Any, Any], options: Mapping[str, Any] | None = None
) -> Callable[[], None]:
    """Two steps of an optimizer with this state, of which nothing is seen outside.

    Args:
        optimizer: of which class.
        state: of its parameters.
        options: those of each group, if they are not to be the optimizer's.
    """
    twin = type(optimizer).__new__(type(optimizer))
    states: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
    groups = []
    for group in optimizer.param_groups:
        params = []
        for p in group["params"]:
            params.append(_meta(p))
            params[-1].grad = _meta(p)
            if p in state:
                states[params[-1]] = {key: _meta(value) for key, value in state[p].items()}
        # The plain implementation: the others want the parameters' own device.
        plain = {"foreach": False, "fused": False, "capturable": False}
        own = {key: _meta(value) for key, value in (options or group).items()}
        changed = {key: value for key, value in plain.items() if key in own}
        groups.append({**own, **changed, "params": params})
    content = {"defaults": optimizer.defaults, "state": states, "param_groups": groups}
    Optimizer.__setstate__(twin, content)
    # Without the wrapper that calls the hooks for all optimizers.
    step = getattr(type(twin).step, "__wrapped__", type(twin).step)

    def two_steps() -> None:
        for _ in range(2):
            step(twin)

    return two_steps


def _meta(value: Any) -> Any:
    """A tensor without data; of numbers, which decide what is done, a copy."""
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 0:
        return value.detach().cpu().clone()
    return torch.empty(value.shape, dtype=value.dtype, device="meta")
