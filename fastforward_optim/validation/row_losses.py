"""Compute the loss of each row of a batch from the output of the forward that gave its mean loss.

A model returns the mean loss of a batch. The losses of the rows follow from the logits if the loss
is of a kind that one of the rules below computes. The model's own loss shows which rule applies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..stage.sharded import is_sharded
from .batches import IGNORED

# For each row, the sum of the losses of its labels and their number; both of shape (rows,).
Sums = tuple[Tensor, Tensor]

# A rule returns None if it does not apply to the shapes of output and labels.
_Rule = Callable[[Any, Tensor], Sums | None]

# Number of logits whose log-probabilities are held at a time: 128 MiB in float32.
_AT_ONCE = 2**25

# Allowed relative difference between the mean over the rows and the model's own loss. Both come
# from the same logits, so in float32 only the order of summation differs (1e-6 over 10^5 labels),
# and any other kind of loss differs by more. Rounding the mean to bfloat16 changes it by up to
# 2^-9 = 0.2 %, and summing it in 16 bits by a few times that.
_TOLERANCE = 1e-4
_TOLERANCE_OF_HALF = 1e-2
_HALF = (torch.float16, torch.bfloat16)


class RowLosses:
    """Computes the losses of a batch's rows, by the rule that reproduces the model's own loss.

    The first batch with a finite loss and a label that counts decides the rule. If no rule agrees
    with the loss (label smoothing, auxiliary losses, a custom loss), or the output has no logits,
    the losses of rows are unknown from then on.

    Cost: the log-probabilities of the labels are computed once more. They take 128 MiB at a time,
    or as much as the logits of one row in float32. Only the batch that decides the rule
    synchronises with the device.

    Args:
        shifts: whether the model predicts each label from the ones before it, as causal language
            models do; None if unknown.

    Attributes:
        is_decided: True once a rule has been chosen, or found not to exist.
        is_sum: True if the loss is the sum over the labels, not their mean.
    """

    def __init__(self, shifts: bool | None) -> None:
        excluded = {True: _own_labels, False: _next_labels, None: None}[shifts]
        self._rules = [rule for rule in _RULES if rule is not excluded]
        self.is_decided = self.is_sum = False

    def __call__(self, loss: Any, output: Any, labels: Any) -> Sums | None:
        """Return each row's sum of losses and number of labels, or None if unknown.

        Args:
            loss: mean or sum of the batch's losses, one number, as the model computed it.
            output: output of the same forward.
            labels: labels of the batch.
        """
        if not self.is_decided:
            self._decide(loss, output, labels)
        if not (self.is_decided and self._rules and isinstance(labels, Tensor)):
            return None
        return self._rules[0](output, labels)

    def _decide(self, loss: Any, output: Any, labels: Any) -> None:
        """Keep only the rule that agrees with the loss, if there is one."""
        if not isinstance(labels, Tensor):
            self._rules, self.is_decided = [], True
            return
        value = float(loss)
        if not math.isfinite(value):
            return
        results = [(rule, rule(output, labels)) for rule in self._rules]
        means = [(rule, _mean_and_sum(*sums)) for rule, sums in results if sums is not None]
        if means and all(pair is None for _, pair in means):
            return
        half = isinstance(loss, Tensor) and loss.dtype in _HALF
        tolerance = _TOLERANCE_OF_HALF if half else _TOLERANCE
        for place in (0, 1):  # compare the means first, then the sums
            close = [
                (abs(pair[place] - value), rule)
                for rule, pair in means
                if pair and math.isclose(pair[place], value, rel_tol=tolerance, abs_tol=1e-6)
            ]
            if close:
                break
        # For an untrained model several rules may be close; the right one is closest.
        self._rules = [min(close, key=lambda pair: pair[0])[1]] if close else []
        self.is_decided, self.is_sum = True, bool(close and place)


def _mean_and_sum(sums: Tensor, counts: Tensor) -> tuple[float, float] | None:
    """Return the mean loss per label and the sum, or None if there are no labels."""
    total, whole = int(counts.sum()), math.fsum(sums.tolist())
    return (whole / total, whole) if total else None


def _next_labels(output: Any, labels: Tensor) -> Sums | None:
    """Rule: each token's logits predict the next label, as in causal language models."""
    logits = _logits(output, 3)
    if logits is None or not _is_index(labels) or logits.shape[:2] != labels.shape:
        return None
    return _cross_entropies(logits, F.pad(labels[:, 1:], (0, 1), value=IGNORED))


