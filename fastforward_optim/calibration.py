"""Calibration: what a stage measures, fed back into the learning rate.

The law is a pure function of numbers (:func:`calibrate`); the tensors that it needs between stages
are in :class:`Window`. Knows nothing of ``torch.optim``, modules or frameworks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .history import LARGEST, StageRecord
from .line_search import FLAT, LineSearch, TwoSidedSearch, estimate_minimum
from .sharded import is_sharded, like, part_of
from .stage import Stage, Trial, copies, grouped

# The rate is multiplied by a power of how much further than the steps went the loss is lowest. The
# first power would keep the rate near the one that is best for the next few steps alone: high
# curvature ends a line search long before it ends the progress of many steps.
GAIN = 4.0
# Where the loss is lowest, in windows from the last iterate, at a rate that is too low and at one
# that is too high. A good one is a little too high for the next few steps: it makes more progress
# over many, and the mean takes its noise out. Much more than that, and it becomes unstable.
TOO_LOW = -0.05
TOO_HIGH = -0.12
# Limits of one stage's factor: a raise of this many times the distance found, of this much in
# all (of STEEPEST after a raise of more than that, until it has proved itself), and a cut to this
# part.
STEEPEST = 4.0
HIGHEST = 1000.0
LOWEST = 0.4
# A raise of more than CAUTIOUS needs a decrease of the loss by more than this part.
CLEAR = 0.01
CAUTIOUS = 2.0
# A loss that is lowest behind the last iterate says that the rate is too high after about this
# many steps. After fewer, noise outweighs progress at any good rate. After many more it does so
# again, where there is not much to learn any more, and there a lower rate makes it no better: a
# run that believed it would come to a halt.
TRUSTED = 24
# The rate is cut by this much at least where the mean of the iterates is better than the last one.
AVERAGED = 0.9
# After many steps the rate is cut by this much where they have made no visible progress.
NO_PROGRESS = 0.5
# The mean of the iterates is over about an eighth of the steps since the last jump, at most
# over these.
HORIZON = 32
# Distance of the first trials, in windows.
REACH = 0.25
# Furthest trial, in windows.
FURTHEST = 4096.0
# Where the mean is better by this part of the loss, the run has blown up on the way: the weights
# from before it are tried too.
BLOWN_UP = 0.1


class Outcome(NamedTuple):
    """What a calibrated stage found.

    Attributes:
        tau: multiple of the mean step that was committed; 0.0 if the mean was.
        trials: pairs (tau, loss).
        loss: at the weights that it left.
        mean_loss: loss at the mean of the iterates; None if it was not tried.
        averaged: whether the weights were left at that mean.
    """

    tau: float
    trials: tuple[Trial, ...]
    loss: float
    mean_loss: float | None
    averaged: bool

    def record(self, *, step: int, seconds: float, steps: int, lr_scale: float) -> StageRecord:
        """What goes into the history."""
        return StageRecord(
            step=step,
            tau=self.tau,
            trials=self.trials,
            loss_before=dict(self.trials).get(0.0, math.nan),
            loss_after=self.loss,
            seconds=seconds,
            steps=steps,
            mean_loss=self.mean_loss,
            averaged=self.averaged,
            lr_scale=lr_scale,
        )


class Rate(NamedTuple):
    """The multiplier of the learning rate, and how it has been changing.

    Attributes:
        scale: what the learning rate is multiplied by.
        gain: power with which the next stage's finding is applied.
        last: logarithm of the last stage's factor.
    """

    scale: float = 1.0
    gain: float = GAIN
    last: float = 0.0

    @property
    def is_steep(self) -> bool:
        """Whether the last stage raised the rate by more than ``STEEPEST``."""
        return self.last > math.log(STEEPEST)


def verdict(trials: Sequence[Trial], steps: int) -> float | None:
    """How much further than the last steps went the loss is lowest, as a part of their distance.

    Args:
        trials: pairs (tau, loss) of a stage, with tau in mean steps.
        steps: number of steps since the last stage.

    Returns:
        0.0 for "just right", 1.0 for "twice as far", -0.5 for "half as far"; None if the trials
        do not tell.
    """
    # A line search of the user's may have tried a point twice, or not tau = 0.
    losses = dict(trials)
    if 0.0 not in losses:
        return None
    ahead = estimate_minimum(losses.items())
    if ahead is None:
        return None
    start = losses[0.0]
    if ahead > 0 and any(tau < 0 and loss < start for tau, loss in trials):
        return None  # lower on both sides: noise
    if ahead > steps and not _gain(trials) > FLAT:  # so is the lowest point of a plateau
        return None
    return max(ahead / steps, -1.0)


def _at_zero(trials: Sequence[Trial]) -> float:
    """The loss at the last iterate; NaN if it is not known."""
    return dict(trials).get(0.0, math.nan)


def _gain(trials: Sequence[Trial]) -> float:
    """How much lower the lowest loss is than the one at the start, as a part of that."""
    start = _at_zero(trials)
    lowest = min(loss for _, loss in trials if math.isfinite(loss))
    return (start - lowest) / abs(start) if start else 0.0


def calibrate(rate: Rate, outcome: Outcome, steps: int) -> Rate:
    """The rate after a stage.

    Args:
        rate: the one before it.
        outcome: what the stage found.
        steps: number of steps since the stage before it.
    """
    gain, averaged = rate.gain, outcome.averaged
    ahead = verdict(outcome.trials, steps)
    trust = min(steps / TRUSTED, (TRUSTED / steps) ** 2)
    if ahead is None:
        factor = 0.5 if averaged else 1.0
    else:
        factor = 1.0
        if ahead > TOO_LOW:
            ratio = (1 + ahead) / (1 + TOO_LOW)
            limit = STEEPEST if rate.is_steep else HIGHEST
            if not _gain(outcome.trials) > CLEAR:
                limit = CAUTIOUS
            factor = min(ratio**gain, STEEPEST * ratio, limit)
        elif ahead < TOO_HIGH:
            factor = max(((1 + ahead) / (1 + TOO_HIGH)) ** (gain * trust), LOWEST)
        if averaged:
            factor = min(factor, AVERAGED**trust)
    start, last = dict(outcome.trials).get(-steps), _at_zero(outcome.trials)
    if start is not None:
        if not last <= start + BLOWN_UP * abs(start):
            factor = min(factor, LOWEST)
        if not outcome.loss < start - FLAT * abs(start):
            factor = min(factor, math.exp(-rate.last) if rate.is_steep else NO_PROGRESS)
    # Kesten's rule: as long as the sign stays the same the rate is far off; when it changes, the
    # rate has been passed, and the changes get smaller.
    change = math.log(factor)
    if change * rate.last < 0:
        gain = max(1.0, gain / 2)
    return Rate(rate.scale * factor, gain, change or rate.last)


def is_far_off(before: Rate, after: Rate) -> bool:
    """Whether the rate should be looked at again soon.

    That is where it has changed much, but not any more once the changes are small because their
    sign has changed twice: what is left then is noise, and it would cost a stage each time.
    """
    return after.gain > 1 and not 0.5 <= after.scale / before.scale <= 2


def two_sided(steps: int) -> TwoSidedSearch:
    """The search after so many steps, of which the mean is the direction."""
    return TwoSidedSearch(REACH * steps, steps, FURTHEST * steps)


class Window:
    """The iterates since the last stage: where they began, and their mean.

    Memory: two copies of the tensors (the mean of 16-bit ones in float32). Time: one multi-tensor
    kernel a step.

    Attributes:
        steps: real steps taken since the window was opened.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._age = 0  # steps that the mean has seen
        self._tensors: list[Tensor] = []
        self._cached: list[list[Tensor]] | None = None
        self._start: list[list[Tensor]] = []
        self._mean: list[list[Tensor]] = []

    def open(self, tensors: Sequence[Tensor]) -> None:
        """Begin at the present values, unless the window is open for just these tensors."""
        if self._is_of(tensors):
            return
        self.steps = self._age = 0
        self._tensors = []  # until all is there: Ctrl-C in between leaves it closed
        # FSDP2 replaces its parameters' local parts, on saving for one.
        self._cached = None if any(map(is_sharded, tensors)) else grouped(tensors)
        self._start = copies(grouped(tensors))
        self._mean = [_wide(group) for group in self._start]
        self._tensors = list(tensors)

    def _is_of(self, tensors: Sequence[Tensor]) -> bool:
        return len(tensors) == len(self._tensors) and all(
            new is old for new, old in zip(tensors, self._tensors, strict=True)
        )

    @property
    def _groups(self) -> list[list[Tensor]]:
        return grouped(self._tensors) if self._cached is None else self._cached

    def add(self) -> None:
        """Take the present values into the mean: a step is over."""
        self.steps += 1
        self._age += 1
        weight = max(8 / (self._age + 7), 1 / HORIZON)
        with torch.no_grad():
            for mean, group in zip(self._mean, self._groups, strict=True):
                if self._age == 1:  # whatever was there, also NaN
                    torch._foreach_copy_(mean, group)
                else:
                    torch._foreach_lerp_(mean, _as(mean, group), weight)

    def stage(self) -> Stage:
        """A stage along the mean step since the window was opened."""
        return Stage(self._tensors, before=self._start, steps=self.steps)

    def search(
        self,
        stage: Stage,
        val_fn: Callable[[], Any],
        line_search: LineSearch,
        last_tau: float,
        final: bool,
        doubtful: bool,
    ) -> Outcome:
        """Run a stage: along the mean step, and to the mean of the iterates.

        The mean is tried where the loss is lowest behind the last iterate or unknown there, and in
        a ``final`` stage, but not where it is lowest far ahead. Then the values from the window's
        begin are tried too, after many steps or where the rate is ``doubtful``.
        """
        steps = self.steps
        tau, trials = stage.search(val_fn, line_search, last_tau)
        losses = dict(trials)
        loss = losses.get(tau, math.nan)
        ahead = verdict(trials, steps)
        if tau > REACH * steps or not (final or ahead is None or ahead < 0):
            return Outcome(tau, trials, loss, None, False)

        mean_loss = stage.measure(val_fn, self._mean)
        averaged = _is_better(mean_loss, loss)
        # The mean of a run that has blown up is not much of a remedy: what about before it?
        blown_up = averaged and not mean_loss > (1 - BLOWN_UP) * loss
        if averaged:
            tau, loss = 0.0, mean_loss
        if -steps not in losses and (blown_up or doubtful or steps > TRUSTED):
            start_loss = stage.measure(val_fn, self._start)
            trials += ((-float(steps), start_loss),)
            if _is_better(start_loss, loss):
                tau, loss, averaged = -float(steps), start_loss, False
        if averaged:
            stage.put(self._mean)
        else:
            stage.write(tau)
        return Outcome(tau, trials, loss, mean_loss, averaged)

    def restart(self, tau: float) -> None:
        """Begin anew at the present values, which a stage has left.

        The mean of the iterates goes on, and moves along, unless the stage went far.

        Args:
            tau: how far the stage went; 0.0 also if it left the tensors at the mean.
        """
        if tau > self.steps or tau == -self.steps:
            self._age = 0
        elif tau != 0:
            part = tau / (self.steps + tau)
            with torch.no_grad():
                for mean, group, start in zip(self._mean, self._groups, self._start, strict=True):
                    torch._foreach_add_(mean, _as(mean, group), alpha=part)
                    torch._foreach_add_(mean, _as(mean, start), alpha=-part)
        with torch.no_grad():
            for start, group in zip(self._start, self._groups, strict=True):
                torch._foreach_copy_(start, group)
        self.steps = 0

    def state_dict(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """Numbers, and copies in the order of the tensors, which are those that are tracked.

        Before the first step there are copies too: distributed checkpointing loads into them.
        Where tensors have been frozen since the last step, the next one begins anew.
        """
        if not self._is_of(tensors):
            window = Window()
            window.open(tensors)
            return window.state_dict(tensors)
        return {
            "steps": self.steps,
            "age": self._age,
            "start": [like(copy.clone(), of) for of, copy in self._in_order(self._start)],
            "mean": [like(copy.clone(), of) for of, copy in self._in_order(self._mean)],
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], tensors: Sequence[Tensor]) -> Window:
        """A window as it was saved, for tensors of the same shapes.

        Raises:
            ValueError: it was saved for others, or is damaged.
        """
        window = cls()
        unique = list({id(tensor): tensor for tensor in tensors}.values())
        shapes = [tuple(tensor.shape) for tensor in unique]
        try:
            steps, age = (_count(state[name]) for name in ("steps", "age"))
            saved = {name: list(state[name]) for name in ("start", "mean")}
            found = {name: [tuple(t.shape) for t in values] for name, values in saved.items()}
            dtypes = [tensor.dtype for tensor in saved["start"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"the calibration in the state dict is damaged: {error!r}") from error
        if not found["start"] == found["mean"] == shapes:
            if not (steps or found["start"] or found["mean"]):  # saved before the first step
                return window
            raise ValueError(
                f"the calibration in the state dict is of {len(found['start'])} tensors, this "
                f"optimizer trains {len(shapes)}, or their shapes differ; load it into an "
                "optimizer of the same model and adapter"
            )
        if dtypes != [tensor.dtype for tensor in unique] or not all(
            tensor.is_floating_point() for tensor in saved["mean"]
        ):
            raise ValueError(
                f"the calibration in the state dict is of {_names(dtypes)}, this optimizer trains "
                f"{_names(tensor.dtype for tensor in unique)}; load it into a model of that dtype"
            )
        window.open(tensors)
        window.steps, window._age = steps, age
        for name, groups in (("start", window._start), ("mean", window._mean)):
            for (tensor, copy), value in zip(window._in_order(groups), saved[name], strict=True):
                copy.copy_(part_of(value, tensor))
        return window

    def _in_order(self, groups: list[list[Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """The tracked tensors, each once, with what ``groups`` holds of them."""
        of_kind = {
            (parts[0].device, parts[0].dtype): iter(copied)
            for parts, copied in zip(self._groups, groups, strict=True)
        }
        unique = {id(tensor): tensor for tensor in self._tensors}.values()
        return [(tensor, next(of_kind[tensor.device, tensor.dtype])) for tensor in unique]


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted({str(dtype) for dtype in dtypes}))


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise ValueError(f"{value!r} is no number of steps")
    return value


def _is_better(loss: float, than: float) -> bool:
    # Of two that are not finite neither is: as in a line search, all of them are worst.
    return math.isfinite(loss) and (loss < than or not math.isfinite(than))


def _wide(group: list[Tensor]) -> list[Tensor]:
    """Copies in which a mean does not drown in rounding: float32 for the 16-bit types."""
    narrow = group[0].dtype in (torch.bfloat16, torch.float16)
    return [tensor.float() if narrow else tensor.clone() for tensor in group]


def _as(like: list[Tensor], group: list[Tensor]) -> list[Tensor]:
    """The tensors in the dtype of ``like``; the same ones if they have it."""
    dtype = like[0].dtype
    return group if group[0].dtype == dtype else [tensor.to(dtype) for tensor in group]
