"""The methods that ``python -m benchmarks compare`` knows.

Each takes the schedule of its run from the ``Result``.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch.optim import AdamW, Optimizer

from fastforward_optim import BracketSearch, FastForward, RepeatSearch, ValidationLoss
from fastforward_optim.search.evidence import Measurement

from ..comparison.comparison import Comparison
from .reference import ReferenceTrainer
from .schedules import CONSTANT, WARMUP, scheduler, warmup_steps
from .trainer import Method, Result, Stage, Trainer

FINAL_TRIALS = 4
"""What a check after the last step of a calibrated run and its end may cost, in trials."""

MEAN = 0.1
"""Part of the budget that the mean of the iterates looks back over."""

Build = Callable[[Comparison, Result], Trainer]


def new_adamw(comparison: Comparison, result: Result) -> AdamW:
    """AdamW with torch's defaults, in one kernel where there is one."""
    fused = comparison.device.type == "cuda"
    return AdamW(comparison.parameters, lr=result.lr, fused=fused)


def scheduled(trainer: Trainer, comparison: Comparison, result: Result) -> Trainer:
    """The trainer, with the schedule that the run has."""
    trainer.scheduler = scheduler(
        result.schedule,
        trainer.optimizer,
        comparison.setting.budget_steps,
        lambda: result.flops / comparison.costs.step,
    )
    return trainer


def adamw(comparison: Comparison, result: Result) -> Trainer:
    """AdamW with torch's defaults."""
    return scheduled(Trainer(new_adamw(comparison, result)), comparison, result)


