"""One Fast Forward stage on tensors: anchor, direction, candidates, commit and roll back.

Knows tensors and a function that measures the loss at their present values. Knows nothing of
``torch.optim``, modules or frameworks.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..arguments import as_float
from ..search.evidence import Loss
from ..search.line_search import LineSearch
from .line import copies_of, line_of
from .sharded import local

Trial = tuple[float, float]


class Stage:
    """Searches along the last steps of some tensors and leaves them at the best point.

    Create it before the step, call :meth:`set_anchor` after the step and :meth:`search` to run the
    stage. With ``before`` and ``anchor`` the values of a tensor before and after the steps,

        candidate(tau) = anchor + tau * (anchor - before) / steps,

    always computed from these two and never from the previous candidate, in float32 for bfloat16
    and float16 tensors, and rounded once.

    Run it inside :meth:`rolled_back_on_error`: whatever is raised, in ``val_fn`` or elsewhere, the
    tensors are then at the anchor.

    Memory: one copy of the tensors unless ``before`` is given, and another one, from
    :meth:`set_anchor` at the latest. Both are freed with the object.

    Args:
        tensors: what to move; leaves that autograd does not watch in the meantime. Of a sharded
            tensor (``DTensor``) each rank moves its own part.
        before: the values from which the direction is taken, as :func:`copies` gives them;
            default: the present ones.
        steps: number of steps from there to the anchor, of which the direction is the mean.
        seed: of the random number generators in each trial; default: their state when the stage
            begins.
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
        """Take the present values as the anchor: the step is over.

        Returns:
            Whether the step changed any tensor; if not, there is no direction to search along.
        """
        moved = [line.set_end() for line in self._lines]
        return any(moved)

    def anchor(self) -> list[list[Tensor]]:
        """The copies that :meth:`set_anchor` has made, as :func:`grouped` orders the tensors."""
        return [line.end() for line in self._lines]

    def wait(self) -> None:
        """Wait until the devices have done what they were given: a clock can be started then."""
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

        Each trial starts from the same state of the random number generators, and leaves it as it
        was: a ``val_fn`` with random draws sees the same ones at each candidate.

        Returns:
            The committed tau, and the pairs (tau, loss) in the order in which they were tried.

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
            trials.append((tau, loss))
            return loss

        best = _check_result(line_search(evaluate, last_tau), trials, line_search)
        if best != self._tau:
            self.write(best)
        return best, tuple(trials)

    def measure(self, val_fn: Callable[[], Any], values: list[list[Tensor]]) -> float:
        """The loss at values that are not on the line; the tensors stay there.

        Args:
            val_fn: as in :meth:`search`.
            values: one for each tensor, as :func:`grouped` orders them.
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
        # Unknown until val_fn is seen to have left the tensors alone: if it raises, a line search
        # may go on, and whatever is to be measured next has to be written.
        tau, self._tau = self._tau, math.nan
        loss = measure(self._tensors, val_fn, self._seed)
        self._tau = tau
        return loss


def measure(tensors: Sequence[Tensor], val_fn: Callable[[], Any], seed: int | None = None) -> float:
    """The loss at the present values of the tensors.

    Args:
        tensors: what is moved, which ``val_fn`` has to leave alone.
        val_fn: measures the loss.
        seed: of the random number generators; default: they stay as they are. Either way they are
            put back.

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
    """The tensors, each once, in lists of one device and one dtype; of sharded ones our part.

    On such lists multi-tensor kernels take their fast path; and what is listed twice would be
    moved twice.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in map(local, each_once(tensors)):
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(groups.values())


def each_once(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors in their order, without those that have been there before."""
    return list({id(tensor): tensor for tensor in tensors}.values())


def copies(groups: list[list[Tensor]]) -> list[list[Tensor]]:
    """Copies of the tensors, without gradients."""
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


@contextmanager
def random_state_kept(devices: Iterable[torch.device], seed: int | None = None) -> Iterator[None]:
    """Put the generators of the CPU and of ``devices`` back on leaving; seed them on entering."""
    indices: dict[str, set[int]] = {}
    for device in devices:
        if device.index is not None and device.type != "cpu":
            indices.setdefault(device.type, set()).add(device.index)
    with ExitStack() as stack:
        for device_type, found in indices.items():  # of one kind, but for a model on two
            stack.enter_context(torch.random.fork_rng(devices=found, device_type=device_type))
        if not indices:  # else the CPU's is among them
            stack.enter_context(torch.random.fork_rng(devices=[]))
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            for device_type, found in indices.items():
                module = torch.get_device_module(device_type)
                for index in found:
                    with torch.accelerator.device_index(index):
                        module.manual_seed(seed)
        yield


def _check_result(tau: Any, trials: list[Trial], line_search: LineSearch) -> float:
    if tau != 0 and tau not in (tried for tried, _ in trials):
        raise RuntimeError(
            f"line_search {line_search!r} returned tau = {tau!r}, which it did not evaluate (it "
            f"tried {[tried for tried, _ in trials]}); return one of the values tried, or 0.0"
        )
    return float(tau)
