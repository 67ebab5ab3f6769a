"""Warn about mistakes that show during a run, once each.

Reads the optimizer's numbers and records, and changes nothing. A mistake gives a warning
(``warnings.warn``) that names the cause and the remedy. Messages that depend on the clock go to the
log.
"""

from __future__ import annotations

import functools
import logging
import math
import time
import warnings
import weakref
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..calibration import ASCENT, UNCHANGED, Calibrator
from ..record import StageRecord
from ..search.line_search import FLAT
from .callers import level_of_the_caller

logger = logging.getLogger(__name__)

# Log a message if stages take more than this part of the time, over at least this many steps.
_COSTLY, _SETTLED = 0.1, 100
# This many steps in a row with a rising rate count as a warm-up.
_RISES = 3
# This many points in a row with exactly the loss of the previous point are no coincidence. A
# shorter run may be, since bfloat16 has few values.
_SAME = 4
# Warn if, from the first stage on, the steps between stages raise the loss this often in a row.
_WORSE = 5
# Warn after this many steps without effect at which a stage was due. A wrapper that accumulates
# gradients takes some such steps; if there are no gradients at all, a few are enough.
_IDLE, _IDLE_WITHOUT_GRADIENTS = 32, 3
# Warn after this many steps of the wrapped optimizer itself, before any step of the wrapper.
_PAST = 3
# Look for an accuracy in the first _FIRST_STAGES stages: at least _FRACTIONS different values, with
# repeats among the losses, that are fractions with a common denominator of at most _MOST_EXAMPLES.
_FIRST_STAGES, _FRACTIONS, _MOST_EXAMPLES = 12, 3, 4096

_NOT_A_LOSS = (
    "val_fn does not fall with the training loss (it returns an accuracy, the negative of a loss, "
    "or a loss with a stop-gradient, or its examples are of another kind); return a loss that "
    "training lowers, such as the cross-entropy"
)
_FROZEN = "none of the tensors requires a gradient"


