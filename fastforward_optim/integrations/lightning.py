"""Fast Forward for the Lightning ``Trainer``; the ``LightningModule`` needs no change.

Wraps the optimizer that ``configure_optimizers`` returns, and reports stages to the loggers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Unpack

from torch import Tensor

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DeepSpeedStrategy
except ImportError as error:
    raise ImportError(
        f"fastforward_optim.integrations.lightning needs lightning ({error}): run "
        "`pip install 'fastforward-optim[lightning]'`"
    ) from error

from ..arguments import check_callable
from ..optimizer import FastForward, Options
from ..record import StageRecord
from .lightning_loss import Forward, ModuleLoss
from .shared import NO_DEEPSPEED, check_options, examples_to_read, metrics

logger = logging.getLogger(__name__)


class FastForwardCallback(Callback):
    """Fast Forward for a Lightning ``Trainer``: wraps the optimizer of ``configure_optimizers``.

    The ``LightningModule`` needs no change. The validation loss is the training loss: the callback
    calls ``training_step`` in eval mode and without gradients, on batches that are not trained on,
    and undoes what the call logs, counts or collects. Checkpoints hold the state of Fast Forward,
    and ``trainer.fit(..., ckpt_path=...)`` continues bit for bit. Each stage is logged to the
    trainer's loggers as ``fast_forward/tau``, ``fast_forward/trials``, ``fast_forward/loss``,
    ``fast_forward/lr_scale`` and ``fast_forward/learning_rate`` (the highest rate in effect), at
    the step at which Lightning logs the training loss of that batch. Lightning counts steps from 0,
    the history from 1.

    For several optimizers, or for other options of ``FastForward``, return a ``FastForward`` from
    ``configure_optimizers`` instead, and leave the callback out.

    Cost: see ``FastForward``. The validation batches are kept on the module's device.

    Args:
        val_data_or_fn: batches that you neither train nor report on, as ``training_step`` takes
            them, in a ``DataLoader`` or a list; or a function without arguments that returns the
            loss. Default: the first batches of the trainer's validation loader; do not report on
            them then.
        interval: number of real steps from one stage to the next.
        num_examples: how many examples a stage measures, rounded up to whole batches. A stage
            takes the first examples of the data. With ``calibrate_lr`` the probe measures these,
            and the later checks measure as many others. No further examples are read.
        forward: measures a batch instead of ``training_step``: ``forward(module, batch)`` returns
            the mean loss, or a pair of the mean loss and the number of labels it averages over.
            Without that number batches are weighted by their rows, as ``self.log`` does. A third
            value may give the losses of the rows, as for ``ValidationLoss``; without it losses are
            compared batch by batch. Required with manual optimization, since ``training_step``
            takes optimizer steps there.
        **options: ``calibrate_lr``, ``total_steps``, ``max_interval``, ``line_search``, ``warmup``
            and ``on_stage``, as for ``FastForward``. ``total_steps`` defaults to the trainer's
            ``estimated_stepping_batches``. With ``calibrate_lr`` the last stage (``finish``) runs
            at the last step, before the trainer validates and saves it. If something else stops
            the training (``EarlyStopping``, ``max_time``), it runs after the last checkpoint.

    Attributes:
        optimizer: the ``FastForward`` of the latest ``fit``, with its history; None before the
            first ``fit`` begins.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a value that cannot work. Also raised when ``fit`` begins, if
            there is nothing to validate on, if ``configure_optimizers`` returned several optimizers
            or a ``FastForward``, or if the strategy is DeepSpeed.

    Examples:
        >>> fast_forward = FastForwardCallback(val_loader, calibrate_lr=True)
        >>> trainer = Trainer(max_steps=1000, callbacks=[fast_forward])
        >>> trainer.fit(module, train_loader)
        >>> print(fast_forward.optimizer.history)

        In language models not all labels count, so return the number that does:

        >>> def forward(module, batch):
        ...     return module.model(**batch).loss, (batch["labels"][:, 1:] != -100).sum()
        >>> FastForwardCallback(val_loader, forward=forward)
    """

    optimizer: FastForward | None

    def __init__(
        self,
        val_data_or_fn: Iterable[Any] | Callable[[], Any] | None = None,
        interval: int = 6,
        *,
        num_examples: int = 32,
        forward: Forward | None = None,
        **options: Unpack[Options],
    ) -> None:
        if isinstance(val_data_or_fn, (str, bytes, Mapping, Tensor)) or not (
            val_data_or_fn is None
            or callable(val_data_or_fn)
            or isinstance(val_data_or_fn, Iterable)
        ):
            raise TypeError(
                "val_data_or_fn must be a DataLoader, a list of batches, a function without "
                f"arguments or None, got {type(val_data_or_fn).__name__}"
            )
        if forward is not None:
            check_callable("forward", forward, "a function of (module, batch), or None")
            if callable(val_data_or_fn):
                raise ValueError(
                    "forward measures batches, but val_data_or_fn is a function that measures by "
                    "itself; pass one of the two"
                )
        self.val_data_or_fn = val_data_or_fn
        self.options: dict[str, Any] = {"interval": interval, **options}
        self.forward = forward
        check_options(num_examples, self.options)
        self.num_examples = num_examples
        self.optimizer = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise ``ValueError`` for a configuration that cannot work, before anything is set up."""
        if stage != "fit":
            return
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError(NO_DEEPSPEED)
        by_hand = not pl_module.automatic_optimization
        if by_hand and self.forward is None and not callable(self.val_data_or_fn):
            raise ValueError(
                f"{type(pl_module).__name__} optimizes manually, so that its training_step cannot "
                "be called to measure a loss: pass forward=function of (module, batch)"
            )
        if self.val_data_or_fn is None and not trainer.enable_validation:
            raise ValueError(
                "there is no validation in this fit: pass val_data_or_fn, batches that are not "
                "trained on"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap the optimizer, after it was made and before a checkpoint is loaded into it."""
        optimizers = trainer.optimizers
        if any(isinstance(optimizer, FastForward) for optimizer in optimizers):
            raise ValueError(
                "there is a FastForward already: leave it out of configure_optimizers, or leave "
                "the callback (or all callbacks but one) out"
            )
        if len(optimizers) > 1:
            raise ValueError(
                f"configure_optimizers returned {len(optimizers)} optimizers: wrap the ones that "
                "you mean there, FastForward(optimizer, val_fn), and leave the callback out"
            )
        on_stage = self.options.get("on_stage")

        def report(record: StageRecord) -> None:
            assert self.optimizer is not None
            _log(trainer, record, self.optimizer)
            if on_stage is not None:
                on_stage(record)

        val_fn = self._val_fn(trainer, pl_module)
        options = {**self.options, "on_stage": report}
        if options.get("total_steps") is None:
            options["total_steps"] = _total_steps(trainer)
        self.optimizer = FastForward(optimizers[0], val_fn, **options)
        # Schedulers keep the wrapped optimizer; its param groups are the same objects.
        trainer.optimizers = [self.optimizer]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Run the last stage of a calibrated run, before its last step is validated."""
        if _is_last(trainer, batch_idx):
            self._finish()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the last stage of a calibrated run that was stopped early."""
        self._finish()

    def _finish(self) -> None:
        if self.optimizer is not None:
            self.optimizer.finish()

    def _val_fn(self, trainer: Trainer, module: LightningModule) -> Callable[[], Any]:
        data = self.val_data_or_fn
        if callable(data):
            return data
        calibrated = bool(self.options.get("calibrate_lr"))
        if data is None:
            data = _validation_loader(trainer)
            logger.warning(
                "Fast Forward chooses by the first %d examples of the validation loader: do not "
                "report on them, or give it others (val_data_or_fn)",
                examples_to_read(self.num_examples, calibrated),
            )
        return ModuleLoss(trainer, module, data, self.num_examples, calibrated, self.forward)


def _validation_loader(trainer: Trainer) -> Any:
    trainer.fit_loop.epoch_loop.val_loop.setup_data()  # the sanity check would do this next
    loader = trainer.val_dataloaders
    if isinstance(loader, (list, tuple)) and len(loader) == 1:
        return loader[0]
    if isinstance(loader, (list, tuple, Mapping)):
        raise ValueError(
            "there are several validation loaders: pass val_data_or_fn, batches that are not "
            "trained on"
        )
    return loader


def _is_last(trainer: Trainer, batch_idx: int) -> bool:
    """Return True if ``max_steps`` or ``max_epochs`` ends the training with this batch."""
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    epochs = trainer.max_epochs
    return (
        epochs is not None
        and epochs != -1
        and trainer.current_epoch + 1 >= epochs
        and (trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches)
    )


def _total_steps(trainer: Trainer) -> int | None:
    """Return the number of optimizer steps of the fit, or None if unknown."""
    steps = trainer.estimated_stepping_batches
    return int(steps) if 0 < steps < math.inf else None


def _log(trainer: Trainer, record: StageRecord, optimizer: FastForward) -> None:
    # self.log would skip stages between multiples of log_every_n_steps. Log at the step that it
    # would use; Lightning's own callbacks read it from here too.
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for each in trainer.loggers:
        each.log_metrics(metrics(record, optimizer), step=step)
