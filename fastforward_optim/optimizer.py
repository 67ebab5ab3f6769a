"""``FastForward``: a torch optimizer that wraps another torch optimizer.

Start reading at ``step``: the real step, the stage, the search, the record. ``stage/`` holds what a
stage does to the tensors, and ``search/`` how far it goes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.optim import Optimizer

from .arguments import check_callable, check_integer, check_process_group, check_val_fn
from .calibration import (
    Calibration,
    Calibrator,
    GradientSpikes,
    Iterates,
    Outcome,
    Phase,
    as_law,
)
from .calibration.scaled_step import step_scaled
from .checkpoint.load import all_or_nothing, check_shapes, load_wrapped, shapes_of
from .checkpoint.state import KEY, Progress, SavedState
from .diagnostics.first_call import check_first_call
from .diagnostics.notices import Notices
from .diagnostics.optimizers import check_learning_rates, check_optimizer, check_params
from .diagnostics.pull_back import Watch
from .history import History
from .ranks import Ranks
from .record import StageRecord
from .saved_numbers import is_finite, number_of
from .search.evidence import Loss, Rows, Trial, error_of
from .search.interval import next_interval
from .search.line_search import BracketSearch, LineSearch
from .stage.sharded import Gathered, is_sharded
from .stage.stage import Stage, copies, grouped, measure, put, restored_on_error
from .validation.base import adapted, original
from .validation.loss import ValidationLoss
from .wrapper import OptimizerWrapper


class Options(TypedDict, total=False):
    """The options of ``FastForward`` that the trainers' callbacks accept and pass on."""

    calibrate_lr: bool | Calibration
    total_steps: int | None
    max_interval: int | None
    line_search: LineSearch | None
    warmup: int
    on_stage: Callable[[StageRecord], object] | None


