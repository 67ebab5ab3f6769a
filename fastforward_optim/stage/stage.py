"""One Fast Forward stage on tensors: anchor, direction, candidates, commit and roll back.

This module handles tensors and a function that measures the loss at their present values. It does
not depend on ``torch.optim``, modules or frameworks.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..arguments import as_float
from ..random_state import random_state_kept
from ..search.evidence import Loss, Trial
from ..search.line_search import LineSearch
from .line import copies_of, line_of
from .sharded import local


class Stage:
    """Searches along the last steps of some tensors and leaves them at the best point.

    Create it before the step, call :meth:`set_anchor` after the step and :meth:`search` to run the
    stage. If ``before`` and ``anchor`` are the values of a tensor before and after the steps, then

        candidate(tau) = anchor + tau * (anchor - before) / steps.

    It is always computed from these two values and never from the previous candidate, in float32
    for bfloat16 and float16 tensors, and rounded once.

    Run it inside :meth:`rolled_back_on_error`: if anything is raised, in ``val_fn`` or elsewhere,
    the tensors are then at the anchor.

    Memory: one copy of the tensors unless ``before`` is given, and a second one from
    :meth:`set_anchor` at the latest. Both are freed with the object.

    Args:
        tensors: the tensors to move: leaves that autograd does not track in the meantime. Each rank
            moves its own part of a sharded tensor (``DTensor``).
        before: the values at which the direction starts, as returned by :func:`copies`; default:
            the present ones.
        steps: number of steps from there to the anchor; the direction is their mean.
        seed: seed of the random number generators in each trial; default: their state when the
            stage begins.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        before: list[list[Tensor]] | None = None,
        steps: int = 1,
        seed: int | None = None,
    ) -> None:
        self._seed = seed
        self._groups = grouped(tensors)
        self._tensors = [tensor for group in self._groups for tensor in group]
        self._devices = {group[0].device for group in self._groups}
        self._steps = steps
        self._furthest_back = 0 if before is None else steps
        starts = [None] * len(self._groups) if before is None else before
        self._lines = list(map(line_of, self._groups, starts))
        self._tau = 0.0

    def set_anchor(self) -> bool:
        """Take the present values as the anchor, after the step.

        Returns:
            True if the step changed any tensor; if not, there is no direction to search along.
        """
        moved = [line.set_end() for line in self._lines]
        return any(moved)

    def anchor(self) -> list[list[Tensor]]:
        """Return the copies made by :meth:`set_anchor`, in the order of :func:`grouped`."""
        return [line.end() for line in self._lines]

    def wait(self) -> None:
        """Wait until the devices have finished their queued work, so that a clock can start."""
        for device in self._devices:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)

    def write(self, tau: float) -> None:
        """Write ``anchor + tau * (anchor - before) / steps`` into the tensors, in place.

        tau = 0 is the anchor and tau = -steps is ``before``, bit for bit.
        """
        for line in self._lines:
            line.write(1 + tau / self._steps)
        # Inside an autocast region the weights' 16-bit copies are cached by tensor, not by value.
        torch.clear_autocast_cache()
        self._tau = tau

    def search(
        self, val_fn: Callable[[], Any], line_search: LineSearch, last_tau: float
    ) -> tuple[float, tuple[Trial, ...]]:
        """Run ``line_search`` on the loss that ``val_fn`` measures and commit its result.

        Each trial starts from the same state of the random number generators and restores it: a
        ``val_fn`` with random draws sees the same ones at each candidate.

        Returns:
            The committed tau, and the pairs (tau, loss) in the order of the trials.

        Raises:
            TypeError: ``val_fn`` returned something other than a real number.
            RuntimeError: ``val_fn`` changed the tensors, or ``line_search`` broke its contract.
        """
        trials: list[Trial] = []

        def evaluate(tau: float) -> float:
            tau = self._check_tau(tau)
            if tau != self._tau:
                self.write(tau)
            loss = self._measure(val_fn)
            trials.append(Trial(tau, loss))
            return loss

        best = _check_result(line_search(evaluate, last_tau), trials, line_search)
        if best != self._tau:
            self.write(best)
        return best, tuple(trials)

    def measure(self, val_fn: Callable[[], Any], values: list[list[Tensor]]) -> float:
        """Measure the loss at values that are not on the line, and leave the tensors there.

        Args:
            val_fn: measures the loss, as in :meth:`search`.
            values: one for each tensor, in the order of :func:`grouped`.
        """
        self.put(values)
        return self._measure(val_fn)

    def rolled_back_on_error(self) -> AbstractContextManager[None]:
        """Return a context that puts the tensors back at the anchor if anything is raised in it."""
        return restored_on_error(lambda: self.write(0.0))

    def put(self, values: list[list[Tensor]]) -> None:
        """Write values that are not on the line into the tensors, in place."""
        put(self._groups, values)
        self._tau = math.nan

    def _check_tau(self, tau: float) -> float:
        tau = float(tau)
        if not (math.isfinite(tau) and tau >= -self._furthest_back):
            raise RuntimeError(
                f"line_search asked for tau = {tau!r}; it must be finite and >= "
                f"{-self._furthest_back}"
            )
        return tau

    def _measure(self, val_fn: Callable[[], Any]) -> float:
        # tau is unknown until val_fn has left the tensors alone: if it raises, a line search may
        # continue, and the next trial must write its point again.
        tau, self._tau = self._tau, math.nan
        loss = measure(self._tensors, val_fn, self._seed)
        self._tau = tau
        return loss