class MeanTrainer(Trainer):
    """AdamW; the weights to report on are an exponential mean of the iterates.

    The mean looks back over the last tenth of the budget; before that much has been spent, it is
    the mean of all iterates.
    """

    reports_mean = True

    def __init__(self, comparison: Comparison, result: Result) -> None:
        super().__init__(new_adamw(comparison, result))
        self.parameters = comparison.parameters
        self.mean = [p.detach().clone() for p in self.parameters]
        self.steps = 0
        self.span = max(1.0, MEAN * comparison.setting.budget_steps)

    def step(self, room: int) -> list[Stage]:
        """A step, which goes into the mean."""
        self.optimizer.step()
        self.steps += 1
        with torch.no_grad():
            torch._foreach_lerp_(self.mean, self.parameters, max(1 / self.steps, 1 / self.span))
        return []

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """With the mean in place of the weights."""
        with torch.no_grad():
            last = [p.clone() for p in self.parameters]
            torch._foreach_copy_(self.parameters, self.mean)
            yield
            torch._foreach_copy_(self.parameters, last)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's, the mean, and of how many steps it is."""
        return super().state_dict() | {"mean": self.mean, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        super().load_state_dict(state)
        self.steps = state["steps"]
        for tensor, saved in zip(self.mean, state["mean"], strict=True):
            tensor.copy_(saved)


class Metered:
    """A ``val_fn`` that counts its passes, and makes no more than there is room for.

    After that it is infinite, which no stage goes to: the stage ends with what it has found.

    Args:
        val_fn: what it meters.
        watch: taken before each stage, uncharged, if it is given.
    """

    def __init__(self, val_fn: ValidationLoss, watch: ValidationLoss | None = None) -> None:
        self.val_fn = val_fn
        self.watch = watch
        self.watched = math.nan
        self.room = 0
        self.passes = 0

    def __call__(self) -> float:
        """The loss, if there is room to measure it."""
        return self.measure().loss

    def measure(self) -> Measurement:
        """The same with the losses of the rows."""
        if self.passes >= self.room:
            return Measurement(math.inf, 1.0)
        self.passes += 1
        return self.val_fn.measure()

    def new_stage(self) -> None:
        """Take the next examples, if they are not fixed."""
        self.val_fn.new_stage()

    def check(self) -> None:
        """Let it try its forward, if it has not yet."""
        self.val_fn.check()
        if self.watch is not None:
            self.watched = self.watch()

    def measuring(self) -> AbstractContextManager[None]:
        """What the library is in for the length of a stage."""
        return self.val_fn.measuring()

    def state_dict(self) -> dict[str, int]:
        """Which examples are next."""
        return self.val_fn.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.val_fn.load_state_dict(state)


class FastForwardTrainer(Trainer):
    """AdamW in a ``FastForward``."""

    def __init__(
        self, comparison: Comparison, result: Result, val_fn: ValidationLoss, options: Any
    ) -> None:
        watch = comparison.test if comparison.setting.test_stages else None
        self.meter = Metered(val_fn, watch)
        interval = comparison.setting.interval
        adamw = new_adamw(comparison, result)
        super().__init__(FastForward(adamw, self.meter, interval, **options))

    def step(self, room: int) -> list[Stage]:
        """A step, with its stage if one is due and there is room for it."""
        if room < 2:
            self.optimizer.optimizer.step()
            return []
        return self.staged(self.optimizer.step, room)

    def staged(self, act: Callable[[], Any], room: int) -> list[Stage]:
        """Do what may run a stage; return its record."""
        self.meter.room, self.meter.passes = room, 0
        seen = len(self.optimizer.history)
        act()
        records = self.optimizer.history[seen:]
        more: Stage = {"passes": self.meter.passes}
        if records and self.meter.watch is not None:
            more |= {"test_before": self.meter.watched, "test_after": self.meter.watch()}
        return [record.to_dict() | more for record in records]


class CalibratedTrainer(FastForwardTrainer):
    """The same with ``calibrate_lr``: as its users are told to, to ``finish`` at the end.

    Without a decay, evaluations before the end are of the mean of the iterates.
    """

    reserve = FINAL_TRIALS

    def __init__(self, comparison: Comparison, result: Result) -> None:
        total = comparison.setting.budget_steps
        options: dict[str, Any] = {
            "calibrate_lr": True,
            "warmup": warmup_steps(result.schedule, total),
        }
        if result.schedule != CONSTANT:
            options["total_steps"] = int(total)
        self.evaluates_mean = result.schedule == CONSTANT
        super().__init__(comparison, result, comparison.pooled_validation(), options)

    def finish(self, room: int) -> list[Stage]:
        """Leave the weights at the better end, the last iterate or the mean."""
        self.evaluates_mean = False
        return self.staged(self.optimizer.finish, room)

    def evaluating(self) -> AbstractContextManager[Any]:
        """At a constant rate with the mean in place of the weights, until the end."""
        mean: AbstractContextManager[Any] = (
            self.optimizer.averaged() if self.evaluates_mean else nullcontext()
        )
        return mean


def calibrated(comparison: Comparison, result: Result) -> Trainer:
    """AdamW in a ``FastForward`` that calibrates the rate, on fresh examples at each stage."""
    return scheduled(CalibratedTrainer(comparison, result), comparison, result)


def fast_forward(*, fixed_interval: bool = False, **options: Any) -> Build:
    """AdamW in a ``FastForward`` on the fixed validation examples."""

    def build(comparison: Comparison, result: Result) -> Trainer:
        more = {"warmup": warmup_steps(result.schedule, comparison.setting.budget_steps)}
        if fixed_interval:
            more["max_interval"] = comparison.setting.interval
        trainer = FastForwardTrainer(comparison, result, comparison.validation, options | more)
        return scheduled(trainer, comparison, result)

    return build


def reference(comparison: Comparison, result: Result) -> Trainer:
    """AdamW with the authors' stages."""
    return scheduled(ReferenceTrainer(comparison, result), comparison, result)


def prodigy(comparison: Comparison, result: Result) -> Trainer:
    """Prodigy, with the options that its README advises."""
    from prodigyopt import Prodigy

    with redirect_stdout(StringIO()):  # it prints which weight decay it uses
        optimizer = Prodigy(
            comparison.parameters,
            lr=result.lr,
            use_bias_correction=True,
            safeguard_warmup=True,
            weight_decay=0.01,
        )
    return scheduled(Trainer(optimizer), comparison, result)


class ScheduleFreeTrainer(Trainer):
    """Schedule-Free AdamW; the weights to report on are its average, not those it trains at."""

    def __init__(self, comparison: Comparison, result: Result) -> None:
        from schedulefree import AdamWScheduleFree

        warmup = int(WARMUP * comparison.setting.budget_steps)
        super().__init__(
            AdamWScheduleFree(comparison.parameters, lr=result.lr, warmup_steps=warmup)
        )
        self.optimizer.train()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """With the average in place of the weights."""
        self.optimizer.eval()
        yield
        self.optimizer.train()


def loraplus(comparison: Comparison, result: Result) -> Trainer:
    """LoRA+ of PEFT: AdamW with another rate for the matrices B."""
    from peft.optimizers import create_loraplus_optimizer

    optimizer: Optimizer = create_loraplus_optimizer(
        comparison.model,
        AdamW,
        lr=result.lr,
        loraplus_lr_ratio=16,
        fused=comparison.device.type == "cuda",
    )
    return scheduled(Trainer(optimizer), comparison, result)


_ALL = (
    Method("adamw", "AdamW.", adamw, trains_on_pool=True),
    Method(
        "adamw-mean",
        "AdamW, exponential mean of the iterates over the last tenth of the budget.",
        MeanTrainer,
        trains_on_pool=True,
        schedules=(CONSTANT,),
    ),
    Method("reference", "The authors' rule as their code behaves.", reference),
    Method(
        "repeat",
        "RepeatSearch at a fixed interval, the paper's rule.",
        fast_forward(fixed_interval=True, line_search=RepeatSearch()),
    ),
    Method("bracket", "BracketSearch, the default.", fast_forward(line_search=BracketSearch())),
    Method("calibrated", "calibrate_lr on fresh examples out of the pool.", calibrated),
    Method(
        "prodigy",
        "Prodigy, lr 1, without a schedule or with a cosine one, as its README advises.",
        prodigy,
        trains_on_pool=True,
        has_rate=False,
        package="prodigyopt",
        schedules=(CONSTANT, "cosine"),
    ),
    Method(
        "schedulefree",
        f"Schedule-Free AdamW, warm-up over {WARMUP:.0%} of the budget.",
        ScheduleFreeTrainer,
        trains_on_pool=True,
        package="schedulefree",
        schedules=(CONSTANT,),
    ),
    Method("loraplus", "LoRA+, ratio 16, on AdamW.", loraplus, trains_on_pool=True),
)
METHODS = {method.name: method for method in _ALL}


def check_installed(methods: list[Method]) -> None:
    """Exit in one line if a package that one of them needs is missing."""
    packages = {method.package for method in methods if method.package}
    missing = sorted(p for p in packages if importlib.util.find_spec(p) is None)
    if missing:
        raise SystemExit(f"missing packages: run `pip install {' '.join(missing)}`")
