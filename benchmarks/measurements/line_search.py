"""``line-search``: the library's line searches compared with an exact one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from torch.optim import AdamW

from fastforward_optim import BracketSearch, FastForward, RepeatSearch
from fastforward_optim.search.line_search import Evaluate, LineSearch

from ..comparison.comparison import Comparison

SEARCHES: dict[str, LineSearch] = {"repeat": RepeatSearch(), "bracket": BracketSearch()}
GOLDEN = (math.sqrt(5) - 1) / 2


class Found(NamedTuple):
    """The decreases of the validation loss that a search and an exact search found at a stage."""

    trials: int
    decrease: float
    exact: float


@dataclass
class Compared:
    """A line search, followed by an exact one on the same line and examples."""

    search: LineSearch
    found: list[Found] = field(default_factory=list)

    def __call__(self, evaluate: Evaluate, last_tau: float, /) -> float:
        """Run both searches; return the result of the first."""
        losses: dict[float, float] = {}

        def once(tau: float) -> float:
            if tau not in losses:
                losses[tau] = evaluate(tau)
            return losses[tau]

        tau = self.search(once, last_tau)
        trials, decrease = len(losses), losses[0.0] - losses[tau]
        lowest = refine(once, losses)
        self.found.append(Found(trials, decrease, losses[0.0] - lowest))
        return tau


def refine(once: Evaluate, losses: dict[float, float]) -> float:
    """Find the lowest loss on the line: bracket the best known point, then golden section.

    Args:
        once: measures the loss at a tau, and stores it in ``losses``.
        losses: the known losses by tau.
    """
    reach = max((abs(tau) for tau in losses), default=1.0) or 1.0
    for part in (0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 4.0):
        once(part * reach)
    while min(losses, key=losses.__getitem__) == max(losses):
        once(2 * max(losses))
    taus = sorted(losses)
    place = taus.index(min(losses, key=losses.__getitem__))
    low, high = taus[max(place - 1, 0)], taus[min(place + 1, len(taus) - 1)]
    for _ in range(12):
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        low, high = (low, right) if once(left) < once(right) else (left, high)
    return min(losses.values())


def measure(comparison: Comparison, name: str, lr: float, steps: int) -> list[Found]:
    """Train with a line search and compare it with an exact one at each stage.

    Args:
        comparison: model and data.
        name: ``repeat`` or ``bracket``.
        lr: the learning rate.
        steps: the number of real steps.
    """
    comparison.restart()
    compared = Compared(SEARCHES[name])
    adamw = AdamW(comparison.parameters, lr=lr)
    interval = comparison.setting.interval
    optimizer = FastForward(
        adamw, comparison.validation, interval, line_search=compared, max_interval=interval
    )
    batches = comparison.training_batches()
    for _ in range(steps):
        comparison.model(**next(batches)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return compared.found


def summary(found: list[Found]) -> tuple[int, float, float]:
    """Return the stages, the trials per stage, and the share of the exact decrease in all."""
    exact = math.fsum(one.exact for one in found)
    share = math.fsum(one.decrease for one in found) / exact if exact > 0 else math.nan
    return len(found), sum(one.trials for one in found) / len(found), share