def measure(tensors: Sequence[Tensor], val_fn: Callable[[], Any], seed: int | None = None) -> float:
    """Return the loss at the present values of the tensors.

    Args:
        tensors: the tensors that are moved; ``val_fn`` must not change them.
        val_fn: measures the loss.
        seed: seed of the random number generators; default: their present state. The state is
            restored in both cases.

    Raises:
        TypeError: ``val_fn`` returned something other than a real number.
        RuntimeError: ``val_fn`` changed the tensors.
    """
    versions = [tensor._version for tensor in tensors]
    with torch.no_grad(), random_state_kept({tensor.device for tensor in tensors}, seed):
        loss = val_fn()
    present = [tensor._version for tensor in tensors]
    if present != versions:
        changed = sum(map(operator.ne, present, versions))
        raise RuntimeError(
            f"val_fn changed {changed} of the {len(versions)} parameters that Fast Forward is "
            "moving; it must only measure the loss. Take optimizer steps, weight averaging and "
            "load_state_dict out of val_fn."
        )
    return loss if isinstance(loss, Loss) else as_float(loss)


def grouped(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Group tensors by device and dtype, without repetitions; of sharded ones the local part.

    Multi-tensor kernels take their fast path on such lists, and a tensor listed twice would move
    twice.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in map(local, each_once(tensors)):
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(groups.values())


def each_once(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors in order, without repetitions."""
    return list({id(tensor): tensor for tensor in tensors}.values())


def copies(groups: list[list[Tensor]]) -> list[list[Tensor]]:
    """Copy the tensors, without gradients."""
    return list(map(copies_of, groups))


def put(groups: list[list[Tensor]], values: list[list[Tensor]]) -> None:
    """Write values into the tensors, in place."""
    with torch.no_grad():
        for tensors, group in zip(groups, values, strict=True):
            torch._foreach_copy_(tensors, group)
    torch.clear_autocast_cache()


@contextmanager
def restored_on_error(restore: Callable[[], object]) -> Iterator[None]:
    """Call ``restore`` if anything is raised inside, Ctrl-C included."""
    try:
        yield
    except BaseException:
        restore()
        raise


def _check_result(tau: Any, trials: list[Trial], line_search: LineSearch) -> float:
    if tau != 0 and tau not in (tried for tried, _ in trials):
        raise RuntimeError(
            f"line_search {line_search!r} returned tau = {tau!r}, which it did not evaluate (it "
            f"tried {[tried for tried, _ in trials]}); return one of the values tried, or 0.0"
        )
    return float(tau)
