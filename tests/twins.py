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
from fastforward_optim.calibration import Phase
from fastforward_optim.record import StageRecord

from .conftest import UNCLIPPED, bits, same
from .problems import Call, Case, Problem, ValFn


@dataclass
class Step:
    """A step of the run with stages, beside the same step of its twin.

    Attributes:
        number: counted from 1.
        tracked: indices of the tensors that the stage may move.
        before, anchor, after: values before the step, after the twin's, and in the end.
        back: values that a check of a calibrated run goes back to, in float64: the mean of the
            window before, or where the first one began; and the largest that they are made of.
        calls: of the validation function, if a stage ran.
        record: of the stage.
        error: what was raised.
    """

    number: int
    tracked: list[int]
    before: list[Tensor]
    anchor: list[Tensor]
    after: list[Tensor]
    calls: list[Call]
    record: StageRecord | None
    error: BaseException | None
    back: list[tuple[Tensor, float]]

    def is_back(self) -> bool:
        """Whether the weights are there up to rounding: of theirs, and of some steps in float32."""
        for i in self.tracked:
            (mean, largest), value = self.back[i], self.after[i].double()
            error = (value - mean).abs()[value.isfinite() & mean.isfinite()]
            if (error > (torch.finfo(self.after[i].dtype).eps + 1e-5) * largest).any():
                return False
        return True


class Windows:
    """The iterates of a calibrated run, in float64, and what lies behind them."""

    def __init__(self) -> None:
        self.tracked: list[int] = []
        self.back: list[Tensor] = []
        self.iterates: list[list[Tensor]] = []
        self.largest: list[float] = []

    def open(self, tracked: list[int], values: list[Tensor]) -> None:
        """Begin anew if other tensors are tracked."""
        if tracked != self.tracked:
            self.tracked = tracked
            self.restart(values)

    def restart(self, values: list[Tensor]) -> None:
        """Begin where the weights are, without a mean behind."""
        self.back, self.iterates = [value.double() for value in values], []
        self.largest = [0.0] * len(values)
        self._see(values)

    def add(self, values: list[Tensor]) -> None:
        """Take in an iterate."""
        self.iterates.append([value.double() for value in values])
        self._see(values)

    def next(self) -> None:
        """Put the mean behind."""
        self.back = [torch.stack(each).mean(0) for each in zip(*self.iterates, strict=True)]
        self.iterates = []

    def _see(self, values: list[Tensor]) -> None:
        for place, value in enumerate(values):
            finite = value[value.isfinite()]
            if finite.numel():
                self.largest[place] = max(self.largest[place], float(finite.double().abs().max()))


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
            calibrate_lr=UNCLIPPED if case.calibrate_lr else False,
            max_interval=longest,
            line_search=None if case.search is None or case.calibrate_lr else search,
            warmup=case.warmup,
            on_stage=self.reported.append,
        )
        self.number = 0
        self.windows = Windows()
        self.random_states: tuple[Tensor, Tensor]

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
        before, scale = self.mine.values(), self.optimizer.lr_scale
        state = torch.get_rng_state()
        with scaled(self.plain.optimizer, scale):
            self.plain.step(self.plain.optimizer, self.number)
        expected_state = torch.get_rng_state()
        torch.set_rng_state(state)
        observed = self._observe(lambda: self.mine.step(self.optimizer, self.number), before)
        self.random_states = expected_state, torch.get_rng_state()
        return observed

    def finish(self) -> Step:
        """The run's last stage."""
        before, state = self.mine.values(), torch.get_rng_state()
        observed = self._observe(self.optimizer.finish, before, final=True)
        self.random_states = state, torch.get_rng_state()
        return observed

    def _observe(self, act: Callable[[], Any], before: list[Tensor], final: bool = False) -> Step:
        anchor = self.plain.values()
        probing = self.optimizer.param_groups[0].get("fast_forward_lr_phase") == Phase.PROBE
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
        self.windows.open(tracked, before)
        if not final:
            self.windows.add(anchor)
        back = list(zip(self.windows.back, self.windows.largest, strict=True))
        if record is not None and record.kind == "check" and not record.tau:
            self.windows.next()
        elif (
            record is not None
            or error is not None
            or (not probing and self.number <= self.case.warmup)
        ):
            self.windows.restart(after)
        with torch.no_grad():
            for p, value in zip(self.plain.params, after, strict=True):
                p.copy_(value)
        return Step(self.number, tracked, before, anchor, after, calls, record, error, back)

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
    """Which steps of a run without calibration are followed by a stage, by the words."""

    def __init__(self, case):
        self.case = case
        self.interval = case.interval
        self.longest = math.inf if case.longer is None else case.interval + case.longer
        self.last = case.warmup

    def check(self, step):
        """Whether a stage came just when it was due, and tried points on the right line."""
        since = step.number - self.last
        moved = any(not torch.equal(step.before[i], step.anchor[i]) for i in step.tracked)
        ran = step.record is not None or step.error is not None
        assert ran == (moved and since >= self.interval)
        if not ran:
            return
        self.last = step.number
        if step.record is None:
            return
        assert step.record.steps == 1
        check_line(step, step.before, 1)
        interval = self.interval // 2 if step.record.tau else self.interval * 2
        self.interval = min(max(interval, self.case.interval), self.longest)


def check_line(step, begin, steps):
    """Whether what was measured lies on the line of the steps."""
    for (tau, _), call in zip(step.record.trials, step.calls, strict=False):
        for i in step.tracked:
            if tau == 0:
                assert same([call.values[i]], [step.anchor[i]])
            else:
                assert is_candidate(call.values[i], begin[i], step.anchor[i], tau / steps)


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
