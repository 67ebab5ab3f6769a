"""Detect optimizers that undo jumps of the weights.

Some optimizers continue from weights that they store themselves: slow weights, an average, the
starting point, a copy in higher precision. Their next steps undo what a stage did. Names differ
between packages, so this module tests behaviour: before the run on a small replica of the optimizer
(:func:`pulls_back`), and during the run after the first long jumps (:class:`Watch`).

Knows ``torch.optim.Optimizer``, and nothing of Fast Forward.
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

# Steps of a replica before and after its jump. Some optimizers copy the weights late, and some
# return to their copy only every five or ten steps.
_BEFORE, _AFTER = 16, 32
# At this learning rate a replica's steps are negligible compared with the jump, unless the
# optimizer chooses its own step size.
_RATE = 1e-7
# An optimizer pulls back if less than this part of the jump is left at the end. Others keep all of
# it, up to rounding.
_KEPT = 0.9
# Time limit for a replica in seconds. Most take a few milliseconds.
_SECONDS = 2.0
# Maximum number of param groups with distinct options to try.
_MOST_KINDS = 8
# Value for constructor arguments that the optimizer does not store, mostly the steps of the run.
_UNKNOWN = 1000
# Number of jumps watched in a run, and of steps watched after each. A jump counts as undone if less
# than _LEFT of it is left, with an allowance for steps up to _LONGER times as long as before.
_JUMPS, _STEPS, _LEFT, _LONGER = 3, 12, 0.7, 2.0
# torch's hooks that apply to all optimizers.
_HOOKS: tuple[Any, ...] = (
    of_torch._global_optimizer_pre_hooks,
    of_torch._global_optimizer_post_hooks,
)
_PLAIN = (bool, int, float, str, type(None), type, torch.dtype)


def pulls_back(optimizer: Optimizer) -> Optimizer | None:
    """Return the optimizer that pulls its weights back, or None.

    That is ``optimizer`` or an optimizer that it holds. Replicas take some steps on the CPU,
    without side effects. An optimizer that cannot be replicated, or whose replica fails, is assumed
    not to pull back. Torch's own optimizers are not tested.
    """
    for found in _with_held(optimizer):
        if not _is_torchs(found) and not _may_communicate(found):
            kept = _kept_by_replica(found)
            if kept is not None and kept < _KEPT:
                return found
    return None


class Watch:
    """Detects during a run whether the steps undo jumps of the weights. Watches the first few.

    Keeps the copy of the weights that a stage made before its jump, until the next stage or for
    twelve steps. Its state is neither saved in checkpoints nor copied.
    """

    def __init__(self) -> None:
        self._jumps_left = _JUMPS
        self.stop()

    def __reduce__(self) -> tuple[type[Watch], tuple[()]]:
        return Watch, ()

    def stop(self) -> None:
        """Stop watching the current jump."""
        self._before: list[list[Tensor]] = []
        self._length, self._tau, self._steps = 0.0, 0.0, 0

    def jumped(
        self,
        present: Callable[[], list[list[Tensor]]],
        before: Callable[[], list[list[Tensor]]],
        tau: float,
    ) -> None:
        """Start to watch a jump.

        Args:
            present: returns the tensors.
            before: returns copies of the tensors from before the jump.
            tau: length of the jump, as a multiple of the last step.
        """
        self.stop()
        # A jump that is not much longer than the next steps would show nothing.
        if self._jumps_left and _LEFT * abs(tau) > _LONGER:
            self._jumps_left -= 1
            self._before, self._tau = before(), abs(tau)
            try:
                self._length = _distance(present(), self._before)
            except Exception:  # the tensors cannot be subtracted
                self.stop()

    def step(self, present: Callable[[], list[list[Tensor]]], *, last: bool) -> bool:
        """Note a step after a jump.

        Args:
            present: returns the tensors.
            last: whether another jump may follow, which would hide the effect of later steps.

        Returns:
            True if the jump turns out to have been undone.
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
        except Exception:  # the tensors have changed, so the jump cannot be judged
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
    """Return the optimizers that are attributes of an optimizer, by name."""
    attributes = getattr(optimizer, "__dict__", {}).items()
    return {name: value for name, value in attributes if isinstance(value, Optimizer)}


