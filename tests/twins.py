"""A run with stages beside one without, step for step, and what every stage has to keep."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastforward_optim import FastForward
from fastforward_optim.history import StageRecord

from .conftest import bits, same
from .problems import Call, Case, Problem, ValFn


@dataclass
class Step:
    """A step of the run with stages, beside the same step of its twin.

    Attributes:
        number: counted from 1.
        tracked: indices of the tensors that the stage may move.
        before, anchor, after: values before the step, after the twin's, and in the end.
        begin: values from which the direction is taken.
        begun: the number of steps taken then.
        mean: of the recent iterates, in float64, and the largest value it has seen, by tensor.
        calls: of the validation function, if a stage ran.
        record: of the stage.
        error: what was raised.
        rate: the multiplier and its gain before the step.
    """

    number: int
    tracked: list[int]
    before: list[Tensor]
    anchor: list[Tensor]
    after: list[Tensor]
    calls: list[Call]
    record: StageRecord | None
    error: BaseException | None
    rate: tuple[float, float]
    begin: list[Tensor]
    begun: int
    mean: list[tuple[Tensor, float]]

    def is_mean(self, values: list[Tensor]) -> bool:
        """Whether values are the mean up to rounding: of theirs, and of many steps in float32."""
        for i in self.tracked:
            (mean, largest), value = self.mean[i], values[i].double()
            error = (value - mean).abs()[value.isfinite() & mean.isfinite()]
            if (error > (torch.finfo(values[i].dtype).eps + 1e-5) * largest).any():
                return False
        return True

    @property
    def searched(self) -> int:
        """How many of the calls the line search made: then come the mean and the begin."""
        if self.record is None or self.record.mean_loss is None:
            return len(self.calls)
        taus = [tau for tau, _ in self.record.trials]
        if taus[-1:] == [-self.record.steps] and self._is_begin(self.calls[-1]):
            mean = self.calls[-2]
            # In few bits the mean may be the begin.
            swapped = self._is_begin(mean) and repr(mean.loss) != repr(self.record.mean_loss)
            return len(self.calls) - (1 if swapped else 2)
        return len(self.calls) - 1

    def _is_begin(self, call: Call) -> bool:
        return all(same([call.values[i]], [self.begin[i]]) for i in self.tracked)


class Mean:
    """The mean of the recent iterates, in float64: over about an eighth of them, at most 32."""

    def __init__(self) -> None:
        self.age = self.number = 0
        self.tensors: list[Tensor] = []
        self.largest: list[float] = []

    def add(self, iterate: list[Tensor], number: int) -> None:
        """Take in an iterate, once."""
        if number == self.number:  # the last stage follows no step of its own
            return
        self.age, self.number = self.age + 1, number
        weight = max(8 / (self.age + 7), 1 / 32)
        wide = [value.double() for value in iterate]
        self.tensors = [
            value if self.age == 1 else mean + weight * (value - mean)
            for mean, value in zip(self.tensors or wide, wide, strict=True)
        ]
        self._see(wide)

    def jump(self, tau: float, steps: int, begin: list[Tensor], after: list[Tensor]) -> None:
        """Move along with a stage, or begin anew after a far one or one back to the begin."""
        if tau > steps or tau == -steps:
            self.age = 0
        elif tau != 0:
            part = tau / (steps + tau)
            self.tensors = [
                mean + part * (new.double() - old.double())
                for mean, old, new in zip(self.tensors, begin, after, strict=True)
            ]
        self._see([value.double() for value in (*begin, *after)])

    def values(self) -> list[tuple[Tensor, float]]:
        return list(zip(self.tensors, self.largest, strict=True))

    def _see(self, values: list[Tensor]) -> None:
        count = len(self.tensors)
        largest = self.largest or [0.0] * count
        for index, value in enumerate(values):
            finite = value[value.isfinite()]
            if finite.numel():
                place = index % count
                largest[place] = max(largest[place], float(finite.abs().max()))
        self.largest = largest


@dataclass
class Twins:
    """A run with stages and its twin without, which takes each step from the same weights."""

    case: Case
    seed: int = 0
    mine: Problem = field(init=False)
    plain: Problem = field(init=False)

    def __post_init__(self) -> None:
        case = self.case
        self.mine, self.plain = Problem(case), Problem(case)
        self.val_fn = ValFn(self.mine)
        self.chosen = None
        if case.chosen != "all":
            # The last two have no dimensions and no elements: there is always one to move.
            self.chosen = [p for p in self.mine.params[1:] if p.requires_grad]
            self.chosen += self.chosen[:1] if case.chosen == "twice" else []
        self.reported: list[StageRecord] = []
        longest = None if case.longer is None else case.interval + case.longer
        self.last_taus: list[float] = []

        def search(evaluate: Callable[[float], float], last_tau: float, /) -> float:
            self.last_taus.append(last_tau)
            return case.search(evaluate, last_tau)

        self.optimizer = FastForward(
            self.mine.optimizer,
            self.val_fn,
            case.interval,
            params=self.chosen,
            calibrate_lr=case.calibrate_lr,
            max_interval=longest,
            line_search=None if case.search is None else search,
            warmup=case.warmup,
            on_stage=self.reported.append,
        )
        self.number = self.begun = 0
        self.begin: tuple[list[int], list[Tensor]] | None = None
        self.mean = Mean()
        self.random_states: tuple[Tensor, Tensor]

    def rate(self) -> tuple[float, float]:
        group = self.optimizer.param_groups[0]
        return self.optimizer.lr_scale, group.get("fast_forward_lr_gain", 1.0)

    @property
    def can_step(self) -> bool:
        """False where a rate gets too high for float16, at which torch raises an error.

        Some optimizers divide it by a bias correction first.
        """
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        largest = max(rates) * self.optimizer.lr_scale
        return (
            torch.float16 not in self.case.dtypes or largest < torch.finfo(torch.float16).max / 100
        )

    def step(self) -> Step:
        """One step of both; an exception of the validation function is caught."""
        self.number += 1
        before, rate = self.mine.values(), self.rate()
        state = torch.get_rng_state()
        with scaled(self.plain.optimizer, rate[0]):
            self.plain.step(self.plain.optimizer, self.number)
        expected_state = torch.get_rng_state()
        torch.set_rng_state(state)
        observed = self._observe(lambda: self.mine.step(self.optimizer, self.number), before, rate)
        self.random_states = expected_state, torch.get_rng_state()
        return observed

    def finish(self) -> Step:
        """The run's last stage."""
        before, state = self.mine.values(), torch.get_rng_state()
        observed = self._observe(self.optimizer.finish, before, self.rate())
        self.random_states = state, torch.get_rng_state()
        return observed

    def _observe(self, act: Callable[[], Any], before: list[Tensor], rate: Any) -> Step:
        anchor = self.plain.values()
        self.val_fn.calls = []
        stages, reported = len(self.optimizer.history), len(self.reported)
        error = None
        try:
            act()
        except BaseException as raised:
            if raised is not self.val_fn.error:
                raise
            error = raised
        record = self.optimizer.history[-1] if len(self.optimizer.history) > stages else None
        assert self.reported[reported:] == ([] if record is None else [record])
        after, calls = self.mine.values(), self.val_fn.calls
        tracked = self.mine.tracked(self.chosen)
        windowed = self.case.calibrate_lr and self.number > self.case.warmup
        if self.begin is None or self.begin[0] != tracked:
            self.begin, self.begun = (tracked, before), self.number - 1
            self.mean = Mean()
        begin, begun = self.begin[1], self.begun
        self.mean.add(anchor, self.number)
        mean = self.mean.values()
        if not windowed:
            self.begin = None
        elif record is not None or error is not None:
            self.begin, self.begun = (tracked, after), self.number
            self.mean.jump(0.0 if record is None else record.tau, self.number - begun, begin, after)
        with torch.no_grad():
            for p, value in zip(self.plain.params, after, strict=True):
                p.copy_(value)
        return Step(
            self.number,
            tracked,
            before,
            anchor,
            after,
            calls,
            record,
            error,
            rate,
            begin,
            begun,
            mean,
        )

    def steps(self) -> Iterator[Step]:
        """All steps of the case; of a calibrated run the last stage too."""
        torch.manual_seed(self.seed)
        for _ in range(self.case.steps):
            if not self.can_step:
                return
            yield self.step()
        if self.case.calibrate_lr:
            yield self.finish()


