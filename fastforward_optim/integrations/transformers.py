"""Fast Forward in the transformers ``Trainer``, and in those built on it, such as TRL's.

Knows the ``Trainer``: its optimizer, data collator, loss and logs. What a stage does is in
``optimizer.py``; here it is only put in place and reported on.
"""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
except ImportError as error:
    raise ImportError(
        f"fastforward_optim.integrations.transformers needs transformers ({error}): run "
        "`pip install 'fastforward-optim[transformers]' accelerate`"
    ) from error

from ..batches import IGNORED
from ..calibration import Calibration
from ..history import StageRecord
from ..line_search import LineSearch
from ..optimizer import FastForward
from ..row_losses import RowLosses
from ..validation import ValidationLoss
from .shared import FEWEST, MOST, check_options, examples_for, figures, wanted

logger = logging.getLogger(__name__)

# What TRL's trainers gather in compute_loss for their next log; a stage must leave no trace there.
GATHERED = ("_metrics", "_stored_metrics", "_total_train_tokens")


class FastForwardCallback(TrainerCallback):
    """Fast Forward for a ``Trainer``, which builds its optimizer as ever: this wraps it.

    ``attach`` adds the callback to a trainer. Everything else is as the trainer has it: its
    collator makes the validation batches, its ``compute_loss`` measures them (so that in TRL's
    ``DPOTrainer`` the validation loss is DPO's), its checkpoints hold what Fast Forward needs, and
    ``resume_from_checkpoint`` goes on bit for bit. Each stage is in ``trainer.state.log_history``
    and goes to W&B, TensorBoard and whatever else reports, as ``fast_forward/tau``,
    ``fast_forward/trials``, ``fast_forward/loss``, ``fast_forward/lr_scale`` and
    ``fast_forward/learning_rate``, the highest rate that is really used.

    Args:
        val_data_or_fn: examples that are neither trained nor reported on: a dataset or a list, of
            what the trainer's collator takes (for ``SFTTrainer`` tokenized ones, as they are in
            ``trainer.eval_dataset``); or a function without arguments that returns the loss.
            Default: the first examples of the trainer's ``eval_dataset``; then do not report on
            these.
        interval: real steps from one stage to the next.
        num_examples: how many examples a trial measures. Default: enough for about 1,000 labels,
            at least 8 and at most 32, and otherwise no more than a step trains on. They are the
            first of the data; with ``calibrate_lr`` the probe measures these, and the checks after
            it as many others.
        calibrate_lr: see ``FastForward``; so the other options. The last stage (``finish``) comes
            with the last step, before that is evaluated and saved.
        total_steps: see ``FastForward``. Default: what the trainer knows, ``state.max_steps``.
        max_interval: see ``FastForward``.
        line_search: see ``FastForward``.
        warmup: see ``FastForward``. Default: that of the trainer's arguments.
        on_stage: see ``FastForward``.

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
        calibrate_lr: bool | Calibration = False,
        total_steps: int | None = None,
        max_interval: int | None = None,
        line_search: LineSearch | None = None,
        warmup: int | None = None,
        on_stage: Callable[[StageRecord], object] | None = None,
    ) -> None:
        if isinstance(val_data_or_fn, (str, bytes, Mapping)) or not (
            val_data_or_fn is None
            or callable(val_data_or_fn)
            or isinstance(val_data_or_fn, Iterable)
            or hasattr(val_data_or_fn, "__getitem__")
        ):
            raise TypeError(
                "val_data_or_fn must be a dataset, a list of examples, a function without "
                f"arguments or None, got {type(val_data_or_fn).__name__}"
            )
        self.val_data_or_fn = val_data_or_fn
        self.options: dict[str, Any] = {
            "interval": interval,
            "calibrate_lr": calibrate_lr,
            "total_steps": total_steps,
            "max_interval": max_interval,
            "line_search": line_search,
            "warmup": warmup,
        }
        self.on_stage = on_stage
        self.num_examples = check_options(num_examples, self.options)
        self.optimizer = None
        self._trainer: Any = None
        self._unreported: list[StageRecord] = []

    def attach(self, trainer: Trainer) -> FastForwardCallback:
        """Add the callback to a trainer; before ``train()``.

        Returns:
            The callback itself.

        Raises:
            ValueError: the trainer has a ``FastForward`` already, there is nothing to validate on,
                or DeepSpeed is to take the steps.
        """
        if self._trainer is not None:
            raise ValueError("this callback is attached already; make another one")
        if _wrapped_in(trainer.optimizer) is not None or any(
            isinstance(callback, FastForwardCallback) and callback is not self
            for callback in trainer.callback_handler.callbacks
        ):
            raise ValueError("the trainer has a FastForward already; attach one callback")
        if trainer.is_deepspeed_enabled:
            raise ValueError("DeepSpeed takes the steps in an engine of its own: not supported")
        if self.val_data_or_fn is None:
            _check_eval_dataset(trainer)
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
        if self.options["total_steps"] is None:
            optimizer.total_steps = state.max_steps
        if self.options["warmup"] is None and args.lr_scheduler_type != "constant":
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
            Trainer.log(trainer, figures(record, self.optimizer))
        trainer.control.should_log = due
        self._unreported.clear()

    def _wrap(self, optimizer: Optimizer) -> FastForward:
        def on_stage(record: StageRecord) -> None:
            self._unreported.append(record)
            if self.on_stage is not None:
                self.on_stage(record)

        options = {**self.options, "warmup": self.options["warmup"] or 0, "on_stage": on_stage}
        return FastForward(optimizer, self._val_fn(), **options)

    def _val_fn(self) -> Callable[[], Any]:
        data = self.val_data_or_fn
        if callable(data):
            return data
        if data is None:
            data = _check_eval_dataset(self._trainer)
        calibrated = bool(self.options["calibrate_lr"])
        loss = TrainerLoss(self._trainer, data, self.num_examples, calibrated)
        if self.val_data_or_fn is None:
            logger.warning(
                "Fast Forward chooses by the first %d examples of eval_dataset: do not report on "
                "them, or give it others (val_data_or_fn)",
                loss.num_examples,
            )
        return loss


class TrainerLoss(ValidationLoss):
    """A trainer's own loss on validation examples, made into batches by its own collator.

    The losses of the rows are those of the model's last forward in ``compute_loss``, if they add up
    to what it returns; otherwise, as with label smoothing or in ``DPOTrainer``, batches are the
    units.

    Args:
        trainer: whose ``compute_loss`` and collator are used.
        data: examples; the first of them are taken.
        num_examples: that a trial measures; None to follow their number of labels.
        calibrated: whether the learning rate is calibrated: then the probe measures as many others.

    Attributes:
        num_examples: all that are measured.
    """

    _is_tried_at_once = False  # the trainer is not ready yet

    def __init__(self, trainer: Any, data: Any, num_examples: int | None, calibrated: bool) -> None:
        self.trainer = trainer
        self.shifts = _is_causal(trainer.model)
        self.row_losses = RowLosses(self.shifts)
        examples = _first(data, wanted(num_examples or MOST, calibrated))
        if not examples:
            raise ValueError("val_data_or_fn is empty; give it at least one example")
        collate = trainer.get_eval_dataloader(examples).collate_fn
        if num_examples is None:
            args = trainer.args
            rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            some = examples[:FEWEST]
            num_examples = examples_for(rows, float(self._weight(collate(some))) / len(some))
            examples = examples[: wanted(num_examples, calibrated)]
        whole = len(examples) // num_examples * num_examples
        examples = examples[: whole or None]  # only whole sets, or the one that there is
        self.num_examples = len(examples)
        size = trainer.args.eval_batch_size
        sets = [examples[at : at + num_examples] for at in range(0, len(examples), num_examples)]
        batches = [
            collate(part[at : at + size]) for part in sets for at in range(0, len(part), size)
        ]
        super().__init__(
            trainer.model,
            batches,
            batches_per_stage=len(batches) // len(sets),
            forward=self._compute_loss,
        )

    def _compute_loss(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Any, ...]:
        trainer = self.trainer
        # compute_loss may take labels out of its inputs, and put options in.
        with (
            trainer.compute_loss_context_manager(),
            _untouched(trainer),
            _last_output(model) as outputs,
        ):
            loss = trainer.compute_loss(model, dict(batch))
            output = outputs.pop() if outputs else None
            rows = self.row_losses(loss, output, batch.get("labels"))
        return loss, self._weight(batch), rows

    def _weight(self, batch: Mapping[str, Any]) -> Any:
        """How many labels the batch's loss is the mean of; its rows where there are none."""
        labels = batch.get("labels")
        if isinstance(labels, torch.Tensor):
            labels = labels[:, 1:] if self.shifts and labels.dim() > 1 else labels
            return (labels != IGNORED).sum()
        return next(len(value) for value in batch.values() if isinstance(value, torch.Tensor))


