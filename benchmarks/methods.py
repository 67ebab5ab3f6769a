"""The methods that ``python -m benchmarks compare`` knows."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from io import StringIO
from typing import Any

from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from fastforward_optim import BracketSearch, FastForward, RepeatSearch, ValidationLoss

from .reference import ReferenceTrainer
from .runner import Comparison, Method, Result, Stage, Trainer

WARMUP = 0.1
"""Part of the budget over which the learning rate rises, where it does."""

FINAL_TRIALS = 6
"""What the last stage of a calibrated run may cost, in trials."""

Build = Callable[[Comparison, Result], Trainer]


def adamw(comparison: Comparison, result: Result) -> Trainer:
    """AdamW with torch's defaults and a constant rate."""
    return Trainer(AdamW(comparison.parameters, lr=result.lr))


def adamw_linear(comparison: Comparison, result: Result) -> Trainer:
    """AdamW with a warm-up and a linear decay to zero."""
    optimizer = AdamW(comparison.parameters, lr=result.lr)
    return Trainer(optimizer, linear_decay(optimizer, comparison, result, warmup=WARMUP))


def linear_decay(
    optimizer: Optimizer, comparison: Comparison, result: Result, *, warmup: float
) -> LambdaLR:
    """Linear from the end of the warm-up to zero at the end of the budget.

    The clock is the cost spent, in plain steps: where stages take a part of it, there are fewer
    steps, and the rate still ends at zero.
    """
    total = comparison.setting.budget_steps
    rising = int(warmup * total)

    def factor(_: int) -> float:
        spent = result.flops / comparison.costs.step
        return (spent + 1) / rising if spent < rising else (total - spent) / (total - rising)

    return LambdaLR(optimizer, factor)


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
        if self.passes >= self.room:
            return math.inf
        self.passes += 1
        return self.val_fn()

    def new_stage(self) -> None:
        """Take the next examples, if they are not fixed."""
        self.val_fn.new_stage()
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
        adamw = AdamW(comparison.parameters, lr=result.lr)
        interval = comparison.setting.interval
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
    """The same with ``calibrate_lr``, and one last stage at the end.

    The reserve for it is also what a stage at the last step is paid from; then there is nothing
    left to be done at the end.
    """

    reserve = FINAL_TRIALS

    def finish(self, room: int) -> list[Stage]:
        """The last stage, if there was a step since the one before."""
        return self.staged(self.optimizer.finish, room)


def fast_forward(**options: Any) -> Build:
    """AdamW in a ``FastForward`` on the fixed validation examples."""

    def build(comparison: Comparison, result: Result) -> Trainer:
        return FastForwardTrainer(comparison, result, comparison.validation, options)

    return build


def calibrated(*, fixed: bool = False, linear: bool = False, **options: Any) -> Build:
    """AdamW in a ``FastForward`` that calibrates the rate, and perhaps a decay around it."""

    def build(comparison: Comparison, result: Result) -> Trainer:
        val_fn = comparison.validation if fixed else comparison.pooled_validation()
        trainer = CalibratedTrainer(comparison, result, val_fn, options | {"calibrate_lr": True})
        if linear:
            trainer.scheduler = linear_decay(trainer.optimizer, comparison, result, warmup=0)
        return trainer

    return build


def prodigy(*, cosine: bool) -> Build:
    """Prodigy, as its README advises: without a schedule, or with a cosine one."""

    def build(comparison: Comparison, result: Result) -> Trainer:
        from prodigyopt import Prodigy

        with redirect_stdout(StringIO()):  # it prints which weight decay it uses
            optimizer = Prodigy(
                comparison.parameters,
                lr=result.lr,
                use_bias_correction=True,
                safeguard_warmup=True,
                weight_decay=0.01,
            )
        total = int(comparison.setting.budget_steps)
        return Trainer(optimizer, CosineAnnealingLR(optimizer, total) if cosine else None)

    return build


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

    return Trainer(
        create_loraplus_optimizer(comparison.model, AdamW, lr=result.lr, loraplus_lr_ratio=16)
    )


_ALL = (
    Method("adamw", "AdamW, constant rate.", adamw, trains_on_pool=True),
    Method(
        "adamw-linear",
        "AdamW, warm-up over a tenth of the budget, then linear to zero.",
        adamw_linear,
        trains_on_pool=True,
    ),
    Method("reference", "The authors' rule as their code behaves.", ReferenceTrainer),
    Method("repeat", "RepeatSearch, the paper's rule.", fast_forward(line_search=RepeatSearch())),
    Method("bracket", "BracketSearch, the default.", fast_forward(line_search=BracketSearch())),
    Method(
        "bracket-adaptive",
        "BracketSearch, stages up to 64 steps apart.",
        fast_forward(line_search=BracketSearch(), max_interval=64),
    ),
    Method("calibrated", "calibrate_lr on fresh examples out of the pool.", calibrated()),
    Method("calibrated-fixed", "The same on fixed examples.", calibrated(fixed=True)),
    Method(
        "calibrated-bracket",
        "calibrate_lr with BracketSearch.",
        calibrated(line_search=BracketSearch()),
    ),
    Method("calibrated-linear", "calibrate_lr, rate linear to zero.", calibrated(linear=True)),
    Method(
        "prodigy",
        "Prodigy, lr 1, no schedule.",
        prodigy(cosine=False),
        trains_on_pool=True,
        has_rate=False,
        package="prodigyopt",
    ),
    Method(
        "prodigy-cosine",
        "Prodigy, lr 1, cosine schedule.",
        prodigy(cosine=True),
        trains_on_pool=True,
        has_rate=False,
        package="prodigyopt",
    ),
    Method(
        "schedulefree",
        "Schedule-Free AdamW, warm-up over a tenth of the budget.",
        ScheduleFreeTrainer,
        trains_on_pool=True,
        package="schedulefree",
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
