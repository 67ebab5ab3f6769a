"""The training loss of a ``LightningModule``, as a ``val_fn``.

Knows how to call the module's training step without side effects.
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
from .shared import examples_to_read

Forward = Callable[[Any, Any], Any]


class _Batch:
    """A batch of any type, as ``training_step`` takes it. ``ValidationLoss`` does not look in."""

    def __init__(self, index: int, batch: Any) -> None:
        self.index = index
        self.batch = batch
        self.rows = _rows(batch)


class ModuleLoss(ValidationLoss):
    """The training loss of a ``LightningModule``, on batches that it does not train on.

    Args:
        trainer: the trainer; its precision, devices and batch hooks are used.
        module: the module; its ``training_step`` is called unless there is a ``forward``.
        data: the batches; the first of them are read, once.
        num_examples: number of examples that a stage measures, rounded up to whole batches.
        calibrated: whether the learning rate is calibrated. If so, the probe has examples of its
            own, and the checks measure as many others.
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
        with isolate_rng():  # a DataLoader draws a random number even if it does not shuffle
            batches, size = _first(trainer, module, data, num_examples, calibrated)
        if not batches:
            raise ValueError("val_data_or_fn is empty; give it at least one batch")
        self.trainer = trainer
        self.own = forward
        super().__init__(module, batches, batches_per_stage=size, forward=self._measure)

    def _measure(self, module: Any, held: _Batch) -> tuple[Any, ...]:
        with (
            self.trainer.precision_plugin.train_step_context(),
            _without_side_effects(self.trainer, module),
        ):
            # training_step may remove items from its batch.
            batch = copy.copy(held.batch)
            if self.own is None:
                return _training_loss(module, batch, held.index), held.rows
            result = self.own(module, batch)
        return result if isinstance(result, tuple) else (result, held.rows)


def _training_loss(module: LightningModule, batch: Any, index: int) -> Any:
    """Call ``training_step`` and return its loss. Raise ``TypeError`` if it returns none."""
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
) -> tuple[list[_Batch], int]:
    """Read the first batches, prepared as for the training step.

    Returns:
        The batches of all sets, and the number of batches in a set. A set has at least
        ``num_examples`` rows. A calibrated run needs two sets; if there is too little data for
        that, each set has fewer batches.
    """
    batches: list[_Batch] = []
    size = rows = 0
    for batch in data:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch)
        batch = trainer.strategy.batch_to_device(batch)
        batches.append(_Batch(len(batches), batch))
        if not size:
            rows += batches[-1].rows
            size = len(batches) if rows >= num_examples else 0
        if size and len(batches) >= examples_to_read(size, calibrated):
            break
    size = size or len(batches)
    if calibrated:
        size = min(size, max(1, len(batches) // 2))
    return batches[: len(batches) // max(size, 1) * size], size


def _rows(batch: Any) -> int:
    """Return the first dimension of the first tensor in a batch, or 1 if it has no tensor."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 1
    if isinstance(batch, Mapping):
        batch = batch.values()
    elif not isinstance(batch, (list, tuple)):
        return len(batch) if hasattr(batch, "__len__") and not isinstance(batch, str) else 1
    return next((_rows(item) for item in batch), 1)


@contextmanager
def _without_side_effects(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Undo the side effects of a training step.

    Its logs are discarded. Attributes of the module and of its metrics are restored, even those
    changed in place: numbers, tensors, buffers, lists and dicts, and the module's own objects.
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
    """Replace ``self.log`` and ``self.log_dict``, and do nothing."""