def _with_held(optimizer: Optimizer, depth: int = 4) -> Iterator[Optimizer]:
    """Yield the optimizers that an optimizer holds, innermost first, and then itself."""
    if depth:
        for value in held_by(optimizer).values():
            yield from _with_held(value, depth - 1)
    yield optimizer


def _is_torchs(kind: object) -> bool:
    kind = kind if isinstance(kind, type) else type(kind)
    return kind.__module__.split(".")[0] == "torch"


def _may_communicate(optimizer: Optimizer) -> bool:
    """Return True if its steps may wait for other ranks, which might not take these steps."""
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
    """Return the part of a jump that is left after some steps, or None if it cannot be measured."""
    end = time.thread_time() + _SECONDS
    types = [p.dtype for group in optimizer.param_groups for p in group["params"]]
    with _silenced():
        for dtype in dict.fromkeys((*types[:1], torch.float32)):
            for with_closure in (False, True):
                try:
                    return _Replicas(optimizer, dtype, with_closure, end).kept()
                except Exception:  # an unknown optimizer may raise anything
                    continue
    return None


class _Replicas:
    """Two replicas of an optimizer, with one tensor for each distinct set of group options.

    Args:
        optimizer: the optimizer to replicate, with its class and options.
        dtype: dtype of the replicas' tensors.
        with_closure: whether to pass a closure to the replicas' steps.
        end: deadline, as a value of ``time.thread_time()``.
    """

    def __init__(
        self, optimizer: Optimizer, dtype: torch.dtype, with_closure: bool, end: float
    ) -> None:
        self._optimizer = optimizer
        self._groups = _kinds_of_groups(optimizer)
        self._with_closure = with_closure
        self._end = end
        self._weights = torch.linspace(0.5, 1.5, 16).view(4, 4).to(dtype)
        # The jump keeps the mean and the trend of each row. Otherwise optimizers that keep norms or
        # means of rows, or whose steps grow with the weights, would seem to pull back.
        self._jump = torch.tensor([1.0, -1.0, -1.0, 1.0]).mul(0.125).expand(4, 4).to(dtype)
        gradient = torch.arange(16.0).square().cos().view(4, 4)
        gradient -= self._jump.float() * 4 * (gradient * self._jump).sum()
        self._gradient = gradient.to(dtype)

    def kept(self) -> float:
        """Return the part of the jump that is left, in the tensor that keeps least of it.

        Only one of the two replicas jumps.
        """
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
        """Run a replica, and return its tensors after the last step."""
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
    """Return the distinct sets of options among the param groups."""
    known = inspect.signature(type(optimizer)).parameters
    kinds: dict[str, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        # Keep constructor options, and flags, which may tell the optimizer how to treat the group.
        # Other values may be counters.
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
    """Return options without weight decay and with a tiny rate: steps then ignore the weights."""
    changed = dict(options)
    for name, value in options.items():
        if isinstance(value, int | float) and type(value) is not bool:
            if name == "lr":
                changed[name] = _RATE
            elif name.startswith("weight_decay"):
                changed[name] = 0.0
    return changed


def _like(optimizer: Optimizer, groups: list[dict[str, Any]], tensors: Sequence[Tensor]) -> Any:
    """Make an optimizer with the same options for other tensors, one tensor per group."""
    kind: Any = type(optimizer)
    held = held_by(optimizer)
    # A value in a group may be an option of an optimizer that this one holds.
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
def _silenced() -> Iterator[None]:
    """Hide all output, logs and warnings inside this context, and restore random states on exit.

    Modes, defaults and hooks that are set outside have no effect inside.
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
