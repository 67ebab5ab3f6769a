"""Count the floating-point operations (FLOPs) of a forward and of a training step.

A multiply-add counts as two.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def forward_flops(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Count the FLOPs of one forward with fvcore, as the paper does, including attention.

    Args:
        model: a model whose output has ``logits``. Its loss is not counted.
        batch: arguments of its forward. Only the shapes matter; ``labels`` are ignored.
    """
    with warnings.catch_warnings():
        # fvcore imports the tracer of torch.jit, which is deprecated.
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis

        names = [name for name in batch if name != "labels"]
        analysis = FlopCountAnalysis(_Logits(model, names), tuple(batch[name] for name in names))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_multiply_adds)
        with torch.no_grad():
            return 2 * int(analysis.total())


def step_flops(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Count the FLOPs of one forward and backward as they run, without the parameter update.

    With LoRA the result is close to two forwards, because frozen weights need no gradients; full
    fine-tuning takes three. The ``grad`` of the parameters does not change.

    Args:
        model: a model whose output has a ``loss``.
        batch: arguments of its forward, with ``labels``.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    # The counter does not know every fused attention kernel: use plain matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model(**batch).loss
        torch.autograd.grad(loss, trainable, allow_unused=True)
    return int(counter.get_total_flops())


class _Logits(nn.Module):
    """Wraps a model for tracing: positional arguments, one tensor as output."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *values: Tensor) -> Tensor:
        arguments = dict(zip(self.names, values, strict=True))
        logits: Tensor = self.model(**arguments, use_cache=False).logits
        return logits


def _attention_multiply_adds(inputs: list[Any], outputs: list[Any]) -> int:
    """Multiply-adds of softmax(q k^T) v, with q (..., L, E), k (..., S, E) and v (..., S, F)."""
    query, key, value = (node.type().sizes() for node in inputs[:3])
    *batch, length, width = query
    return int(math.prod(batch) * length * key[-2] * (width + value[-1]))
