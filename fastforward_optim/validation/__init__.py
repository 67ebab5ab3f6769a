"""Measuring: what a ``val_fn`` is, and the one made from a model and batches.

Knows models, batches and the loss of each row; from ``stage/`` how to keep the random state and
to tell a sharded tensor. Knows no optimizers and no ranks.
"""

from ..search.evidence import Measurement, Rows
from .base import ValidationFunction
from .loss import ValidationLoss

__all__ = ["Measurement", "Rows", "ValidationFunction", "ValidationLoss"]
