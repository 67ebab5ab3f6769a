"""Fast Forward in the transformers ``Trainer``, and in those built on it, such as TRL's.

Wraps the optimizer that the ``Trainer`` makes, and reports stages to its loggers.
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
    """Fast Forward for a ``Trainer``: wraps the optimizer that the trainer builds.

    ``attach`` adds the callback to a trainer. The trainer prepares the validation examples as it
    prepares its ``eval_dataset``, and the loss is what its ``evaluate`` reports for them (in TRL's
    ``DPOTrainer`` that of DPO), without side effects in the trainer. Its checkpoints hold what Fast
    Forward needs, and ``resume_from_checkpoint`` continues bit for bit. Each stage is logged to
    ``trainer.state.log_history``, W&B, TensorBoard and other reporters as ``fast_forward/tau``,
    ``fast_forward/trials``, ``fast_forward/loss``, ``fast_forward/lr_scale`` and
    ``fast_forward/learning_rate``, the highest rate that is really used.

    Args:
        val_data_or_fn: examples that are neither trained nor reported on: a dataset, a list or
            anything to iterate over, of what ``trainer.evaluate`` takes (in TRL raw or tokenized);
            ``attach`` reads as many as may be measured, once. Several data sets in a dict, which
            ``evaluate`` takes too, are measured in equal parts. Or a function without arguments
            that returns the loss; needed where the trainer's own is no measure of progress, see
            ``attach``. Default: the first examples of the trainer's ``eval_dataset``, or of each
            one; then do not report on these.
        interval: real steps from one stage to the next.
        num_examples: how many examples a trial measures. Default: enough for about 1,000 labels,
            at least 8 and at most 32, and otherwise no more than a step trains on. They are the
            first of the data; with ``calibrate_lr`` the probe measures these, and the checks after
            it as many others.
        **options: ``calibrate_lr``, ``total_steps``, ``max_interval``, ``line_search``, ``warmup``
            and ``on_stage``, as ``FastForward`` takes them. ``total_steps`` and ``warmup`` are by
            default what the trainer knows. With ``calibrate_lr`` the last stage (``finish``) comes
            with the last step, before that is evaluated and saved.

    Attributes:
        optimizer: the ``FastForward``, from the begin of the training on; with it the history.

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
        """Add the callback to a trainer; before ``train()``.

        Returns:
            The callback itself.

        Raises:
            ValueError: the trainer has a ``FastForward`` already, DeepSpeed is to take the steps,
                there is nothing to validate on, the trainer cannot make batches of the examples, or
                its loss is no measure of progress (of what it generates, as in ``GRPOTrainer``; or
                weighted by the model itself, as with ``loss_type="dft"``): then ``val_data_or_fn``
                must be a function. When training begins also: there are no examples, or
                the trainer cannot compute its loss of them.
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
        """The trainer makes its optimizer just before it loads a checkpoint into it."""
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
        """Report on the stage that came with this step, if one did."""
        if state.global_step >= state.max_steps:
            self._finish()  # before this step is evaluated and saved
        self._report()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Run the last stage of a run that was stopped early, unless a better model was loaded."""
        if not args.load_best_model_at_end:
            self._finish()
        self._report()

    def _finish(self) -> None:
        if self.optimizer is not None:
            self.optimizer.finish()

    def _report(self) -> None:
        trainer = self._trainer
        due = trainer.control.should_log  # of the training loss, which our log would put off
        for record in self._unreported:
            assert self.optimizer is not None
            # Not the trainer's own: TRL's logs, and clears, what it has gathered for the next one.
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
    """The ``FastForward`` in an optimizer of accelerate's, or the one that it is."""
    while optimizer is not None and not isinstance(optimizer, FastForward):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer
