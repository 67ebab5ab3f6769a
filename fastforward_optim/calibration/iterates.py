"""The iterates of a calibrated run: means over windows, how these move, and a mean kept aside.

Knows tensors. Knows nothing of ``torch.optim``, modules or frameworks.
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
# What a checkpoint holds of each tensor, and what it counts.
TENSORS = ("mean", "previous", "movement", "average", "best")
_COUNTS = ("steps", "age", "first", "second")


class Iterates:
    """Means of the iterates over windows of steps, and over the recent part of the run.

    Memory: five copies of the tensors, in float32 for 16-bit ones. Time: two multi-tensor kernels
    a step.

    Attributes:
        steps: real steps in the present window.
        lengths: of the last windows whose means lie behind: at most two.
        age: real steps that the mean kept aside has seen.
        horizon: that mean is over about this part of them.
        standing: how the run stands beside the best mean.
        known: the loss at the best mean, or where the first window began if there is none yet, if
            it has been measured and can be compared with later ones. No part of a checkpoint.
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
        # Where the window began, as long as there is no mean behind.
        self._previous: Groups = []
        self._movement: Groups = []
        self._average: Groups = []
        self._best: Groups = []

    def open(self, tensors: Sequence[Tensor]) -> None:
        """Begin at the present values, unless it is open for just these tensors."""
        if self._is_of(tensors):
            return
        self.steps = self.age = 0
        self.lengths, self.unfinished, self.known = (), False, None
        self.standing = Standing()
        self._tensors = []  # until all is there: an interrupt in between leaves it closed
        # FSDP2 replaces its parameters' local parts, on saving for one.
        self._cached = None if any(map(is_sharded, tensors)) else grouped(tensors)
        groups = grouped(tensors)
        self._mean, self._previous, self._movement, self._average, self._best = (
            [_wide(group) for group in groups] for _ in TENSORS
        )
        self._tensors = list(tensors)

    def _is_of(self, tensors: Sequence[Tensor]) -> bool:
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
        """Take the present values into both means: a step is over."""
        self.steps += 1
        self.age += 1
        self.unfinished = True
        self._blend(self._mean, 1 / self.steps)
        self._blend(self._average, 1 / (1 + self.horizon * (self.age - 1)))

    def _blend(self, means: Groups, weight: float) -> None:
        for mean, group in zip(means, self._groups, strict=True):
            if weight == 1:  # whatever was there, also NaN
                torch._foreach_copy_(mean, group)
            else:
                torch._foreach_lerp_(mean, _as(mean, group), weight)

    @torch.no_grad()
    def restart(self, *, forget: bool, known: float | None = None) -> None:
        """Begin a window at the present values, without means behind: the best ones so far.

        Args:
            forget: whether the mean kept aside begins anew too.
            known: the loss there.
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
        """Put the window's mean behind, and begin the next one.

        Args:
            is_best: whether it is the best one so far.
            known: the loss at the best one.
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
        """Inner products of the mean's last movement, and its one in this window.

        Args:
            ranks: how many processes add their products up. Those of tensors that each of them
                has whole are divided by it.

        Returns:
            Of the two with each other, of the last one with itself, of this one with itself; zero
            where there is no last one.
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
            # Sums of millions of squares: not in float32, but MPS has no float64.
            dtype = torch.float32 if now.device.type == "mps" else torch.float64
            products = torch.stack([(a * b).sum(dtype=dtype) for a, b in pairs])
            if id(tensor) in whole:
                products /= ranks
            sums[now.device] = sums.get(now.device, 0) + products
        values = [value.tolist() for value in sums.values()]
        both, last_square, square = (math.fsum(column) for column in zip(*values, strict=True))
        return both, last_square, square

    def stage(self) -> Stage:
        """A stage at the present values.

        ``tau = -steps`` is where the window began, or the mean of the window before it, which the
        probe searches along. All stages have the same seed: their losses are compared with each
        other.
        """
        return Stage(self._tensors, before=self._previous, steps=max(self.steps, 1), seed=0)

    @property
    def mean(self) -> Groups:
        """The mean of this window."""
        return self._mean

    @property
    def average(self) -> Groups:
        """The mean that is kept aside."""
        return self._average

    @property
    def best(self) -> Groups:
        """The best mean so far; the values where the first window began, before there is one."""
        return self._best

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While it lasts the tensors hold the mean that is kept aside, if there is one."""
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
        """Numbers, and copies in the order of the tensors, which are those that are tracked.

        Before the first step there are copies too: distributed checkpointing loads into them.
        Where tensors have been frozen since the last step, the next one begins anew.
        """
        if not self._is_of(tensors):
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
        """Iterates as they were saved, for tensors of the same shapes.

        Raises:
            ValueError: they were saved for others, or are damaged.
        """
        iterates = cls(horizon)
        shapes = [tuple(tensor.shape) for tensor in each_once(tensors)]
        try:
            steps, age, *lengths = (as_count(state[name], at_least=0) for name in _COUNTS)
            finished = as_count(state.get("finished", 0), at_least=0)
            # The best mean has been kept since version 0.2.
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
        """The tracked tensors, each once, with what ``groups`` holds of them."""
        of_kind = {
            (parts[0].device, parts[0].dtype): iter(copied)
            for parts, copied in zip(self._groups, groups, strict=True)
        }
        return [
            (tensor, next(of_kind[tensor.device, tensor.dtype]))
            for tensor in each_once(self._tensors)
        ]


def _wide(group: list[Tensor]) -> list[Tensor]:
    """Copies in which a mean does not drown in rounding: float32 for the 16-bit types."""
    narrow = group[0].dtype in (torch.bfloat16, torch.float16)
    with torch.no_grad():
        return [tensor.float() if narrow else tensor.detach().clone() for tensor in group]


def _as(like: list[Tensor], group: Iterable[Tensor]) -> list[Tensor]:
    """The tensors in the dtype of ``like``; the same ones if they have it."""
    return [tensor.to(like[0].dtype) for tensor in group]