class FastForward(OptimizerWrapper):
    """Fast Forward around any torch optimizer (Rahamim et al., EMNLP 2024, section "Fast Forward").

    After every ``interval``-th real step, a Fast Forward stage repeats the step's weight change for
    as long as the loss that ``val_fn`` measures falls. The wrapper can be used wherever the wrapped
    optimizer can: it shares ``param_groups``, ``state`` and ``defaults`` with it, and works with LR
    schedulers, ``GradScaler`` and checkpoints like any optimizer.

    A stage moves the weights only on sufficient evidence (see ``BracketSearch``). After a stage
    that finds nothing, the interval doubles. A stage leaves the random number generators and the
    optimizer's moments unchanged, and also the weights, bit for bit, if it finds nothing better. If
    ``val_fn`` raises, the weights are restored to the values after the real step, and the exception
    propagates.

    With ``calibrate_lr=True`` there are no such stages. The run finds the multiplier of the
    learning rate's schedule early and then leaves it alone: see ``calibrate_lr``.

    Cost: about ten microseconds for a step without a stage. A stage takes about five passes over
    the validation set (see ``line_search``) and two copies of the tracked tensors, which are freed
    when it ends; after each of the first three long jumps one copy is kept for up to twelve steps.
    Calibration keeps five copies (in float32) between stages and one more during a stage, and adds
    four multi-tensor kernels and a few tiny ones a step.

    Args:
        optimizer: the optimizer to wrap: any ``torch.optim.Optimizer`` that continues from the
            current weights. Schedule-Free, Lookahead and similar optimizers do not.
        val_fn: returns the validation loss (a float, or a tensor of one element) at the current
            weights, and must not change them. It is called without gradients, and each call starts
            from the same state of torch's random number generators. See ``ValidationLoss``, and
            ``ValidationFunction`` to write your own class.
        interval: number of real steps from one stage to the next; the paper uses 6.
        params: the tensors to move; default: all in ``param_groups``. A stage moves those that
            require a gradient when it begins. If there are none, a warning is logged when a stage
            is due.
        calibrate_lr: whether to scale the learning rate by what the run itself shows. A single run,
            whatever rate was set, then ends about where the best run of a sweep would, under the
            same schedule. The first ``interval`` steps use a small fraction of the rate, and a line
            search along them shows what step size is possible. During the first 15 % of the run the
            rate is corrected by how the mean of the iterates moves; then it is held. At the end of
            each window of steps a pass over the validation set checks that the run has not
            diverged; if it has, the run goes back and continues at a lower rate. A gradient whose
            norm is far above those of the recent steps is scaled down. The multiplier
            (``lr_scale``) is applied only inside the wrapped ``step()``: schedulers and closures
            never see it. Pass a ``Calibration`` to set the constants; True means ``Calibration()``.
        total_steps: number of real steps of the run, for ``calibrate_lr``. Omit it if unknown: the
            rate is then corrected to the end, over windows that grow with the run, and the run ends
            at the mean of the recent iterates; see ``finish`` and ``averaged``.
        max_interval: upper limit of the interval, which doubles after a stage that found nothing
            and halves after one that did. Default: no limit; ``max_interval=interval`` gives the
            paper's fixed interval. With ``calibrate_lr``: the maximum number of steps from one
            check to the next.
        line_search: how far to go: ``BracketSearch``, ``RepeatSearch`` (the paper's) or a function;
            see ``LineSearch``. Default: ``BracketSearch()``. Not allowed with ``calibrate_lr``.
        warmup: number of real steps over which the rate rises at the start. The first interval
            begins after them; a calibrated rate rises over them too.
        on_stage: called with the ``StageRecord`` of each stage when it is over, for logging.
        process_group: the ranks that decide together. The loss of a trial is the mean over them,
            each weighted as ``val_fn`` reports. Default: all ranks, if ``torch.distributed`` is
            initialised. Use False for a model that belongs to this process alone. Each rank must
            take the same steps with the same options.

    Attributes:
        optimizer: the wrapped optimizer.
        history: the ``StageRecord`` of each stage so far.

    Raises:
        TypeError: ``optimizer`` is not an optimizer, or an argument has the wrong type.
        ValueError: an argument has an invalid value, ``params`` is empty, or ``optimizer`` undoes
            jumps of the weights.

    Warning:
        Step hooks registered on the wrapper run around the step and its stage. Step hooks
        registered on the wrapped optimizer run around the real step alone. Torch's global step
        hooks see both.

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
        calibrate_lr: bool | Calibration = False,
        total_steps: int | None = None,
        max_interval: int | None = None,
        line_search: LineSearch | None = None,
        warmup: int = 0,
        on_stage: Callable[[StageRecord], object] | None = None,
        process_group: Any = None,
    ) -> None:
        check_optimizer(optimizer, FastForward)
        check_val_fn(val_fn)
        if line_search is not None:
            expected = "BracketSearch(), RepeatSearch() or a function"
            check_callable("line_search", line_search, expected)
        if on_stage is not None:
            check_callable("on_stage", on_stage, "a function of one StageRecord, or None")
        interval = check_integer("interval", interval, at_least=1)
        warmup = check_integer("warmup", warmup, at_least=0)
        law = as_law(calibrate_lr)
        if law is not None:
            if line_search is not None:
                raise ValueError(
                    "line_search has no part in a calibration, which has a search of its own: "
                    "leave out line_search or calibrate_lr"
                )
            check_learning_rates(optimizer)
        if total_steps is not None:
            total_steps = check_integer("total_steps", total_steps, at_least=1)
        if max_interval is not None:
            max_interval = check_integer("max_interval", max_interval, at_least=interval)
        chosen = None if params is None else check_params(params, optimizer)

        super().__init__(optimizer)
        self._val_fn = adapted(val_fn)
        self.interval = interval
        self.max_interval = max_interval
        self.line_search = BracketSearch() if line_search is None else line_search
        self._warmup = warmup
        self._total_steps = total_steps
        self.on_stage = on_stage
        self.process_group = check_process_group(process_group)
        self.history = History()
        self._params = chosen
        self._calibrator = (
            None if law is None else Calibrator(law, interval, warmup, total_steps, max_interval)
        )
        self._gathered = Gathered(self._tracked())
        self._notices = Notices()
        self._watch = Watch()
        self._add_progress()
        self.history._reason = "it has taken no step (call step() here, not on the optimizer in it)"
        self._notices.watch(optimizer)
        if self._calibrator is not None:
            one_set = isinstance(val_fn, ValidationLoss) and val_fn.same_examples
            self._notices.calibrated(self, self._calibrator, one_set)

    def __repr__(self) -> str:
        options = f"interval={self.interval}"
        if self._calibrator is not None:
            default = self._calibrator.law == Calibration()
            options += f", calibrate_lr={True if default else self._calibrator.law}"
        else:
            options += f", line_search={self.line_search!r}"
        for name in ("total_steps", "max_interval", "warmup"):
            if getattr(self, name):
                options += f", {name}={getattr(self, name)}"
        if not self.history:
            options += f", history={self.history!r}"
        return f"{type(self).__name__}({options}, optimizer={self.optimizer!r})"

    @property
    def val_fn(self) -> Any:
        """The validation function, as it was passed."""
        return original(self._val_fn)

    @val_fn.setter
    def val_fn(self, value: Any) -> None:
        self._val_fn = adapted(value)

    @property
    def warmup(self) -> int:
        """Number of real steps over which the rate rises; set it before the first step."""
        return self._warmup

    @warmup.setter
    def warmup(self, value: int) -> None:
        self._warmup = check_integer("warmup", value, at_least=0)
        if self._calibrator is not None:
            self._calibrator.warmup = self._warmup

    @property
    def total_steps(self) -> int | None:
        """Number of real steps of the run, None if unknown; set it before the first step."""
        return self._total_steps

    @total_steps.setter
    def total_steps(self, value: int | None) -> None:
        known = value is not None
        self._total_steps = check_integer("total_steps", value, at_least=1) if known else None
        if self._calibrator is not None:
            self._calibrator.total_steps = self._total_steps

    @property
    def calibrate_lr(self) -> bool:
        """Whether the learning rate is calibrated."""
        return self._calibrator is not None

    @property
    def lr_scale(self) -> float:
        """The current multiplier of the learning rate; 1.0 if it is not calibrated."""
        if self._calibrator is None:
            return 1.0
        progress = self._progress
        return self._calibrator.factor(progress.rate, self.param_groups, progress.step + 1)

    def step(
        self, closure: Callable[[], Any] | None = None, *arguments: Any, **options: Any
    ) -> Any:
        """Take one real step, and run a Fast Forward stage after it if one is due.

        Args:
            closure: passed to the wrapped optimizer's ``step``.
            *arguments: passed on unchanged.
            **options: passed on unchanged.

        Returns:
            The return value of the wrapped optimizer's ``step``: the closure's loss, or None.

        Raises:
            TypeError: ``val_fn`` returned something other than a real number.
            RuntimeError: ``val_fn`` changed the weights.
        """
        take = partial(self._real_step, arguments=arguments, options=options)
        if closure is None and self._is_checkpoint_probe():
            return take(None)
        self._notices.unwatch()
        progress = self._progress
        step = progress.step + 1
        if step == 1 and not self.history:
            self._first_step()
        if not self._warmup:
            self._notices.rate(self.param_groups)
        if self._calibrator is not None:
            return self._calibrated_step(self._calibrator, take, closure, step)
        since = step - max(progress.last_stage, self.warmup)
        stage = None
        if since >= self._interval_now():
            tracked = self._tracked()
            if not tracked:
                self._notices.frozen(self._params is not None)
            stage = Stage(tracked)
        loss = take(closure)
        self._progress.step = step
        if self._watch.step(self._groups, last=stage is not None):
            self._notices.pulled_back(type(self.optimizer).__name__)
        if stage is not None:
            record = self._run_stage(stage, since)
            if record is not None:
                self._watch.jumped(self._groups, stage.anchor, record.tau)
            del stage  # frees the copies before on_stage, which may evaluate or save
            self._report(record)
        return loss

    def _first_step(self) -> None:
        """Try ``val_fn`` now, because a mistake costs less here than at the first stage."""
        total = self._total_steps
        self._notices.first_step(self._warmup, self.interval, total)
        self.history._reason = f"the first one comes after step {self._warmup + self.interval}"
        groups = grouped(self._tracked())
        before, ranks = copies(groups), Ranks(self.process_group, 0)
        try:
            with restored_on_error(lambda: put(groups, before)), ranks.together():
                if not self._val_fn.check():
                    tensors = [tensor for group in groups for tensor in group]
                    check_first_call(
                        self.val_fn, lambda: measure(tensors, lambda: self._val_fn.measure().loss)
                    )
                ranks.ready()
        finally:
            self._gathered.drop(list(filter(is_sharded, self._tracked())))

    def _calibrated_step(
        self,
        calibrator: Calibrator,
        take: Callable[[Callable[..., Any] | None], Any],
        closure: Callable[[], Any] | None,
        step: int,
    ) -> Any:
        tracked = self._tracked()
        if not tracked:  # steps that move nothing do not count as steps of the probe
            if step - self.warmup >= self.interval:
                self.history._reason = self._notices.frozen(self._params is not None)
            loss = take(closure)
            self._progress.step = step
            return loss
        calibrator.iterates.open(tracked)
        rate = self._progress.rate
        factor = calibrator.factor(rate, self.param_groups, step)
        closure = calibrator.without_spikes(rate, self.param_groups, closure)
        loss = step_scaled(take, closure, self.param_groups, factor)
        progress = self._progress
        progress.step = step
        progress.rate = calibrator.after_step(progress.rate, self.param_groups, step, factor)
        if calibrator.is_due(progress.rate):
            stage = calibrator.iterates.stage()
            record = self._run_stage(stage, calibrator.iterates.steps)
            del stage
            self._report(record)
        return loss

    def _real_step(
        self,
        closure: Callable[..., Any] | None,
        arguments: tuple[Any, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        if closure is not None or arguments:
            arguments = (closure, *arguments)
        return self.optimizer.step(*arguments, **(options or {}))

    def _run_stage(self, stage: Stage, since: int, final: bool = False) -> StageRecord | None:
        """Run a stage ``since`` steps after the last one, and record it.

        Returns:
            The record; None if the steps moved nothing, as with a rate of zero or a wrapper that
            accumulates gradients. The stage then runs later.
        """
        try:
            return self._whole_stage(stage, since, final)
        except BaseException:
            if self._calibrator is not None:  # start a new window
                self._calibrator.iterates.restart(forget=False)
            raise

    def _whole_stage(self, stage: Stage, since: int, final: bool) -> StageRecord | None:
        progress, calibrator = self._progress, self._calibrator
        stage.wait()  # so that pending steps do not count as the stage's time
        start = time.perf_counter()
        ranks = Ranks(self.process_group, progress.step)
        with torch.autograd.profiler.record_function("FastForward.stage"), ranks.together():
            moved = stage.set_anchor() or final
            own = () if calibrator is None else calibrator.iterates.products(ranks.size)
            moved, products = ranks.begin(moved, self._val_fn, own)
            if not moved:
                if calibrator is not None:
                    progress.rate = calibrator.not_moved(progress.rate)
                return None
            progress.last_stage = progress.step
            found = self._search(stage, ranks, products, final)
        if calibrator is None:
            useful, limits = found.tau != 0, (self.interval, self.max_interval)
            progress.set_interval(next_interval(self._interval_now(), useful, *limits))
        progress.last_tau = found.tau
        record = StageRecord(
            step=progress.step,
            tau=found.tau,
            trials=tuple(Trial(tau, float(loss)) for tau, loss in found.trials),
            loss_before=float(found.before),
            loss_after=float(found.after),
            seconds=time.perf_counter() - start,
            steps=1 if calibrator is None else since,
            mean_loss=None if found.mean_loss is None else float(found.mean_loss),
            averaged=found.averaged,
            lr_scale=self.lr_scale,
            kind=found.kind,
            decision=found.decision,
            error=found.error,
            elsewhere=found.elsewhere,
        )
        self.history._append(record)
        return record

    def _search(
        self, stage: Stage, ranks: Ranks, products: Sequence[float], final: bool
    ) -> Outcome:
        """Search and commit; roll back to the anchor if anything is raised."""
        progress, sharded = self._progress, list(filter(is_sharded, self._tracked()))
        calibrator = self._calibrator

        def val_fn(reference: Rows | None = None) -> Loss:
            self._gathered.drop(sharded)
            return ranks.measure(self._val_fn, reference)

        # A calibration compares the same rows at all checks, if the rows are known.
        keeps = calibrator is not None and self._val_fn.gives_rows
        has_others = not self._val_fn.same_examples
        if keeps and self._val_fn.state_dict() is None:  # it could not return to these rows
            has_others = False
        others = self._other_examples if has_others else None
        try:
            with stage.rolled_back_on_error():
                if not keeps or progress.rate.phase == Phase.PROBE:
                    self._val_fn.new_stage()
                with self._val_fn.measuring(), ranks.share(self._val_fn):
                    if calibrator is None:
                        line_search = ranks.line_search(self.line_search)
                        found = _judged(*stage.search(val_fn, line_search, progress.last_tau))
                    elif final:
                        groups = self.param_groups
                        found = calibrator.finish(progress.rate, stage, val_fn, groups, others)
                    else:
                        found, progress.rate = calibrator.run(
                            *(progress.rate, stage, val_fn, progress.step, products),
                            momentum=_momentum(self.param_groups[0]),
                            others=others,
                        )
                        if keeps and found.kind == "probe":
                            self._val_fn.new_stage()  # the probe has chosen on its rows
                ranks.end(found.tau)
                return found
        finally:
            self._gathered.drop(sharded)

    @contextmanager
    def _other_examples(self) -> Iterator[Callable[[], None]]:
        """Context that yields a function to move on to examples other than the stage's."""
        place = deepcopy(self._val_fn.state_dict())
        try:
            yield self._val_fn.new_stage
        finally:
            if place is not None:
                self._val_fn.load_state_dict(place)

    def _report(self, record: StageRecord | None) -> StageRecord | None:
        if record is None:
            self.history._reason = self._notices.idle(self._tracked(), self.param_groups)
            return None
        self._notices.time(record.seconds, record.step)
        if self.on_stage is not None:
            self.on_stage(record)
        self._notices.stage(self.history, self._val_fn.same_examples)
        return record

    def finish(self) -> StageRecord | None:
        """End a calibrated run: leave the weights at the best point. Call it after the last step.

        This point is the last iterate, or the mean of the recent iterates if it is clearly better,
        as it is at a rate that has not decayed, or the best mean that a check has measured, if the
        run has become worse since. It costs one to three passes over the examples of a stage, and
        up to sixteen more if the loss is suspect.

        Returns:
            The stage's record. None if there is nothing to do: the learning rate is not calibrated
            or was left alone, or no step has been taken since the probe or since tensors were
            frozen.
        """
        if self._calibrator is None:
            return None
        iterates = self._calibrator.iterates
        iterates.open(self._tracked())  # starts afresh if tensors have been frozen since
        if not iterates.unfinished:
            return None
        return self._report(self._run_stage(iterates.stage(), max(iterates.steps, 1), final=True))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the weights are the mean of the recent iterates, to evaluate or save.

        The mean covers about the last tenth of the steps so far. It removes the noise of a rate
        that has not decayed yet, much as a decay would. On exit, the weights are restored bit for
        bit. Before the first step after the probe there is no mean, and nothing changes. It costs
        one copy of the tracked tensors.

        Raises:
            RuntimeError: the learning rate is not calibrated, so no mean is kept.

        Examples:
            >>> with optimizer.averaged():
            ...     evaluate(model)
        """
        if self._calibrator is None:
            raise RuntimeError(
                "there is no mean of the iterates: it is kept with calibrate_lr=True only; see "
                "torch.optim.swa_utils.AveragedModel for other runs"
            )
        iterates = self._calibrator.iterates
        iterates.open(self._tracked())
        sharded = list(filter(is_sharded, self._tracked()))
        self._gathered.drop(sharded)
        with iterates.averaged():
            yield
            self._gathered.drop(sharded)

    @property
    def _progress(self) -> Progress:
        # Fetched at each step: load_state_dict replaces the group.
        return Progress(self.param_groups[0])

    def _add_progress(self) -> None:
        rate = None if self._calibrator is None else self._calibrator.begin()
        self._progress.add_missing(rate, self.interval)

    def _interval_now(self) -> int:
        return self._progress.interval(self.interval, self.max_interval)

    def _tracked(self) -> list[Tensor]:
        """Return the tensors that a stage moves, from the current param groups."""
        params = self._params
        if params is None:
            params = [p for group in self.param_groups for p in group["params"]]
        return [p for p in params if p.requires_grad]

    def _groups(self) -> list[list[Tensor]]:
        return grouped(self._tracked())

    # Hooks registered on the wrapper run here; those of the wrapped optimizer run in its own
    # methods.

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state dict, with the history under ``"fast_forward"``.

        ``torch.load(weights_only=True)`` can read it, and the wrapped optimizer alone can load it
        too.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict: dict[str, Any] = dict(self.optimizer.state_dict())
        state_dict[KEY] = self._saved_state()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def _saved_state(self) -> dict[str, Any]:
        calibrator = self._calibrator
        return SavedState(
            history=self.history,
            iterates=None
            if calibrator is None
            else calibrator.iterates.state_dict(self._tracked()),
            val_fn=self._val_fn.state_dict(),
            optimizer=type(self.optimizer).__name__,
            shapes=shapes_of(self.param_groups),
            gradient_norms=None if calibrator is None else calibrator.spikes.state_dict(),
        ).to_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state dict of this class, or of the wrapped optimizer alone.

        Without the ``"fast_forward"`` part the history starts empty. Without the numbers in the
        first param group, which distributed checkpointing keeps, the step count starts at zero too.

        Raises:
            ValueError: the state dict is damaged, of another model or optimizer, or of a newer
                version. Nothing has been changed then, except tensors that another library's
                optimizer copied into.
        """
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"state_dict must be a dict, got {type(state_dict).__name__}")
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        with self._loading(state_dict) as saved:
            state_dict.pop(KEY, None)
            load_wrapped(self.optimizer, state_dict, saved.optimizer)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    @contextmanager
    def _loading(self, state_dict: Mapping[str, Any]) -> Iterator[SavedState]:
        """Context to load the wrapped optimizer in; it loads our part too, all or nothing."""
        saved = SavedState.from_state_dict(state_dict)
        check_shapes(saved.shapes, self.optimizer)
        calibrator = self._calibrator
        if calibrator is not None:
            iterates = Iterates(calibrator.law.horizon_of_mean)
            if saved.iterates is not None:
                iterates = Iterates.from_state_dict(
                    iterates.horizon, saved.iterates, self._tracked()
                )
            spikes = GradientSpikes.from_state_dict(calibrator.law, saved.gradient_norms)
        with all_or_nothing(self, self._val_fn):
            # This comes first, because another library's optimizer may copy into its existing
            # tensors.
            if saved.val_fn is not None:
                self._val_fn.load_state_dict(saved.val_fn)
            yield saved
            self._add_progress()
            if calibrator is not None:
                calibrator.iterates, calibrator.spikes = iterates, spikes
            self.history = saved.history
            self.history._reason = f"it has taken {self._progress.step} steps, as loaded"
            self._watch.stop()


def _judged(tau: float, trials: tuple[Trial, ...]) -> Outcome:
    """Describe the result of a line search as an outcome."""
    losses = dict(trials)
    before = losses.get(0.0, math.nan)
    # NaN compares false with everything.
    best = min(losses, key=lambda at: (not math.isfinite(losses[at]), losses[at]), default=0.0)
    shown = losses.get(tau if tau else best, before)
    if tau:
        decision = "taken"
    else:
        decision = "lower, but not clearly" if losses.get(best, before) < before else "not lower"
    after = losses.get(tau, math.nan)
    return Outcome("stage", decision, tau, trials, before, after, error=error_of(shown))


def _momentum(group: Mapping[str, Any]) -> float:
    """Return the weight of the past in an optimizer's steps; 0.0 if unknown."""
    betas = group.get("betas")
    value = betas[0] if isinstance(betas, tuple | list) and betas else group.get("momentum")
    number = number_of(value)
    return min(max(float(number), 0.0), 0.99) if is_finite(number) else 0.0
