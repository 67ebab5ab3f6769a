"""A stage from its definition: slow, plain, one number after another.

Written from the paper and the docstrings, to compare the fast one with. Line searches here are
generators: they yield the tau that is to be tried, are sent the one that was and its loss, and
return what they found. A parabola is computed in fractions: exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from fractions import Fraction

import torch
from torch import Tensor

Search = Generator[float, tuple[float, float], float]
FLAT, WORTHWHILE, STRAIGHT = 1e-3, 0.01, 0.9


def candidate(before: Tensor, anchor: Tensor, tau: float, steps: int = 1) -> Tensor:
    """``anchor + tau * (anchor - before) / steps`` in float64, element by element."""
    result = torch.empty(anchor.shape, dtype=torch.float64)
    flat = result.view(-1)
    pairs = zip(before.reshape(-1).tolist(), anchor.reshape(-1).tolist(), strict=True)
    for index, (old, new) in enumerate(pairs):
        flat[index] = new + tau * (new - old) / steps
    return result


def run_stage(
    befores: list[Tensor],
    anchors: list[Tensor],
    loss_of: Callable[[list[Tensor]], float],
    search: Search,
    steps: int = 1,
) -> tuple[float, list[tuple[float, float]]]:
    """The tau that a search finds, and the pairs (tau, loss) that it tried."""
    trials: list[tuple[float, float]] = []
    tau = next(search)
    while True:
        values = [
            candidate(before, anchor, tau, steps)
            for before, anchor in zip(befores, anchors, strict=True)
        ]
        trials.append((tau, loss_of(values)))
        try:
            tau = search.send(trials[-1])
        except StopIteration as stop:
            return stop.value, trials


class Tried:
    """What has been tried so far: losses by tau, those that are not finite as infinity."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.losses: dict[float, float] = {}
        self.last = 0.0

    def ask(self, tau: float) -> Search:
        self.last, loss = yield tau
        self.losses[self.last] = loss if math.isfinite(loss) else math.inf
        return self.losses[self.last]

    @property
    def spent(self) -> bool:
        return len(self.losses) >= self.limit

    @property
    def best(self) -> float:
        """The first tau with the lowest loss; 0.0 if none has a finite one."""
        lowest = min(self.losses.values())
        if lowest == math.inf:
            return 0.0
        return next(tau for tau, loss in self.losses.items() if loss == lowest)

    def flat(self, loss: float) -> bool:
        """Within a thousandth of the larger of the two losses, as ``math.isclose`` has it."""
        start = self.losses[0.0]
        if loss == math.inf or start == math.inf:
            return False
        return abs(loss - start) <= FLAT * max(abs(loss), abs(start))


def repeat_search(max_tau: float, max_trials: int) -> Search:
    """tau = 1, 2, 3, ... until the loss stops decreasing; eightfold strides over a plateau."""
    tried = Tried(max_trials)
    yield from tried.ask(0.0)
    tau, stride = 1.0, 1.0
    while tau <= max_tau and not tried.spent:
        lowest = min(tried.losses.values())
        loss = yield from tried.ask(tau)
        if not loss < lowest:
            if not (tried.flat(loss) and tried.flat(lowest)):
                break
            stride *= 8
        # The next multiple of the stride.
        tau = stride * (math.floor(tau / stride) + 1)
    return tried.best


def bracket_search(max_tau: float, max_trials: int, last_tau: float) -> Search:
    """Down by quarters, or up by doubling, then at most two steps to a parabola's vertex."""
    tried = Tried(max_trials)
    start = yield from tried.ask(0.0)
    first = min(last_tau / 2 if last_tau > 4 else 1.0, max_tau)
    yield from tried.ask(first)
    line = [0.0, first]
    rises = yield from _ahead(tried, line, max_tau)
    if not rises:
        return tried.best
    triple = None
    if len(line) > 2:
        triple = line[-3:]
    while triple is None and line[1] >= 2 and not tried.spent:
        nearer = max(1.0, line[1] / 4)
        loss = yield from tried.ask(nearer)
        line.insert(1, nearer)
        if loss < start:
            triple = line[:3]
    for _ in range(2):
        if triple is None or tried.spent:
            break
        tau, gain = vertex_in(triple, tried.losses)
        so_far = start - tried.losses[tried.best]
        if not so_far + gain > FLAT * abs(start) or gain <= WORTHWHILE * so_far:
            break
        yield from tried.ask(tau)
        line = sorted([*triple, tried.last])
        # Of the two inner points the lower one is in the middle; of equal ones the right one.
        low = 1 if tried.losses[line[1]] < tried.losses[line[2]] else 2
        triple = line[low - 1 : low + 2]
    return tried.best


def _ahead(
    tried: Tried, line: list[float], max_tau: float
) -> Generator[float, tuple[float, float], bool]:
    """Go on until the loss rises; False where a limit came first."""
    while True:
        last, before = tried.losses[line[-1]], tried.losses[line[-2]]
        if tried.flat(last) and tried.flat(tried.losses[tried.best]):
            factor = 8
        elif not last < before:
            return True
        else:
            factor = 2
            if len(line) > 2:
                earlier = tried.losses[line[-3]]
                fall = (last - before) / (line[-1] - line[-2])
                if fall <= STRAIGHT * ((before - earlier) / (line[-2] - line[-3])):
                    factor = 4
        if line[-1] >= max_tau or tried.spent:
            return False
        tau = min(factor * line[-1], max_tau)
        yield from tried.ask(tau)
        line.append(tau)


def parabola(taus: list[float], losses: list[float]) -> tuple[Fraction, Fraction] | None:
    """Where the parabola through three points is lowest, and its leading coefficient; exactly.

    In Newton's form: f(x) = y0 + m (x - x0) + a (x - x0) (x - x1).
    """
    x0, x1, x2 = map(Fraction, taus)
    y0, y1, y2 = map(Fraction, losses)
    m = (y1 - y0) / (x1 - x0)
    a = ((y2 - y1) / (x2 - x1) - m) / (x2 - x0)
    if a <= 0:
        return None
    return (x0 + x1 - m / a) / 2, a


def vertex_in(taus: list[float], by_tau: dict[float, float]) -> tuple[float, float]:
    """The vertex if it is inside, and how far below the middle it is; else the middle, and 0."""
    losses = [by_tau[tau] for tau in taus]
    if losses[2] == math.inf:
        return (taus[1] + taus[2]) / 2, math.inf if losses[1] < losses[0] else 0.0
    if math.inf in losses:
        return taus[1], 0.0
    found = parabola(taus, losses)
    if found is None or not taus[0] < found[0] < taus[2]:
        return taus[1], 0.0
    return float(found[0]), float(found[1] * (Fraction(taus[1]) - found[0]) ** 2)