@contextlib.contextmanager
def scaled(optimizer: torch.optim.Optimizer, scale: float) -> Iterator[None]:
    """Learning rates that are multiplied for a step, and the same objects again after it."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * scale if scale != 1 else rate
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


class Schedule:
    """Which steps are followed by a stage, and from where its direction is taken: by the words."""

    def __init__(self, case):
        self.case = case
        self.interval = case.interval
        self.longest = case.interval if case.longer is None else case.interval + case.longer
        if case.calibrate_lr and case.longer is None:
            self.longest = 64
        self.last = case.warmup

    def check(self, step, twins):
        """Whether a stage came just when it was due, and tried points on the right line."""
        case = self.case
        last_one = step.number == case.steps and same(step.before, step.anchor)
        since = step.number - self.last
        if case.calibrate_lr and step.number > case.warmup:
            since = step.number - step.begun
        moved = any(not torch.equal(step.begin[i], step.anchor[i]) for i in step.tracked)
        ran = step.record is not None or step.error is not None
        if not last_one:
            assert ran == (moved and since >= self.interval)
        if not ran:
            return
        self.last = step.number
        if step.record is None:
            return
        steps = since if case.calibrate_lr else 1
        assert step.record.steps == steps
        self._check_line(step, steps)
        if self.longest > case.interval:
            useful = step.record.tau != 0
            if case.calibrate_lr:
                scale, gain = twins.rate()
                useful = gain > 1 and not 0.5 <= scale / step.rate[0] <= 2
            interval = self.interval // 2 if useful else self.interval * 2
            self.interval = min(max(interval, case.interval), self.longest)

    def _check_line(self, step, steps):
        searched = step.searched
        trials = zip(step.record.trials[:searched], step.calls[:searched], strict=False)
        for (tau, _), call in trials:
            for i in step.tracked:
                if tau == 0:
                    assert same([call.values[i]], [step.anchor[i]])
                else:
                    assert is_candidate(call.values[i], step.begin[i], step.anchor[i], tau / steps)


def no_trace(twins: Twins) -> bool:
    """Whether all but the weights is what the twin's plain step has made of it, bit for bit."""
    mine, plain = twins.mine, twins.plain
    assert same([twins.random_states[0]], [twins.random_states[1]]), "random numbers were drawn"
    for p, q in zip(mine.params, plain.params, strict=True):
        assert p.requires_grad == q.requires_grad
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or same([p.grad], [q.grad])
        assert described(mine.optimizer.state[p]) == described(plain.optimizer.state[q])
    assert [m.training for m in mine.net.modules()] == [m.training for m in plain.net.modules()]
    groups = zip(mine.optimizer.param_groups, plain.optimizer.param_groups, strict=True)
    for group, expected in groups:
        ours = {key for key in group if key.startswith("fast_forward")}
        options = {key: group[key] for key in set(group) - ours - {"params"}}
        assert described(options) == described({key: expected[key] for key in options})
        assert set(options) | {"params"} == set(expected)
    return True