def _next_labels_after_virtual_tokens(output: Any, labels: Tensor) -> Sums | None:
    """Rule: as ``_next_labels``, with unlabelled tokens at the start, as in prompt tuning."""
    logits = _logits(output, 3)
    if logits is None or not _is_index(labels) or labels.dim() != 2 or len(labels) != len(logits):
        return None
    virtual = logits.shape[1] - labels.shape[1]
    if virtual < 1:
        return None
    return _cross_entropies(logits, F.pad(labels, (virtual - 1, 1), value=IGNORED))


def _own_labels(output: Any, labels: Tensor) -> Sums | None:
    """Rule: each token's logits predict its own label."""
    logits = _logits(output, 3)
    if logits is None or not _is_index(labels) or logits.shape[:2] != labels.shape:
        return None
    return _cross_entropies(logits, labels)


def _classes(output: Any, labels: Tensor) -> Sums | None:
    """Rule: one class for each row."""
    logits = _logits(output, 2)
    if logits is None or not _is_index(labels) or labels.numel() != len(logits):
        return None
    return _cross_entropies(logits[:, None], labels.reshape(-1, 1))


def _log_probabilities(output: Any, labels: Tensor) -> Sums | None:
    """Rule: the output has log-probabilities of the labels and no logits, as in TRL's trainers.

    They are zero where a label does not count.
    """
    log_p, counted = _tensor(output, "log_probs"), _tensor(output, "label_mask")
    if log_p is None or counted is None or log_p.dim() != 2:
        return None
    if log_p.shape != counted.shape or log_p.shape[:1] != labels.shape[:1]:
        return None
    return -log_p.sum(1, dtype=_wide(log_p)), counted.sum(1)


def _squared_errors(output: Any, labels: Tensor) -> Sums | None:
    """Rule: regression, in which every number of a row counts."""
    return _of_numbers(output, labels, F.mse_loss)


def _binary_cross_entropies(output: Any, labels: Tensor) -> Sums | None:
    """Rule: several classes for each row, each true or false."""
    return _of_numbers(output, labels, F.binary_cross_entropy_with_logits)


_RULES: tuple[_Rule, ...] = (
    _next_labels,
    _next_labels_after_virtual_tokens,
    _own_labels,
    _classes,
    _log_probabilities,
    _squared_errors,
    _binary_cross_entropies,
)


def _of_numbers(output: Any, labels: Tensor, function: Callable[..., Tensor]) -> Sums | None:
    logits = _tensor(output, "logits")
    if logits is None or not labels.is_floating_point() or labels.dim() == 0:
        return None
    if logits.shape[:1] != labels.shape[:1] or logits.numel() != labels.numel():
        return None
    rows, dtype = len(labels), _wide(logits)
    first = logits.reshape(rows, -1).to(dtype)
    second = labels.reshape(rows, -1).to(logits.device, dtype)
    sums = function(first, second, reduction="none").sum(1)
    return sums, torch.full_like(sums, first.shape[1])


def _cross_entropies(logits: Tensor, labels: Tensor) -> Sums:
    """Return each row's sum of cross-entropies and number of labels.

    Args:
        logits: of shape (rows, length, classes).
        labels: of shape (rows, length).
    """
    labels = labels.to(logits.device)
    counted = labels != IGNORED
    # Clamp: an index out of range may give a wrong loss, but not an error that leaves the GPU
    # unusable.
    indices = labels.clamp(0, logits.shape[2] - 1)[..., None]
    at_once = max(1, _AT_ONCE // max(1, logits.shape[1] * logits.shape[2]))
    losses = []
    for first in range(0, max(1, len(logits)), at_once):
        rows = slice(first, first + at_once)
        # On a GPU this is one kernel, without a float32 copy of the logits.
        log_p = F.log_softmax(logits[rows], dim=-1, dtype=_wide(logits))
        losses.append(-log_p.gather(-1, indices[rows])[..., 0])
    return torch.cat(losses).masked_fill(~counted, 0.0).sum(1), counted.sum(1)


def _tensor(output: Any, name: str) -> Tensor | None:
    """Return a tensor of the output, or None if it is missing or sharded."""
    value = getattr(output, name, None)
    return value if isinstance(value, Tensor) and not is_sharded(value) else None


def _logits(output: Any, dimensions: int) -> Tensor | None:
    logits = _tensor(output, "logits")
    return logits if logits is not None and logits.dim() == dimensions else None


def _is_index(labels: Tensor) -> bool:
    return not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in _HALF else tensor.dtype
