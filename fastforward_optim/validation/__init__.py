"""Validation: the interface of a ``val_fn``, and ``ValidationLoss`` for a model and batches.

Knows models, batches and the loss of each row. Of ``stage/`` it uses only the test for sharded
tensors. Knows no optimizers and no ranks.
"""

from ..search.evidence import Measurement, Rows
from .base import ValidationFunction
from .loss import ValidationLoss

__all__ = ["Measurement", "Rows", "ValidationFunction", "ValidationLoss"]
