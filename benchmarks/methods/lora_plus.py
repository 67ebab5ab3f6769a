"""LoRA+, from PEFT."""

from __future__ import annotations

from torch.optim import AdamW, Optimizer

from ..comparison.comparison import Comparison
from .adamw import scheduled
from .trainer import Result, Trainer


def loraplus(comparison: Comparison, result: Result) -> Trainer:
    """Train with PEFT's LoRA+: AdamW with a higher rate for the matrices B."""
    from peft.optimizers import create_loraplus_optimizer

    optimizer: Optimizer = create_loraplus_optimizer(
        comparison.model,
        AdamW,
        lr=result.lr,
        loraplus_lr_ratio=16,
        fused=comparison.device.type == "cuda",
    )
    return scheduled(Trainer(optimizer), comparison, result)
