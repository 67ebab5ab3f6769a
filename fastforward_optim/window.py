"""The iterates since the last stage, which a calibrated stage searches along, and their mean.

Knows tensors. Knows nothing of ``torch.optim``, modules or frameworks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .calibration import BLOWN_UP, REACH, TRUSTED, Outcome, verdict
from .line_search import LineSearch
from .saved_numbers import as_count
from .sharded import is_sharded, like, part_of
from .stage import Stage, copies, each_once, grouped

# The mean of the iterates is over about an eighth of the steps since the last jump, at most
# over these.
HORIZON = 32


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
            return Outcome(tau, trials, loss)

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
        unique = each_once(tensors)
        shapes = [tuple(tensor.shape) for tensor in unique]
        try:
            steps, age = (as_count(state[name], at_least=0) for name in ("steps", "age"))
            saved = {name: list(state[name]) for name in ("start", "mean")}
            found = {name: [tuple(t.shape) for t in values] for name, values in saved.items()}
            dtypes = [tensor.dtype for tensor in saved["start"]]
            both = saved["start"] + saved["mean"]
            if any(tensor.layout != torch.strided or tensor.is_meta for tensor in both):
                raise ValueError("it holds tensors that are sparse or without data")
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
        return [
            (tensor, next(of_kind[tensor.device, tensor.dtype]))
            for tensor in each_once(self._tensors)
        ]


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted({str(dtype) for dtype in dtypes}))


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
