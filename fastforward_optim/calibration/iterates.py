"""The iterates of a calibrated run: means over windows, their movements, and a recent mean.

This module handles tensors. It does not depend on ``torch.optim``, modules or frameworks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..saved_numbers import as_count
from ..stage.sharded import is_sharded, like, part_of
from ..stage.stage import Stage, copies, each_once, grouped, put
from .law import Standing

Groups = list[list[Tensor]]
# Names of the tensors and of the counts in a checkpoint.
TENSORS = ("mean", "previous", "movement", "average", "best")
_COUNTS = ("steps", "age", "first", "second")


class Iterates:
    """Means of the iterates over windows of steps, and over the recent part of the run.

    Memory: five copies of the tensors, in float32 for 16-bit ones. Time: two multi-tensor kernels a
    step.

    Attributes:
        steps: number of real steps in the current window.
        lengths: number of steps of the last finished windows, at most two.
        age: number of real steps that have entered the recent mean.
        horizon: the recent mean covers about this fraction of them.
        standing: position of the run relative to the best mean.
        known: loss at the best mean, or at the start of the first window if there is no best mean
            yet. None if it has not been measured or cannot be compared with later losses. Not part
            of a checkpoint.
    """

    def __init__(self, horizon: float) -> None:
        self.horizon = horizon
        self.steps = self.age = 0
        self.lengths: tuple[int, ...] = ()
        self.unfinished = False
        self.standing = Standing()
        self.known: float | None = None
        self._tensors: list[Tensor] = []
        self._cached: Groups | None = None
        self._mean: Groups = []
        # Before the first window ends, these are the values at its start.
        self._previous: Groups = []
        self._movement: Groups = []
        self._average: Groups = []
        self._best: Groups = []

    def open(self, tensors: Sequence[Tensor]) -> None:
        """Start at the present values, unless it is already open for exactly these tensors."""
        if self._tracks(tensors):
            return
        self.steps = self.age = 0
        self.lengths, self.unfinished, self.known = (), False, None
        self.standing = Standing()
        self._tensors = []  # an interrupt before the end leaves it closed
        # FSDP2 replaces the local parts of its parameters, for example when it saves them.
        self._cached = None if any(map(is_sharded, tensors)) else grouped(tensors)
        groups = grouped(tensors)
        self._mean, self._previous, self._movement, self._average, self._best = (
            [_wide(group) for group in groups] for _ in TENSORS
        )
        self._tensors = list(tensors)

    def _tracks(self, tensors: Sequence[Tensor]) -> bool:
        return len(tensors) == len(self._tensors) and all(
            new is old for new, old in zip(tensors, self._tensors, strict=True)
        )

    @property
    def _held(self) -> tuple[Groups, ...]:
        """The copies, in the order of ``TENSORS``."""
        return self._mean, self._previous, self._movement, self._average, self._best

    @property
    def _groups(self) -> Groups:
        return grouped(self._tensors) if self._cached is None else self._cached

    @torch.no_grad()
    def add(self) -> None:
        """Add the present values to both means, after a step."""
        self.steps += 1
        self.age += 1
        self.unfinished = True
        self._blend(self._mean, 1 / self.steps)
        self._blend(self._average, 1 / (1 + self.horizon * (self.age - 1)))

    def _blend(self, means: Groups, weight: float) -> None:
        for mean, group in zip(means, self._groups, strict=True):
            if weight == 1:  # lerp would keep a NaN of the old values
                torch._foreach_copy_(mean, group)
            else:
                torch._foreach_lerp_(mean, _as(mean, group), weight)

    @torch.no_grad()
    def restart(self, *, forget: bool, known: float | None = None) -> None:
        """Start a window at the present values, which become the best ones; drop the window means.

        Args:
            forget: whether to restart the recent mean too.
            known: loss at the present values.
        """
        self.known = known
        self.standing = Standing(returns=self.standing.returns)
        for copies_of in (self._previous, self._best):
            for copy, group in zip(copies_of, self._groups, strict=True):
                torch._foreach_copy_(copy, group)
        self.steps, self.lengths = 0, ()
        if forget:
            self.age, self.unfinished = 0, False

    @torch.no_grad()
    def next_window(self, *, is_best: bool, known: float | None = None) -> None:
        """End the window and start the next one.

        Args:
            is_best: whether this window's mean is the best one so far.
            known: loss at the best mean.
        """
        self.known = known
        if is_best:
            for best, mean in zip(self._best, self._mean, strict=True):
                torch._foreach_copy_(best, mean)
        pairs = zip(self._movement, self._mean, self._previous, strict=True)
        for movement, mean, previous in pairs:
            torch._foreach_copy_(movement, mean)
            torch._foreach_sub_(movement, previous)
        self._previous, self._mean = self._mean, self._previous
        self.lengths = (*self.lengths, self.steps)[-2:]
        self.steps = 0

    @torch.no_grad()
    def products(self, ranks: int) -> tuple[float, float, float]:
        """Return inner products of the mean's last movement and its movement in this window.

        Args:
            ranks: number of processes whose products are summed. Products of tensors that every
                process holds whole are divided by it.

        Returns:
            The product of the two movements, the square of the last one, and the square of this
            one; all zero if there is no last movement.
        """
        if len(self.lengths) < 2:
            return 0.0, 0.0, 0.0
        sums: dict[torch.device, Tensor] = {}
        whole = {id(part[0]) for part in self._in_order(self._mean) if not is_sharded(part[0])}
        for (tensor, mean), (_, previous), (_, last) in zip(
            *(self._in_order(groups) for groups in (self._mean, self._previous, self._movement)),
            strict=True,
        ):
            now = mean - previous
            pairs = ((now, last), (last, last), (now, now))
            # Sums of millions of squares need float64, which MPS does not have.
            dtype = torch.float32 if now.device.type == "mps" else torch.float64
            products = torch.stack([(a * b).sum(dtype=dtype) for a, b in pairs])
            if id(tensor) in whole:
                products /= ranks
            sums[now.device] = sums.get(now.device, 0) + products
        values = [value.tolist() for value in sums.values()]
        both, last_square, square = (math.fsum(column) for column in zip(*values, strict=True))
        return both, last_square, square

    def stage(self) -> Stage:
        """Return a stage at the present values.

        ``tau = -steps`` is the mean of the window before. If there is none, as in the probe, which
        searches along this line, it is the point where the window began. All stages have the same
        seed, because their losses are compared with each other.
        """
        return Stage(self._tensors, before=self._previous, steps=max(self.steps, 1), seed=0)

    @property
    def mean(self) -> Groups:
        """The mean of this window."""
        return self._mean

    @property
    def average(self) -> Groups:
        """The mean of the recent iterates."""
        return self._average

    @property
    def best(self) -> Groups:
        """The best mean so far; the values at the start of the first window before there is one."""
        return self._best

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the tensors hold the mean of the recent iterates, if there is one."""
        if not self.age:
            yield
            return
        groups = self._groups
        kept = copies(groups)
        try:
            put(groups, self._average)
            yield
        finally:
            put(groups, kept)

    def state_dict(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """Return the counts, and the copies in the order of ``tensors``, the tracked ones.

        The copies are also there before the first step, because distributed checkpointing loads
        into them. If tensors have been frozen since the last step, the state is a fresh one.
        """
        if not self._tracks(tensors):
            fresh = Iterates(self.horizon)
            fresh.open(tensors)
            return fresh.state_dict(tensors)
        first, second = (0, 0, *self.lengths)[-2:]
        finished = int(self.age > 0 and not self.unfinished)
        counts = dict(zip(_COUNTS, (self.steps, self.age, first, second), strict=True))
        counts["finished"] = finished
        return {**counts, **self.standing._asdict()} | {
            name: [like(copy.clone(), of) for of, copy in self._in_order(groups)]
            for name, groups in zip(TENSORS, self._held, strict=True)
        }

    @classmethod
    def from_state_dict(
        cls, horizon: float, state: Mapping[str, Any], tensors: Sequence[Tensor]
    ) -> Iterates:
        """Restore saved iterates for tensors of the same shapes.

        Raises:
            ValueError: the state was saved for other tensors, or is damaged.
        """
        iterates = cls(horizon)
        shapes = [tuple(tensor.shape) for tensor in each_once(tensors)]
        try:
            steps, age, *lengths = (as_count(state[name], at_least=0) for name in _COUNTS)
            finished = as_count(state.get("finished", 0), at_least=0)
            # State dicts from before version 0.2 have no best mean.
            state = {"best": state["previous"], **Standing()._asdict(), **state}
            since, returns = (as_count(state[name], at_least=0) for name in ("since", "returns"))
            standing = Standing(since, returns, float(state["suspected"]))
            if not math.isfinite(standing.suspected):
                raise ValueError(f"its suspected rise is {standing.suspected}")
            saved = {name: list(state[name]) for name in TENSORS}
            found = [[tuple(tensor.shape) for tensor in saved[name]] for name in TENSORS]
            every = [tensor for name in TENSORS for tensor in saved[name]]
            if any(tensor.layout != torch.strided or tensor.is_meta for tensor in every):
                raise ValueError("it holds tensors that are sparse or without data")
            if not all(tensor.is_floating_point() for tensor in every):
                raise ValueError("it holds tensors of whole numbers")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"the calibration in the state dict is damaged: {error!r}") from error
        if any(shapes != these for these in found):
            raise ValueError(
                f"the calibration in the state dict is of {len(found[0])} tensors, this optimizer "
                f"trains {len(shapes)}, or their shapes differ; load it into an optimizer of the "
                "same model and adapter"
            )
        iterates.open(tensors)
        iterates.steps, iterates.age = steps, age
        iterates.lengths = tuple(length for length in lengths if length)
        iterates.unfinished = age > 0 and not finished
        iterates.standing = standing
        for name, groups in zip(TENSORS, iterates._held, strict=True):
            pairs = zip(iterates._in_order(groups), saved[name], strict=True)
            for (tensor, copy), value in pairs:
                copy.copy_(part_of(value, tensor))
        return iterates

    def _in_order(self, groups: Groups) -> list[tuple[Tensor, Tensor]]:
        """Return pairs of each tracked tensor, once, and its copy in ``groups``."""
        of_kind = {
            (parts[0].device, parts[0].dtype): iter(copied)
            for parts, copied in zip(self._groups, groups, strict=True)
        }
        return [
            (tensor, next(of_kind[tensor.device, tensor.dtype]))
            for tensor in each_once(self._tensors)
        ]


def _wide(group: list[Tensor]) -> list[Tensor]:
    """Copy tensors in a dtype that a mean can be computed in: float32 for the 16-bit types."""
    narrow = group[0].dtype in (torch.bfloat16, torch.float16)
    with torch.no_grad():
        return [tensor.float() if narrow else tensor.detach().clone() for tensor in group]


def _as(like: list[Tensor], group: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors in the dtype of ``like``; the same tensors if they already have it."""
    return [tensor.to(like[0].dtype) for tensor in group]
