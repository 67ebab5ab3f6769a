"""``FastForward``: the torch optimizer around a torch optimizer.

Knows ``torch.optim.Optimizer`` and its contracts (hooks, closures, schedulers, checkpoints, AMP).
What a stage does to the tensors is in ``stage.py``.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .arguments import check_callable, check_integer, check_params
from .history import History, StageRecord
from .line_search import BracketSearch, LineSearch
from .stage import Stage

logger = logging.getLogger(__name__)

# Counters ride as plain numbers in the first param group: every way of saving an optimizer keeps
# them, distributed checkpointing included, and other optimizers ignore them.
_STEP = "fast_forward_step"
_LAST_STAGE = "fast_forward_last_stage"
_LAST_TAU = "fast_forward_tau"
_COUNTERS: dict[str, int | float] = {_STEP: 0, _LAST_STAGE: 0, _LAST_TAU: 0.0}
# The rest of a checkpoint, under a top-level key of its own, which other optimizers ignore too.
_CHECKPOINT_KEY = "fast_forward"
_CHECKPOINT_VERSION = 1


class FastForward(Optimizer):
    """Fast Forward around any torch optimizer (Rahamim et al., EMNLP 2024, section "Fast Forward").

    Every ``interval``-th real step is followed by a Fast Forward stage: the change that the step
    made to the weights is repeated for as long as the loss that ``val_fn`` measures goes down. The
    wrapper stands in for the wrapped optimizer everywhere: ``param_groups``, ``state`` and
    ``defaults`` are the wrapped one's own, and LR schedulers, ``GradScaler`` and checkpoints take
    it as they take any optimizer.

    A stage leaves the random number generators, the optimizer's moments and, where it finds
    nothing better, the weights bit for bit as they were. If ``val_fn`` raises, the weights are put
    back to what the real step made of them, and the exception propagates.

    Cost: a step without a stage, a few microseconds. A stage, about five passes over the
    validation set (see ``line_search``) and two copies of the tracked tensors, which are freed at
    its end.

    Args:
        optimizer: the optimizer to wrap; any instance of ``torch.optim.Optimizer``.
        val_fn: returns the validation loss (a float, or a tensor of one element) of the weights as
            they are when it is called; it must not change them. It is called without gradients,
            and each call starts from the same state of torch's random number generators. See
            ``ValidationLoss``.
        interval: real steps from one stage to the next; the paper uses 6.
        params: the tensors to move; default: all in ``param_groups``. Of these, a stage moves the
            ones that require a gradient when it begins.
        line_search: how far to go: ``BracketSearch`` (default) or ``RepeatSearch`` (the paper's),
            or a function, see ``LineSearch``.
        warmup: number of real steps that pass before the first interval begins.
        on_stage: called with the ``StageRecord`` of each stage when it is over, for logging.

    Attributes:
        optimizer: the wrapped optimizer.
        history: the ``StageRecord`` of each stage so far.

    Raises:
        TypeError: ``optimizer`` is not an optimizer, or an argument has the wrong type.
        ValueError: an argument has a value that cannot work, or there is nothing to move.

    .. warning::
        Step hooks registered on the wrapper run around the step and its stage; those registered on
        the wrapped optimizer run around the real step alone. Torch's global step hooks see both.

    Example:
        >>> val_fn = ValidationLoss(model, val_batches)
        >>> optimizer = FastForward(torch.optim.AdamW(lora_parameters(model), lr=2e-4), val_fn)
        >>> for batch in loader:
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> print(optimizer.history)
    """

    # GradScaler must unscale the gradients itself: it hands its scale to optimizers that take it
    # (the fused ones), and the wrapped one would never see it.
    _step_supports_amp_scaling = False

    optimizer: Optimizer
    history: History

    def __init__(
        self,
        optimizer: Optimizer,
        val_fn: Callable[[], Any],
        interval: int = 6,
        *,
        params: Iterable[Tensor] | None = None,
        line_search: LineSearch = BracketSearch(),  # noqa: B008  # frozen
        warmup: int = 0,
        on_stage: Callable[[StageRecord], object] | None = None,
    ) -> None:
        _check_optimizer(optimizer)
        check_callable("val_fn", val_fn, "a function without arguments that returns the loss")
        check_callable("line_search", line_search, "BracketSearch(), RepeatSearch() or a function")
        if on_stage is not None:
            check_callable("on_stage", on_stage, "a function of one StageRecord, or None")
        interval = check_integer("interval", interval, at_least=1)
        warmup = check_integer("warmup", warmup, at_least=0)
        chosen = None if params is None else check_params(params, optimizer)

        # Optimizer.__init__ fills torch's hook tables, but through the properties below it would
        # replace the wrapped optimizer's own param_groups: let it write into a stand-in.
        self.__dict__["optimizer"] = SimpleNamespace(add_param_group=lambda group: None)
        super().__init__([torch.empty(0)], {})

        self.optimizer = optimizer
        self.val_fn = val_fn
        self.interval = interval
        self.line_search = line_search
        self.warmup = warmup
        self.on_stage = on_stage
        self.history = History()
        self._params = chosen
        if not self._tracked():
            raise ValueError(
                "optimizer has no tensor that requires a gradient"
                + ("" if chosen is None else " among params")
                + ", so there is nothing to fast-forward; call requires_grad_() on the tensors "
                "that you train before you wrap the optimizer"
            )
        self._add_missing_counters()

    # The wrapped optimizer's own objects, never copies: schedulers and users write into them.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's param groups (the same list)."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> Any:
        """The wrapped optimizer's state (the same mapping)."""
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's defaults (the same dict)."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.optimizer.defaults = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group to the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the wrapped optimizer does it."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def __repr__(self) -> str:
        options = f"interval={self.interval}, line_search={self.line_search!r}"
        if self.warmup:
            options += f", warmup={self.warmup}"
        return f"{type(self).__name__}({options}, optimizer={self.optimizer!r})"

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one real step, and run a Fast Forward stage after it if one is due.

        Args:
            closure: passed on to the wrapped optimizer's ``step``.

        Returns:
            What the wrapped optimizer's ``step`` returned: the closure's loss, or None.

        Raises:
            TypeError: ``val_fn`` returned something other than a real number.
            RuntimeError: ``val_fn`` changed the weights.
        """
        if closure is None and self._is_checkpoint_probe():
            return self._real_step(closure)
        # Fetched at each step: load_state_dict replaces the group, FSDP2 its parameters.
        counters = self.param_groups[0]
        step = counters.get(_STEP, 0) + 1
        last_stage = counters.get(_LAST_STAGE, 0)
        tracked = self._tracked() if step - max(last_stage, self.warmup) >= self.interval else []
        if not tracked:
            loss = self._real_step(closure)
            counters[_STEP] = step
            return loss

        stage = Stage(tracked)
        loss = self._real_step(closure)
        counters[_STEP] = step
        if not stage.set_anchor():  # a rate of zero, or a wrapper that accumulates: not yet
            return loss
        counters[_LAST_STAGE] = step
        record = self._run_stage(stage, step)
        del stage  # frees the copies before on_stage, which may evaluate or save
        if self.on_stage is not None:
            self.on_stage(record)
        return loss

    def _real_step(self, closure: Callable[[], Any] | None) -> Any:
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    def _run_stage(self, stage: Stage, step: int) -> StageRecord:
        counters = self.param_groups[0]
        start = time.perf_counter()
        with torch.autograd.profiler.record_function("FastForward.stage"):
            tau, trials = stage.search(self.val_fn, self.line_search, counters.get(_LAST_TAU, 0.0))
        losses = dict(trials)
        record = StageRecord(
            step=step,
            tau=tau,
            trials=trials,
            loss_before=losses.get(0.0, math.nan),
            loss_after=losses.get(tau, math.nan),
            seconds=time.perf_counter() - start,
        )
        if not math.isfinite(losses.get(0.0, 0.0)):
            logger.warning("the validation loss after step %d is %s", step, losses[0.0])
        counters[_LAST_TAU] = tau
        self.history._append(record)
        logger.debug(
            "stage after step %d: tau %.4g, loss %.6g to %.6g, %d trials, %.2f s",
            step,
            tau,
            record.loss_before,
            record.loss_after,
            len(trials),
            record.seconds,
        )
        return record

    def _tracked(self) -> list[Tensor]:
        """The tensors that a stage moves, as the param groups are now."""
        params = self._params
        if params is None:
            params = [p for group in self.param_groups for p in group["params"]]
        return [p for p in params if p.requires_grad]

    def _is_checkpoint_probe(self) -> bool:
        """Whether this step is no step of training.

        ``torch.distributed.checkpoint`` takes one with empty state, learning rates and gradients
        all zero, to make the wrapped optimizer create its state. A warm-up's first step has
        learning rate zero too, but gradients.
        """
        return (
            not self.optimizer.state
            and all(group.get("lr", 0) == 0 for group in self.param_groups)
            and not any(
                p.grad is not None and bool(p.grad.any())
                for group in self.param_groups
                for p in group["params"]
            )
        )

    def _add_missing_counters(self) -> None:
        for name, value in _COUNTERS.items():
            self.param_groups[0].setdefault(name, value)

    # Checkpoints. The hooks registered on the wrapper run here, those of the wrapped optimizer in
    # its own methods.

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict, with the history under ``"fast_forward"``.

        It holds tensors, plain numbers, lists and dicts, so ``torch.load(weights_only=True)``
        reads it. The wrapped optimizer alone can load it too, and ignores what it does not know.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict: dict[str, Any] = dict(self.optimizer.state_dict())
        state_dict[_CHECKPOINT_KEY] = {
            "version": _CHECKPOINT_VERSION,
            "history": self.history.state_dict(),
        }
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, or a state dict of the wrapped optimizer alone.

        Without our part the history starts empty; without the counters in the first param group
        (distributed checkpointing keeps them), so does the count of steps.

        Raises:
            ValueError: our part is damaged or of a newer version; then nothing has been changed.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        history = _read_history(state_dict.pop(_CHECKPOINT_KEY, None))
        self.optimizer.load_state_dict(state_dict)
        self._add_missing_counters()
        self.history = history
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    # Pickling and copying: torch's way drops the hook tables and what a scheduler patched in.

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self.__dict__.items()
            if name != "step" and not name.startswith("_optimizer_")
        }


def _read_history(part: Any) -> History:
    if part is None:
        return History()
    if not isinstance(part, Mapping) or not isinstance(part.get("history"), list):
        raise ValueError(
            f"the {_CHECKPOINT_KEY!r} part of the state dict is damaged: expected a version and a "
            f"history, got {part!r}; remove it to load the wrapped optimizer's part alone"
        )
    if part.get("version") != _CHECKPOINT_VERSION:
        raise ValueError(
            f"the {_CHECKPOINT_KEY!r} part of the state dict has version {part.get('version')!r}, "
            f"this release reads version {_CHECKPOINT_VERSION}; update fastforward-optim, or "
            "remove that part to load the wrapped optimizer's part alone"
        )
    return History(StageRecord.from_dict(record) for record in part["history"])


def _check_optimizer(optimizer: object) -> None:
    if isinstance(optimizer, type):
        raise TypeError(
            f"optimizer must be an instance, got the class {optimizer.__name__}; construct it "
            f"first: FastForward({optimizer.__name__}(params, lr=...), val_fn)"
        )
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            "optimizer must be an instance of torch.optim.Optimizer, got "
            f"{type(optimizer).__name__}; pass the optimizer itself"
        )
    if isinstance(optimizer, FastForward):
        raise ValueError(
            "optimizer is wrapped in FastForward already; wrap it once, or pass "
            "optimizer.optimizer, the wrapped one"
        )
