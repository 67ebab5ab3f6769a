"""The loss that a ``LightningModule`` trains with, as a ``val_fn``.

Knows the module's training step, and how to call it so that nobody notices.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from ..validation.loss import ValidationLoss
from .attributes import Attributes, own_objects
from .shared import wanted

Forward = Callable[[Any, Any], Any]


class _Held:
    """A batch as ``training_step`` takes it, of whatever type: nothing looks into it."""

    def __init__(self, index: int, batch: Any) -> None:
        self.index = index
        self.batch = batch
        self.rows = _rows(batch)


class ModuleLoss(ValidationLoss):
    """The loss that a ``LightningModule`` trains with, on batches that it does not train on.

    Args:
        trainer: whose precision, devices and batch hooks are used.
        module: whose ``training_step`` is called, unless there is a ``forward``.
        data: batches; the first of them are read, once.
        num_examples: that a stage measures, rounded up to whole batches.
        calibrated: whether the learning rate is calibrated: then the probe measures as many others.
        forward: see ``FastForwardCallback``.
    """

    _is_tried_at_once = False  # the trainer is not ready yet

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        data: Iterable[Any],
        num_examples: int,
        calibrated: bool,
        forward: Forward | None,
    ) -> None:
        with isolate_rng():  # a DataLoader draws from it, also where it does not shuffle
            batches, size = _first(trainer, module, data, num_examples, calibrated)
        if not batches:
            raise ValueError("val_data_or_fn is empty; give it at least one batch")
        self.trainer = trainer
        self.own = forward
        super().__init__(module, batches, batches_per_stage=size, forward=self._measure)

    def _measure(self, module: Any, held: _Held) -> tuple[Any, ...]:
        with self.trainer.precision_plugin.train_step_context(), _untouched(self.trainer, module):
            # training_step may take things out of its batch.
            batch = copy.copy(held.batch)
            if self.own is None:
                return _training_loss(module, batch, held.index), held.rows
            result = self.own(module, batch)
        return result if isinstance(result, tuple) else (result, held.rows)


def _training_loss(module: LightningModule, batch: Any, index: int) -> Any:
    """What ``training_step`` returns as the loss of a batch."""
    step = module.training_step
    names = list(inspect.signature(step).parameters)
    output = step(batch, index) if len(names) > 1 else step(batch)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"training_step of {type(module).__name__} returned no loss in eval mode, but "
            f"{type(output).__name__}; pass forward=function of (module, batch)"
        )
    return loss


def _first(
    trainer: Trainer, module: LightningModule, data: Any, num_examples: int, calibrated: bool
) -> tuple[list[_Held], int]:
    """The first batches, as the training step would get them, and how many of them a set has.

    A set has so many rows or more. A calibrated run has two, of fewer batches if need be.
    """
    batches: list[_Held] = []
    size = rows = 0
    for batch in data:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch)
        batch = trainer.strategy.batch_to_device(batch)
        batches.append(_Held(len(batches), batch))
        if not size:
            rows += batches[-1].rows
            size = len(batches) if rows >= num_examples else 0
        if size and len(batches) >= wanted(size, calibrated):
            break
    size = size or len(batches)
    if calibrated:
        size = min(size, max(1, len(batches) // 2))
    return batches[: len(batches) // max(size, 1) * size], size


def _rows(batch: Any) -> int:
    """First dimension of the first tensor in a batch; 1 where there is none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 1
    if isinstance(batch, Mapping):
        batch = batch.values()
    elif not isinstance(batch, (list, tuple)):
        return len(batch) if hasattr(batch, "__len__") and not isinstance(batch, str) else 1
    return next((_rows(item) for item in batch), 1)


@contextmanager
def _untouched(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Undo what a training step does besides computing a loss.

    Its logs go nowhere. Attributes of the module and of its metrics are put back, also where they
    were changed in place: numbers, tensors, buffers, lists and dicts, and objects of the module's
    own.
    """
    loggers = trainer.loggers
    owners = [
        each
        for each in module.modules()
        if isinstance(each, (LightningModule, Metric, MetricCollection))
    ]
    with isolate_rng(include_cuda=False):  # Python's and NumPy's
        kept = Attributes(owners, own_objects(module))
        try:
            for each in owners:
                if isinstance(each, LightningModule):
                    vars(each).update(log=_ignore, log_dict=_ignore)
            trainer.loggers = [DummyLogger() for _ in loggers]
            yield
        finally:
            trainer.loggers = loggers
            kept.put_back()


def _ignore(*args: Any, **kwargs: Any) -> None:
    """In the place of ``self.log``."""
