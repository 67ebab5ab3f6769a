"""Whether an optimizer takes jumps of its weights back.

Some optimizers continue from weights that they keep themselves: slow weights, an average, the
starting point, a copy in more bits. Their next steps undo what a stage did. Names differ between
packages, so this module looks at behaviour: before the run, on a small replica of the optimizer
(:func:`pulls_back`); and in the run, after the first long jumps (:class:`Watch`).

Knows ``torch.optim.Optimizer``. Knows nothing of Fast Forward.
"""

from __future__ import annotations

import inspect
import io
import logging
import math
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as of_torch

from ..random_state import randomness_kept

# Steps before and after the jump of a replica: some optimizers take their copy late, and some go
# back every five or ten steps.
_BEFORE, _AFTER = 16, 32
# At this rate a replica's steps are negligible beside the jump, unless it finds their size itself.
_RATE = 1e-7
# An optimizer pulls back if less of the jump is left at the end. Others keep all, up to rounding.
_KEPT = 0.9
# Seconds after which a replica is given up. Most take some milliseconds.
_SECONDS = 2.0
# Groups with other options than these are not tried.
_MOST_KINDS = 8
# For what a constructor asks for and an optimizer does not keep: mostly the steps of the run.
_UNKNOWN = 1000
# Jumps watched in a run, and steps for each. A jump is undone if less than this part is left, after
# a deduction for steps that are so many times longer than before.
_JUMPS, _STEPS, _LEFT, _LONGER = 3, 12, 0.7, 2.0
# Hooks that are for all optimizers.
_HOOKS: tuple[Any, ...] = (
    of_torch._global_optimizer_pre_hooks,
    of_torch._global_optimizer_post_hooks,
)
_PLAIN = (bool, int, float, str, type(None), type, torch.dtype)


def pulls_back(optimizer: Optimizer) -> Optimizer | None:
    """Return the optimizer that pulls its weights back: this one or one that it holds, or None.

    Replicas take some steps on the CPU, without side effects. An optimizer that cannot be
    replicated, or whose replica fails, counts as one that does not pull back. Torch's own
    optimizers are not tried.
    """
    for found in _with_held(optimizer):
        if not _is_torchs(found) and not _may_communicate(found):
            kept = _kept_by_replica(found)
            if kept is not None and kept < _KEPT:
                return found
    return None


class Watch:
    """Sees whether the steps of a run take jumps of the weights back: of its first few jumps.

    Keeps the copy that a stage has made of the weights before its jump, until the next stage or for
    twelve steps. No part of a checkpoint, nor of a copy.
    """

    def __init__(self) -> None:
        self._jumps_left = _JUMPS
        self.stop()

    def __reduce__(self) -> tuple[type[Watch], tuple[()]]:
        return Watch, ()

    def stop(self) -> None:
        """Look at the present jump no more."""
        self._before: list[list[Tensor]] = []
        self._length, self._tau, self._steps = 0.0, 0.0, 0

    def jumped(
        self,
        present: Callable[[], list[list[Tensor]]],
        before: Callable[[], list[list[Tensor]]],
        tau: float,
    ) -> None:
        """The weights have been moved.

        Args:
            present: gives the tensors.
            before: gives copies of them from before the jump.
            tau: how many times longer the jump was than the last step.
        """
        self.stop()
        # Of a jump that is not much longer than the steps after it nothing could be told.
        if self._jumps_left and _LEFT * abs(tau) > _LONGER:
            self._jumps_left -= 1
            self._before, self._tau = before(), abs(tau)
            try:
                self._length = _distance(present(), self._before)
            except Exception:  # of tensors that cannot be subtracted nothing is known
                self.stop()

    def step(self, present: Callable[[], list[list[Tensor]]], *, last: bool) -> bool:
        """A step has been taken.

        Args:
            present: gives the tensors.
            last: whether another jump may follow, which hides what later steps do.

        Returns:
            Whether this step shows that the jump has been taken back.
        """
        if not self._before:
            return False
        self._steps += 1
        if self._steps < _STEPS and not last:
            return False
        least = _LEFT - _LONGER * self._steps / self._tau
        try:
            taken_back = _distance(present(), self._before) < least * self._length
            if taken_back:
                self._jumps_left = 0
            return taken_back
        except Exception:  # tensors that are not what they were: nothing is to be said then
            return False
        finally:
            self.stop()


