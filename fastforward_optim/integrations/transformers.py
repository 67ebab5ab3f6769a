"""Fast Forward for the transformers ``Trainer`` and the trainers built on it, such as TRL's.

Wraps the optimizer that the ``Trainer`` creates, and reports stages to its loggers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Unpack

from torch.optim import Optimizer

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
except ImportError as error:
    raise ImportError(
        f"fastforward_optim.integrations.transformers needs transformers ({error}): run "
        "`pip install 'fastforward-optim[transformers]' accelerate`"
    ) from error

from ..optimizer import FastForward, Options
from ..record import StageRecord
from .shared import NO_DEEPSPEED, check_options, metrics
from .trainer_data import Examples
from .trainer_kinds import check_trainer
from .trainer_loss import TrainerLoss, examples_of

__all__ = ["FastForwardCallback", "TrainerLoss"]

logger = logging.getLogger(__name__)


class FastForwardCallback(TrainerCallback):
    """Fast Forward for a ``Trainer``: wraps the optimizer that the trainer creates.

    ``attach`` adds the callback to a trainer. The trainer prepares the validation examples as it
    prepares its ``eval_dataset``. The loss is the one that its ``evaluate`` reports for them (the
    DPO loss in TRL's ``DPOTrainer``), measured without side effects in the trainer. Checkpoints
    hold the state of Fast Forward, and ``resume_from_checkpoint`` continues bit for bit. Each stage
    is logged to ``trainer.state.log_history``, W&B, TensorBoard and other reporters as
    ``fast_forward/tau``, ``fast_forward/trials``, ``fast_forward/loss``, ``fast_forward/lr_scale``
    and ``fast_forward/learning_rate`` (the highest rate in effect).

    Args:
        val_data_or_fn: examples that you neither train nor report on, as ``trainer.evaluate`` takes
            them (raw or tokenized in TRL): a dataset, a list or another iterable. ``attach`` reads
            the examples it needs, once. Several data sets in a dict, which ``evaluate`` also
            takes, are measured in equal parts. Or a function without arguments that returns the
            loss; required if the trainer's own loss does not measure progress, see ``attach``.
            Default: the first examples of the trainer's ``eval_dataset``, or of each of them if
            there are several; do not report on these examples then.
        interval: number of real steps from one stage to the next.
        num_examples: how many examples a trial measures. Default: enough for about 1,000 labels,
            at least 8 and at most 32, and otherwise no more than a step trains on. A trial takes
            the first examples of the data. With ``calibrate_lr`` the probe measures these, and the
            later checks measure as many others.
        **options: ``calibrate_lr``, ``total_steps``, ``max_interval``, ``line_search``, ``warmup``
            and ``on_stage``, as for ``FastForward``. ``total_steps`` and ``warmup`` default to the
            trainer's own values. With ``calibrate_lr`` the last stage (``finish``) runs at the last
            step, before the trainer evaluates and saves it.

    Attributes:
        optimizer: the ``FastForward``, with its history; None before training begins.

    Examples:
        >>> trainer = Trainer(model, args, train_dataset=train, eval_dataset=test)
        >>> FastForwardCallback(validation, calibrate_lr=True).attach(trainer)
        >>> trainer.train()
    """

    optimizer: FastForward | None

    def __init__(
        self,
        val_data_or_fn: Iterable[Any] | Callable[[], Any] | None = None,
        interval: int = 6,
        *,
        num_examples: int | None = None,
        **options: Unpack[Options],
    ) -> None:
        if isinstance(val_data_or_fn, (str, bytes)) or not (
            val_data_or_fn is None
            or callable(val_data_or_fn)
            or isinstance(val_data_or_fn, Iterable)
            or hasattr(val_data_or_fn, "__getitem__")
        ):
            raise TypeError(
                "val_data_or_fn must be a dataset, a list of examples, a dict of these by the name "
                "of the data set, a function without arguments or None, got "
                f"{type(val_data_or_fn).__name__}"
            )
        self.val_data_or_fn = val_data_or_fn
        self.options: dict[str, Any] = {"interval": interval, **options}
        self.num_examples = check_options(num_examples, self.options)
        self.optimizer = None
        self._trainer: Any = None
        self._examples: list[Examples] | None = None
        self._unreported: list[StageRecord] = []

    def attach(self, trainer: Trainer) -> FastForwardCallback:
        """Add the callback to a trainer. Call this before ``train()``.

        Returns:
            The callback itself.

        Raises:
            ValueError: the trainer already has a ``FastForward`` or uses DeepSpeed, there is
                nothing to validate on, or the trainer cannot make batches of the examples. Also if
                its loss does not measure progress: a loss on generated completions (as in
                ``GRPOTrainer``), or one that the model itself weights (as with
                ``loss_type="dft"``); ``val_data_or_fn`` must be a function then. Also raised when
                training begins, if there are no examples or the trainer cannot compute its loss on
                them.
        """
        if self._trainer is not None:
            raise ValueError("this callback is attached already; make another one")
        if _wrapped_in(trainer.optimizer) is not None or any(
            isinstance(callback, FastForwardCallback) and callback is not self
            for callback in trainer.callback_handler.callbacks
        ):
            raise ValueError("the trainer has a FastForward already; attach one callback")
        if trainer.is_deepspeed_enabled:
            raise ValueError(NO_DEEPSPEED)
        data = self.val_data_or_fn
        if not callable(data):
            check_trainer(trainer)
        if data is None:
            _check_eval_dataset(trainer)
        elif not callable(data):
            calibrated = bool(self.options.get("calibrate_lr"))
            self._examples = examples_of(trainer, data, self.num_examples, calibrated)
        self._trainer = trainer
        self._wrap_when_created(trainer)
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    def _wrap_when_created(self, trainer: Any) -> None:
        """Wrap the optimizer when the trainer creates it, just before it loads a checkpoint."""
        create = trainer.create_optimizer

        def create_optimizer(*args: Any, **kwargs: Any) -> Any:
            create(*args, **kwargs)
            self.optimizer = _wrapped_in(trainer.optimizer)
            if self.optimizer is None:
                self.optimizer = trainer.optimizer = self._wrap(trainer.optimizer)
            return trainer.optimizer

        trainer.create_optimizer = create_optimizer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that the callback has been attached."""
        if self._trainer is None:
            raise RuntimeError(
                "FastForwardCallback is not attached: instead of passing it in callbacks=, call "
                "FastForwardCallback(...).attach(trainer)"
            )
        optimizer = self.optimizer
        if optimizer is None:
            return
        if isinstance(optimizer.val_fn, TrainerLoss):
            optimizer.val_fn.check()
        if self.options.get("total_steps") is None:
            optimizer.total_steps = state.max_steps
        if self.options.get("warmup") is None and args.lr_scheduler_type != "constant":
            optimizer.warmup = args.get_warmup_steps(state.max_steps)

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report the stage that ran after this step, if any."""
        if state.global_step >= state.max_steps:
            self._finish()  # before this step is evaluated and saved
        self._report()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Run the last stage of a run that was stopped early, unless the best model was loaded."""
        if not args.load_best_model_at_end:
            self._finish()
        self._report()

    def _finish(self) -> None:
        if self.optimizer is not None:
            self.optimizer.finish()

    def _report(self) -> None:
        trainer = self._trainer
        due = trainer.control.should_log  # Trainer.log resets it: the training loss would be late
        for record in self._unreported:
            assert self.optimizer is not None
            # The log method of TRL's trainers would also log, and clear, the metrics that they
            # collect for their next log.
            Trainer.log(trainer, metrics(record, self.optimizer))
        trainer.control.should_log = due
        self._unreported.clear()

    def _wrap(self, optimizer: Optimizer) -> FastForward:
        def on_stage(record: StageRecord) -> None:
            self._unreported.append(record)
            if self.options.get("on_stage") is not None:
                self.options["on_stage"](record)

        warmup = self.options.get("warmup") or 0
        options = {**self.options, "warmup": warmup, "on_stage": on_stage}
        return FastForward(optimizer, self._val_fn(), **options)

    def _val_fn(self) -> Callable[[], Any]:
        if callable(self.val_data_or_fn):
            return self.val_data_or_fn
        data: Any = self._examples
        if data is None:
            data = _check_eval_dataset(self._trainer)
        calibrated = bool(self.options.get("calibrate_lr"))
        loss = TrainerLoss(self._trainer, data, self.num_examples, calibrated)
        if self.val_data_or_fn is None:
            logger.warning(
                "Fast Forward chooses by the first %d examples of eval_dataset: do not report on "
                "them, or give it others (val_data_or_fn)",
                loss.num_examples,
            )
        return loss


def _check_eval_dataset(trainer: Any) -> Any:
    if trainer.eval_dataset is None:
        raise ValueError(
            "the trainer has no eval_dataset: pass val_data_or_fn, examples that are not trained on"
        )
    return trainer.eval_dataset


def _wrapped_in(optimizer: Any) -> FastForward | None:
    """Return the ``FastForward`` that ``optimizer`` is or wraps (as accelerate's does), or None."""
    while optimizer is not None and not isinstance(optimizer, FastForward):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer
