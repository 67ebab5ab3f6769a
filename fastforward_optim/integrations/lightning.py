"""Fast Forward in the Lightning ``Trainer``, without a change to the ``LightningModule``.

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
    """Fast Forward for a Lightning ``Trainer``: wraps what ``configure_optimizers`` returned.

    The ``LightningModule`` stays as it is. The validation loss is the one that it trains with, of
    its ``training_step`` in eval mode and without gradients, on batches that it does not train on;
    what such a call logs, counts or gathers is undone. Checkpoints hold what Fast Forward needs,
    and ``trainer.fit(..., ckpt_path=...)`` goes on bit for bit. Each stage goes to the trainer's
    loggers as ``fast_forward/tau``, ``fast_forward/trials``, ``fast_forward/loss``,
    ``fast_forward/lr_scale`` and ``fast_forward/learning_rate`` (the highest that is really used),
    at the step at which Lightning logs the training loss of its batch (Lightning counts from 0, the
    history from 1).

    For several optimizers, or other options of ``FastForward``, return a ``FastForward`` from
    ``configure_optimizers`` instead; it needs no callback.

    Cost: see ``FastForward``. The validation batches are kept on the module's device.

    Args:
        val_data_or_fn: batches that are neither trained nor reported on: a ``DataLoader`` or a
            list, of what ``training_step`` takes; or a function without arguments that returns the
            loss. Default: the first batches of the trainer's validation loader; then do not report
            on these.
        interval: real steps from one stage to the next.
        num_examples: how many examples a stage measures, rounded up to whole batches. They are the
            first of the data; with ``calibrate_lr`` the probe measures these and the checks after
            it as many others. No more than these are read.
        forward: measures a batch instead of ``training_step``: ``forward(module, batch)`` returns
            the mean loss, or a pair of that and the number of labels that it is the mean of.
            Without that number batches are weighted by their rows, as ``self.log`` does. The losses
            of the rows may be the third value, as for ``ValidationLoss``; without them batches are
            the units. Needed with manual optimization, whose ``training_step`` takes steps of its
            own.
        **options: ``calibrate_lr``, ``total_steps``, ``max_interval``, ``line_search``, ``warmup``
            and ``on_stage``, as ``FastForward`` takes them. ``total_steps`` is by default what the
            trainer knows (``estimated_stepping_batches``). With ``calibrate_lr`` the last stage
            (``finish``) comes with the last step, before that is validated and saved; where
            something else stops the training (``EarlyStopping``, ``max_time``) after its last
            checkpoint.

    Attributes:
        optimizer: the ``FastForward`` of the last ``fit``, from its begin on; with it the history.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a value that cannot work. When ``fit`` begins also: there is
            nothing to validate on, ``configure_optimizers`` returned several optimizers or a
            ``FastForward``, or the strategy is DeepSpeed.

    Examples:
        >>> fast_forward = FastForwardCallback(val_loader, calibrate_lr=True)
        >>> trainer = Trainer(max_steps=1000, callbacks=[fast_forward])
        >>> trainer.fit(module, train_loader)
        >>> print(fast_forward.optimizer.history)

        Language models, whose labels do not all count, need their own weights:

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
        """Refuse what cannot work, before anything is set up."""
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
        """Wrap the optimizer: it has been made, and a checkpoint is about to be loaded into it."""
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
        # A scheduler keeps the wrapped optimizer, of which the param groups are the same ones.
        trainer.optimizers = [self.optimizer]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Run the last stage of a calibrated training, before its last step is validated."""
        if _is_last(trainer, batch_idx):
            self._finish()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the last stage of a calibrated training that was stopped early."""
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
    trainer.fit_loop.epoch_loop.val_loop.setup_data()  # as the sanity check would do it next
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
    """Whether this batch ends the training, as far as that is set beforehand."""
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
    """Number of optimizer steps of the fit; None if unknown."""
    steps = trainer.estimated_stepping_batches
    return int(steps) if 0 < steps < math.inf else None


def _log(trainer: Trainer, record: StageRecord, optimizer: FastForward) -> None:
    # Not self.log, which keeps to log_every_n_steps; the step is the one that it would log at, as
    # Lightning's own callbacks find it.
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for each in trainer.loggers:
        each.log_metrics(metrics(record, optimizer), step=step)
