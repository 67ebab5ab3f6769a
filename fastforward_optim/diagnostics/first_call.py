"""Try a ``val_fn`` before the first step: it must work, be repeatable, and keep modules' modes."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from torch import nn

from ..search.line_search import FLAT
from .callers import level_of_the_caller


def check_first_call(val_fn: Callable[[], Any], measure: Callable[[], float]) -> None:
    """Call a ``val_fn`` twice before the first step, and warn if the two losses differ.

    Also warn, and restore the modes, if it leaves a module in another train or eval mode.

    Args:
        val_fn: the function that the user passed.
        measure: calls ``val_fn``, from the same state of torch's random number generators each
            time.

    Raises:
        Exception: whatever ``val_fn`` raises, with a note that ``FastForward`` called it.
    """
    modes = [(module, module.training) for module in _modules_of(val_fn)]
    try:
        first, second = measure(), measure()
    except Exception as error:
        error.add_note("raised in val_fn, which FastForward tries before the first step")
        raise
    changed = [(module, was) for module, was in modes if module.training != was]
    for module, was in changed:  # otherwise the next steps would run in the wrong mode
        module.training = was
    if changed:
        module, was = changed[0]
        now, then = ("eval", "train") if was else ("train", "eval")
        warnings.warn(
            f"val_fn leaves {type(module).__name__} in {now} mode, which it found in {then} mode: "
            f"after each stage training would go on in it; call model.{then}() at the end of "
            "val_fn, or pass ValidationLoss(model, batches)",
            stacklevel=level_of_the_caller(),
        )
    if math.isfinite(first) and not math.isclose(first, second, rel_tol=FLAT):
        warnings.warn(
            f"val_fn returned {first:.6g} and then {second:.6g} at the same weights, so that a "
            "stage would choose by chance: each call must measure the same examples (in a list; an "
            "iterator is used up), with random numbers from torch's own generators, or from one "
            "that val_fn seeds at each call",
            stacklevel=level_of_the_caller(),
        )


def _modules_of(val_fn: Any) -> list[nn.Module]:
    """Return the modules that a function visibly uses, with their submodules."""
    found: dict[int, nn.Module] = {}
    for value in _used_by(val_fn):
        for item in (value, *_attributes(value)):
            if isinstance(item, nn.Module):
                found.update((id(module), module) for module in item.modules())
    return list(found.values())


def _used_by(function: Any) -> Iterator[Any]:
    """Yield the objects that a function, method, partial or callable object refers to."""
    if isinstance(function, functools.partial):
        yield from (*function.args, *function.keywords.values())
        function = function.func
    if inspect.ismethod(function):
        yield function.__self__
        function = function.__func__
    if not inspect.isfunction(function):
        yield function
        return
    function = inspect.unwrap(function)  # decorated with torch.no_grad(), for example
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # the variable is unbound
            yield cell.cell_contents
    names = function.__code__.co_names
    yield from (function.__globals__[name] for name in names if name in function.__globals__)


def _attributes(value: Any) -> list[Any]:
    attributes = getattr(value, "__dict__", None)
    plain = isinstance(attributes, Mapping) and not inspect.ismodule(value)
    return list(attributes.values()) if plain and attributes is not None else []