def _first(data: Any, count: int) -> list[Any]:
    """The first examples of a dataset of either kind."""
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return [data[index] for index in range(min(count, len(data)))]
    return list(islice(iter(data), count))


def _check_eval_dataset(trainer: Any) -> Any:
    data = trainer.eval_dataset
    if data is None or isinstance(data, Mapping):
        got = "has no eval_dataset" if data is None else "has several eval_datasets"
        raise ValueError(
            f"the trainer {got}: pass val_data_or_fn, examples that are not trained on"
        )
    return data


def _wrapped_in(optimizer: Any) -> FastForward | None:
    """The ``FastForward`` in an optimizer of accelerate's, or the one that it is."""
    while optimizer is not None and not isinstance(optimizer, FastForward):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def _is_causal(model: Any) -> bool:
    """Whether a model shifts its labels, so that the first of a row does not count."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


@contextmanager
def _last_output(model: nn.Module) -> Iterator[deque[Any]]:
    """While it lasts, the output of the last forward of the model.

    ``compute_loss(..., return_outputs=True)`` would give it too, but not all trainers take that,
    and those of TRL make a second forward for it.
    """
    outputs: deque[Any] = deque(maxlen=1)
    hook = model.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()


@contextmanager
def _untouched(trainer: Any) -> Iterator[None]:
    """Put back what ``compute_loss`` gathers for the trainer's logs."""
    kept = {
        name: copy.deepcopy(getattr(trainer, name)) for name in GATHERED if hasattr(trainer, name)
    }
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(trainer, name, value)