class Notices:
    """Gives each warning once in a run. Its state is neither saved in checkpoints nor copied."""

    def __init__(self) -> None:
        # Time and step at the end of this process's first stage.
        self._began, self._first = 0.0, -1
        self._stages = 0.0
        self._rate, self._rises = math.inf, 0
        self._idle = 0
        self._watch: Any = None
        self._said: set[str] = set()

    def __reduce__(self) -> tuple[type[Notices], tuple[()]]:
        return Notices, ()

    def say(self, what: str, text: str) -> None:
        """Give the warning ``text``, once per run for each key ``what``."""
        if what not in self._said:
            self._said.add(what)
            warnings.warn(text, stacklevel=level_of_the_caller())

    def watch(self, optimizer: Optimizer) -> None:
        """Count steps of the wrapped optimizer until :meth:`unwatch`."""
        if not hasattr(optimizer, "_optimizer_step_post_hooks"):
            return  # Optimizer.__init__ was not called
        count, notices = 0, weakref.ref(self)

        def stepped(*_: Any) -> None:
            nonlocal count
            count += 1
            here = notices()
            if count == _PAST and here is not None:
                here.say(
                    "past",
                    f"the wrapped {type(optimizer).__name__} has taken {count} steps and "
                    "FastForward none: call step() on the FastForward, or no stage will run",
                )

        self._watch = optimizer.register_step_post_hook(stepped)

    def calibrated(self, owner: Any, calibrator: Calibrator, one_set: bool) -> None:
        """Check a calibrated run at its start, and at its end check that ``finish`` was called.

        Args:
            owner: owner of the calibrator. The run is over when it is deleted or the program ends.
            calibrator: the run's calibrator.
            one_set: whether a ``ValidationLoss`` measures the same examples at all stages.
        """
        if one_set:
            self.say(
                "one set",
                "the probe of a calibration and the checks after it should measure different "
                "examples, so that a choice by chance is noticed: pass twice as many, in two sets "
                "(ValidationLoss: batches_per_stage=half of the batches)",
            )
        weakref.finalize(owner, _warn_of_no_finish, calibrator)

    def unwatch(self) -> None:
        """Stop counting, since the wrapper itself takes steps now."""
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    def first_step(self, warmup: int, interval: int, total: int | None) -> None:
        """Warn before the first step if the run is too short for a stage."""
        if total is not None and warmup + interval > total:
            self.say(
                "short",
                f"no stage will run in {total} steps: the first comes after warmup + interval = "
                f"{warmup} + {interval} of them; pass fewer",
            )

    def rate(self, groups: list[dict[str, Any]]) -> None:
        """Look, before a step, for a warm-up that the user did not declare."""
        rate = groups[0].get("lr")
        if not isinstance(rate, int | float):  # reading a tensor would wait for the device
            return
        self._rises = self._rises + 1 if rate > self._rate else 0
        self._rate = rate
        if self._rises == _RISES:
            self._log(
                "warmup",
                "the learning rate rises from step to step: pass warmup=, the number of steps over "
                "which it does, so that no stage takes the warm-up for a rate that is too low",
            )

    def time(self, seconds: float, step: int) -> None:
        """Add the time of a stage, and log a message if stages take a large part of the time.

        Time is counted from the end of this process's first stage, since that stage may include
        compilation and may follow the loading of a checkpoint.

        Args:
            seconds: time of the stage.
            step: number of real steps so far.
        """
        now = time.perf_counter()
        if self._first < 0:
            self._began, self._first = now, step
            return
        self._stages += seconds
        part = self._stages / max(now - self._began, 1e-9)
        if step - self._first >= _SETTLED and part > _COSTLY:
            self._log(
                "cost",
                f"stages have taken {100 * part:.0f} % of the time so far: measure fewer examples "
                "in each trial, or raise interval",
            )

    def idle(self, params: Sequence[Tensor], groups: list[dict[str, Any]]) -> str:
        """Return the likely reason why a step at which a stage was due changed no weight."""
        self._idle += 1
        without = all(p.grad is None or not bool(p.grad.any()) for p in params)
        if not params:
            return _FROZEN
        if without:
            reason = (
                "its tensors have no gradients: call zero_grad() after step(), not before it, and "
                "make the optimizer after get_peft_model, of the tensors that the model has then"
            )
        elif all(float(group.get("lr") or 0.0) == 0 for group in groups):
            reason = "the learning rate is zero"
        else:
            reason = "its steps are lost in rounding, or it takes none"
        reason = f"the optimizer changes no weight: {reason}"
        if self._idle >= (_IDLE_WITHOUT_GRADIENTS if without else _IDLE):
            self.say("idle", f"no stage can run, since {reason}")
        return reason

    def frozen(self, chosen: bool) -> str:
        """Return why no stage runs if no tensor requires a gradient.

        The message goes only to the log, since gradual unfreezing starts like this.

        Args:
            chosen: whether the user passed ``params``.
        """
        self._log(
            "frozen",
            f"no stage runs as long as no tensor of {'params' if chosen else 'the optimizer'} "
            "requires a gradient: call requires_grad_() on the tensors that you train, and make "
            "the optimizer after get_peft_model",
        )
        return _FROZEN

    def pulled_back(self, name: str) -> None:
        """Warn that the steps after a jump have undone it.

        The cause may be an optimizer that could not be tested on a replica, or a hook.

        Args:
            name: name of the wrapped optimizer's class.
        """
        self.say(
            "pulled back",
            f"the steps after a stage have undone its jump of the weights: {name}, or a hook, goes "
            "on from weights that it keeps itself, such as slow ones or an average; wrap an "
            "optimizer that goes on from the weights, such as torch.optim.AdamW, or train without "
            "stages",
        )

    def stage(self, history: Sequence[StageRecord], same_examples: bool) -> None:
        """Check after a stage whether ``val_fn`` can be a loss.

        Args:
            history: the records so far, including this stage's.
            same_examples: whether all stages measure the same examples.
        """
        self._idle = 0
        record = history[-1]
        if record.decision == ASCENT:
            self.say(
                "ascent",
                "what val_fn returns rises along the optimizer's first steps, however short they "
                f"are: {_NOT_A_LOSS}. The learning rate is left as it was set",
            )
        if record.decision == UNCHANGED or _same_points(history) >= _SAME:
            self.say(
                "same",
                f"val_fn returns {record.loss_before:.6g} at all weights that were tried: it does "
                "not depend on the tensors that the optimizer trains. It may measure another copy "
                "of the model (an average of the weights, the model before get_peft_model), or "
                "return a number that was computed before",
            )
        if len(history) <= _FIRST_STAGES and _is_accuracy(history):
            self.say(
                "accuracy",
                "val_fn returns what looks like an accuracy or an error rate. A stage goes where "
                "val_fn is lower, so that it would drive an accuracy down, and small steps change "
                "neither; return the loss",
            )
        if len(history) == _WORSE + 1 and same_examples and _always_rises(history):
            self.say(
                "worse",
                f"the steps between the first {len(history)} stages have raised what val_fn "
                f"returns each time: {_NOT_A_LOSS}; or the learning rate is too high",
            )

    def _log(self, what: str, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning("%s", text)


def _warn_of_no_finish(calibrator: Calibrator) -> None:
    """Log at the end of a calibrated run if ``finish`` was not called."""
    if calibrator.iterates.unfinished:
        _say_that_finish_is_missing()


@functools.cache  # once per process, since it may have many short runs
def _say_that_finish_is_missing() -> None:
    # Use the log, since errors that are raised while an object is destroyed are lost.
    logger.warning(
        "finish() was not called after the last step of a calibrated run: the weights are the last "
        "iterate's, whether or not the mean of the last iterates, or the last sound one, is better"
    )


def _points(record: StageRecord) -> list[float]:
    """Return the losses that a stage measured at weights at least one step apart."""
    trials = {tau: loss for tau, loss in record.trials if not 0 < abs(tau) < 1}
    losses = [record.loss_before] if record.kind == "check" else list(trials.values())
    return losses if record.mean_loss is None else [*losses, record.mean_loss]


def _same_points(history: Sequence[StageRecord]) -> int:
    """Return how many of the latest points in a row have exactly the loss of the one before."""
    count = 0
    for record in reversed(history):
        losses = _points(record)
        if len(set(losses)) > 1 or not losses or not math.isfinite(losses[0]) or count >= _SAME:
            break
        count += len(losses) - 1
    return count


def _is_accuracy(history: Sequence[StageRecord]) -> bool:
    """Return True if the losses are fractions with a common denominator, and some are equal."""
    losses = [loss for record in history for loss in _points(record)]
    values = {abs(loss) for loss in losses} - {0.0, 1.0}
    if len(values) < _FRACTIONS or len(losses) == len(set(losses)):
        return False
    return all(0 < value < 1 for value in values) and any(
        # A mean in float32 differs from the fraction by about this much.
        all(abs(value * whole - round(value * whole)) <= 2e-7 * whole for value in values)
        for whole in range(2, _MOST_EXAMPLES + 1)
    )


def _always_rises(history: Sequence[StageRecord]) -> bool:
    """Return True if each stage begins at a higher loss than the previous stage ended with."""
    return all(
        record.kind == "stage"
        and record.loss_before - last.loss_after > FLAT * abs(last.loss_after)
        for last, record in pairwise(history)
    )