@torch.no_grad()
def _distance(first: list[list[Tensor]], second: list[list[Tensor]]) -> float:
    norms = [
        torch.linalg.vector_norm(a - b, dtype=torch.promote_types(a.dtype, torch.float32))
        for group, others in zip(first, second, strict=True)
        for a, b in zip(group, others, strict=True)
    ]
    return math.hypot(*(norm.item() for norm in norms))


def held_by(optimizer: object) -> dict[str, Optimizer]:
    """The optimizers that are attributes of an optimizer, by name."""
    attributes = getattr(optimizer, "__dict__", {}).items()
    return {name: value for name, value in attributes if isinstance(value, Optimizer)}


def _with_held(optimizer: Optimizer, depth: int = 4) -> Iterator[Optimizer]:
    """The optimizers that an optimizer holds, innermost first, and itself."""
    if depth:
        for value in held_by(optimizer).values():
            yield from _with_held(value, depth - 1)
    yield optimizer


def _is_torchs(kind: object) -> bool:
    kind = kind if isinstance(kind, type) else type(kind)
    return kind.__module__.split(".")[0] == "torch"


def _may_communicate(optimizer: Optimizer) -> bool:
    """Whether its steps may wait for other ranks, which may not take them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    for kind in type(optimizer).__mro__:
        if _is_torchs(kind) or kind.__module__ in ("abc", "builtins"):
            continue
        try:
            source = inspect.getsource(sys.modules[kind.__module__])
        except (OSError, TypeError, KeyError):
            return True
        if "distributed" in source:
            return True
    return False


def _kept_by_replica(optimizer: Optimizer) -> float | None:
    """The part of a jump that is left after some steps; None if it cannot be known."""
    end = time.thread_time() + _SECONDS
    types = [p.dtype for group in optimizer.param_groups for p in group["params"]]
    with _unseen():
        for dtype in dict.fromkeys((*types[:1], torch.float32)):
            for with_closure in (False, True):
                try:
                    return _Replicas(optimizer, dtype, with_closure, end).kept()
                except Exception:  # nothing is known of what may be raised
                    continue
    return None


class _Replicas:
    """Two optimizers like another one, with one tensor for each kind of its groups.

    Args:
        optimizer: whose class and options they have.
        dtype: of their tensors.
        with_closure: whether their steps are given a closure.
        end: when they have to be done, by this thread's clock.
    """

    def __init__(
        self, optimizer: Optimizer, dtype: torch.dtype, with_closure: bool, end: float
    ) -> None:
        self._optimizer = optimizer
        self._groups = _kinds_of_groups(optimizer)
        self._with_closure = with_closure
        self._end = end
        self._weights = torch.linspace(0.5, 1.5, 16).view(4, 4).to(dtype)
        # Of each row the mean and the trend stay: optimizers that keep norms or means of rows, or
        # whose steps grow with the weights, do not pull back.
        self._jump = torch.tensor([1.0, -1.0, -1.0, 1.0]).mul(0.125).expand(4, 4).to(dtype)
        gradient = torch.arange(16.0).square().cos().view(4, 4)
        gradient -= self._jump.float() * 4 * (gradient * self._jump).sum()
        self._gradient = gradient.to(dtype)

    def kept(self) -> float:
        """Of the jump that one of them makes, the least part that is left in a tensor."""
        stayed, moved = self._run(jumps=False), self._run(jumps=True)
        jump = self._jump.double()
        parts = [
            float(((there - here) * jump).sum() / jump.square().sum())
            for here, there in zip(stayed, moved, strict=True)
        ]
        if not all(map(math.isfinite, parts)):
            raise ArithmeticError("a replica has blown up")
        return min(parts)

    def _run(self, *, jumps: bool) -> list[Tensor]:
        """Where the tensors end."""
        _seed()
        tensors = [torch.nn.Parameter(self._weights.clone()) for _ in self._groups]
        replica = _like(self._optimizer, self._groups, tensors)
        if callable(getattr(replica, "train", None)):
            replica.train()

        def closure() -> Tensor:
            for tensor in tensors:
                tensor.grad = self._gradient.clone()
            return torch.tensor(1.0)

        for step in range(_BEFORE + _AFTER):
            if time.thread_time() > self._end:
                raise TimeoutError
            if jumps and step == _BEFORE:
                for tensor in tensors:
                    tensor.data.add_(self._jump)
            closure()
            if self._with_closure:
                replica.step(closure)
            else:
                replica.step()
        return [tensor.detach().double() for tensor in tensors]


def _kinds_of_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The options of the groups, those of each kind once."""
    known = inspect.signature(type(optimizer)).parameters
    kinds: dict[str, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        # Other values may be counters; flags may tell the optimizer what to do with a group.
        options = {
            name: value
            for name, value in group.items()
            if name != "params" and _is_plain(value) and (name in known or type(value) is bool)
        }
        options = _without_decay(options)
        kinds.setdefault(repr(options), options)
    return list(kinds.values())[:_MOST_KINDS]


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _without_decay(options: dict[str, Any]) -> dict[str, Any]:
    """The options of an optimizer whose steps do not depend on the weights."""
    changed = dict(options)
    for name, value in options.items():
        if isinstance(value, int | float) and type(value) is not bool:
            if name == "lr":
                changed[name] = _RATE
            elif name.startswith("weight_decay"):
                changed[name] = 0.0
    return changed


def _like(optimizer: Optimizer, groups: list[dict[str, Any]], tensors: Sequence[Tensor]) -> Any:
    """An optimizer with the same options, for other tensors: one for each of the groups."""
    kind: Any = type(optimizer)
    held = held_by(optimizer)
    # What is in a group may be the option of one that it holds.
    sources = (vars(optimizer), optimizer.param_groups[0], optimizer.defaults)
    options: dict[str, Any] = {}
    inner: dict[str, Any] = {}
    for name, parameter in inspect.signature(kind).parameters.items():
        values = [source[name] for source in sources if name in source]
        plain = [value for value in values if _is_plain(value)]
        attribute = name if name in held else f"_{name}"
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if attribute in held:
            inner[name] = _like(held[attribute], groups, tensors)
        elif name == "params":
            pairs = zip(groups, tensors, strict=True)
            options[name] = [{**group, "params": [tensor]} for group, tensor in pairs]
        elif plain:
            options[name] = plain[0]
        elif parameter.default is parameter.empty:
            options[name] = _UNKNOWN
    options = _without_decay(options)
    try:
        replica = kind(**options, **inner)
    except Exception:
        if not inner:
            raise
        replica = kind(**options, **{name: type(value) for name, value in inner.items()})
    return replica


def _seed() -> None:
    torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the devices too
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)


@contextmanager
def _unseen() -> Iterator[None]:
    """Put random numbers back at the end, and let nothing be printed, logged or warned of.

    Modes and defaults that are set outside do not count inside.
    """
    disabled, dtype = logging.root.manager.disable, torch.get_default_dtype()
    hooks = [(table, dict(table)) for table in _HOOKS]
    with (
        randomness_kept(),
        torch.device("cpu"),
        torch.inference_mode(False),
        torch.enable_grad(),
        warnings.catch_warnings(),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
    ):
        try:
            warnings.simplefilter("ignore")
            logging.disable(logging.CRITICAL)
            torch.set_default_dtype(torch.float32)
            for table in _HOOKS:
                table.clear()
            yield
        finally:
            for table, entries in hooks:
                table.update(entries)
            torch.set_default_dtype(dtype)
            logging.disable(disabled)
