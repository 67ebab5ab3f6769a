"""``FastForward``: the torch optimizer around a torch optimizer.

Knows ``torch.optim.Optimizer`` and its contracts (hooks, closures, schedulers, checkpoints, AMP).
What a stage does to the tensors is in ``stage.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .arguments import (
    check_callable,
    check_integer,
    check_learning_rates,
    check_optimizer,
    check_params,
    check_trained,
)
from .calibration import Outcome, calibrate, is_far_off, loss_at, two_sided
from .checkpoint import KEY, Part, has_state, kept_on_error, read_part, write_part
from .counters import Counters, check_saved
from .distributed import Ranks, check_process_group
from .history import History, StageRecord
from .learning_rate import step_scaled
from .line_search import BracketSearch, LineSearch
from .loading import as_dict, check_shapes, load_whole, shapes_of, unchanged_on_error
from .schedule import next_interval
from .sharded import Gathered, is_sharded
from .stage import Stage
from .window import Window
from .wrapper import OptimizerWrapper, keeps_grad_mode

# The longest interval when the learning rate is calibrated: a good rate is seldom looked at.
_LONGEST = 64


class FastForward(OptimizerWrapper):
    """Fast Forward around any torch optimizer (Rahamim et al., EMNLP 2024, section "Fast Forward").

    Every ``interval``-th real step is followed by a Fast Forward stage: the change that the step
    made to the weights is repeated for as long as the loss that ``val_fn`` measures goes down. The
    wrapper stands in for the wrapped optimizer everywhere: ``param_groups``, ``state`` and
    ``defaults`` are the wrapped one's own, and LR schedulers, ``GradScaler`` and checkpoints take
    it as they take any optimizer.

    A stage leaves the random number generators, the optimizer's moments and, where it finds
    nothing better, the weights bit for bit as they were. If ``val_fn`` raises, the weights are put
    back to what the real step made of them, and the exception propagates.

    With ``calibrate_lr=True`` a stage searches along the mean step since the last stage, ahead and
    back, and what it finds is fed back into the learning rate: see ``calibrate_lr``.

    Cost: a step without a stage, some ten microseconds. A stage, about five passes over the
    validation set (see ``line_search``) and two copies of the tracked tensors, which are freed at
    its end. Calibration keeps two copies between stages and adds one multi-tensor kernel a step.

    Args:
        optimizer: the optimizer to wrap; any ``torch.optim.Optimizer`` that is not Schedule-Free.
        val_fn: returns the validation loss (a float, or a tensor of one element) of the weights as
            they are when it is called; it must not change them. It is called without gradients,
            and each call starts from the same state of torch's random number generators. See
            ``ValidationLoss``.
        interval: real steps from one stage to the next; the paper uses 6.
        params: the tensors to move; default: all in ``param_groups``. Of these, a stage moves the
            ones that require a gradient when it begins.
        calibrate_lr: whether to scale the learning rate by what the stages find. One run, at
            whatever rate was set, then ends about where the best run of a sweep would. The
            multiplier (``lr_scale``) is applied inside the wrapped ``step()`` only: schedulers and
            closures never see it. Stages also try the mean of the recent iterates, which takes the
            noise of a high rate out; call ``finish`` after the last step for one more.
            ``val_fn`` should measure other examples at each stage (``ValidationLoss`` with
            ``batches_per_stage``): fitted to a few fixed ones, a run cuts its rate too far.
        max_interval: the interval doubles after a stage that was not worth its cost, up to this,
            and is halved after one that was. Default: ``interval``, so that it is fixed; with
            ``calibrate_lr`` 64.
        line_search: how far to go: ``BracketSearch`` or ``RepeatSearch`` (the paper's), or a
            function, see ``LineSearch``. Default: ``BracketSearch()``; with ``calibrate_lr`` a
            search to both sides.
        warmup: number of real steps that pass before the first interval begins.
        on_stage: called with the ``StageRecord`` of each stage when it is over, for logging.
        process_group: the ranks that take every decision together: the loss of a trial is the
            mean over them, by the weights that ``val_fn`` returns. Default: all of them, if
            ``torch.distributed`` is initialised; False for a model that is this process's alone.
            Each rank has to take the same steps, with the same options.

    Attributes:
        optimizer: the wrapped optimizer.
        history: the ``StageRecord`` of each stage so far.

    Raises:
        TypeError: ``optimizer`` is not an optimizer, or an argument has the wrong type.
        ValueError: an argument has a value that cannot work, or there is nothing to move.

    Warning:
        Step hooks registered on the wrapper run around the step and its stage; those registered on
        the wrapped optimizer run around the real step alone. Torch's global step hooks see both.

    Examples:
        >>> val_fn = ValidationLoss(model, val_batches)
        >>> optimizer = FastForward(torch.optim.AdamW(lora_parameters(model), lr=2e-4), val_fn)
        >>> for batch in loader:
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> print(optimizer.history)
    """

    history: History

    def __init__(
        self,
        optimizer: Optimizer,
        val_fn: Callable[[], Any],
        interval: int = 6,
        *,
        params: Iterable[Tensor] | None = None,
        calibrate_lr: bool = False,
        max_interval: int | None = None,
        line_search: LineSearch | None = None,
        warmup: int = 0,
        on_stage: Callable[[StageRecord], object] | None = None,
        process_group: Any = None,
    ) -> None:
        check_optimizer(optimizer, FastForward)
        check_callable("val_fn", val_fn, "a function without arguments that returns the loss")
        if line_search is not None:
            expected = "BracketSearch(), RepeatSearch() or a function"
            check_callable("line_search", line_search, expected)
        if on_stage is not None:
            check_callable("on_stage", on_stage, "a function of one StageRecord, or None")
        interval = check_integer("interval", interval, at_least=1)
        warmup = check_integer("warmup", warmup, at_least=0)
        if not isinstance(calibrate_lr, bool):
            raise TypeError(f"calibrate_lr must be True or False, got {calibrate_lr!r}")
        if calibrate_lr:
            check_learning_rates(optimizer)
        if max_interval is None:
            max_interval = max(interval, _LONGEST) if calibrate_lr else interval
        max_interval = check_integer("max_interval", max_interval, at_least=interval)
        chosen = None if params is None else check_params(params, optimizer)

        super().__init__(optimizer)
        self.val_fn: Any = val_fn
        self.interval = interval
        self.max_interval = max_interval
        self.calibrate_lr = calibrate_lr
        default = None if calibrate_lr else BracketSearch()
        self.line_search = default if line_search is None else line_search
        self.warmup = warmup
        self.on_stage = on_stage
        self.process_group = check_process_group(process_group)
        self.history = History()
        self._params = chosen
        self._window = Window()
        self._gathered = Gathered()
        check_trained(self._tracked(), "" if chosen is None else " among params")
        self._counters.add_missing(calibrate_lr, interval, max_interval)

    def __repr__(self) -> str:
        options = f"interval={self.interval}"
        if self.calibrate_lr:
            options += ", calibrate_lr=True"
        if self.max_interval != self.interval:
            options += f", max_interval={self.max_interval}"
        if self.line_search is not None:
            options += f", line_search={self.line_search!r}"
        if self.warmup:
            options += f", warmup={self.warmup}"
        return f"{type(self).__name__}({options}, optimizer={self.optimizer!r})"

    @keeps_grad_mode
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
            return self._real_step(None)
        counters = self._counters
        step = counters.step + 1
        if self.calibrate_lr:
            return self._calibrated_step(closure, step)
        since = step - max(counters.last_stage, self.warmup)
        stage = Stage(self._tracked()) if since >= self._interval_now() else None
        loss = self._real_step(closure)
        self._counters.step = step
        if stage is not None:
            record = self._run_stage(stage, since)
            del stage  # frees the copies before on_stage, which may evaluate or save
            self._report(record)
        return loss

    def _calibrated_step(self, closure: Callable[[], Any] | None, step: int) -> Any:
        window = self._window
        warm = step > self.warmup
        if warm:
            window.open(self._tracked())
        else:  # one that is there is of a checkpoint, or of `finish`
            self._window = Window()
        loss = step_scaled(self._real_step, closure, self.param_groups, self.lr_scale)
        self._counters.step = step
        if warm:
            window.add()
            if window.steps >= self._interval_now():
                self._report(self._run_stage(window.stage(), window.steps))
        return loss

    @keeps_grad_mode
    def finish(self) -> StageRecord | None:
        """Run one last stage now: call it after the last step of a calibrated run.

        It leaves the weights at the mean of the recent iterates if that is better than the last
        one, as it is at most rates that are not too low.

        Returns:
            The stage's record; None where there was nothing to do: the learning rate is not
            calibrated, or no step has been taken since the last stage or since tensors were frozen.
        """
        if self.calibrate_lr:
            self._window.open(self._tracked())  # begins anew if tensors have been frozen since
        window = self._window
        if not window.steps:
            return None
        return self._report(self._run_stage(window.stage(), window.steps, final=True))

    @property
    def lr_scale(self) -> float:
        """What the learning rate is multiplied by at present; 1.0 if it is not calibrated."""
        return self._counters.rate.scale if self.calibrate_lr else 1.0

    @property
    def _counters(self) -> Counters:
        # Fetched at each step: load_state_dict replaces the group.
        return Counters(self.param_groups[0])

    def _interval_now(self) -> int:
        return self._counters.interval(self.interval, self.max_interval)

    def _real_step(self, closure: Callable[[], Any] | None) -> Any:
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    def _run_stage(self, stage: Stage, since: int, final: bool = False) -> StageRecord | None:
        """Run a stage ``since`` steps after the last one, record it and learn from it.

        None if the steps moved nothing, as with a rate of zero, or a wrapper that accumulates:
        then not yet.
        """
        try:
            return self._whole_stage(stage, since, final)
        except Exception:
            if self.calibrate_lr:  # this stage is over too
                self._window.restart(0.0)
            raise
        except BaseException:  # Ctrl-C may have come half-way through a change of the window
            self._window = Window()
            raise

    def _whole_stage(self, stage: Stage, since: int, final: bool) -> StageRecord | None:
        counters = self._counters
        start = time.perf_counter()
        ranks = Ranks(self.process_group, counters.step)
        with torch.autograd.profiler.record_function("FastForward.stage"), ranks.together():
            if not ranks.begin(stage.set_anchor(), self.val_fn):
                return None
            counters.last_stage = counters.step
            outcome = self._search(stage, ranks, final)
        useful = outcome.tau != 0
        if self.calibrate_lr:
            before = counters.rate
            counters.rate = calibrate(before, outcome, since)
            useful = is_far_off(before, counters.rate)
            self._window.restart(outcome.tau)
        if self.max_interval > self.interval:
            limits = self.interval, self.max_interval
            counters.set_interval(next_interval(self._interval_now(), useful, *limits))
        counters.last_tau = outcome.tau
        record = outcome.record(
            step=counters.step,
            seconds=time.perf_counter() - start,
            steps=since if self.calibrate_lr else 1,
            lr_scale=self.lr_scale,
        )
        self.history._append(record)
        return record

    def _report(self, record: StageRecord | None) -> StageRecord | None:
        if record is not None and self.on_stage is not None:
            self.on_stage(record)
        return record

    def _search(self, stage: Stage, ranks: Ranks, final: bool) -> Outcome:
        """Search and commit; whatever is raised, the tensors are at the anchor then."""
        counters, sharded = self._counters, list(filter(is_sharded, self._tracked()))
        line_search = self.line_search or two_sided(self._window.steps)

        def val_fn() -> float:
            self._gathered.drop(sharded)
            return ranks.mean(self.val_fn)

        try:
            if hasattr(self.val_fn, "new_stage"):
                self.val_fn.new_stage()
            options = val_fn, ranks.line_search(line_search), counters.last_tau
            measuring = getattr(self.val_fn, "measuring", None)
            with measuring() if callable(measuring) else nullcontext(), ranks.share(self.val_fn):
                if self.calibrate_lr:
                    doubtful = counters.rate.is_steep
                    outcome = self._window.search(stage, *options, final, doubtful)
                else:
                    tau, trials = stage.search(*options)
                    outcome = Outcome(tau, trials, loss_at(trials, tau))
            ranks.end(outcome.tau)
            return outcome
        except BaseException:
            stage.write(0.0)
            raise
        finally:
            self._gathered.drop(sharded)

    def _tracked(self) -> list[Tensor]:
        """The tensors that a stage moves, as the param groups are now."""
        params = self._params
        if params is None:
            params = [p for group in self.param_groups for p in group["params"]]
        return [p for p in params if p.requires_grad]

    # The hooks registered on the wrapper run here, those of the wrapped one in its own methods.

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict, with the history under ``"fast_forward"``.

        ``torch.load(weights_only=True)`` reads it. The wrapped optimizer alone can load it too.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict: dict[str, Any] = dict(self.optimizer.state_dict())
        state_dict[KEY] = self._part()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def _part(self) -> dict[str, Any]:
        part = Part(
            self.history,
            self._window.state_dict(self._tracked()) if self.calibrate_lr else None,
            self.val_fn.state_dict() if has_state(self.val_fn) else None,
            type(self.optimizer).__name__,
            shapes_of(self.param_groups),
        )
        return write_part(part)

    @contextmanager
    def _loading(self, written: Any) -> Iterator[Part]:
        """Load our part, and what else is loaded inside; if anything is raised, nothing."""
        part = read_part(written)
        check_shapes(part.shapes, self.optimizer)
        saved = part.window if self.calibrate_lr else None
        window = Window() if saved is None else Window.from_state_dict(saved, self._tracked())
        with unchanged_on_error(self), kept_on_error(self.val_fn):
            # Before what is loaded inside: an optimizer may copy into the tensors that it has.
            if part.val_fn is not None and has_state(self.val_fn):
                self.val_fn.load_state_dict(part.val_fn)
            yield part
            self._counters.check()
            self._counters.add_missing(self.calibrate_lr, self.interval, self.max_interval)
            self._window, self.history = window, part.history

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned, or a state dict of the wrapped optimizer alone.

        Without our part the history starts empty; without the counters in the first param group
        (distributed checkpointing keeps them), so does the count of steps.

        Raises:
            ValueError: it is damaged, of another model or optimizer, or of a newer version. Nothing
                has been changed then, but tensors that another library's optimizer copied into.
        """
        state_dict = as_dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        check_saved(state_dict)
        with self._loading(state_dict.pop(KEY, None)) as part:
            load_whole(self.optimizer, state_dict, part.optimizer)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)
