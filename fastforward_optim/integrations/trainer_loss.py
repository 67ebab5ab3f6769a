"""The loss that a ``Trainer``'s ``evaluate`` reports, as a ``val_fn``.

Knows how ``evaluate`` computes its loss, and how to compute it without side effects.
"""

from __future__ import annotations

import inspect
import math
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..random_state import randomness_kept
from ..search.evidence import Measurement
from ..validation.batches import IGNORED, device_of, to_device
from ..validation.loss import ValidationLoss
from ..validation.row_losses import RowLosses
from .attributes import Attributes, replaced
from .shared import FEWEST, MOST, examples_for, examples_to_read
from .trainer_data import Examples, attributes_of, batches_of, first, ignore
from .trainer_kinds import no_generation


class TrainerLoss(ValidationLoss):
    """The loss that a trainer's ``evaluate`` reports for the examples.

    The trainer's ``prediction_step`` measures each batch, and the mean weights each batch by its
    number of examples, so the result equals ``trainer.evaluate(examples)["eval_loss"]``. The
    trainer's attributes, state and logs are restored after each measurement.

    The losses of the rows come from the model's last forward in ``prediction_step``, if they agree
    with the loss that it returns. Otherwise, as with label smoothing or in ``DPOTrainer``, losses
    are compared batch by batch.

    Args:
        trainer: the trainer; its loss, data preparation, collator and loader are used.
        data: examples as ``trainer.evaluate`` takes them, or prepared examples; the first ones are
            used. If it is a dict of several data sets, the same number is used of each.
        num_examples: number of examples that a trial measures; None to choose it by the number of
            labels per example.
        calibrated: whether the learning rate is calibrated. If so, the probe has examples of its
            own, and the checks measure as many others.

    Attributes:
        num_examples: total number of examples in use.

    Raises:
        ValueError: there are no examples, or the trainer cannot make batches of them.
    """

    _is_tried_at_once = False  # the trainer is not ready yet

    def __init__(self, trainer: Any, data: Any, num_examples: int | None, calibrated: bool) -> None:
        self.trainer = trainer
        self.shifts = _is_causal(trainer.model)
        self.row_losses = RowLosses(self.shifts)
        self._kept: Attributes | None = None  # the trainer's attributes, during a measurement
        self._reports = _reports(trainer)
        if not isinstance(data, list) or not all(isinstance(part, Examples) for part in data):
            data = examples_of(trainer, data, num_examples, calibrated)
        if not data or not all(map(len, data)):
            raise ValueError("val_data_or_fn is empty; give it at least one example")
        with randomness_kept(trainer.args.device):
            each = [self._sets(part.rows, num_examples, calibrated, len(data)) for part in data]
            sets = list(zip(*each, strict=False))  # the smallest data set decides how many
            parts = [
                [counted for examples in one for counted in self._counted(examples)] for one in sets
            ]
        size = min(map(len, parts))
        batches = [batch for part in parts for batch, _ in part[:size]]
        counts = [count for part in parts for _, count in part[:size]]
        self.num_examples = sum(len(examples) for one in sets for examples in one)
        self._examples = sets[0][0]  # examples of the first stage
        super().__init__(
            trainer.model, batches, batches_per_stage=size, forward=self._measure_as_evaluate
        )
        self._weights = [
            count if self._labels(batch) != 0 else 0
            for count, batch in zip(counts, self.batches, strict=True)
        ]

    def _counted(self, examples: Any) -> list[tuple[Any, int]]:
        """Return the batches of the examples, each with its number of examples."""
        most, rows = self.trainer.args.eval_batch_size, len(examples)
        return [
            (batch, max(min(most, rows - place * most), 1))
            for place, batch in enumerate(batches_of(self.trainer, examples))
        ]

    def _sets(
        self, examples: Any, num_examples: int | None, calibrated: bool, share: int
    ) -> list[Any]:
        """Split the examples of one of ``share`` data sets into the sets that trials measure.

        All sets are complete, unless there are too few examples even for the first one.
        """
        trainer = self.trainer
        if num_examples is None:
            args, some = trainer.args, first(examples, FEWEST)
            rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            counts = [self._labels(batch) for batch in batches_of(trainer, some)]
            labels = sum(count for count in counts if count is not None) / len(some)
            num_examples = -(-examples_for(rows, labels) // share)
            if calibrated:  # prefer two smaller sets to one
                num_examples = min(num_examples, max(1, len(examples) // 2))
        else:
            num_examples = -(-num_examples // share)
        examples = first(examples, examples_to_read(num_examples, calibrated))
        starts = range(0, max(len(examples) - num_examples, 0) + 1, num_examples)
        return [first(examples, num_examples, start) for start in starts]

    def _labels(self, batch: Any) -> int | None:
        """Return the number of labels in a batch that count, or None if there are no labels."""
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, torch.Tensor):
            return None
        labels = labels[:, 1:] if self.shifts and labels.dim() > 1 else labels
        return int((labels != IGNORED).sum())

    def check(self) -> bool:
        """Measure one batch before training begins, so that errors appear early.

        Raises:
            ValueError: the trainer's loss cannot be measured on the examples, is computed on
                generated completions, or is a sum over batches of different sizes.
        """
        if self._tried:
            return True
        self._tried, trainer = True, self.trainer
        with (
            randomness_kept(trainer.args.device),
            no_generation(trainer),
            torch.no_grad(),
            self.measuring(),
        ):
            try:
                self._measure_batch(0, True, device_of(self.model))
                self._check_that_batches_can_be_added()
            except (LookupError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{type(trainer).__name__} cannot compute its loss of the examples in "
                    f"val_data_or_fn ({type(error).__name__}: {error}): pass what "
                    "trainer.evaluate(...) takes, or a function without arguments that returns "
                    "the loss"
                ) from error
        self.row_losses = RowLosses(self.shifts)  # the first real measurement decides the rule
        return True

    def _check_that_batches_can_be_added(self) -> None:
        """Raise ``ValueError`` if the loss is a sum and the batches differ in size.

        ``evaluate`` averages such sums as if they were means.
        """
        weights = [weight for weight in (self._weights or [])[: self.batches_per_stage] if weight]
        if len(set(weights)) < 2 or weights[0] < 2:
            return
        whole, middle = weights[0], weights[0] // 2
        parts = [
            first(self._examples, whole),
            first(self._examples, middle),
            first(self._examples, whole - middle, middle),
        ]
        batches = [batch for part in parts for batch in batches_of(self.trainer, part)]
        loss, *halves = (
            float(self._evaluate(self.model, to_device(batch, device_of(self.model))))
            for batch in batches
        )
        if loss and math.isclose(loss, sum(halves), rel_tol=1e-4):
            raise ValueError(
                f"the loss of {type(self.trainer).__name__} is a sum over the batch, and the sums "
                f"of batches of {whole} and {weights[-1]} examples cannot be averaged: return the "
                "mean, or make num_examples a multiple of per_device_eval_batch_size"
            )

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Keep the model in eval mode inside this context, and restore the trainer on exit."""
        if self._mode is not None:
            yield
            return
        trainer = self.trainer
        with (
            # If ranks share the batches, each counts only the labels of its own batches.
            replaced(trainer.args, average_tokens_across_devices=False),
            replaced(trainer, log=ignore),
        ):
            self._kept = attributes_of(trainer)
            try:
                with super().measuring():
                    yield
            finally:
                self._kept.put_back()
                self._kept = None

    def measure(self) -> Measurement:
        """Measure as :meth:`ValidationLoss.measure` does, and restore the trainer afterwards."""
        with self.measuring():
            with randomness_kept(device_of(self.model)):
                measurement = super().measure()
            if self._kept is not None:
                self._kept.put_back()
        return measurement

    def _measure_as_evaluate(self, model: nn.Module, batch: Any) -> tuple[Any, ...]:
        with _last_output(model) as outputs:
            loss = self._evaluate(model, batch)
            output = outputs.pop() if outputs else None
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        return loss, 1, self.row_losses(loss, output, labels)  # the constructor sets the weights

    def _evaluate(self, model: nn.Module, batch: Any) -> Any:
        """Return the loss of a batch in ``evaluate``, or in training if ``evaluate`` has none."""
        trainer = self.trainer
        if self._reports:
            # With prediction_loss_only, Liger's kernels would skip the logits, from which the
            # losses of the rows are computed.
            alone = not (trainer.args.use_liger_kernel and _steps_as_trainer(trainer))
            loss = trainer.prediction_step(model, _copied(batch), prediction_loss_only=alone)[0]
            if loss is not None:
                return loss.mean()
            self._reports = False
        inputs, options = _copied(batch), {}
        if _takes(trainer.compute_loss, "num_items_in_batch"):
            counted = trainer._get_num_items_in_batch([inputs], trainer.args.device)
            options["num_items_in_batch"] = counted
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(model, inputs, **options)


def examples_of(
    trainer: Any, data: Any, num_examples: int | None, calibrated: bool
) -> list[Examples]:
    """Read and prepare the examples of each data set, as many as may be measured.

    Raises:
        ValueError: the trainer cannot prepare the examples.
    """
    count = examples_to_read(num_examples or MOST, calibrated)
    own = data is trainer.eval_dataset
    several: Mapping[Any, Any] = data if isinstance(data, Mapping) else {None: data}
    return [
        Examples(trainer, part, count, name=name, is_prepared=own) for name, part in several.items()
    ]


def _copied(batch: Any) -> Any:
    """Return a copy of a batch, in which the trainer may add and remove items."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def _steps_as_trainer(trainer: Any) -> bool:
    return type(trainer).prediction_step is Trainer.prediction_step


def _reports(trainer: Any) -> bool:
    """Return True if ``evaluate`` can work.

    ``Trainer.prediction_step`` needs a ``compute_loss`` that takes ``return_outputs``; training
    does not.
    """
    return not _steps_as_trainer(trainer) or _takes(trainer.compute_loss, "return_outputs")


def _takes(function: Any, name: str) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == name or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _is_causal(model: Any) -> bool:
    """Return True if the model shifts its labels, so that the first of each row does not count."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


@contextmanager
def _last_output(model: nn.Module) -> Iterator[deque[Any]]:
    """Yield a deque that holds the output of the model's last forward.

    ``compute_loss(..., return_outputs=True)`` would return it too, but not all trainers support
    that, and TRL's run a second forward for it.
    """
    outputs: deque[Any] = deque(maxlen=1)
    hook = model.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()
