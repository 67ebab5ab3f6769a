"""Prodigy, from the package prodigyopt."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO

from ..comparison.comparison import Comparison
from .adamw import scheduled
from .trainer import Result, Trainer


def prodigy(comparison: Comparison, result: Result) -> Trainer:
    """Train with Prodigy, with the options that its README recommends."""
    from prodigyopt import Prodigy

    with redirect_stdout(StringIO()):  # it prints its weight decay
        optimizer = Prodigy(
            comparison.parameters,
            lr=result.lr,
            use_bias_correction=True,
            safeguard_warmup=True,
            weight_decay=0.01,
        )
    return scheduled(Trainer(optimizer), comparison, result)