def described(values: dict[Any, Any]) -> dict[Any, Any]:
    """The values as what can be compared: tensors by their bits, NaN equal to itself."""
    return {
        key: (value.dtype, value.shape, bits(value)) if isinstance(value, Tensor) else repr(value)
        for key, value in values.items()
    }


def lowest(calls: list[Call]) -> Call | None:
    """The first of the calls with the lowest finite loss; None if no loss is finite."""
    finite = [call for call in calls if math.isfinite(call.loss)]
    return min(finite, key=lambda call: call.loss) if finite else None


def is_candidate(value: Tensor, before: Tensor, anchor: Tensor, multiple: float) -> bool:
    """Whether a value is ``anchor + multiple * (anchor - before)`` up to rounding.

    With u half a unit in the last place of the type that is computed in (float32 for the 16-bit
    types, else the tensor's own), d = anchor - before and c the exact candidate, the error is at
    most

        half a unit in the last place of the tensor's type at c
        + u * (1 + 4 * |multiple|) * |d|:

    the difference, its multiple and their product are rounded, each by u of at most
    (1 + |multiple|) * |d|, and the sum is rounded to c. A tenth more is for products of roundings,
    and for the reference's own in float64.
    """
    wide = torch.float32 if value.dtype in (torch.bfloat16, torch.float16) else value.dtype
    u = torch.finfo(wide).eps / 2
    old, new, found = before.double(), anchor.double(), value.double()
    direction = new - old
    exact = new + multiple * direction
    information = torch.finfo(value.dtype)
    half_unit = exact.abs() * information.eps / 2 + information.smallest_normal * information.eps
    error = half_unit + u * (exact.abs() + (1 + 4 * abs(multiple)) * direction.abs())
    known = exact.isfinite() & (exact.abs() + 1.1 * error < information.max)
    return bool(((found - exact).abs() <= 1.1 * error)[known].all())
